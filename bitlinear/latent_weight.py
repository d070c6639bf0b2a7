"""The latent weight: a floating-point weight that quantises to given packed weights.

``undeploy()`` trains on from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import packing
from .arguments import dtype_name
from .groups import round_scales


@torch.inference_mode(False)
@torch.no_grad()
def latent_weight(
    w_packed: Tensor,
    w_scale: Tensor,
    in_features: int,
    eps: float,
    dtype: torch.dtype,
    group_size: int = 0,
) -> Tensor:
    """A weight that quantises to the same ternary weights and the same scale again.

    The absmean of ``ternary * v`` is ``v * mean|ternary|``, so ``v = w_scale / mean|ternary|``. If
    rounding ``v`` would give another absmean than ``w_scale``, the first nonzero weights get the
    next representable number above ``v`` and the others the one below.

    Args:
        w_packed: uint8, shape ``(N, ceil(K/4))``.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``; with groups ``(N, ceil(K/group_size))``.
        in_features: ``K``.
        eps: Lower bound of the scale in training.
        dtype: Floating-point dtype of the result.
        group_size: The number of weights of a row that share a scale; 0 or -1 if all do.

    Returns:
        Shape ``(N, K)``, on the device of ``w_packed``.

    Raises:
        ValueError: A scale is below ``eps``, a packed byte is not valid, or a weight would overflow
            ``dtype``.
    """
    shape = (w_packed.shape[0], in_features)
    weight = torch.empty(shape, dtype=dtype, device=w_packed.device)
    if not weight.is_meta:
        smallest = float(w_scale.min())
        lowest = w_scale.clamp_min(eps)
        if not torch.equal(round_scales(lowest) if group_size > 0 else lowest, w_scale):
            remedy = "set layer.eps to at most w_scale first"
            if smallest == 0:
                remedy = "replace it, by any scale if its weights are 0, and deploy the layer again"
            raise ValueError(
                f"w_scale is {smallest:g}, but no weight in training has a scale below eps = "
                f"{eps:g}: {remedy}"
            )
        packing.check_packed(w_packed, in_features)
        if group_size > 0:
            _fill_groups(weight, w_packed, w_scale, group_size)
        else:
            _fill(weight, w_packed, w_scale)
    return weight


def _fill_groups(weight: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int) -> None:
    """As :func:`_fill`: the groups are the rows of a weight, and the last ones of another."""
    out_features, in_features = weight.shape
    whole = in_features // group_size
    for first, count, size in ((0, whole, group_size), (whole, 1, in_features % group_size)):
        if count == 0 or size == 0:
            continue
        begin = first * group_size
        columns = slice(begin, begin + count * size)
        groups = weight.new_empty((out_features * count, size))
        packed = w_packed[:, begin // 4 : (begin + count * size + 3) // 4]
        scales = w_scale[:, first : first + count]
        _fill(groups, packed.reshape(len(groups), -1), scales.reshape(-1, 1))
        weight[:, columns] = groups.reshape(out_features, -1)


def _fill(weight: Tensor, w_packed: Tensor, w_scale: Tensor) -> None:
    in_features = weight.shape[1]
    per_row = w_scale.dim() == 2

    def unpack(first: int, rows: Tensor) -> Tensor:
        return packing.unpack_unchecked(w_packed[first : first + len(rows)], in_features)

    chunks = packing.enumerate_chunks(weight)
    nonzero_per_row = torch.cat([unpack(*chunk).count_nonzero(dim=1) for chunk in chunks])
    nonzero = nonzero_per_row if per_row else nonzero_per_row.sum(dim=0, keepdim=True)
    count = in_features if per_row else weight.numel()
    lower, step, num_upper = _magnitudes(w_scale.reshape(-1), nonzero, count, weight.dtype)
    if not per_row:  # Distribute the upper magnitudes over the first rows of the tensor.
        nonzero_before = nonzero_per_row.cumsum(dim=0) - nonzero_per_row
        num_upper = (num_upper - nonzero_before).clamp_min(0)
    num_upper = num_upper.minimum(nonzero_per_row)[:, None]
    lower, step = (value.reshape(-1, 1).expand(len(weight), 1) for value in (lower, step))
    all_upper = num_upper == nonzero_per_row[:, None]
    for first, rows in chunks:
        part = slice(first, first + len(rows))
        t = unpack(first, rows)
        rows.copy_(t * (lower[part] + all_upper[part] * step[part]).to(torch.float32))
        # Rows with both magnitudes: one at most of a tensor with one scale.
        for n in ((num_upper[part] > 0) & ~all_upper[part])[:, 0].nonzero()[:, 0]:
            row = slice(first + n, first + n + 1)
            is_upper = (t[n] != 0).cumsum(dim=0) <= num_upper[row]
            rows[n] = t[n] * (lower[row] + is_upper * step[row])[0]


def _magnitudes(
    w_scale: Tensor, nonzero: Tensor, count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes of ``dtype`` whose sum over ``nonzero`` weights is ``w_scale * count``.

    Returns:
        The lower magnitude and the distance to the next one, fp64, and the number of weights that
        get the upper one; each in the shape of ``w_scale``, ``(1,)`` or ``(N,)``.
    """
    info = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    exact = w_scale.double() * count / nonzero.clamp_min(1)
    if bool((exact > info.max).any()):
        raise ValueError(
            f"the weight would overflow {dtype_name(dtype)}, as few of the ternary weights are not "
            f"0: call {'float' if info.bits < 32 else 'double'}() on the layer first"
        )
    exponent = torch.frexp(exact.clamp_min(info.tiny)).exponent - 1
    step = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    nearest = (exact / step).round() * step
    mean = (nearest * nonzero / count).float()
    lower = torch.where(mean == w_scale, nearest, (exact / step).floor() * step)
    num_upper = ((w_scale.double() * count - lower * nonzero) / step).round().long()
    return lower, step, torch.where(mean == w_scale, 0, num_upper)
