"""Deployed layers that read one input, with what stands before and behind them, as one product.

The weights are constants. Gradients of the other operands pass straight through the quantiser, as
in :mod:`bitlinear.deployed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import Function
from .deployed import input_gradient, is_transformed, raise_if_scale_needs_gradient

_fused_linear = torch.ops.bitlinear.fused_linear.default


def fused_linear(
    x: Tensor,
    w_packed: Sequence[Tensor],
    w_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    in_features: int,
    eps: float = 1e-6,
    group_size: int = 0,
    act_bits: int = 8,
    activation: str | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Apply ``torch.ops.bitlinear.fused_linear``, with gradients of all but the weights.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``; with an activation ``(..., 2 K)``: two halves
            ``a`` and ``b``, of which the product reads ``activation(a) * b``.
        w_packed: 1 to 4 weights: uint8, shapes ``(N_i, ceil(K/4))``; see :mod:`bitlinear.packing`.
        w_scale: The scale of each weight: fp32, shape ``(1,)`` or ``(N_i, 1)``; with groups
            ``(N_i, ceil(K/group_size))``.
        bias: The bias of each weight: floating point, shape ``(N_i,)``; or None.
        in_features: ``K``.
        eps: Lower bound of the absmax of a token.
        group_size: The number of weights of a row that share a scale; 0 or -1 if all do.
        act_bits: 8 or 16, the bits of a quantised activation.
        activation: ``"silu"``; ``"relu2"``, the square of ReLU; or None for no gate.
        norm_weight: The weight of an RMSNorm in front of the product (behind the gate): floating
            point, shape ``(K,)``. None for no norm.
        norm_eps: What the norm adds to the mean square.
        residual: Added to the output, whose shape it has: fp32, fp16 or bf16. Or None.

    Returns:
        Shape ``(..., N_0 + N_1 + ...)``: the outputs of the weights side by side, in the dtype of
        ``x``; under autocast, in the dtype of autocast. What happens between ``x`` and the output
        is computed in fp32 and not rounded to 16 bits: :func:`bitlinear.ops.reference_fused_linear`
        is the specification.

    Raises:
        TypeError, ValueError: See :func:`bitlinear.arguments.check_fused_linear`.
    """
    if torch.is_grad_enabled() and (
        is_transformed()
        or any(t is not None and t.requires_grad for t in (x, norm_weight, residual, *bias))
    ):
        output: Tensor = _FusedLinear.apply(  # type: ignore[no-untyped-call]
            *(x, norm_weight, residual, in_features, eps, group_size, act_bits, activation),
            norm_eps,
            *(*w_packed, *w_scale, *bias),
        )
    else:
        output = _fused_linear(
            *(x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits),
            *(activation, norm_weight, norm_eps, residual),
        )
    return output


class _FusedLinear(Function):
    """The operator, with gradients. ``weights``: all packed weights, then scales, then biases."""

    @staticmethod
    def forward(
        x: Tensor,
        norm_weight: Tensor | None,
        residual: Tensor | None,
        in_features: int,
        eps: float,
        group_size: int,
        act_bits: int,
        activation: str | None,
        norm_eps: float,
        *weights: Tensor | None,
    ) -> Tensor:
        output: Tensor = _fused_linear(
            *(x, *_thirds(weights), in_features, eps, group_size, act_bits),
            *(activation, norm_weight, norm_eps, residual),
        )
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, norm_weight, residual, ctx.in_features, _, ctx.group_size, *_ = inputs[:9]
        ctx.activation, ctx.norm_eps = inputs[7:9]
        w_packed, w_scale, bias = _thirds(inputs[9:])
        ctx.has_prologue = ctx.activation is not None or norm_weight is not None
        ctx.save_for_backward(x if ctx.has_prologue else None, norm_weight, *w_packed, *w_scale)
        ctx.x_dtype = x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.bias_dtypes = [None if b is None else b.dtype for b in bias]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, *weights = ctx.saved_tensors
        count = len(weights) // 2
        needs_x, needs_norm, needs_residual = ctx.needs_input_grad[:3]
        _, needs_scale, needs_bias = _thirds(ctx.needs_input_grad[9:])
        raise_if_scale_needs_gradient(any(needs_scale))
        grads = grad.split([len(w) for w in weights[:count]], dim=-1)
        grad_x = grad_norm = None
        if needs_x or needs_norm:
            parts = [
                input_gradient(g, w, s, ctx.in_features, ctx.group_size).to(torch.float32)
                for g, w, s in zip(grads, weights[:count], weights[count:])
            ]
            grad_values = sum(parts[1:], parts[0])
            if ctx.has_prologue:
                grad_values, grad_norm = _prologue_gradients(
                    grad_values, x, ctx.activation, norm_weight, ctx.norm_eps
                )
            grad_x = grad_values.to(ctx.x_dtype)
        grad_residual = grad.to(ctx.residual_dtype) if needs_residual else None
        grad_bias = [
            g.reshape(-1, g.shape[-1]).to(torch.float32).sum(dim=0).to(dtype) if needed else None
            for g, dtype, needed in zip(grads, ctx.bias_dtypes, needs_bias)
        ]
        no_weights = [None] * (2 * count)
        return grad_x, grad_norm, grad_residual, *[None] * 6, *no_weights, *grad_bias


def _thirds(weights: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    count = len(weights) // 3
    return weights[:count], weights[count : 2 * count], weights[2 * count :]


def _prologue_gradients(
    grad: Tensor, x: Tensor, activation: str | None, norm_weight: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``x``, in fp32, and of ``norm_weight``, from that of the quantised values.

    Autograd can differentiate every operation here, unlike those of :mod:`bitlinear.prologue`.
    """
    values = x.to(torch.float32)
    if activation is not None:
        a, b = values.chunk(2, dim=-1)
        activated, slope = _activation_and_slope(a, activation)
        values = activated * b
    grad_norm = None
    if norm_weight is not None:
        factor = (values.square().mean(dim=-1, keepdim=True) + norm_eps).rsqrt()
        normed = values * factor
        grad_norm = (grad * normed).reshape(-1, len(norm_weight)).sum(dim=0).to(norm_weight.dtype)
        grad = grad * norm_weight.to(torch.float32)
        grad = factor * (grad - normed * (grad * normed).mean(dim=-1, keepdim=True))
    if activation is not None:
        grad = torch.cat([grad * b * slope, grad * activated], dim=-1)
    return grad, grad_norm


def _activation_and_slope(a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if activation == "silu":
        sigmoid = a.sigmoid()
        return a * sigmoid, sigmoid * (1 + a * (1 - sigmoid))
    positive = a.relu()
    return positive.square(), 2 * positive
