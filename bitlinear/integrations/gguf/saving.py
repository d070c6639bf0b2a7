"""``save``: a deployed model of transformers as a GGUF file for llama.cpp."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from ... import foreign, packing
from ...groups import repeat_scales
from ...linear import BitLinear
from ...messages import list_names
from .architectures import (
    ARCHITECTURES,
    Architecture,
    check_model,
    file_name,
    file_order,
    part_of,
    settings,
)
from .codecs import BLOCK, encode_tq2_0
from .ternary import factor_name

_FLOAT_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class _Entry(NamedTuple):
    """A tensor of the file.

    Attributes:
        name: Its name in the file.
        type: The name of its type.
        shape: In the order of torch.
        make: Computes the bytes of its values.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a deployed model of transformers as a GGUF file, without rounding.

    Deployed layers become TQ2_0. A scale for the tensor that is not a number in fp16 goes into a
    ``.scale`` tensor in F32, where llama.cpp reads it; other scales must be numbers in fp16, and
    groups must have a multiple of 256 weights. Norms and biases become F32, other parameters keep
    their dtype. :func:`load` gives back the same weights and scales, except that the scale of a row
    of zeros means nothing.

    The file has no tokenizer (``tokenizer.ggml.model`` is ``no_vocab``): llama.cpp's own converter
    writes one. It does not say ``eps`` and the bits of activations, which :func:`load` takes as
    arguments. llama.cpp quantises activations in blocks, so its outputs differ by that. BitNet
    files need a llama.cpp that reads ``bitnet.hidden_activation``.

    Args:
        model: A model for causal language modelling of the type ``llama``, ``qwen2``, ``qwen3`` or
            ``bitnet``.
        path: The file. It is written under a temporary name beside it and then renamed.

    Raises:
        TypeError: ``model`` is not a model of transformers.
        ValueError: The model cannot be written exactly, or llama.cpp cannot compute it. The message
            has every reason; no file is written.
        OSError: The file cannot be written.
    """
    check_model(model, "save", "save its state_dict instead")
    config: Any = model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ValueError(
            f"models of type {config.model_type!r} cannot be saved as GGUF: only those of the "
            f"types {sorted({a.model_type for a in ARCHITECTURES.values()})}"
        )
    tensors, problems = _tensors(model)
    problems = _why_not_computable(config, architecture) + problems
    entries: list[_Entry] = []
    names_by_reason: dict[str, list[str]] = {}
    for name, tensor, owner in tensors:
        try:
            entries += _entries(name, tensor, owner, architecture, config)
        except ValueError as error:
            subject, _, reason = str(error).partition(": ")
            names_by_reason.setdefault(reason, []).append(subject)
    problems += [f"{list_names(names)}: {reason}" for reason, names in names_by_reason.items()]
    if not any(entry.type == "TQ2_0" for entry in entries) and not problems:
        problems.append("it has no deployed layer: call bitlinear.deploy(model) first")
    if config.model_type == "bitnet" and any(e.name == "output.weight" for e in entries):
        problems.append("lm_head is not tied to the embedding, as llama.cpp has it for bitnet")
    if problems:
        raise ValueError("the model cannot be saved as GGUF:\n  " + "\n  ".join(problems))
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the path of a file")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _write(temporary, config, entries)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _why_not_computable(config: Any, architecture: Architecture) -> list[str]:
    """What llama.cpp does not compute as transformers does."""
    problems = []
    if config.hidden_act not in architecture.activations:
        problems.append(
            f"hidden_act is {config.hidden_act!r}, but llama.cpp computes "
            f"{' or '.join(architecture.activations)}"
        )
    if config.rope_parameters["rope_type"] != "default":
        problems.append(
            f"rope_parameters are {config.rope_parameters}: only the default type is supported by "
            f"this version"
        )
    if getattr(config, "sliding_window", None) is not None:
        problems.append(f"sliding_window is {config.sliding_window}: it is not supported")
    return problems


def _tensors(model: nn.Module) -> tuple[list[tuple[str, Tensor, nn.Module]], list[str]]:
    """All weights and biases with their names and owners, and what a file cannot hold.

    A deployed layer counts as its packed weight. A head that is tied to the embedding is left out.
    """
    found: list[tuple[str, Tensor, nn.Module]] = []
    problems = []
    # The class of quantize_head; its integration may not be importable here.
    if any(type(module).__name__ == "Int8Table" for module in model.modules()):
        raise ValueError(
            "the head of this model has int8 weights, which a GGUF file of this package cannot "
            "hold: save the model before quantize_head"
        )
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    for prefix, module in model.named_modules(remove_duplicate=False):
        transient = module._non_persistent_buffers_set
        own = {**module._parameters, **module._buffers}
        own = {key: t for key, t in own.items() if t is not None and key not in transient}
        if not own:
            continue
        if isinstance(module, BitLinear) and module.is_deployed:
            own["weight"] = own.pop("w_packed")
            del own["w_scale"]
        if not _is_known(module) or own.keys() - {"weight", "bias"}:
            problems.append(
                f"{prefix} is of the class {type(module).__name__}, with {', '.join(own)}, which a "
                f"file cannot hold: save the state_dict of the model instead"
            )
            continue
        if prefix == "lm_head" and own["weight"] is embedding:
            continue
        found += [(f"{prefix}.{key}", t, module) for key, t in own.items()]
    return found, problems


def _is_known(module: nn.Module) -> bool:
    """Whether it computes what llama.cpp does with such tensors."""
    if isinstance(module, nn.Linear):
        return isinstance(module, BitLinear) or not foreign.why_not_linear(module)
    return type(module) is nn.Embedding or type(module).__name__.endswith("RMSNorm")


def _entries(
    name: str, tensor: Tensor, owner: nn.Module, architecture: Architecture, config: Any
) -> list[_Entry]:
    """The tensors of the file for one weight or bias.

    Raises:
        ValueError: It cannot be written exactly. The message is a name, a colon and the reason.
    """
    found = file_name(name)
    if found is None:
        raise ValueError(f"{name}: llama.cpp has no such tensor")
    if tensor.is_meta:
        raise ValueError(f"{name}: on the meta device, without values: load it first")
    order = file_order(architecture, found, config)
    if isinstance(owner, BitLinear) and name.endswith(".weight"):
        return _packed_entries(name, found, owner, architecture, order)
    if tensor.dtype not in _FLOAT_TYPES:
        raise ValueError(f"{name}: its dtype is {tensor.dtype}, but a file has F32, F16 and BF16")
    if name.endswith(".bias") and part_of(found) not in architecture.biases:
        raise ValueError(f"{name}: llama.cpp reads no such bias")

    def make() -> Tensor:
        values = tensor.detach().cpu()
        values = values.float() if values.dim() == 1 else values
        values = values if order is None else values[order]
        return values.contiguous().view(torch.uint8)

    kind = "F32" if tensor.dim() == 1 else _FLOAT_TYPES[tensor.dtype]
    return [_Entry(found, kind, tuple(tensor.shape), make)]


def _packed_entries(
    name: str, found: str, layer: BitLinear, architecture: Architecture, order: Tensor | None
) -> list[_Entry]:
    layer_name = name.rpartition(".")[0]
    if type(layer) is not BitLinear:
        raise ValueError(
            f"{layer_name}: its class {type(layer).__name__} is not known to llama.cpp: save the "
            f"state_dict of the model instead"
        )
    if not layer.is_deployed:
        raise ValueError(f"{layer_name}: not deployed: call bitlinear.deploy(model) first")
    if layer.in_features % BLOCK:
        raise ValueError(
            f"{layer_name}: in_features must be a multiple of {BLOCK} for TQ2_0, but it is "
            f"{layer.in_features}"
        )
    try:
        packing.check_packed(layer.w_packed, layer.in_features)
    except ValueError as error:
        raise ValueError(f"{layer_name}: {error}") from error
    w_scale = _block_scales(layer, layer_name)
    halves = w_scale.to(torch.float16)
    factors: list[_Entry] = []
    if not bool(((halves.float() == w_scale) & (halves > 0)).all()):
        if w_scale.numel() > 1:
            row, block = (((halves.float() != w_scale) | (halves <= 0)).nonzero()[0]).tolist()
            raise ValueError(
                f"{layer_name}: the scale of row {row}, {w_scale[row, block].item():.9g}, is not a "
                f"number in fp16, as TQ2_0 needs it where a tensor has several scales: save the "
                f"state_dict of the model instead"
            )
        if part_of(found) not in architecture.scaled:
            raise ValueError(
                f"{layer_name}: the scale {w_scale.item():.9g} is not a number in fp16, and "
                f"llama.cpp reads no scale beside TQ2_0 for this layer"
            )
        halves = torch.ones(1, dtype=torch.float16, device="cpu")
        factors = [_Entry(factor_name(found), "F32", (1,), lambda: w_scale.view(torch.uint8))]

    def make() -> Tensor:
        w_packed = layer.w_packed.detach().cpu()
        rows = halves
        if order is not None:
            w_packed = w_packed[order]
            rows = halves[order] if len(halves) > 1 else halves
        return encode_tq2_0(w_packed, layer.in_features, rows)

    shape = (layer.out_features, layer.in_features)
    return [_Entry(found, "TQ2_0", shape, make), *factors]


def _block_scales(layer: BitLinear, name: str) -> Tensor:
    """The scales of a layer; with groups, one for each block of TQ2_0.

    Raises:
        ValueError: A block has several scales.
    """
    w_scale, group_size = layer.w_scale.detach().cpu(), layer._group_size
    if group_size <= 0:
        return w_scale
    if group_size % BLOCK:
        raise ValueError(
            f"{name}: a scale for every {group_size} in_features, but TQ2_0 has one for every "
            f"{BLOCK}: save_pretrained keeps it"
        )
    return repeat_scales(w_scale, group_size // BLOCK, layer.in_features // BLOCK)


def _write(path: Path, config: Any, entries: list[_Entry]) -> None:
    name = config.model_type
    writer = gguf.GGUFWriter(path, name)
    try:
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_TQ2_0)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_tokenizer_model("no_vocab")
        adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        for key, value in settings(name, config).items():
            adders[type(value)](key, value)
        for entry in entries:
            kind = gguf.GGMLQuantizationType[entry.type]
            byte_shape = gguf.quant_shape_to_byte_shape(entry.shape, kind)
            size = int(np.prod(byte_shape))
            writer.add_tensor_info(entry.name, byte_shape, np.dtype(np.uint8), size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.make().numpy())
    finally:
        writer.close()
