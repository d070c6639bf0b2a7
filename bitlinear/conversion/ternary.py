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
from ..groups import (
    GROUP_UNIT,
    describe_rounding,
    fill_unused,
    relative_rounding,
    round_scales,
)
from ..quantize import PER_ROW

_HALF_DTYPES = (torch.bfloat16, torch.float16)
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
        rounding: The largest change of a scale by :func:`bitlinear.groups.round_scales`, relative
            to the scale: 1 if it became 0. 0 without groups.
        group_size: 0 for one scale per tensor, -1 for one per output feature, or the number of
            weights of an output feature that share one.
    """

    values: Tensor
    count: int
    zeros: float
    deviation: float
    rounding: float
    group_size: int

    def __str__(self) -> str:
        kind = {0: "one scale", PER_ROW: "a scale per output feature"}.get(
            self.group_size, f"a scale for each group of {self.group_size} inputs"
        )
        range_ = f"{float(self.values.min()):.6g}"
        if self.count > 1:
            range_ = f"{self.count} different ones, {range_} to {float(self.values.max()):.6g}"
        text = f"{kind} ({range_}), {self.zeros:.1%} zeros, largest deviation {self.deviation:.3g}"
        return text + (f", {describe_rounding(self.rounding)}" if self.rounding > 0 else "")


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

    Where neither a tensor nor its rows have such scales, groups of inputs may: their size is the
    largest multiple of 32 that explains the weight, by equal magnitudes first. Their scales are
    rounded as :func:`bitlinear.groups.round_scales` does.

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
        return Scales(scale, 1, 1.0, 0.0, 0.0, 0)
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
    if groups := _find_groups(weight):
        return _group_scales(groups, rows)
    if width := _equal_shards(weight):
        return NotTernary(
            f"each of its blocks of {width} columns has scales of its own, but groups must be "
            f"multiples of {GROUP_UNIT}",
            is_refused=True,
        )
    row = int((lowest != highest).nonzero()[0])
    return NotTernary(
        f"{int((lowest != highest).sum())} of {len(weight)} rows have several magnitudes (row "
        f"{row} from {float(lowest[row]):.6g} to {float(highest[row]):.6g}), also within groups of "
        f"{GROUP_UNIT} inputs: the weight is not ternary, or the size of its groups is no multiple "
        f"of {GROUP_UNIT}"
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
    rounding = 0.0
    if group_size > 0:
        exact, values = values, round_scales(values)  # can be 0, beside much larger ones
        rounding = relative_rounding(exact, values)
    valid = values.isfinite() & ((values > 0) | (group_size > 0))
    if not bool(valid.all()):
        return NotTernary("a scale does not fit float32", is_refused=True)
    deviation = max(deviation, float((values.double() - scales.double()).abs().max()))
    group_size = group_size or (PER_ROW if values.dim() == 2 else 0)
    return Scales(values, count, 1 - nonzero / rows.count, deviation, rounding, group_size)


@dataclass(frozen=True)
class _Groups:
    """The magnitudes of the weights other than 0 in each group of a row.

    Attributes:
        lowest, highest: As in :class:`_Rows`, shape ``(N, groups)``.
        size: The number of weights in a group.
    """

    lowest: Tensor
    highest: Tensor
    size: int

    def merged(self, count: int) -> _Groups:
        """Groups of ``count`` times as many weights."""
        lowest = _blocks(self.lowest, count, torch.inf).amin(dim=2)
        highest = _blocks(self.highest, count).amax(dim=2)
        return _Groups(lowest, highest, count * self.size)

    def rows(self, end: int) -> _Groups:
        """Of the first rows."""
        return _Groups(self.lowest[:end], self.highest[:end], self.size)

    def have_scales(self, dtype: torch.dtype, are_equal: bool) -> bool:
        """Whether each group has one magnitude, or else two neighbouring ones of the dtype."""
        used = self.highest > 0
        lowest, highest = self.lowest[used], self.highest[used]
        if are_equal:
            return torch.equal(lowest, highest)
        return bool(_are_neighbours(lowest, highest, dtype).all())


def _find_groups(weight: Tensor) -> _Groups | None:
    """The largest groups, of a multiple of GROUP_UNIT inputs, each of which has a scale."""
    kinds = (True, False) if weight.dtype in _HALF_DTYPES else (True,)
    units = _groups_with_scales(weight, GROUP_UNIT, kinds[-1])
    if units is None:
        return None
    for are_equal in kinds:
        for count in range(units.lowest.shape[1] - 1, 0, -1):
            # A few rows rule out nearly all sizes.
            parts = (units.rows(4), units)
            if all(part.merged(count).have_scales(weight.dtype, are_equal) for part in parts):
                return units.merged(count)
    return None


def _groups_with_scales(weight: Tensor, size: int, are_equal: bool) -> _Groups | None:
    """The groups of this size, if each has a scale; see :meth:`_Groups.have_scales`."""
    chunks = []
    for _, rows in packing.enumerate_chunks(weight):
        lowest, highest, _ = _magnitudes(_blocks(rows, size))
        chunks.append(_Groups(lowest, highest, size))
        if not chunks[-1].have_scales(weight.dtype, are_equal):
            return None
    return _Groups(
        torch.cat([chunk.lowest for chunk in chunks]),
        torch.cat([chunk.highest for chunk in chunks]),
        size,
    )


def _blocks(rows: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """Rows as blocks of ``size`` columns, the last one filled up: ``(N, blocks, size)``."""
    missing = -rows.shape[1] % size
    blocks: Tensor = F.pad(rows, (0, missing), value=fill).unflatten(1, (-1, size))
    return blocks


def _group_scales(groups: _Groups, rows: _Rows) -> Scales | NotTernary:
    used = groups.highest > 0
    means = torch.where(used, (groups.lowest.double() + groups.highest.double()) / 2, 0.0)
    deviation = float(((groups.highest.double() - groups.lowest.double()) / 2)[used].max())
    count = int(means[used].unique().numel())
    return _checked(fill_unused(means), count, rows, deviation, groups.size)


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
    highest = magnitudes.amax(dim=-1)  # NaN if a weight is
    lowest = magnitudes.masked_fill(magnitudes == 0, torch.inf).amin(dim=-1)
    return lowest, highest, magnitudes.count_nonzero(dim=-1)


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


def _equal_shards(weight: Tensor) -> int:
    """The columns of each of some equal parts in which every row has one magnitude; 0 if none."""
    in_features = weight.shape[1]
    for width in (in_features // n for n in _SHARDS if in_features % n == 0):
        if width > 1 and _groups_with_scales(weight, width, are_equal=True) is not None:
            return width
    return 0
