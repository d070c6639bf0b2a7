"""``load``: a model of transformers filled from a GGUF file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from ...arguments import QuantType, check_act_bits, check_eps, group_size_of
from ...conversion.replacement import CALL_HOOKS, find_parents, set_child
from ...linear import BitLinear
from .architectures import DERIVED, check_config, file_name, file_order
from .reader import GgufFile, TensorInfo
from .ternary import (
    TernaryTensor,
    check_i2_s_layout,
    check_ternary,
    check_type,
    factor_name,
    read_factor,
    read_ternary,
)
from .types import FLOAT_TYPES, TERNARY_TYPES

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


class _Source(NamedTuple):
    """Where the values of a tensor of the model come from.

    Attributes:
        info: The tensor of the file.
        order: Its rows; see :func:`file_order`.
        factor: The factor of its values.
    """

    info: TensorInfo
    order: Tensor | None
    factor: float


def load(
    path: str | os.PathLike[str],
    model: _Model,
    *,
    i2_s_layout: str | None = None,
    act_bits: int = 8,
    eps: float = 1e-5,
) -> _Model:
    """Fill a model of transformers from a GGUF file, with deployed layers for ternary tensors.

    The linear layers whose tensors have the type TQ1_0, TQ2_0 or I2_S become deployed
    :class:`~bitlinear.BitLinear` layers, with the weights and scales of the file; see
    :func:`tensors`. Their biases stay in fp32. All other parameters get the values of the file in
    their own dtype: F32, F16 and BF16, and for the embedding and the head every type that the
    package gguf can dequantise, such as Q6_K. A file without ``output.weight`` has a head with the
    values of the embedding. For the architecture ``llama`` the rows of queries and keys are put
    back into the order of transformers.

    The architectures are ``llama``, ``qwen2``, ``qwen3``, ``bitnet`` and those of bitnet.cpp,
    ``bitnet-b1.58`` and ``bitnet-25``. Make the model from the config of the original checkpoint::

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
        model = load("model.gguf", model).eval()

    On the meta device the model takes no memory before the load, and is on the CPU after it.
    Other models keep their devices, and their old weights until the ternary tensors are read.
    Beyond the tensors themselves, the load takes a few MB.

    Args:
        path: The file.
        model: The model, for causal language modelling.
        i2_s_layout: As for :func:`tensors`.
        act_bits: The bits of quantised activations, 8 or 16; the file does not tell.
        eps: The lower bound of the absmax of a token; see :class:`~bitlinear.BitLinear`. The
            default is that of BitNet models in transformers.

    Returns:
        ``model``, which ``save_pretrained`` can save.

    Raises:
        OSError: The file cannot be opened.
        TypeError: ``model`` is not a model of transformers.
        ValueError: As for :func:`tensors`; or the file is one of another model, its config differs,
            a tensor is missing or not used, or has a type or shape that does not fit. The model is
            unchanged.
    """
    from ..transformers.quantizer import attach

    check_i2_s_layout(i2_s_layout)
    check_act_bits(act_bits)
    check_eps(eps, act_bits)
    if not hasattr(model, "config"):
        raise TypeError(
            f"load() needs a model of transformers, but got a {type(model).__name__}: tensors() "
            f"reads the ternary tensors for any other"
        )
    file = GgufFile(path)
    sources = _find_sources(file, model)
    ternary = _check_sources(file, model, sources, i2_s_layout)
    buffers = _computed_buffers(model)
    packed = {
        name: read_ternary(file, sources[name].info, i2_s_layout, sources[name].order)
        for name in ternary
    }
    _replace_layers(file, model, sources, packed, act_bits, eps)
    _fill_parameters(file, model, sources)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer
    _logger.info("%s: loaded %d deployed layers", path, len(ternary))
    return attach(model)


# --- Checks, before the first change ---


def _find_sources(file: GgufFile, model: Any) -> dict[str, _Source]:
    """The sources of all parameters, by their names in the model.

    Raises:
        ValueError: A parameter has no source, or a tensor of the file no parameter.
    """
    architecture = check_config(file, model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources: dict[str, _Source] = {}
    used, missing = set(DERIVED), []
    for name in parameters:
        found = file_name(name)
        if found == _HEAD and _HEAD not in file.tensors:
            found = _EMBEDDING
        info = file.tensors.get(found or "")
        if found is None or info is None:
            missing.append(f"{name} (in the file: {found or 'no name'})")
            continue
        used |= {found, factor_name(found)}
        order = file_order(architecture, found, model.config)
        sources[name] = _Source(info, order, read_factor(file, info))
    unused = [name for name in file.tensors if name not in used]
    problems = [f"it has no tensor for {name}" for name in missing]
    problems += [f"the model has no parameter for {name}" for name in unused]
    embedding, head = (parameters.get(n) for n in ("model.embed_tokens.weight", "lm_head.weight"))
    if head is not None and head is embedding and _HEAD in file.tensors:
        problems.append(
            f"it has a head of its own, {_HEAD}, but the model ties its head to the embedding: set "
            f"config.tie_word_embeddings = False"
        )
    _raise(file, problems)
    return sources


def _check_sources(
    file: GgufFile, model: nn.Module, sources: dict[str, _Source], i2_s_layout: str | None
) -> list[str]:
    """Check types and shapes; return the names of the weights that become packed ones."""
    ternary, problems = [], []
    for name, source in sources.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        info = source.info
        try:
            _check_shape(name, info, owner)
            check_type(info)
            if info.type.name in TERNARY_TYPES and info.name != _EMBEDDING:
                _check_linear(name, owner)
                check_ternary(file, info, i2_s_layout)
                ternary.append(name)
            else:
                _check_float(info)
        except ValueError as error:
            problems.append(str(error))
    _raise(file, problems)
    return ternary


def _check_shape(name: str, info: TensorInfo, owner: nn.Module) -> None:
    if isinstance(owner, BitLinear):
        raise ValueError(
            f"{name} belongs to a BitLinear: load into a model without them, as its class makes it"
        )
    shape = tuple(owner._parameters[name.rpartition(".")[2]].shape)  # type: ignore[union-attr]
    if shape != info.shape:
        raise ValueError(
            f"{info.name} has shape {list(info.shape)}, but {name} has shape {list(shape)}"
        )


def _check_linear(name: str, owner: nn.Module) -> None:
    if type(owner) is not nn.Linear or not name.endswith(".weight"):
        raise ValueError(
            f"{name} of a {type(owner).__name__} is ternary in the file, but only the weight of a "
            f"plain nn.Linear can become a packed one"
        )


def _check_float(info: TensorInfo) -> None:
    """Raise ValueError unless the values of a tensor can be read as floats."""
    if info.type.name in FLOAT_TYPES:
        return
    if info.name not in (_EMBEDDING, _HEAD):
        raise ValueError(
            f"{info.name} has type {info.type.name}, which is not ternary: only the embedding and "
            f"the head can be quantised in another way"
        )
    try:
        _to_float(info, torch.zeros(1, info.type.block_bytes, dtype=torch.uint8, device="cpu"))
    except (NotImplementedError, KeyError):
        raise ValueError(
            f"{info.name}: the package gguf cannot dequantise type {info.type.name}: quantise it "
            f"to Q6_K or F16"
        ) from None


def _computed_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """New values of the buffers on the meta device, which no file holds: of rotations.

    Raises:
        ValueError: There are others.
    """
    found = []
    for prefix, module in model.named_modules():
        names = [name for name, t in module._buffers.items() if t is not None and t.is_meta]
        if not names:
            continue
        if not type(module).__name__.endswith("RotaryEmbedding"):
            raise ValueError(
                f"{prefix}.{names[0]} is on the meta device, and the file has no values for it: "
                f"make the model on the CPU"
            )
        with torch.device("cpu"), torch.inference_mode(False):
            fresh = type(module)(module.config)
        found += [(module, name, fresh.get_buffer(name)) for name in names]
    return found


def _raise(file: GgufFile, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{file.path} does not fit the model:\n  " + "\n  ".join(problems))


# --- The change ---


@torch.inference_mode(False)  # Nothing could be loaded into buffers made in inference mode.
@torch.no_grad()
def _replace_layers(
    file: GgufFile,
    model: nn.Module,
    sources: dict[str, _Source],
    packed: dict[str, TernaryTensor],
    act_bits: int,
    eps: float,
) -> None:
    """Put deployed layers in place of the linear layers with these weights; empties ``packed``."""
    from ..transformers.layers import empty_layer

    parents = find_parents(model)
    while packed:
        name, tensor = packed.popitem()
        prefix = name.rpartition(".")[0]
        old: Any = model.get_submodule(prefix)
        state = {"w_packed": tensor.w_packed, "w_scale": tensor.w_scale}
        if old.bias is not None:
            state["bias"] = torch.empty(old.out_features, device="cpu")
            _read_into(state["bias"], file, sources[f"{prefix}.bias"])
        new = empty_layer(
            old.in_features,
            old.out_features,
            bias_dtype=None if old.bias is None else torch.float32,
            use_rms_norm=False,
            eps=eps,
            dtype=old.weight.dtype,
            quant_type=QuantType(act_bits, group_size_of(tensor.w_scale)).name,
        )
        new.load_state_dict(state, assign=True)
        if not old.weight.is_meta:
            new.to(old.weight.device)
        for key in CALL_HOOKS:
            if key in vars(old):
                vars(new)[key] = vars(old)[key]
        set_child(parents[id(old)], new.train(old.training))


@torch.inference_mode(False)
@torch.no_grad()
def _fill_parameters(file: GgufFile, model: nn.Module, sources: dict[str, _Source]) -> None:
    """Write the values of the parameters that the model still has; tied ones stay tied."""
    filled: dict[int, nn.Parameter] = {}
    owners = [
        (module, key, parameter, sources[f"{prefix}.{key}"])
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    for module, key, old, source in owners:
        if id(old) not in filled:
            new = old
            if old.is_meta or old.is_inference():
                device = "cpu" if old.is_meta else old.device
                values = torch.empty(old.shape, dtype=old.dtype, device=device)
                new = nn.Parameter(values, requires_grad=old.requires_grad)
            _read_into(new, file, source)
            filled[id(old)] = new
        module._parameters[key] = filled[id(old)]


def _read_into(target: Tensor, file: GgufFile, source: _Source) -> None:
    """Write the values of a tensor of the file into a tensor of any float dtype and device."""
    rows = target.view(source.info.matrix_shape)
    for first, values in _float_chunks(file, source):
        order = slice(first, first + len(values))
        index = order if source.order is None else source.order[order].to(target.device)
        rows[index] = values.to(target.device, target.dtype)


def _float_chunks(file: GgufFile, source: _Source) -> Iterator[tuple[int, Tensor]]:
    for first, data in file.chunks(source.info):
        values = _to_float(source.info, data)
        yield first, values if source.factor == 1 else values * source.factor


def _to_float(info: TensorInfo, data: Tensor) -> Tensor:
    """fp32 values of the bytes of some rows."""
    kind = gguf.GGMLQuantizationType[info.type.name]
    values: np.ndarray[Any, Any] = gguf.dequantize(data.numpy(), kind)
    return torch.from_numpy(values)
