"""The operators for the head of a model, in plain torch: few tokens by int8 or bf16 weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import packing
from .arguments import dtype_name
from .quantize import epilogue
from .quantized_linear import check_quantized

# The sums of bf16_product that run side by side.
_BF16_SUMS = 64


def reference_int8_product(
    q: Tensor, s_x: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Multiply tokens of 16 bits by int8 weights with a scale per row.

    ``float(q @ w.T) * (s_x * w_scale.T)``: the sums are exact, and each operation on them is one
    rounding to fp32, before the one to ``dtype``.

    Args:
        q: int16, shape ``(..., K)``; see :func:`bitlinear.quantize.quantize_activations`.
        s_x: fp32, shape ``(..., 1)``.
        w: int8, shape ``(N, K)``.
        w_scale: fp32, shape ``(N, 1)``.
        dtype: fp32, fp16 or bf16, of the output.

    Returns:
        Shape ``(..., N)``.

    Raises:
        TypeError: ``q`` is int8, or ``dtype`` is not one of the three.
        ValueError: Another dtype, a shape or a device is wrong.
    """
    _check_int8_product(q, s_x, w, w_scale, dtype)
    out_features, in_features = w.shape
    scales = s_x.reshape(-1, 1)
    tokens = q.reshape(len(scales), in_features).to(torch.float64)
    y = s_x.new_empty((len(scales), out_features), dtype=dtype)
    step = packing.rows_per_chunk(8 * in_features, q.is_cuda)
    for first in range(0, out_features, step):
        rows = slice(first, first + step)
        sums = (tokens @ w[rows].to(torch.float64).T).add_(0.0)  # no integer sum gives -0.0
        y[:, rows] = epilogue(sums.to(torch.float32), scales, w_scale[rows], None)
    return y.reshape(*q.shape[:-1], out_features)


def fake_int8_product(
    q: Tensor, s_x: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return an empty output."""
    _check_int8_product(q, s_x, w, w_scale, dtype)
    return s_x.new_empty((*q.shape[:-1], w.shape[0]), dtype=dtype)


def reference_bf16_product(x: Tensor, w: Tensor) -> Tensor:
    """Multiply tokens by weights of bf16, in fp32: ``x @ w.T``.

    64 sums run side by side: sum ``j`` adds the products of ``k = j, j + 64, ...``, in this order.
    Then the upper half of the sums is added to the lower half, until one is left.

    Args:
        x: bf16, shape ``(..., K)``.
        w: bf16, shape ``(N, K)``.

    Returns:
        bf16, shape ``(..., N)``.

    Raises:
        ValueError: A dtype, a shape or a device is wrong.
    """
    _check_bf16_product(x, w)
    missing = -w.shape[1] % _BF16_SUMS if w.shape[1] else _BF16_SUMS
    tokens, weight = (pad(t.to(torch.float32), (0, missing)) for t in (x[..., None, :], w))
    sums = tokens.new_zeros(*x.shape[:-1], w.shape[0], _BF16_SUMS)
    for a, b in zip(tokens.split(_BF16_SUMS, dim=-1), weight.split(_BF16_SUMS, dim=-1)):
        sums = sums + a * b
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, dim=-1)
        sums = low + high
    return sums[..., 0].to(torch.bfloat16)


def fake_bf16_product(x: Tensor, w: Tensor) -> Tensor:
    """Return an empty output."""
    _check_bf16_product(x, w)
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _check_int8_product(
    q: Tensor, s_x: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype
) -> None:
    """Raise the errors of :func:`reference_int8_product`; arguments.h has the same."""
    check_quantized(q, s_x, dtype)
    if q.dtype != torch.int16:
        raise TypeError("bitlinear: q must be int16, but it is int8: quantise with act_bits = 16")
    in_features, out_features = q.shape[-1], w.shape[0] if w.dim() else 0
    for name, tensor, kind, shape, expected in (
        ("w", w, torch.int8, [out_features, in_features], f"(N, {in_features})"),
        ("w_scale", w_scale, torch.float32, [out_features, 1], f"({out_features}, 1)"),
    ):
        if tensor.dtype != kind or list(tensor.shape) != shape or tensor.device != q.device:
            raise ValueError(
                f"bitlinear: {name} must be {dtype_name(kind)}, of shape {expected}, on "
                f"{q.device}, but it is {dtype_name(tensor.dtype)} of shape {list(tensor.shape)} "
                f"on {tensor.device}"
            )


def _check_bf16_product(x: Tensor, w: Tensor) -> None:
    """Raise the errors of :func:`reference_bf16_product`; arguments.h has the same."""
    if (
        x.dtype != torch.bfloat16
        or w.dtype != torch.bfloat16
        or (w.dim() != 2 or not x.dim() or x.shape[-1] != w.shape[1])
        or x.device != w.device
    ):
        raise ValueError(
            f"bitlinear: x must be bfloat16, of shape (..., K), and w bfloat16, of shape (N, K) on "
            f"the same device, but they are {dtype_name(x.dtype)} of shape {list(x.shape)} on "
            f"{x.device} and {dtype_name(w.dtype)} of shape {list(w.shape)} on {w.device}"
        )
