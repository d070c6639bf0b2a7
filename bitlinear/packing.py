"""Packed format, version 1: four ternary weights in a byte.

``w_packed`` is uint8 of shape ``(N, ceil(K/4))``, row-major. Byte ``b`` of a row holds the weights
``k = 4b, 4b+1, 4b+2, 4b+3``, most significant pair of bits first, each as the code ``t + 1`` in
{0, 1, 2}. Code 3 is invalid. Slots past ``K`` hold code 1 (weight 0).

The metadata of ``state_dict`` holds the version (``BitLinear._version``); without it, the version
is 1. Some files have no metadata (safetensors), so a later format must also rename its tensor: a
reader of version 1 must never find a ``w_packed`` with another meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

FORMAT_VERSION = 1

PACKED_NAMES = ("w_packed", "w_scale")
"""Names of the tensors that replace the weight of a deployed layer."""

# The size of a chunk bounds the temporaries of packing, unpacking and checking, however large the
# layer is. It is larger on a GPU, where each chunk costs several launches.
_CHUNK_BYTES, _GPU_CHUNK_BYTES = 1 << 20, 1 << 26


def packed_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Shape ``(N, ceil(K/4))`` of the packed weights of an ``(N, K)`` layer."""
    return out_features, (in_features + 3) // 4


def describe_memory(tensors: Iterable[tuple[Tensor, Tensor]]) -> str:
    """For logs: ``12,583 kB of packed weights and 1,573 kB of scales``.

    Args:
        tensors: ``w_packed`` and ``w_scale`` of each weight.
    """
    pairs = list(tensors)
    weights, scales = (sum(pair[i].nbytes for pair in pairs) / 1e3 for i in range(2))
    return f"{weights:,.0f} kB of packed weights and {scales:,.0f} kB of scales"


