"""Scales of groups of weights along K, as integers.

A group is ``group_size`` consecutive inputs of an output feature, the last one of a row perhaps
fewer. Each row of scales is a power of two, the unit of the row, times integers of 15 bits:
``w_scale = multipliers * unit``. So a product stays in integers until its end,

    ``acc[m, n] = sum_g multipliers[n, g] * sum_(k in g) q[m, k] * t[n, k]``,
    ``y = float(acc) * (s_x * unit) + bias``,

which no order of additions changes: every kernel, batch and number of threads gives the same bits.
A scale of 11 bits, as fp16 has, is exact if it is at least a sixteenth of the largest scale of its
row. Others are rounded once, when a weight is packed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_UNIT = 32
"""Groups are multiples of this many weights."""

LARGEST_MULTIPLIER = 2**15 - 1

LARGE_ROUNDING = 2**-7
"""A larger change of a scale, relative to it, is worth a warning."""

# The unit of a row stays a normal number of fp32.
_SMALLEST_EXPONENT = -126


def count_groups(in_features: int, group_size: int) -> int:
    """The number of groups of a row."""
    return -(-in_features // group_size)


def split_scales(w_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Write scales as integers times a power of two per row.

    Args:
        w_scale: fp32, shape ``(N, groups)``.

    Returns:
        ``multipliers``: int32 in [-32767, 32767], shape ``(N, groups)``, rounded half to even; and
        ``unit``: fp32, shape ``(N, 1)``. A row with a scale that is not finite has multipliers of 0
        and the unit NaN.
    """
    largest = w_scale.abs().amax(dim=1, keepdim=True)
    _, exponent = torch.frexp(largest)
    one = torch.ones_like(largest)
    unit = torch.ldexp(one, (exponent - 15).clamp_min(_SMALLEST_EXPONENT))
    is_finite = largest.isfinite()
    multipliers = (w_scale / unit).round().clamp(-LARGEST_MULTIPLIER, LARGEST_MULTIPLIER)
    multipliers = torch.where(is_finite, multipliers, 0.0)
    return multipliers.to(torch.int32), torch.where(is_finite, unit, torch.nan)


def round_scales(w_scale: Tensor) -> Tensor:
    """The scales that products compute with: ``multipliers * unit``, exact in fp32.

    Args:
        w_scale: As for :func:`split_scales`.

    Returns:
        fp32, in the shape of ``w_scale``; rounding them again changes nothing. A row with a scale
        that is not finite is NaN.
    """
    multipliers, unit = split_scales(w_scale)
    return multipliers.to(torch.float32) * unit


def relative_rounding(w_scale: Tensor, rounded: Tensor) -> float:
    """The largest change of a scale by :func:`round_scales`, relative to it: 1 if it became 0.

    Args:
        w_scale: fp32, positive, shape ``(N, groups)``.
        rounded: ``round_scales(w_scale)``.
    """
    return float(((rounded.double() - w_scale.double()).abs() / w_scale.double()).max())


def describe_rounding(rounding: float) -> str:
    """For messages: what :func:`relative_rounding` found."""
    lost = ", to 0 with their weights" if rounding >= 1 else ""
    return f"scales are rounded by up to {rounding:.2g} of their size{lost}"


def fill_unused(w_scale: Tensor) -> Tensor:
    """Replace scales that are 0, because all weights of their group are.

    They get the largest scale of their row, so that they round no other one; in a row of zeros, the
    largest of all.

    Args:
        w_scale: Not negative, shape ``(N, groups)``.
    """
    of_row = w_scale.amax(dim=1, keepdim=True)
    return torch.where(w_scale > 0, w_scale, torch.where(of_row > 0, of_row, w_scale.max()))


def sum_groups(values: Tensor, group_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of each group: of ``(N, K)`` the sums ``(N, groups)``, in ``dtype``."""
    group_size = min(group_size, values.shape[1])  # no memory for what a group lacks
    missing = -values.shape[1] % group_size
    groups: Tensor = F.pad(values, (0, missing)).unflatten(1, (-1, group_size))
    return groups.sum(dim=-1, dtype=dtype)


def repeat_scales(w_scale: Tensor, group_size: int, in_features: int) -> Tensor:
    """The scale of each weight: of ``(N, groups)`` a tensor ``(N, in_features)``."""
    return w_scale.repeat_interleave(min(group_size, in_features), dim=1)[:, :in_features]


def group_product(q: Tensor, t: Tensor, multipliers: Tensor, group_size: int) -> Tensor:
    """``acc`` of the module's formula, exact.

    Args:
        q: Integers in [-32385, 32385], shape ``(M, K)``.
        t: Integers in {-1, 0, 1}, shape ``(N, K)``.
        multipliers: int32, shape ``(N, groups)``.

    Returns:
        int64, shape ``(M, N)``.
    """
    # Below 2**53: 500,000 inputs of 15 bits times multipliers of 15 bits.
    weight = t.to(torch.float64) * repeat_scales(multipliers, group_size, t.shape[1])
    return (q.to(torch.float64) @ weight.T).to(torch.int64)
