"""An independent oracle in NumPy for the results of BitLinear. It shares no code with the package.

The integer product is computed in float64, where it is exact: sums stay far below 2^53. Float steps
are single float32 operations in the order of the specification, so results are equal to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

F32 = np.float32
QMAX = {8: 127, 16: 32385}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize_activations(
    x: Any, eps: float = 1e-6, act_bits: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """``(q, s_x)``: int64 (..., K), float32 (..., 1). Non-finite rows: q = 0, s_x = NaN."""
    x = np.asarray(x, F32)
    qmax = QMAX[act_bits]
    with np.errstate(all="ignore"):
        a = np.maximum(np.max(np.abs(x), axis=-1, keepdims=True), F32(eps))
        q = np.clip(np.rint(x * (F32(qmax) / a)), -qmax, qmax)
        s_x = a / F32(qmax)
    bad = ~np.isfinite(a)
    return np.where(bad, 0, q).astype(np.int64), np.where(bad, F32("nan"), s_x)


def weight_scale(w: Any, eps: float = 1e-6, per_row: bool = False, group_size: int = 0) -> Any:
    """Absmean in float64, rounded once. A correct scale is within a few ulp of it.

    Of groups, before they are rounded to :func:`integer_scales`.
    """
    magnitudes = np.abs(np.asarray(w, np.float64))
    if group_size > 0:
        starts = range(0, magnitudes.shape[1], group_size)
        groups = [magnitudes[:, i : i + group_size].mean(axis=1) for i in starts]
        return np.maximum(F32(np.stack(groups, axis=1)), F32(eps))
    mean = magnitudes.mean(axis=1, keepdims=True) if per_row else magnitudes.mean()
    return np.maximum(F32(mean), F32(eps))


def integer_scales(w_scale: Any) -> tuple[np.ndarray, np.ndarray]:
    """``(m, unit)``, int64 (N, groups), float32 (N, 1): ``w_scale ~ m * unit``, m of 15 bits."""
    w_scale = np.asarray(w_scale, np.float64)
    largest = np.abs(w_scale).max(axis=1, keepdims=True)
    finite = np.isfinite(largest)
    _, exponent = np.frexp(np.where(finite, largest, 1.0))
    unit = np.ldexp(1.0, np.maximum(exponent - 15, -126))
    m = np.clip(np.rint(np.where(finite, w_scale, 0.0) / unit), -32767, 32767).astype(np.int64)
    return m, np.where(finite, unit, np.nan).astype(F32)


def spread(w_scale: Any, group_size: int, k: int) -> np.ndarray:
    """The scale of each weight: (N, groups) to (N, K)."""
    return np.repeat(np.asarray(w_scale), group_size, axis=1)[:, :k]


def ternarize(w: Any, scale: Any) -> np.ndarray:
    """int64 in {-1, 0, 1}."""
    return np.clip(np.rint(np.asarray(w, F32) / np.asarray(scale, F32)), -1, 1).astype(np.int64)


def pack(t: np.ndarray) -> np.ndarray:
    """uint8 (N, ceil(K/4)): base-4 digits, the most significant first; absent weights are 0."""
    n, k = t.shape
    codes = np.ones((n, -(-k // 4) * 4), np.int64)
    codes[:, :k] = t + 1
    return (codes.reshape(n, codes.shape[1] // 4, 4) @ [64, 16, 4, 1]).astype(np.uint8)


def linear(
    x: Any,
    t: Any,
    w_scale: Any,
    bias: Any = None,
    eps: float = 1e-6,
    act_bits: int = 8,
    group_size: int = 0,
) -> np.ndarray:
    """float32 (M, N), before the rounding to the output dtype.

    ``w_scale``: (), (1,) or (N, 1); with groups (N, groups).
    """
    if group_size > 0:
        m, w_scale = integer_scales(w_scale)
        t = t * spread(m, group_size, t.shape[1])
    q, s_x = quantize_activations(x, eps, act_bits)
    assert QMAX[act_bits] * q.shape[-1] * (32767 if group_size > 0 else 1) < 2**53
    # As exact as in int64, and eight times faster. Adding 0.0 takes the sign of -0.0.
    product = (q.astype(np.float64) @ np.asarray(t, np.float64).T + 0.0).astype(F32)
    with np.errstate(all="ignore"):
        y = product * (s_x * np.asarray(w_scale, F32).reshape(1, -1))
        return y if bias is None else y + np.asarray(bias, F32)


def exp(z: Any) -> np.ndarray:
    """float32: ``2**n * exp(r)`` with ``z = n * ln(2) + r``; a polynomial of ``r`` (Cephes)."""
    with np.errstate(all="ignore"):
        z = np.clip(np.asarray(z, F32), F32(-86), F32(88))
        n = np.rint(z * F32(1.44269504))
        r = (z - n * F32(0.693359375)) + n * F32(2.12194440e-4)
        p = np.zeros_like(r)
        for digits in (
            *("1.9875691500E-4", "1.3981999507E-3", "8.3334519073E-3"),
            *("4.1665795894E-2", "1.6666665459E-1", "5.0000001201E-1"),
        ):
            p = p * r + F32(digits)
        return np.ldexp((p * (r * r) + r) + F32(1), n.astype(np.int64))


def sum_in_pairs(values: np.ndarray) -> np.ndarray:
    """float32 (M,), of (M, K): the first 2^n values, 2^n < K <= 2^(n+1), then those behind them."""
    count = values.shape[-1]
    if count == 1:
        return values[..., 0]
    half = 2 ** ((count - 1).bit_length() - 1)
    return sum_in_pairs(values[..., :half]) + sum_in_pairs(values[..., half:])


def prologue(
    x: Any, activation: str | None = None, norm_weight: Any = None, norm_eps: float = 0.0
) -> np.ndarray:
    """float32 (M, K), of (M, K) or of (M, 2 K) with an activation: a gate, then an RMSNorm."""
    values = np.asarray(x, F32)
    with np.errstate(all="ignore"):
        if activation is not None:
            a, b = np.split(values, 2, axis=-1)
            positive = np.maximum(a, F32(0))
            values = (a / (F32(1) + exp(-a)) if activation == "silu" else positive * positive) * b
        if norm_weight is not None:
            mean = sum_in_pairs(values * values) / F32(values.shape[-1])
            factor = F32(1) / np.sqrt(mean + F32(norm_eps))
            values = (values * factor[:, None]) * np.asarray(norm_weight, F32)
    return values


def lookup(ids: Any, t: Any, w_scale: Any) -> np.ndarray:
    """float32 (..., K), before the rounding to the output dtype. ``w_scale``: (1,) or (N, 1)."""
    table = np.asarray(t, F32) * np.asarray(w_scale, F32)
    return table[np.asarray(ids)]


def expected(
    x: torch.Tensor,
    t: Any,
    w_scale: Any,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    act_bits: int = 8,
    group_size: int = 0,
) -> torch.Tensor:
    """:func:`linear` for tensors: any leading dimensions, one rounding to the output dtype."""
    rows = x.detach().reshape(-1, x.shape[-1]).float().numpy()
    bias_values = None if bias is None else bias.detach().float().numpy()
    y = torch.from_numpy(linear(rows, t, w_scale, bias_values, eps, act_bits, group_size))
    return y.to(dtype or x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def expected_fused(
    x: torch.Tensor,
    weights: Any,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    act_bits: int = 8,
    activation: str | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    residual: torch.Tensor | None = None,
    group_size: int = 0,
) -> torch.Tensor:
    """The fused product for tensors, as :func:`expected`. ``weights``: ``(t, w_scale, bias)``."""
    norm = None if norm_weight is None else norm_weight.detach().float().numpy()
    rows = x.detach().reshape(-1, x.shape[-1]).float().numpy()
    values = prologue(rows, activation, norm, norm_eps)
    parts = [
        linear(
            *(values, t, w_scale, None if bias is None else bias.detach().float()),
            *(eps, act_bits, group_size),
        )
        for t, w_scale, bias in weights
    ]
    y = np.concatenate(parts, axis=1)
    y = y.reshape(*x.shape[:-1], y.shape[1])
    if residual is not None:
        y = y + residual.detach().float().numpy()
    return torch.from_numpy(y).to(dtype or x.dtype)


def ternary(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Random weights in {-1, 0, 1}."""
    return np.random.default_rng(seed).integers(-1, 2, (n, k))


