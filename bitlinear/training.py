"""The product of a layer in training: the straight-through estimator (STE).

The forward pass quantises both operands. The gradient passes through the rounding unchanged
(arXiv 1308.3432).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_activations, check_device
from .autograd import (
    Function,
    backward_dtype,
    compiles_transform,
    output_dtype,
    without_autocast,
)
from .groups import repeat_scales
from .ops import has_cpu_kernels
from .quantize import quantize_activations, quantize_weights


def straight_through_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    act_bits: int = 8,
    group_size: int = 0,
) -> Tensor:
    """Apply a linear map with quantised operands and straight-through gradients.

    The forward pass quantises the weight and computes what the deployed layer computes, to the bit.
    With ``q, s_x`` and ``t, s_w`` the quantised operands, the gradients are
    ``grad_x = grad @ (s_w * t)``, ``grad_weight = grad.T @ (s_x * q)`` and
    ``grad_bias = grad.sum(0)``, computed in fp32 (on a GPU, with a ``grad`` of 16 bits, operands
    have its dtype) and returned in the dtypes of the inputs. Higher derivatives are those of these
    formulas, straight through both quantisers.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``.
        weight: Floating point, shape ``(N, K)``.
        bias: Floating point, shape ``(N,)``, or None.
        eps: Lower bound of the absmax of a token and of the absmean of the weights.
        act_bits: 8 or 16, the bits of a quantised activation.
        group_size: 0 for one scale of the weights per tensor, -1 for one per output feature, or the
            number of weights of an output feature that share one.

    Returns:
        Shape ``(..., N)``, in the dtype of ``x``; under autocast, in the dtype of autocast.

    Raises:
        TypeError: ``x`` is neither fp32, fp16 nor bf16.
        ValueError: Shapes or devices do not fit.
    """
    compiling = torch.compiler.is_compiling()
    needs_gradients = torch.is_grad_enabled()
    if needs_gradients and compiling and compiles_transform():
        # In a transform, torch.compile ignores the backward() of a Function: the gradient would be
        # 0. A blend of strength 1 is the same product in differentiable operations.
        return blended_linear(x, weight, bias, torch.ones(()), eps, act_bits, group_size)
    dtype = _check_operands(x, weight, bias)
    if needs_gradients and not compiling and _is_plain(x, weight):
        native = torch.ops.bitlinear.straight_through_linear.default
        return cast(Tensor, native(x, weight, bias, eps, act_bits, group_size, dtype))
    w_packed, w_scale = torch.ops.bitlinear.quantize_weight.default(
        weight.detach(), eps, group_size
    )
    if not needs_gradients:
        with without_autocast(x.device.type):
            return _packed_linear(x, w_packed, w_scale, bias, eps, group_size, act_bits, dtype)
    edges = (x, weight)
    if not compiling:
        edges = _GradientEdges.apply(x, weight)  # type: ignore[no-untyped-call]
    output, *_ = _StraightThroughLinear.apply(  # type: ignore[no-untyped-call]
        *edges, bias, x.detach(), eps, group_size, act_bits, dtype, w_packed, w_scale
    )
    return cast(Tensor, output)


def blended_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strength: Tensor,
    eps: float = 1e-6,
    act_bits: int = 8,
    group_size: int = 0,
) -> Tensor:
    """Apply a linear map with partly quantised operands and straight-through gradients.

    ``linear(x + strength * (Q(x) - x), weight + strength * (Q(weight) - weight), bias)``. ``Q``
    quantises and multiplies with the scale again; the gradient treats it as the identity.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``.
        weight: Floating point, shape ``(N, K)``.
        bias: Floating point, shape ``(N,)``, or None.
        strength: fp32, shape ``()``: 0 for a plain linear layer, 1 for quantised operands.
        eps: Lower bound of the absmax of a token and of the absmean of the weights.
        act_bits, group_size: As for :func:`straight_through_linear`.

    Returns:
        Shape ``(..., N)``, in the dtype of ``x``; under autocast, in the dtype of autocast.

    Raises:
        TypeError: ``x`` is neither fp32, fp16 nor bf16.
        ValueError: Shapes or devices do not fit.
    """
    dtype = _check_operands(x, weight, bias)
    with without_autocast(x.device.type):
        with torch.no_grad():
            q, s_x = quantize_activations(x, eps, act_bits)
            t, s_w = quantize_weights(weight, eps, group_size)
            step_x = strength * (q * s_x - x)
            if group_size > 0:
                s_w = repeat_scales(s_w, group_size, weight.shape[1])
            step_w = strength * (t * s_w - weight)
        operands = ((x + step_x).float(), (weight + step_w).float())
        y = F.linear(*operands, None if bias is None else bias.float())
    return y.to(dtype)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether the function in C++ serves: no mode, transform or tracer observes its operations."""
    return (
        has_cpu_kernels()
        and {type(x), type(weight)} <= {Tensor, torch.nn.Parameter}
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
    )


