"""``torch.ops.bitlinear.linear``: schema, shape inference, reference implementation, autocast.

The CPU kernel is registered from C++ where it could be compiled. Everything else about the
operator is here, and the reference implementation runs wherever there is no kernel.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import integrations, packing
from .quantize import (
    ACTIVATION_DTYPES,
    MAX_IN_FEATURES,
    check_activations,
    check_device,
    check_eps,
    dtype_name,
    epilogue,
    integer_product,
    product_dtype,
    quantize_activations,
    refuse_layout,
    row_sums,
    scale_of_sums,
    ternarize,
    without_autocast,
)

# Parameters that no kernel serves yet (group_size, act_bits) are here so that graphs which are
# exported today can be loaded when one does.
SCHEMAS = (
    "linear(Tensor x, Tensor w_packed, Tensor w_scale, Tensor? bias, int in_features, "
    "float eps=1e-6, int group_size=0, int act_bits=8, ScalarType? out_dtype=None) -> Tensor",
    "quantize_weight(Tensor weight, float eps=1e-6) -> (Tensor, Tensor)",
    "expand_weight(Tensor w_packed, int in_features, Tensor? w_scale=None, "
    "ScalarType? dtype=None) -> Tensor",
    "quantize_activations(Tensor x, float eps=1e-6) -> (Tensor, Tensor)",
    "expand_activations(Tensor q, Tensor s_x, ScalarType? dtype=None) -> Tensor",
)

# Of tensors without strides. Where no kernel is registered, torch's message lists all that are.
_REFUSED_KEYS = (
    *("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA"),
    *("NestedTensorCPU", "NestedTensorCUDA", "MkldnnCPU"),
)

# The registrations last as long as this object.
_library: torch.library.Library | None = None


def register(compiled: bool) -> None:
    """Completes the operator. Called once, by ``import bitlinear``.

    Args:
        compiled: Whether C++ has already defined ``bitlinear::linear``, with its CPU kernel and
            its autograd rule.
    """
    global _library  # noqa: PLW0603
    if _library is not None:
        return
    _library = library = torch.library.Library("bitlinear", "FRAGMENT")
    pt2 = (torch.Tag.pt2_compliant_tag,)

    if not compiled:
        for schema in SCHEMAS:
            library.define(schema, tags=pt2)
    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "linear": (_fake_linear, reference_linear),
        "quantize_weight": (_fake_quantize_weight, reference_quantize_weight),
        "expand_weight": (_fake_expand_weight, reference_expand_weight),
        "quantize_activations": (_fake_quantize_activations, quantize_activations),
        "expand_activations": (_fake_expand_activations, reference_expand_activations),
    }
    for name, (fake, reference) in implementations.items():
        torch.library.register_fake(f"bitlinear::{name}", fake, lib=library)
        library.impl(name, reference, "CompositeExplicitAutograd")
    for key in _REFUSED_KEYS:
        library.impl("linear", refuse_layout, key)
    for device_type in ("cpu", "cuda"):
        key = f"Autocast{device_type.upper()}"
        library.impl("linear", _autocast_linear(device_type, key), key)
    if not compiled:
        torch.library.register_autograd("bitlinear::linear", _no_derivative, lib=library)
    if hasattr(torch.library, "register_vmap"):  # since torch 2.5; before, vmap is a loop
        for name in implementations:
            operator = getattr(torch.ops.bitlinear, name).default
            torch.library.register_vmap(f"bitlinear::{name}", _vmap(operator), lib=library)
    register_flop_formula(torch.ops.bitlinear.linear)(_count_flops)
    integrations.watch_imports()


def check_arguments(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    eps: float,
    group_size: int,
    act_bits: int,
    out_dtype: torch.dtype | None,
) -> None:
    """Raises for arguments that the operator cannot serve; ops.cpp checks and says the same.

    Raises:
        NotImplementedError: ``group_size`` or ``act_bits`` has a reserved value.
        TypeError: A dtype is wrong.
        ValueError: ``in_features``, ``eps``, a shape or a device is wrong.
    """
    if group_size != 0:
        raise NotImplementedError(
            f"bitlinear: group_size = {group_size} is reserved for a later version: use 0"
        )
    if act_bits != 8:
        raise NotImplementedError(
            f"bitlinear: act_bits = {act_bits} is reserved for a later version: use 8"
        )
    if not 1 <= in_features <= MAX_IN_FEATURES:
        raise ValueError(
            f"bitlinear: in_features must be between 1 and {MAX_IN_FEATURES} (where int32 sums are "
            f"exact), but it is {in_features}: split the layer along in_features"
        )
    check_eps(eps)
    check_activations(x, in_features)
    if out_dtype is not None and out_dtype not in ACTIVATION_DTYPES:
        raise TypeError(
            f"bitlinear: out_dtype must be float32, float16 or bfloat16, but it is "
            f"{dtype_name(out_dtype)}: leave it out to get the dtype of x"
        )
    if w_packed.dtype != torch.uint8:
        raise TypeError(
            f"bitlinear: w_packed must be uint8, but it is {dtype_name(w_packed.dtype)}: pack "
            f"ternary weights with bitlinear.packing.pack_ternary"
        )
    if w_scale.dtype != torch.float32:
        raise TypeError(
            f"bitlinear: w_scale must be float32, but it is {dtype_name(w_scale.dtype)}: convert "
            f"it with w_scale.float()"
        )
    columns = packing.packed_shape(0, in_features)[1]
    if w_packed.dim() != 2 or w_packed.shape[1] != columns:
        raise ValueError(
            f"bitlinear: w_packed must have shape (N, {columns}) for in_features = {in_features}, "
            f"four weights to a byte, but it has shape {list(w_packed.shape)}"
        )
    out_features = w_packed.shape[0]
    if list(w_scale.shape) not in ([1], [out_features, 1]):
        raise ValueError(
            f"bitlinear: w_scale must have shape (1,) or ({out_features}, 1), but it has shape "
            f"{list(w_scale.shape)}: scales are per tensor or per output feature"
        )
    check_device(x, "w_packed", w_packed)
    check_device(x, "w_scale", w_scale)
    if bias is not None:
        if not bias.dtype.is_floating_point:
            raise TypeError(
                f"bitlinear: bias must be floating point, but it is {dtype_name(bias.dtype)}: "
                f"convert it with bias.float()"
            )
        if list(bias.shape) != [out_features]:
            raise ValueError(
                f"bitlinear: bias must have shape ({out_features},), as w_packed has "
                f"{out_features} rows, but it has shape {list(bias.shape)}"
            )
        check_device(x, "bias", bias)


def reference_linear(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    eps: float = 1e-6,
    group_size: int = 0,
    act_bits: int = 8,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The operator in plain torch: the same bits as the kernels, on any device.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``.
        w_packed: uint8, shape ``(N, ceil(K/4))``; see :mod:`bitlinear.packing`.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``.
        bias: Floating point, shape ``(N,)``, or None; used as fp32.
        in_features: ``K``, at most 500,000.
        eps: Lower bound of the absmax of a token.
        group_size: Reserved; 0.
        act_bits: Reserved; 8.
        out_dtype: fp32, fp16 or bf16; None for the dtype of ``x``.

    Returns:
        Shape ``(..., N)``.

    Raises:
        NotImplementedError, TypeError, ValueError: See :func:`check_arguments`.
    """
    check_arguments(x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits, out_dtype)
    packing.check_packed(w_packed, in_features)
    q, s_x = quantize_activations(x.reshape(-1, in_features), eps)
    q = q.to(torch.float32)
    out_features = w_packed.shape[0]
    y = x.new_empty((q.shape[0], out_features), dtype=out_dtype or x.dtype)
    step = packing.rows_per_chunk(4 * in_features, x.is_cuda)
    for first in range(0, out_features, step):
        rows = slice(first, first + step)
        t = packing.expand(w_packed[rows], in_features).to(torch.float32)
        y[:, rows] = epilogue(
            integer_product(q, t),
            s_x,
            w_scale[rows] if w_scale.dim() == 2 else w_scale,
            None if bias is None else bias[rows],
        )
    return y.reshape(*x.shape[:-1], out_features)