def adversarial_rows(k: int, seed: int = 0, act_bits: int = 8) -> np.ndarray:
    """float32 (M, k): rows that are hard to quantise."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(k).astype(F32)
    # With this maximum the scale is 1, so every k + 0.5 is a tie.
    qmax = QMAX[act_bits]
    ties = (rng.integers(-qmax, qmax, k) + 0.5).astype(F32)
    ties[0] = qmax
    # Every rest of the division by 254, at which 16 bits are split; 127 is a tie.
    rests = (np.arange(k) % 255 - 127 + 254 * (np.arange(k) % 127)).astype(F32)
    rests[0] = qmax
    spike = np.full(k, 1e-3, F32)
    spike[-1] = -1e4
    rows = [
        normal,
        ties,
        rests,
        spike,
        np.zeros(k),
        np.full(k, -0.0),
        np.full(k, 1e-7),  # Below eps.
        np.full(k, 1e-42),  # Subnormal.
        np.full(k, 127.0),
        np.full(k, -127.0),
        normal * F32(3e37),
        normal * F32(1e-30),
        np.where(np.arange(k) % 2, F32(6e4), F32(-6e4)),
    ]
    return np.stack(rows).astype(F32)


def assert_same_bits(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Same dtype, shape and values to the bit, the sign of zero included; NaN equals NaN."""
    assert actual.dtype == wanted.dtype
    assert actual.shape == wanted.shape
    # Every fp16 and bf16 value is a float32 value.
    values, wanted_values = actual.detach().float().numpy(), wanted.detach().float().numpy()
    np.testing.assert_array_equal(values, wanted_values)
    signs, wanted_signs = (np.signbit(v) & ~np.isnan(v) for v in (values, wanted_values))
    np.testing.assert_array_equal(signs, wanted_signs)
