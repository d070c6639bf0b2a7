"""The quantisers, the integer product and the epilogue, in plain torch.

Activations: absmax per token, to 8 or 16 bits. Weights: absmean per tensor or per output feature,
to {-1, 0, +1}. As in BitNet b1.58 (arXiv 2402.17764).

Every float operation here is one separately rounded fp32 operation, in the order in which the
kernels do it, so that the results are the same to the bit. Divisors and dividends are tensors for
that reason: torch computes ``127 / tensor`` as ``127 * (1 / tensor)``, and on CUDA ``tensor / 127``
as ``tensor * (1 / 127)``, which round twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import group_product, repeat_scales, round_scales, split_scales, sum_groups

PER_ROW = -1
"""The ``group_size`` of a weight with a scale per output feature; 0: one scale per tensor; other
sizes: see :mod:`bitlinear.groups`."""

_QMAX8 = 127
HIGH_WEIGHT = 254
QMAX = {8: _QMAX8, 16: HIGH_WEIGHT * _QMAX8 + _QMAX8}
"""The largest quantised activation, by its bits."""

INTEGER_DTYPES = {8: torch.int8, 16: torch.int16}

EXACT_K = (2**24 - 1) // _QMAX8
"""fp32 adds integers exactly below 2**24; no sum of K products |q * t| <= 127 exceeds 127 * K."""


def quantize_activations(x: Tensor, eps: float = 1e-6, act_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantise activations with one absmax scale per token: ``x ~ q * s_x``.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``.
        eps: Lower bound of the absmax of a token.
        act_bits: 8 or 16.

    Returns:
        ``q``: int8 in [-127, 127], or int16 in [-32385, 32385], shape ``(..., K)``, and ``s_x``:
        fp32, shape ``(..., 1)``. A token with a NaN or an infinity gets ``q = 0`` and an ``s_x``
        that makes products NaN.
    """
    x = x.to(torch.float32)
    absmax = x.abs().amax(dim=-1, keepdim=True).clamp_min(eps)
    return quantize_with_absmax(x, absmax, act_bits)