def _fake_linear(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    eps: float = 1e-6,
    group_size: int = 0,
    act_bits: int = 8,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_arguments(x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits, out_dtype)
    return x.new_empty((*x.shape[:-1], w_packed.shape[0]), dtype=out_dtype or x.dtype)


def reference_quantize_weight(weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Absmean quantisation per tensor (BitNet b1.58), packed.

    Args:
        weight: Floating point, shape ``(N, K)``.
        eps: Lower bound of the scale.

    Returns:
        ``w_packed``: uint8, shape ``(N, ceil(K/4))``, see :mod:`bitlinear.packing`; and
        ``w_scale``: fp32, shape ``(1,)``, NaN or infinite if a weight is (its code is then 0).
    """
    chunks = packing.enumerate_chunks(weight)
    sums = row_sums(weight[:0]).new_empty(len(weight))
    for first, rows in chunks:
        sums[first : first + len(rows)] = row_sums(rows)
    w_scale = scale_of_sums(sums, weight.numel(), eps)
    return packing.pack_quantized(weight, lambda rows: ternarize(rows, w_scale)), w_scale


def _fake_quantize_weight(weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    shape = packing.packed_shape(*weight.shape)
    scale = weight.new_empty((1,), dtype=torch.float32)
    return weight.new_empty(shape, dtype=torch.uint8), scale


def reference_expand_weight(
    w_packed: Tensor,
    in_features: int,
    w_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The ternary weights, times their scale if it is given.

    Args:
        w_packed: uint8, shape ``(N, ceil(K/4))``.
        in_features: K.
        w_scale: fp32, shape ``(1,)``.
        dtype: fp32 (if None), fp16 or bf16.

    Returns:
        Shape ``(N, K)``.
    """
    weight = packing.expand(w_packed, in_features).to(torch.float32)
    if w_scale is not None:
        weight = weight * w_scale
    return weight.to(dtype or torch.float32)


def _fake_expand_weight(
    w_packed: Tensor,
    in_features: int,
    w_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (w_packed.shape[0], in_features)
    return w_packed.new_empty(shape, dtype=dtype or torch.float32)


def _fake_quantize_activations(x: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale


def reference_expand_activations(
    q: Tensor, s_x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """``q * s_x``, in fp32, or rounded from it to fp16 or bf16 if ``dtype`` says so.

    Args:
        q: int8, shape ``(..., K)``.
        s_x: fp32, shape ``(..., 1)``.
        dtype: fp32 (if None), fp16 or bf16.
    """
    return (q.to(torch.float32) * s_x).to(dtype or torch.float32)


def _fake_expand_activations(q: Tensor, s_x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype or torch.float32)


def _autocast_linear(device_type: str, key: str) -> Any:
    """Under autocast only the output is rounded to 16 bits: ``x`` is quantised as it is."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def linear(
        x: Tensor,
        w_packed: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        in_features: int,
        eps: float = 1e-6,
        group_size: int = 0,
        act_bits: int = 8,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if out_dtype is None and x.device.type == device_type and x.dtype in ACTIVATION_DTYPES:
            out_dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            output: Tensor = torch.ops.bitlinear.linear.default(
                x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits, out_dtype
            )
        return output

    return linear


def _vmap(operator: Any) -> Callable[..., tuple[Any, int]]:
    """The rule of an operator for vmap: one more dimension of tokens, but one weight at a time."""
    names = [argument.name for argument in operator._schema.arguments]
    of_tokens = {"x", "q", "s_x"} & {*names}

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, int]:
        if of_tokens == {name for name, dim in zip(names, in_dims) if dim is not None}:
            moved = (a if d is None else a.movedim(d, 0) for a, d in zip(arguments, in_dims))
            return operator(*moved), 0
        each = [
            operator(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        return tuple(map(torch.stack, zip(*each))), 0

    return rule


def _count_flops(x_shape: Any, w_shape: Any, *_: Any, **__: Any) -> int:
    """Those of ``nn.Linear``, for :class:`torch.utils.flop_counter.FlopCounterMode`."""
    return int(2 * math.prod(x_shape) * w_shape[0])


def _no_derivative(ctx: Any, grad: Tensor) -> Any:
    """As in C++, where the derivative is registered as not implemented."""
    raise NotImplementedError(
        "bitlinear: the derivative of torch.ops.bitlinear.linear is not implemented: use "
        "bitlinear.ops.deployed_linear, which has the gradient of x"
    )


class _DeployedLinear(torch.autograd.Function):
    """The operator, with the gradients of ``x`` and of the bias. The weights are constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        w_packed: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        in_features: int,
        eps: float,
    ) -> Tensor:
        output: Tensor = torch.ops.bitlinear.linear.default(
            x, w_packed, w_scale, bias, in_features, eps
        )
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w_packed, w_scale, bias, ctx.in_features, _ = inputs
        ctx.save_for_backward(w_packed, w_scale)
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_scale, needs_bias, *_ = ctx.needs_input_grad
        if needs_scale:
            raise NotImplementedError(
                "bitlinear: w_scale has no gradient, as the weights of a deployed layer are "
                "constants: call undeploy() to train them, or w_scale.requires_grad_(False)"
            )
        grad_x = grad_bias = None
        x_dtype, bias_dtype = ctx.dtypes
        device_type = grad.device.type
        with without_autocast(device_type):
            if needs_x:
                w_packed, w_scale = ctx.saved_tensors
                dtype = product_dtype(device_type, grad.dtype)
                t = torch.ops.bitlinear.expand_weight.default(
                    w_packed, ctx.in_features, None, dtype
                )
                scaled = grad.to(torch.float32) * w_scale.reshape(-1)
                grad_x = (scaled.to(dtype) @ t).to(x_dtype)
            if needs_bias:
                grad_bias = grad.reshape(-1, grad.shape[-1]).to(torch.float32).sum(dim=0)
                grad_bias = grad_bias.to(bias_dtype)
        return grad_x, None, None, grad_bias, None, None


# As of the functions in quantize.py.
_DeployedLinear.forward.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    _DeployedLinear.forward
)


def _is_in_a_transform() -> bool:
    """Whether a transform of torch.func is active: a tensor within may hide that it wants one."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def deployed_linear(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    eps: float = 1e-6,
) -> Tensor:
    """:func:`reference_linear` by the compiled kernel, with gradients of ``x`` and ``bias``.

    The gradient passes straight through the activations' quantiser: ``grad_x = (grad * w_scale.T)
    @ t``, in fp32 (on a GPU, where ``grad`` has 16 bits, the product in its dtype).

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``.
        w_packed: uint8, shape ``(N, ceil(K/4))``; see :mod:`bitlinear.packing`.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``.
        bias: Floating point, shape ``(N,)``, or None.
        in_features: ``K``.
        eps: Lower bound of the absmax of a token.

    Returns:
        Shape ``(..., N)``, in the dtype of ``x``; under autocast, in the dtype of autocast.
    """
    arguments = (x, w_packed, w_scale, bias, in_features, eps)
    if torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad) or _is_in_a_transform()
    ):
        output: Tensor = _DeployedLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        output = torch.ops.bitlinear.linear.default(*arguments)
    return output
