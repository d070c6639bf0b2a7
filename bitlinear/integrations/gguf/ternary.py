"""The ternary tensors of a GGUF file as packed weights and scales."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from ... import packing
from .codecs import (
    I2_S_BLOCKS,
    decode_i2_s,
    decode_ptq1_0,
    decode_q2_0,
    decode_tq1_0,
    decode_tq2_0,
)
from .reader import GgufFile, TensorInfo
from .scales import BlockScales
from .types import TERNARY_TYPES


@dataclass(frozen=True, eq=False)
class TernaryTensor:
    """A ternary tensor.

    Attributes:
        name: Its name in the file, such as ``"blk.0.attn_q.weight"``.
        w_packed: uint8, ``(N, ceil(K/4))``; see :mod:`bitlinear.packing`.
        w_scale: fp32, ``(1,)``, ``(N, 1)`` or ``(N, ceil(K/group_size))``; it multiplies.
        in_features: ``K``.
        group_size: The number of weights of a row that share a scale; None if all do.
    """

    name: str
    w_packed: Tensor
    w_scale: Tensor
    in_features: int
    group_size: int | None = None


def tensors(
    path: str | os.PathLike[str], *, i2_s_layout: str | None = None
) -> Iterator[TernaryTensor]:
    """Read the ternary tensors of a GGUF file, one at a time.

    The types are TQ1_0, TQ2_0 and Q2_0 of llama.cpp, PQ2_0 and PTQ1_0 of PrismML, and I2_S of
    bitnet.cpp.

    Weights are rearranged as bits, never computed as floats. If all blocks of a tensor, or of each
    of its rows, have one scale, the tensor has one scale, or one for each row; otherwise one for
    each block, rounded as :func:`bitlinear.groups.round_scales` does (scales in fp16 that are at
    least a sixteenth of the largest in their row do not change; the logger ``"bitlinear"`` reports
    others). The factor in a ``.scale`` tensor beside it is included: the product is rounded once,
    to fp32. Rows are in the order of the file; :func:`load` knows the architectures that reorder
    them. Tensors of other types are left out.

    Beyond the result, this takes a few MB.

    Args:
        path: The file.
        i2_s_layout: ``"x86"`` or ``"arm"``, the CPU on which bitnet.cpp wrote tensors of type I2_S.
            The layouts differ, and nothing in the file tells which one it is.

    Returns:
        An iterator in the order of the file.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file is damaged or cut off; it has I2_S and no ``i2_s_layout``, or a type
            that is ternary but not supported. Or, when the iterator comes to the tensor: a weight
            is invalid, or a scale is not positive.
    """
    check_i2_s_layout(i2_s_layout)
    file = GgufFile(path)
    for info in file.tensors.values():
        check_type(info)
    found = [info for info in file.tensors.values() if info.type.name in TERNARY_TYPES]
    for info in found:
        check_ternary(file, info, i2_s_layout)
    return (read_ternary(file, info, i2_s_layout) for info in found)


def check_i2_s_layout(layout: str | None) -> None:
    """Raise ValueError unless the layout is None or a known one."""
    if layout is not None and layout not in I2_S_BLOCKS:
        raise ValueError(f"i2_s_layout must be one of {[*I2_S_BLOCKS]}, but it is {layout!r}")


def check_type(info: TensorInfo) -> None:
    """Raise ValueError, which says what to do, if no tensor of this type can be read."""
    if info.type.refusal:
        raise ValueError(f"{info.name}: type {info.type.name} {info.type.refusal}")


def check_ternary(file: GgufFile, info: TensorInfo, i2_s_layout: str | None) -> None:
    """Raise ValueError unless the arguments and the shapes fit a ternary tensor."""
    if len(info.shape) != 2:
        raise ValueError(
            f"{info.name}: a ternary tensor must have 2 dimensions, but its shape is "
            f"{list(info.shape)}: vectors and experts are not supported by this version"
        )
    if info.type.name == "I2_S":
        if i2_s_layout is None:
            raise ValueError(
                f"{info.name} has type I2_S, whose layout depends on the CPU on which bitnet.cpp "
                f"wrote it, and nothing in the file tells which one: pass i2_s_layout='x86' "
                f"(blocks of 128 weights) or 'arm' (blocks of 64); the wrong one gives a model "
                f"that writes nonsense"
            )
        block = I2_S_BLOCKS[i2_s_layout]
        if prod(info.shape) % block:
            raise ValueError(
                f"{info.name} of shape {list(info.shape)} is no whole number of blocks of {block} "
                f"weights, so it was not written with i2_s_layout={i2_s_layout!r}"
            )
    read_factor(file, info)


def factor_name(name: str) -> str:
    """The name of the tensor with the factor of all values of the tensor with this name."""
    return name[: -len("weight")] + "scale" if name.endswith(".weight") else ""


def read_factor(file: GgufFile, info: TensorInfo) -> float:
    """The factor beside a tensor, a fp32 number; 1 if there is none.

    Raises:
        ValueError: It is not one positive finite number in F32.
    """
    factor = file.tensors.get(factor_name(info.name))
    if factor is None:
        return 1.0
    if factor.type.name != "F32" or prod(factor.shape) != 1:
        raise ValueError(
            f"{factor.name} must be one number in F32, but it is {factor.type.name} of shape "
            f"{list(factor.shape)}"
        )
    (_, data), *_ = file.chunks(factor)
    value: float = data.view(torch.float32).item()
    if not 0 < value < torch.inf:
        raise ValueError(f"{factor.name} must be finite and positive, but it is {value:g}")
    return value


@torch.inference_mode(False)  # No state could be loaded into buffers made in inference mode.
def read_ternary(
    file: GgufFile, info: TensorInfo, i2_s_layout: str | None, order: Tensor | None = None
) -> TernaryTensor:
    """Read a tensor for which :func:`check_ternary` has been called.

    Args:
        file: The file.
        info: The tensor.
        i2_s_layout: As for :func:`tensors`.
        order: int64, ``(N,)``: row ``r`` of the file becomes row ``order[r]``.

    Raises:
        ValueError: A weight is invalid, or the scales cannot be represented.
    """
    rows, in_features = info.shape
    w_packed = torch.empty(packing.packed_shape(rows, in_features), dtype=torch.uint8, device="cpu")
    block_scales = BlockScales(info.name, rows, info.type.block)
    if order is None:
        order = torch.arange(rows, device="cpu")
    for first, codes, scales in _decoded_chunks(file, info, i2_s_layout):
        rows_of_chunk = order[first : first + len(codes)]
        _check_codes(info.name, first, codes)
        blocks = codes.view(*scales.shape, -1)
        block_scales.add(first, scales, used=(blocks != 1).any(dim=2))
        w_packed[rows_of_chunk] = packing.pack_ternary(codes.to(torch.int8) - 1)
    w_scale, group_size = block_scales.collapse(read_factor(file, info))
    if w_scale.dim() > 1:
        w_scale = torch.empty_like(w_scale).index_copy_(0, order, w_scale)
    return TernaryTensor(info.name, w_packed, w_scale, in_features, group_size)


_DECODERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "TQ1_0": decode_tq1_0,
    "TQ2_0": decode_tq2_0,
    "Q2_0": partial(decode_q2_0, block=64),
    "PQ2_0": partial(decode_q2_0, block=128),
    "PTQ1_0": decode_ptq1_0,
}


def _decoded_chunks(
    file: GgufFile, info: TensorInfo, i2_s_layout: str | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The first row, the codes ``(rows, K)`` and the scales ``(rows, blocks)`` of each chunk."""
    if info.type.name == "I2_S":
        assert i2_s_layout is not None
        scale = file.tail(info)[:4].view(torch.float32)
        for first, data in file.chunks(info, I2_S_BLOCKS[i2_s_layout]):
            yield first, decode_i2_s(data, i2_s_layout), scale.expand(len(data), 1)
        return
    decode = _DECODERS[info.type.name]
    for first, data in file.chunks(info):
        yield first, *decode(data)


def can_expand(info: TensorInfo) -> bool:
    """Whether :func:`expand_rows` can read a tensor of this type."""
    return info.type.name in _DECODERS


def expand_rows(info: TensorInfo, first: int, data: Tensor) -> Tensor:
    """The values of some rows of a ternary tensor, for an embedding that stays dense.

    Args:
        info: The tensor.
        first: The number of the first row, for errors.
        data: uint8, the bytes of the rows.

    Returns:
        fp32, ``(rows, K)``.

    Raises:
        ValueError: A weight is invalid.
    """
    codes, scales = _DECODERS[info.type.name](data)
    _check_codes(info.name, first, codes)
    blocks = codes.view(*scales.shape, -1).float() - 1
    return (blocks * scales[..., None]).flatten(1)


def _check_codes(name: str, first: int, codes: Tensor) -> None:
    invalid = codes == 3
    if bool(invalid.any()):
        row, column = (int(i) for i in invalid.nonzero()[0])
        raise ValueError(
            f"{name}: the weight in row {first + row} and column {column} has the invalid code 3: "
            f"the file is damaged; download it again"
        )
