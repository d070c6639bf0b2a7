"""Dense weights that are ternary already: which scales they have, read from their values.

Nothing here rounds a weight to a ternary value. A weight either is a scale times -1, 0 or 1, by the
rule of :func:`find_scales`, or it is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import packing
from ..groups import GROUP_UNIT, fill_unused, round_scales
from ..quantize import PER_ROW

_HALF_DTYPES = (torch.bfloat16, torch.float16)
_GROUP_SIZES = (256, 128, 64, 32)
_SHARDS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Scales:
    """The scales of a ternary weight.

    Attributes:
        values: fp32, ``(1,)``, ``(N, 1)`` or ``(N, groups)``, the last as
            :func:`bitlinear.groups.round_scales` rounds them. Zeros that share a scale get the
            largest of all.
        count: How many different scales there are.
        zeros: The share of weights that are 0.
        deviation: The largest distance of a magnitude from its scale; 0 if all are equal.
        group_size: 0 for one scale per tensor, -1 for one per output feature, or the number of
            weights of an output feature that share one.
    """

    values: Tensor
    count: int
    zeros: float
    deviation: float
    group_size: int

    def __str__(self) -> str:
        kind = {0: "one scale", PER_ROW: "a scale per output feature"}.get(
            self.group_size, f"a scale for each group of {self.group_size} inputs"
        )
        range_ = f"{float(self.values.min()):.6g}"
        if self.count > 1:
            range_ = f"{self.count} different ones, {range_} to {float(self.values.max()):.6g}"
        return f"{kind} ({range_}), {self.zeros:.1%} zeros, largest deviation {self.deviation:.3g}"


@dataclass(frozen=True)
class NotTernary:
    """Why a weight has no such scales.

    Attributes:
        reason: What was seen, in one line.
        is_refused: It may be ternary, but what it is cannot be told, or not be represented.
    """

    reason: str
    is_refused: bool = False


def find_scales(weight: Tensor) -> Scales | NotTernary:
    """Find the scales of a weight whose values are ternary times scales.

    The rule: all magnitudes that share a scale are equal, except that they may be two neighbouring
    numbers in bf16 and fp16 storage; the scale is then the mean of both, which is half a unit in
    the last place from either. Equal magnitudes come first: if they are equal in every row, each
    row has its scale, even where two neighbouring numbers would explain the whole tensor. Of equal
    magnitudes, one scale for the tensor is preferred.

    Args:
        weight: Floating point, shape ``(N, K)``, with values.

    Returns:
        The scales, or why there are none. A weight is refused if it has fewer than two weights
        other than 0 for each scale: any numbers would look like that.
    """
    rows = _Rows(weight)
    if not rows.is_finite:
        return NotTernary("a weight is NaN or infinite")
    if rows.has_subnormals:
        return NotTernary("a weight is below the smallest normal number of float32")
    used = rows.nonzero > 0
    if not used.any():
        scale = torch.ones(1, dtype=torch.float32, device=weight.device)
        return Scales(scale, 1, 1.0, 0.0, 0)
    lowest, highest = rows.lowest[used], rows.highest[used]
    if torch.equal(lowest, highest):
        scales = one_or_each(rows.highest, used)
        return _checked(scales, highest.unique().numel(), rows, 0.0)

    if weight.dtype in _HALF_DTYPES:
        if _are_neighbours(lowest.min(), highest.max(), weight.dtype):
            low, high = lowest.min(), highest.max()
            scales = ((low + high) / 2).reshape(1)
            return _checked(scales, 1, rows, float((high - low) / 2))
        if bool(_are_neighbours(lowest, highest, weight.dtype).all()):
            means = (rows.lowest + rows.highest) / 2
            scales = torch.where(used, means, means[used].max())[:, None]
            deviation = float(((highest - lowest) / 2).max())
            return _checked(scales, means[used].unique().numel(), rows, deviation)
    if columns := _equal_columns(weight):
        return _group_scales(weight, columns, rows)
    row = int((lowest != highest).nonzero()[0])
    return NotTernary(
        f"{int((lowest != highest).sum())} of {len(weight)} rows have several magnitudes, the "
        f"first of them from {float(lowest[row]):.6g} to {float(highest[row]):.6g}"
    )


def one_or_each(scales: Tensor, used: Tensor) -> Tensor:
    """One scale if all rows have the same one; otherwise one for each row.

    Args:
        scales: Shape ``(N,)``.
        used: bool, shape ``(N,)``, at least one of them True: whether the row has a weight other
            than 0. The scales of other rows mean nothing; they get the largest one.

    Returns:
        Shape ``(1,)`` or ``(N, 1)``.
    """
    largest = scales[used].max()
    if bool((scales[used] == largest).all()):
        return largest.reshape(1)
    return torch.where(used, scales, largest)[:, None]


def scale_factor(scale: Tensor, out_features: int, divides: bool, name: str) -> Tensor:
    """The factor of the product of a layer, from a scale that a checkpoint has.

    Args:
        scale: Any floating dtype; one number, or one for each output feature, in any shape.
        out_features: ``N``.
        divides: Whether the product is divided by the scale. Its inverse is rounded once, in fp32.
        name: The name of the scale, for errors.

    Returns:
        fp32, shape ``(1,)`` or ``(N, 1)``: a new tensor.

    Raises:
        ValueError: The shape does not fit, or a scale is not positive and finite.
    """
    if scale.numel() != 1 and list(scale.squeeze().shape) != [out_features]:
        raise ValueError(
            f"{name} must be one number, or one for each of {out_features} output features, but it "
            f"has shape {list(scale.shape)}"
        )
    values = scale.detach().float().reshape((1,) if scale.numel() == 1 else (-1, 1)).clone()
    factor = 1.0 / values if divides else values
    for used in (values, factor):
        bad = ~(used.isfinite() & (used > 0))
        if bool(bad.any()):
            raise ValueError(
                f"{name} must be positive, but it is {float(values[bad][0]):g}: the file is damaged"
            )
    return factor


def check_signs(weight: Tensor, name: str = "weight") -> None:
    """Raise ValueError, which names the first other value, unless all weights are -1, 0 or 1."""
    for first, rows in packing.enumerate_chunks(weight):
        if not torch.equal(rows, rows.sign()):
            row, column = (int(i) for i in (rows != rows.sign()).nonzero()[0])
            raise ValueError(
                f"{name}[{first + row}, {column}] is {rows[row, column].item()}, but it must be "
                f"-1, 0 or 1"
            )


def pack(weight: Tensor) -> Tensor:
    """Pack the signs of a ternary weight.

    Returns:
        uint8, shape ``(N, ceil(K/4))``; see :mod:`bitlinear.packing`.
    """
    return packing.pack_quantized(weight, lambda first, rows: rows.sign().to(torch.int8))


def _checked(
    scales: Tensor, count: int, rows: _Rows, deviation: float, group_size: int = 0
) -> Scales | NotTernary:
    """``scales`` in fp32, rounded as products round them; ``group_size`` is positive or 0."""
    nonzero = int(rows.nonzero.sum())
    if nonzero < 2 * count:
        return NotTernary(
            f"it has {nonzero} weights other than 0 and {count} scales, as any weight of this "
            f"shape would",
            is_refused=True,
        )
    values = scales.to(torch.float32)
    if group_size > 0:
        values = round_scales(values)  # can be 0, beside much larger ones
    valid = values.isfinite() & ((values > 0) | (group_size > 0))
    if not bool(valid.all()):
        return NotTernary("a scale does not fit float32", is_refused=True)
    rounding = float((values.double() - scales.double()).abs().max())
    group_size = group_size or (PER_ROW if values.dim() == 2 else 0)
    return Scales(values, count, 1 - nonzero / rows.count, max(deviation, rounding), group_size)


def _group_scales(weight: Tensor, group_size: int, rows: _Rows) -> Scales | NotTernary:
    """The scales of a weight whose groups have one magnitude each."""
    if group_size % GROUP_UNIT != 0:
        return NotTernary(
            f"each of its blocks of {group_size} columns has scales of its own, but groups must be "
            f"multiples of {GROUP_UNIT}",
            is_refused=True,
        )
    missing = -weight.shape[1] % group_size
    highest = torch.cat(
        [
            F.pad(part.abs(), (0, missing)).unflatten(1, (-1, group_size)).amax(dim=-1)
            for _, part in packing.enumerate_chunks(weight)
        ]
    ).double()
    scales = fill_unused(highest)
    count = int(highest[highest > 0].unique().numel())
    return _checked(scales, count, rows, 0.0, group_size)


class _Rows:
    """The magnitudes in each row of a weight.

    Attributes:
        lowest, highest: Of the weights other than 0, in fp32, or in fp64 for fp64; infinite and 0
            in a row of zeros.
        nonzero: The number of weights other than 0.
        count: The number of all weights.
        is_finite: Whether every weight is.
        has_subnormals: Whether one is so small that a CPU may take it for 0.
    """

    def __init__(self, weight: Tensor) -> None:
        chunks = packing.enumerate_chunks(weight)
        parts = [_magnitudes(rows) for _, rows in chunks]
        self.lowest, self.highest, self.nonzero = (torch.cat(part) for part in zip(*parts))
        self.count = weight.numel()
        self.is_finite = bool(self.highest.isfinite().all())
        self.has_subnormals = any(_has_subnormals(rows) for _, rows in chunks)


def _magnitudes(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    magnitudes = rows.to(torch.promote_types(rows.dtype, torch.float32)).abs()
    highest = magnitudes.amax(dim=1)  # NaN if a weight is
    lowest = magnitudes.masked_fill(magnitudes == 0, torch.inf).amin(dim=1)
    return lowest, highest, magnitudes.count_nonzero(dim=1)


def _has_subnormals(rows: Tensor) -> bool:
    """Whether an fp32 or bf16 number is subnormal, also if torch.set_flush_denormal is on."""
    if rows.dtype not in (torch.float32, torch.bfloat16):
        return False
    magnitudes = rows.float().contiguous().view(torch.int32) & 0x7FFFFFFF
    return bool(((magnitudes > 0) & (magnitudes < 0x00800000)).any())


def _are_neighbours(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether no other number of a 16-bit dtype lies between two positive ones."""
    # The bits of positive numbers have the order of the numbers.
    bits = [value.to(dtype).view(torch.int16).to(torch.int32) for value in (low, high)]
    return bits[1] - bits[0] <= 1


def _equal_columns(weight: Tensor) -> int:
    """The widest blocks of columns in each of which every row has one magnitude; 0 if none."""
    in_features = weight.shape[1]
    shards = {in_features // n for n in _SHARDS if in_features % n == 0}
    for width in sorted({*shards, *_GROUP_SIZES}, reverse=True):
        if 1 < width < in_features and _has_equal_blocks(weight, width):
            return width
    return 0


def _has_equal_blocks(weight: Tensor, width: int) -> bool:
    for _, rows in packing.enumerate_chunks(weight):
        for block in rows.split(width, dim=1):
            lowest, highest, nonzero = _magnitudes(block)
            if not torch.equal(lowest[nonzero > 0], highest[nonzero > 0]):
                return False
    return True
