"""The product of tokens that are already quantised, in plain torch.

Training keeps the quantised tokens for the backward pass, and a compiler computes them together
with the operations in front of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import packing
from .arguments import (
    ACTIVATION_DTYPES,
    check_device,
    check_group_size,
    check_in_features,
    check_operand,
    dtype_name,
)
from .quantize import linear_of_quantized


def reference_quantized_linear(
    q: Tensor,
    s_x: Tensor,
    q_sum: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 0,
) -> Tensor:
    """Compute ``linear`` of the tokens ``q * s_x`` without quantising them again.

    Args:
        q: int8, shape ``(..., K)``; see :func:`bitlinear.quantize.quantize_activations`.
        s_x: fp32, shape ``(..., 1)``.
        q_sum: int32, shape ``(..., 1)``: the sum of each token of ``q``.
        w_packed: uint8, shape ``(N, ceil(K/4))``; see :mod:`bitlinear.packing`.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``; with groups ``(N, ceil(K/group_size))``.
        bias: Floating point, shape ``(N,)``, or None; used as fp32.
        dtype: fp32, fp16 or bf16, of the output.
        group_size: The number of weights of a row that share a scale; 0 or -1 if all do.

    Returns:
        Shape ``(..., N)``.

    Raises:
        TypeError, ValueError: A dtype, a shape or a device is wrong, or a packed byte is not valid.
    """
    _check(q, s_x, q_sum, w_packed, w_scale, bias, dtype, group_size)
    packing.check_packed(w_packed, q.shape[-1])
    tokens, scales = q.reshape(-1, q.shape[-1]), s_x.reshape(-1, 1)
    y = multiply(tokens, scales, w_packed, w_scale, bias, dtype, group_size)
    return y.reshape(*q.shape[:-1], len(w_packed))


def fake_quantized_linear(
    q: Tensor,
    s_x: Tensor,
    q_sum: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 0,
) -> Tensor:
    """Return an empty output."""
    _check(q, s_x, q_sum, w_packed, w_scale, bias, dtype, group_size)
    return s_x.new_empty((*q.shape[:-1], w_packed.shape[0]), dtype=dtype)


def multiply(
    q: Tensor,
    s_x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 0,
) -> Tensor:
    """Multiply quantised tokens ``(M, K)`` by packed weights; return ``(M, N)``."""
    in_features, out_features = q.shape[-1], w_packed.shape[0]
    y = s_x.new_empty((q.shape[0], out_features), dtype=dtype)
    step = packing.rows_per_chunk(4 * in_features, q.is_cuda)
    for first in range(0, out_features, step):
        rows = slice(first, first + step)
        t = packing.unpack_unchecked(w_packed[rows], in_features).to(torch.float32)
        y[:, rows] = linear_of_quantized(
            *(q, s_x, t),
            w_scale[rows] if w_scale.dim() == 2 else w_scale,
            None if bias is None else bias[rows],
            group_size,
        )
    return y


def check_quantized(q: Tensor, s_x: Tensor, dtype: torch.dtype) -> None:
    """Check quantised tokens, and the dtype of what is computed from them."""
    if (
        (q.dtype not in (torch.int8, torch.int16) or s_x.dtype != torch.float32)
        or (not q.dim() or s_x.shape != (*q.shape[:-1], 1))
        or s_x.device != q.device
    ):
        raise ValueError(
            f"bitlinear: q must be int8 or int16, of shape (..., K), and s_x float32, of shape "
            f"(..., 1) on the same device, but they are {dtype_name(q.dtype)} of shape "
            f"{list(q.shape)} on {q.device} and {dtype_name(s_x.dtype)} of shape "
            f"{list(s_x.shape)} on {s_x.device}"
        )
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(
            f"bitlinear: dtype must be float32, float16 or bfloat16, but it is {dtype_name(dtype)}"
        )


def _check(
    q: Tensor,
    s_x: Tensor,
    q_sum: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int,
) -> None:
    """Raise the errors of :func:`reference_quantized_linear`; arguments.h has the same."""
    check_quantized(q, s_x, dtype)
    if q.dtype != torch.int8:
        raise TypeError("bitlinear: q must be int8, but it is int16: quantise with act_bits = 8")
    if q_sum.dtype != torch.int32 or q_sum.shape != s_x.shape:
        raise ValueError(
            f"bitlinear: q_sum must be int32, of shape {list(s_x.shape)}, but it is "
            f"{dtype_name(q_sum.dtype)} of shape {list(q_sum.shape)}"
        )
    check_device(q, "q_sum", q_sum)
    check_in_features(q.shape[-1])
    check_group_size(group_size)
    check_operand(q, w_packed, w_scale, bias, q.shape[-1], group_size)