def rows_per_chunk(row_bytes: int, on_gpu: bool = False) -> int:
    """Number of rows of ``row_bytes`` bytes to process at a time."""
    return max(1, (_GPU_CHUNK_BYTES if on_gpu else _CHUNK_BYTES) // max(1, row_bytes))


def enumerate_chunks(tensor: Tensor) -> list[tuple[int, Tensor]]:
    """Split a 2-D tensor into views of whole rows, at most about 1 MB each (64 MB on a GPU).

    Returns:
        The index of the first row and the view, for each chunk.
    """
    step = rows_per_chunk(tensor.shape[1] * tensor.element_size(), tensor.is_cuda)
    return list(zip(range(0, tensor.shape[0], step), tensor.split(step)))


def pack_ternary(t: Tensor) -> Tensor:
    """Pack ternary weights, four to a byte.

    Args:
        t: int8, shape ``(N, K)``, values in {-1, 0, 1}.

    Returns:
        uint8, shape ``(N, ceil(K/4))``, on the device of ``t``.

    Raises:
        TypeError: ``t`` is not int8.
        ValueError: ``t`` is not 2-D, or holds a value outside {-1, 0, 1}.
    """
    if t.dtype != torch.int8:
        raise TypeError(f"pack_ternary: t must be int8, but it is {t.dtype}: use t.to(torch.int8)")
    if t.dim() != 2:
        raise ValueError(f"pack_ternary: t must have shape (N, K), but it has {list(t.shape)}")
    if not t.is_meta and t.numel() > 0:
        lowest, highest = (int(value) for value in t.aminmax())
        if lowest < -1 or highest > 1:
            raise ValueError(
                f"pack_ternary: t must hold only -1, 0 and 1, but its values span {lowest} to "
                f"{highest}: quantise the weights first"
            )
    rows, columns = packed_shape(*t.shape)
    padded = F.pad(t, (0, 4 * columns - t.shape[1]))
    codes = (padded + 1).to(torch.uint8).reshape(rows, columns, 4)
    c0, c1, c2, c3 = codes.unbind(-1)
    return (c0 << 6) | (c1 << 4) | (c2 << 2) | c3


def pack_quantized(weight: Tensor, to_ternary: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Quantise and pack a weight, one chunk of rows at a time.

    Args:
        weight: Shape ``(N, K)``.
        to_ternary: Quantises rows of the weight, of which it gets the index of the first one and
            the values, to int8 in {-1, 0, 1}.

    Returns:
        uint8, shape ``(N, ceil(K/4))``, on the device of ``weight``.
    """
    packed = weight.new_empty(packed_shape(*weight.shape), dtype=torch.uint8)
    for first, rows in enumerate_chunks(weight):
        packed[first : first + len(rows)] = pack_ternary(to_ternary(first, rows))
    return packed


def unpack_ternary(packed: Tensor, in_features: int) -> Tensor:
    """Unpack ternary weights: the inverse of :func:`pack_ternary`.

    Args:
        packed: uint8, shape ``(N, ceil(K/4))``.
        in_features: ``K``.

    Returns:
        int8, shape ``(N, K)``, values in {-1, 0, 1}, on the device of ``packed``.

    Raises:
        TypeError, ValueError: See :func:`check_packed`.
    """
    check_packed(packed, in_features)
    return unpack_unchecked(packed, in_features)


def unpack_unchecked(packed: Tensor, in_features: int) -> Tensor:
    """Unpack without checks: code 3 reads as weight 2, as in the kernels."""
    codes = torch.stack([(packed >> shift) & 3 for shift in (6, 4, 2, 0)], dim=-1)
    return codes.flatten(-2)[..., :in_features].to(torch.int8) - 1


def check_packed(packed: Tensor, in_features: int) -> None:
    """Check packed weights without unpacking them.

    Raises:
        TypeError: ``packed`` is not uint8.
        ValueError: The shape does not fit ``in_features``, a byte holds the invalid code 3, or a
            slot past ``in_features`` holds a weight other than 0.
    """
    check_packed_dtype(packed)
    check_packed_shape(packed, in_features)
    if not packed.is_meta:
        _check_codes(packed, in_features)


def check_packed_dtype(packed: Tensor) -> None:
    """Raise TypeError unless ``packed`` is uint8."""
    if packed.dtype != torch.uint8:
        raise TypeError(
            f"bitlinear: w_packed must be uint8, but it is {packed.dtype}: pack ternary weights "
            f"with bitlinear.packing.pack_ternary".replace("torch.", "")
        )


def check_packed_shape(packed: Tensor, in_features: int) -> None:
    """Raise ValueError unless ``packed`` has the shape ``(N, ceil(in_features/4))``."""
    columns = packed_shape(0, in_features)[1]
    if packed.dim() != 2 or packed.shape[1] != columns:
        raise ValueError(
            f"bitlinear: w_packed must have shape (N, {columns}) for in_features = {in_features}, "
            f"four weights to a byte, but it has shape {list(packed.shape)}"
        )


# kernels/checked_weights.h makes the same check, with the same messages.
def _check_codes(packed: Tensor, in_features: int) -> None:
    for first, rows in enumerate_chunks(packed):
        # A pair of bits is code 3 if both of its bits are set. The search reads bytes, because a
        # bool mask would make it five times as slow.
        invalid = rows & (rows >> 1) & 0b01010101
        if bool(invalid.any()):
            row, byte = (int(i) for i in invalid.nonzero()[0])
            raise ValueError(
                f"bitlinear: w_packed holds the invalid code 3, first in byte {byte} of row "
                f"{first + row} (0x{int(rows[row, byte]):02x}): the bytes were changed (averaged, "
                f"for example) or damaged, or are not in packed format version {FORMAT_VERSION}"
            )
    unused_slots = 4 * packed.shape[1] - in_features
    unused_bits = (1 << 2 * unused_slots) - 1
    if bool(((packed[:, -1] & unused_bits) != (0b01010101 & unused_bits)).any()):
        raise ValueError(
            f"bitlinear: w_packed has weights beyond in_features = {in_features}: it was packed "
            f"for a layer with up to {4 * packed.shape[1]}"
        )