def quantize_with_absmax(x: Tensor, absmax: Tensor, act_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantise fp32 activations ``(..., K)`` whose absmax ``(..., 1)`` is given."""
    qmax = torch.full_like(absmax, QMAX[act_bits])
    scaled = _multiply_subnormals_too(x, _divide(qmax, absmax))
    q = _round_to_integers(scaled, QMAX[act_bits]).to(INTEGER_DTYPES[act_bits])
    return q, _divide(absmax, qmax)


def split_activations(q: Tensor) -> tuple[Tensor, Tensor]:
    """Split activations of 16 bits into two of 8: ``q = 254 * high + low``.

    Args:
        q: Integers in [-32385, 32385], of any dtype that holds them.

    Returns:
        ``high`` and ``low``, integers in [-127, 127], in fp32.
    """
    q = q.to(torch.float32)
    high = (q / HIGH_WEIGHT).round().clamp(-_QMAX8, _QMAX8)
    return high, q - HIGH_WEIGHT * high


def _round_to_integers(values: Tensor, limit: int) -> Tensor:
    """Round half to even and clamp, in place; NaN becomes 0, because its scale carries the NaN."""
    # vmap has no rule for clamp_.
    return values.round_().clamp(-limit, limit).nan_to_num_(nan=0.0)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` in fp32, rounded once.

    The division of fp32 that torch.compile generates for a GPU is approximate, that of fp64 is not.
    fp64 has more than twice the bits of fp32, so that rounding its quotient again is exact.
    """
    if a.is_cuda and torch.compiler.is_compiling():
        return (a.to(torch.float64) / b.to(torch.float64)).to(torch.float32)
    return a / b


# Before torch 2.13 vmap has no rule for a view of another dtype; for a copy it has a loop.
reinterpret = Tensor.view if torch.__version__ >= "2.13" else torch.view_copy


def _multiply_subnormals_too(x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor`` in fp32, including subnormal ``x`` if torch.set_flush_denormal is on."""
    product = x * factor
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._is_tracing():
        return product
    # A subnormal number is the integer in its low bits times 2**-149. Both factors below are
    # normal, and powers of two do not round; if factor * 2**-24 is subnormal, the product rounds
    # to 0 anyway.
    bits = reinterpret(x, torch.int32)
    magnitude = bits & 0x7FFFFFFF
    signed = torch.where(bits < 0, -magnitude, magnitude).to(torch.float32)
    return torch.where(magnitude < 0x00800000, (signed * 2.0**-125) * (factor * 2.0**-24), product)


def quantize_weights(
    weight: Tensor, eps: float = 1e-6, group_size: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantise weights with absmean scales: ``weight ~ t * s_w``.

    Args:
        weight: Floating point, shape ``(N, K)``.
        eps: Lower bound of a scale.
        group_size: 0 for one scale per tensor, :data:`PER_ROW` for one per output feature, or the
            number of weights in a group.

    Returns:
        ``t``: int8 in {-1, 0, 1}, shape ``(N, K)``, and ``s_w``: fp32, shape ``(1,)``, ``(N, 1)``
        or ``(N, ceil(K/group_size))``, NaN or infinite if a weight is.
    """
    scale = scale_from_row_sums(row_sums(weight, group_size), weight.shape[1], eps, group_size)
    return ternarize(weight, scale, group_size), scale


def row_sums(weight: Tensor, group_size: int = 0) -> Tensor:
    """Sum of the magnitudes in each row, ``(N, 1)``, or in each of its groups, ``(N, groups)``.

    The sums are float64, so that the order of the additions hardly matters; MPS has no float64.
    """
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    if group_size > 0:
        return sum_groups(weight.abs(), group_size, dtype)
    return weight.abs().sum(dim=-1, keepdim=True, dtype=dtype)


def scale_from_row_sums(sums: Tensor, in_features: int, eps: float, group_size: int = 0) -> Tensor:
    """The scales of a weight with these :func:`row_sums`; see :func:`quantize_weights`."""
    if group_size == 0:
        # Rows first, then their sums: the order does not depend on the number of threads, so a
        # layer quantises to the same bits in every call.
        means = sums.sum().reshape(1) / (len(sums) * in_features)
    elif group_size == PER_ROW:
        means = sums / in_features
    else:
        last = in_features - group_size * (sums.shape[1] - 1)
        means = torch.cat([sums[:, :-1] / group_size, sums[:, -1:] / last], dim=1)
    scale = means.to(torch.float32).clamp_min(eps)
    return round_scales(scale) if group_size > 0 else scale


def ternarize(weight: Tensor, scale: Tensor, group_size: int = 0) -> Tensor:
    """``clamp(rint(weight / scale), -1, 1)`` as int8, in the shape of ``weight``."""
    if group_size > 0:
        scale = repeat_scales(scale, group_size, weight.shape[1])
    return _round_to_integers(weight.to(torch.float32) / scale, 1).to(torch.int8)


def linear_of_quantized(
    q: Tensor, s_x: Tensor, t: Tensor, s_w: Tensor, bias: Tensor | None, group_size: int = 0
) -> Tensor:
    """The output of a layer, from quantised operands.

    Args:
        q: int8 in [-127, 127] or int16 in [-32385, 32385], shape ``(M, K)``.
        s_x: fp32, shape ``(M, 1)``.
        t: fp32 integers in {-1, 0, 1}, shape ``(N, K)``.
        s_w: fp32, shape ``(1,)`` or ``(N, 1)``; with groups ``(N, groups)``.
        bias: Floating point, shape ``(N,)``, or None.
        group_size: The number of weights in a group, or 0.

    Returns:
        fp32, shape ``(M, N)``.
    """
    if group_size > 0:
        multipliers, s_w = split_scales(s_w)
        product = group_product(q, t, multipliers, group_size).to(torch.float32)
    else:
        product = integer_product(q, t)
    return epilogue(product, s_x, s_w, bias)


def integer_product(q: Tensor, t: Tensor) -> Tensor:
    """``q @ t.T`` exactly, then rounded once to fp32.

    Args:
        q: int8 in [-127, 127] or int16 in [-32385, 32385], shape ``(M, K)``.
        t: fp32 integers in {-1, 0, 1}, shape ``(N, K)``.

    Returns:
        fp32, shape ``(M, N)``.
    """
    if q.dtype == torch.int16:
        high, low = (_integer_product(part, t) for part in split_activations(q))
        return join_products(high, low).to(torch.float32)
    return _integer_product(q.to(torch.float32), t).to(torch.float32)


def join_products(high: Tensor, low: Tensor) -> Tensor:
    """``254 * high + low`` of integers, as int64: beyond K = 66,000 it needs more than 32 bits."""
    return HIGH_WEIGHT * high.to(torch.int64) + low.to(torch.int64)


def _integer_product(q: Tensor, t: Tensor) -> Tensor:
    """``q @ t.T`` of fp32 integers in [-127, 127] and {-1, 0, 1}: exact, in fp32 or int64."""
    if q.shape[-1] <= EXACT_K:
        return (q @ t.T).add_(0.0)  # makes -0.0, which no integer sum gives, to 0.0
    parts = [a @ b.T for a, b in zip(q.split(EXACT_K, dim=-1), t.split(EXACT_K, dim=-1))]
    return torch.stack([part.to(torch.int32) for part in parts]).sum(dim=0)


def epilogue(product: Tensor, s_x: Tensor, s_w: Tensor, bias: Tensor | None) -> Tensor:
    """``product * (s_x * s_w) + bias`` in fp32, each operation rounded on its own.

    Args:
        product: fp32, shape ``(..., N)``; overwritten.
        s_x: fp32, shape ``(..., 1)``.
        s_w: fp32, shape ``(1,)`` or ``(N, 1)``.
        bias: Shape ``(N,)``, or None.
    """
    y = product.mul_(s_x * s_w.reshape(-1))
    return y if bias is None else y.add_(bias.to(torch.float32))
