"""Where the values of a model come from in a GGUF file: the checks before a load, the reading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from ...ternary_layer import TernaryLayer
from .architectures import DERIVED, check_config, file_name, file_order
from .reader import GgufFile, TensorInfo
from .ternary import (
    can_expand,
    check_ternary,
    check_type,
    expand_rows,
    factor_name,
    read_factor,
)
from .types import FLOAT_TYPES, TERNARY_TYPES

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


class Source(NamedTuple):
    """Where the values of a tensor of the model come from.

    Attributes:
        info: The tensor of the file.
        order: Its rows; see :func:`file_order`.
        factor: The factor of its values.
    """

    info: TensorInfo
    order: Tensor | None
    factor: float


def find_sources(file: GgufFile, model: Any) -> dict[str, Source]:
    """The sources of all parameters, by their names in the model.

    Raises:
        ValueError: A parameter has no source, or a tensor of the file no parameter.
    """
    architecture = check_config(file, model)
    deployed = [n for n, m in model.named_modules() if isinstance(m, TernaryLayer)]
    if deployed:
        raise ValueError(
            f"the model has layers of bitlinear already, such as {deployed[0]}: load into a model "
            f"as its class makes it"
        )
    if not hasattr(model, "lm_head"):
        raise ValueError(
            f"{type(model).__name__} has no head: pass the model for causal language modelling"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources: dict[str, Source] = {}
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
        sources[name] = Source(info, order, read_factor(file, info))
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


def check_sources(
    file: GgufFile,
    model: nn.Module,
    sources: dict[str, Source],
    i2_s_layout: str | None,
    pack_embedding: bool,
) -> list[str]:
    """Check types and shapes; return the names of the weights that become packed ones."""
    ternary, problems = [], []
    for name, source in sources.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        info = source.info
        try:
            _check_shape(name, info, owner)
            check_type(info)
            packs = pack_embedding or info.name != _EMBEDDING
            if info.type.name in TERNARY_TYPES and packs:
                _check_packable(name, owner)
                check_ternary(file, info, i2_s_layout)
                ternary.append(name)
            else:
                _check_float(info)
        except ValueError as error:
            problems.append(str(error))
    _raise(file, problems)
    return ternary


def _check_shape(name: str, info: TensorInfo, owner: nn.Module) -> None:
    shape = tuple(owner._parameters[name.rpartition(".")[2]].shape)  # type: ignore[union-attr]
    if shape != info.shape:
        raise ValueError(
            f"{info.name} has shape {list(info.shape)}, but {name} has shape {list(shape)}"
        )


def _check_packable(name: str, owner: nn.Module) -> None:
    if type(owner) not in (nn.Linear, nn.Embedding) or not name.endswith(".weight"):
        raise ValueError(
            f"{name} of a {type(owner).__name__} is ternary in the file, but only the weight of a "
            f"plain nn.Linear or nn.Embedding can become a packed one"
        )


def _check_float(info: TensorInfo) -> None:
    """Raise ValueError unless the values of a tensor can be read as floats."""
    if info.type.name in FLOAT_TYPES or (info.name == _EMBEDDING and can_expand(info)):
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


def computed_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
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
        found += [
            (module, name, fresh.get_buffer(name).to(module.get_buffer(name).dtype))
            for name in names
        ]
    return found


def _raise(file: GgufFile, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{file.path} does not fit the model:\n  " + "\n  ".join(problems))


def read_into(target: Tensor, file: GgufFile, source: Source) -> None:
    """Write the values of a tensor of the file into a tensor of any float dtype and device."""
    rows = target.view(source.info.matrix_shape)
    for first, values in _float_chunks(file, source):
        order = slice(first, first + len(values))
        index = order if source.order is None else source.order[order].to(target.device)
        rows[index] = values.to(target.device, target.dtype)


def _float_chunks(file: GgufFile, source: Source) -> Iterator[tuple[int, Tensor]]:
    info = source.info
    for first, data in file.chunks(info):
        values = expand_rows(info, first, data) if can_expand(info) else _to_float(info, data)
        yield first, values if source.factor == 1 else values * source.factor


def _to_float(info: TensorInfo, data: Tensor) -> Tensor:
    """fp32 values of the bytes of some rows."""
    kind = gguf.GGMLQuantizationType[info.type.name]
    values: np.ndarray[Any, Any] = gguf.dequantize(data.numpy(), kind)
    return torch.from_numpy(values)
