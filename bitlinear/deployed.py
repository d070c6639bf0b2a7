"""The product of a deployed layer, with the gradient of its input.

The weights are constants. The gradient passes straight through the quantiser of the activations
(straight-through estimator, arXiv 1308.3432), so that adapters and the layers in front can train.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import CPU_MULTIPLIES_BF16, Function, backward_dtype, without_autocast
from .groups import count_groups

# The size of a block of expanded weights on a CPU. malloc keeps blocks of this size for the next
# call. Larger ones it gets from the system, which clears them in every call; that takes as long as
# a third of the product.
_BLOCK_BYTES = 24 << 20


def deployed_linear(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    eps: float = 1e-6,
    group_size: int = 0,
    act_bits: int = 8,
) -> Tensor:
    """Apply ``torch.ops.bitlinear.linear``, with gradients of ``x`` and ``bias``.

    ``grad_x = grad @ (w_scale * t)``; see :func:`input_gradient`.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``.
        w_packed: uint8, shape ``(N, ceil(K/4))``; see :mod:`bitlinear.packing`.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``; with groups ``(N, ceil(K/group_size))``.
        bias: Floating point, shape ``(N,)``, or None.
        in_features: ``K``.
        eps: Lower bound of the absmax of a token.
        group_size: The number of weights of a row that share a scale; 0 or -1 if all do.
        act_bits: 8 or 16, the bits of a quantised activation.

    Returns:
        Shape ``(..., N)``, in the dtype of ``x``; under autocast, in the dtype of autocast.

    Raises:
        TypeError, ValueError: See :func:`bitlinear.arguments.check_linear`.
    """
    arguments = (x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits)
    if torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad) or is_transformed()
    ):
        output: Tensor = _DeployedLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        output = torch.ops.bitlinear.linear.default(*arguments)
    return output


def input_gradient(
    grad: Tensor, w_packed: Tensor, w_scale: Tensor, in_features: int, group_size: int = 0
) -> Tensor:
    """``grad @ (w_scale * t)``, from packed weights.

    The weights are expanded for the product, on a CPU a block of columns at a time, and not kept.
    The product is in fp32, with two exceptions, in which the weights are rounded as those of
    ``nn.Linear`` are: on a GPU it is in the dtype of ``grad``, and on a CPU with instructions for
    it in bf16, if ``grad`` is bf16 and there is one scale. (One rounded scale changes all products
    by the same factor.)

    Args:
        grad: Gradient of the output, shape ``(..., N)``.
        w_packed: uint8, shape ``(N, ceil(K/4))``.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``; with groups ``(N, ceil(K/group_size))``.
        in_features: ``K``.
        group_size: The number of weights of a row that share a scale; 0 or -1 if all do.

    Returns:
        Shape ``(..., K)``.
    """
    expand = torch.ops.bitlinear.expand_weight.default
    device_type = grad.device.type
    with without_autocast(device_type):
        dtype = backward_dtype(device_type, grad.dtype)
        if CPU_MULTIPLIES_BF16 and grad.dtype == torch.bfloat16 and w_scale.dim() == 1:
            dtype = grad.dtype
        columns: int = in_features
        if device_type == "cpu":
            count = len(w_packed) * in_features * dtype.itemsize // _BLOCK_BYTES + 1
            unit = group_size if group_size > 0 else 64
            columns = ((in_features - 1) // count // unit + 1) * unit  # blocks of about one size
        grad, blocks = grad.to(dtype), []
        for first in range(0, in_features, columns):
            width = min(columns, in_features - first)
            packed = w_packed[:, first // 4 : (first + width + 3) // 4]
            scales = w_scale
            if group_size > 0:
                groups = count_groups(width, group_size)
                scales = w_scale.narrow(1, first // group_size, groups)
            blocks.append(grad @ expand(packed, width, scales, dtype, group_size))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


class _DeployedLinear(Function):
    """The operator, with the gradients of ``x`` and of the bias."""

    @staticmethod
    def forward(
        x: Tensor,
        w_packed: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        in_features: int,
        eps: float,
        group_size: int,
        act_bits: int,
    ) -> Tensor:
        output: Tensor = torch.ops.bitlinear.linear.default(
            x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits
        )
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w_packed, w_scale, bias, ctx.in_features, _, ctx.group_size, _ = inputs
        ctx.save_for_backward(w_packed, w_scale)
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_scale, needs_bias, *_ = ctx.needs_input_grad
        raise_if_scale_needs_gradient(needs_scale)
        grad_x = grad_bias = None
        if needs_x:
            w_packed, w_scale = ctx.saved_tensors
            grad_x = input_gradient(grad, w_packed, w_scale, ctx.in_features, ctx.group_size)
            grad_x = grad_x.to(ctx.x_dtype)
        if needs_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).to(torch.float32).sum(dim=0)
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None, None, None, None


def raise_if_scale_needs_gradient(needed: bool) -> None:
    """Raise NotImplementedError if the gradient of ``w_scale`` is asked for."""
    if needed:
        raise NotImplementedError(
            "bitlinear: w_scale has no gradient, as the weights of a deployed layer are "
            "constants: call undeploy() to train them, or w_scale.requires_grad_(False)"
        )


def is_transformed() -> bool:
    """Whether torch.func transforms a function, in which ``requires_grad`` can be hidden."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