def _check_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Check the operands and return the dtype of the output."""
    check_activations(x, weight.shape[-1])
    check_device(x, "weight", weight)
    check_device(x, "bias", bias)
    return output_dtype(x)


def _packed_linear(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    eps: float,
    group_size: int,
    act_bits: int,
    dtype: torch.dtype,
) -> Tensor:
    output: Tensor = torch.ops.bitlinear.linear.default(
        x, w_packed, w_scale, bias, x.shape[-1], eps, group_size, act_bits, dtype
    )
    return output


class _GradientEdges(Function):
    """Tensors without memory that stand for the operands in the autograd graph.

    They have the shapes and dtypes of the operands. A backward pass that is itself differentiated
    needs the operands' edges of the graph; saving the operands would keep 4 bytes of each value.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(()).expand(x.shape), weight.new_empty(()).expand(weight.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        needed = zip(output, ctx.needs_input_grad)
        ctx.mark_non_differentiable(*[edge for edge, needs_grad in needed if not needs_grad])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


class _StraightThrough(Function):
    """The identity on ``values``, with the gradient passed to ``edge``."""

    @staticmethod
    def forward(values: Tensor, edge: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _straight_through(values: Tensor, edge: Tensor) -> Tensor:
    # torch.compile has no second derivatives, and raises an error that says so.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return values
    return cast(Tensor, _StraightThrough.apply(values, edge))  # type: ignore[no-untyped-call]


def _multiply(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    eps: float,
    group_size: int,
    act_bits: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the product, and the quantised tokens for the backward pass."""
    ops = torch.ops.bitlinear
    if _is_fused(x, act_bits):
        q, s_x = quantize_activations(x, eps)
        q_sum = q.sum(dim=-1, keepdim=True, dtype=torch.int32)
        y = ops.quantized_linear.default(q, s_x, q_sum, w_packed, w_scale, bias, dtype, group_size)
    else:
        # torch.onnx.export(dynamo=False) takes the order of these calls for the order of the
        # outputs. The first one quantises x too, but to a layout of its own.
        y = _packed_linear(x, w_packed, w_scale, bias, eps, group_size, act_bits, dtype)
        q, s_x = ops.quantize_activations.default(x, eps, act_bits)
    return y, q, s_x


def _is_fused(tokens: Tensor, act_bits: int) -> bool:
    """Whether a compiler fuses the quantiser of these tokens with the operations around it.

    Then the quantiser is written in operations of torch. Layers that read one input also share it:
    the compiler removes equal operations.
    """
    # Since torch 2.7. Before 2.13, is_exporting() is also true where torch.compile traces.
    is_exporting = getattr(torch.compiler, "_is_exporting_flag", False)
    return tokens.is_cuda and act_bits == 8 and torch.compiler.is_compiling() and not is_exporting


def _expand_activations(q: Tensor, s_x: Tensor, dtype: torch.dtype) -> Tensor:
    if _is_fused(q, 8 * q.element_size()):
        return (q.to(torch.float32) * s_x).to(dtype)
    tokens: Tensor = torch.ops.bitlinear.expand_activations.default(q, s_x, dtype)
    return tokens


class _StraightThroughLinear(Function):
    """Quantised product forward; gradients as if neither operand had been rounded.

    ``x_edge`` and ``weight_edge`` are the operands' edges of the graph (:class:`_GradientEdges`).
    The values come from ``x``, ``w_packed`` and ``w_scale``.
    """

    @staticmethod
    def forward(
        x_edge: Tensor,
        weight_edge: Tensor,
        bias: Tensor | None,
        x: Tensor,
        eps: float,
        group_size: int,
        act_bits: int,
        dtype: torch.dtype,
        w_packed: Tensor,
        w_scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(x.device.type):
            return _multiply(x, w_packed, w_scale, bias, eps, group_size, act_bits, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x_edge, weight_edge, bias, _, _, group_size, *_, w_packed, w_scale = inputs
        _, q, s_x = output
        ctx.mark_non_differentiable(q, s_x)
        ctx.set_materialize_grads(False)  # allocates no zeros for the gradients of q and s_x
        # 1 or 2 bytes per activation and 2 bits per weight; nn.Linear keeps 4 bytes of each.
        ctx.save_for_backward(q, s_x, w_packed, w_scale)
        # Hooks of saved tensors (offloading to the CPU) would give the edges memory.
        ctx.edges = (x_edge, weight_edge)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.group_size = group_size

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        expand_weight = torch.ops.bitlinear.expand_weight.default
        q, s_x, w_packed, w_scale = ctx.saved_tensors
        x_edge, weight_edge = ctx.edges
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        device_type = grad.device.type
        grad_x = grad_weight = grad_bias = None
        with without_autocast(device_type):
            dtype = backward_dtype(device_type, grad.dtype)
            g = grad.reshape(-1, grad.shape[-1]).to(dtype)
            if needs_x:
                weight = expand_weight(w_packed, q.shape[-1], w_scale, dtype, ctx.group_size)
                grad_x = g @ _straight_through(weight, weight_edge)
                grad_x = grad_x.to(x_edge.dtype).reshape(q.shape)
            if needs_weight:
                tokens = _straight_through(_expand_activations(q, s_x, dtype), x_edge)
                grad_weight = g.T @ tokens.reshape(-1, q.shape[-1])
                grad_weight = grad_weight.to(weight_edge.dtype)
            if needs_bias:
                grad_bias = g.sum(dim=0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, *(None,) * 7
