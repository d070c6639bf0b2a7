"""``torch.ops.bitlinear``: schemas, fake and reference implementations, autocast, vmap.

C++ registers the compiled kernels. The reference implementations here run on every device without
one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_any

from . import packing
from .arguments import (
    ACTIVATION_DTYPES,
    check_act_bits,
    check_fused_linear,
    check_group_size,
    check_linear,
    check_scale_shape,
    raise_unsupported_layout,
)
from .attend import fake_attend, reference_attend
from .groups import count_groups, repeat_scales
from .head_products import (
    fake_bf16_product,
    fake_int8_product,
    reference_bf16_product,
    reference_int8_product,
)
from .prologue import apply_prologue
from .quantize import (
    INTEGER_DTYPES,
    quantize_activations,
    row_sums,
    scale_from_row_sums,
    ternarize,
)
from .quantized_linear import fake_quantized_linear, multiply, reference_quantized_linear

SCHEMAS = (
    "linear(Tensor x, Tensor w_packed, Tensor w_scale, Tensor? bias, int in_features, "
    "float eps=1e-6, int group_size=0, int act_bits=8, ScalarType? out_dtype=None) -> Tensor",
    "fused_linear(Tensor x, Tensor[] w_packed, Tensor[] w_scale, Tensor?[] bias, int in_features, "
    "float eps=1e-6, int group_size=0, int act_bits=8, str? activation=None, "
    "Tensor? norm_weight=None, float norm_eps=0.0, Tensor? residual=None, "
    "ScalarType? out_dtype=None) -> Tensor",
    "quantize_weight(Tensor weight, float eps=1e-6, int group_size=0) -> (Tensor, Tensor)",
    "expand_weight(Tensor w_packed, int in_features, Tensor? w_scale=None, "
    "ScalarType? dtype=None, int group_size=0) -> Tensor",
    "quantize_activations(Tensor x, float eps=1e-6, int act_bits=8) -> (Tensor, Tensor)",
    "expand_activations(Tensor q, Tensor s_x, ScalarType? dtype=None) -> Tensor",
    "quantized_linear(Tensor q, Tensor s_x, Tensor q_sum, Tensor w_packed, Tensor w_scale, "
    "Tensor? bias, ScalarType dtype, int group_size=0) -> Tensor",
    "linear_with_activations(Tensor x, Tensor w_packed, Tensor w_scale, Tensor? bias, float eps, "
    "ScalarType dtype, int group_size=0) -> (Tensor, Tensor, Tensor)",
    "int8_product(Tensor q, Tensor s_x, Tensor w, Tensor w_scale, ScalarType dtype) -> Tensor",
    "bf16_product(Tensor x, Tensor w) -> Tensor",
    "attend(Tensor query, Tensor(a!) keys, Tensor(b!) values, Tensor? mask, float scale, "
    "Tensor? position=None, Tensor? new_key=None, Tensor? new_value=None, Tensor? cos=None, "
    "Tensor? sin=None) -> Tensor",
)

# Dispatch keys of tensors without strides. If none of ours is registered for them, torch raises an
# error that lists every registered kernel.
_UNSUPPORTED_KEYS = (
    *("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA"),
    *("NestedTensorCPU", "NestedTensorCUDA", "MkldnnCPU"),
)

_REGISTRATIONS = "_bitlinear_registrations"


_state = {"has_cpu_kernels": False}


def has_cpu_kernels() -> bool:
    """Whether the operators run compiled code on the CPU."""
    return _state["has_cpu_kernels"]


def unregister() -> None:
    """Undo :func:`register` of an earlier import in this process, if there was one.

    A notebook may delete this package's modules and import it again. C++ must be able to define the
    operators then.
    """
    library = vars(torch.library).pop(_REGISTRATIONS, None)
    if library is not None:
        library._destroy()


def register(compiled: bool) -> None:
    """Register the operators.

    Args:
        compiled: Whether C++ has already defined them, with CPU kernels and autograd rules.
    """
    library = torch.library.Library("bitlinear", "FRAGMENT")
    # The registrations last as long as this object.
    setattr(torch.library, _REGISTRATIONS, library)
    _state["has_cpu_kernels"] = compiled
    pt2 = (torch.Tag.pt2_compliant_tag,)

    if not compiled:
        for schema in SCHEMAS:
            library.define(schema, tags=pt2)
    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "linear": (_fake_linear, reference_linear),
        "fused_linear": (_fake_fused_linear, reference_fused_linear),
        "quantize_weight": (_fake_quantize_weight, reference_quantize_weight),
        "expand_weight": (_fake_expand_weight, reference_expand_weight),
        "quantize_activations": (_fake_quantize_activations, quantize_activations),
        "expand_activations": (_fake_expand_activations, reference_expand_activations),
        "quantized_linear": (fake_quantized_linear, reference_quantized_linear),
        "linear_with_activations": (
            _fake_linear_with_activations,
            reference_linear_with_activations,
        ),
        "int8_product": (fake_int8_product, reference_int8_product),
        "bf16_product": (fake_bf16_product, reference_bf16_product),
        "attend": (fake_attend, reference_attend),
    }
    for name, (fake, reference) in implementations.items():
        torch.library.register_fake(f"bitlinear::{name}", fake, lib=library)
        library.impl(name, reference, "CompositeExplicitAutograd")
    for name in ("linear", "fused_linear"):
        for key in _UNSUPPORTED_KEYS:
            library.impl(name, raise_unsupported_layout, key)
        operator = getattr(torch.ops.bitlinear, name).default
        for device_type in ("cpu", "cuda"):
            key = f"Autocast{device_type.upper()}"
            library.impl(name, _autocast_rule(operator, device_type, key), key)
        if not compiled:
            torch.library.register_autograd(
                f"bitlinear::{name}", _raise_no_derivative(name), lib=library
            )
    if hasattr(torch.library, "register_vmap"):  # since torch 2.5; before, vmap loops
        for name in implementations:
            operator = getattr(torch.ops.bitlinear, name).default
            torch.library.register_vmap(f"bitlinear::{name}", _vmap_rule(operator), lib=library)


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
    """Compute the operator in plain torch: the same bits as the kernels, on any device.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``.
        w_packed: uint8, shape ``(N, ceil(K/4))``; see :mod:`bitlinear.packing`.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``; with groups ``(N, ceil(K/group_size))``.
        bias: Floating point, shape ``(N,)``, or None; used as fp32.
        in_features: ``K``, at most 500,000.
        eps: Lower bound of the absmax of a token.
        group_size: The number of weights of a row that share a scale; 0 or -1 if all do.
        act_bits: 8 or 16, the bits of a quantised activation.
        out_dtype: fp32, fp16 or bf16; None for the dtype of ``x``.

    Returns:
        Shape ``(..., N)``.

    Raises:
        TypeError, ValueError: See :func:`bitlinear.arguments.check_linear`.
    """
    check_linear(x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits, out_dtype)
    packing.check_packed(w_packed, in_features)
    q, s_x = quantize_activations(x.reshape(-1, in_features), eps, act_bits)
    y = multiply(q, s_x, w_packed, w_scale, bias, out_dtype or x.dtype, group_size)
    return y.reshape(*x.shape[:-1], len(w_packed))


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
    check_linear(x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits, out_dtype)
    return x.new_empty((*x.shape[:-1], w_packed.shape[0]), dtype=out_dtype or x.dtype)


def reference_fused_linear(
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
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute products of one input by several weights, with what stands before and behind them.

    ``[linear(v, w_packed[0], ...), linear(v, w_packed[1], ...), ...] + residual``, side by side,
    with ``v = rms_norm(gate(x))``; see :mod:`bitlinear.prologue`. All of it is fp32; the sum is
    rounded to ``out_dtype``, once.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``; with an activation ``(..., 2 K)``.
        w_packed: 1 to 4 weights; each as for :func:`reference_linear`.
        w_scale: The scale of each weight.
        bias: The bias of each weight, or None.
        in_features: ``K``, at most 500,000.
        eps: Lower bound of the absmax of a token.
        group_size: As for :func:`reference_linear`, for all weights.
        act_bits: 8 or 16, the bits of a quantised activation.
        activation: ``"silu"``, ``"relu2"``, or None for no gate.
        norm_weight: Floating point, shape ``(K,)``; None for no norm.
        norm_eps: What the norm adds to the mean square.
        residual: fp32, fp16 or bf16, in the shape of the output; or None.
        out_dtype: fp32, fp16 or bf16; None for the dtype of ``x``.

    Returns:
        Shape ``(..., N)``; ``N`` is the sum of the rows of all weights.

    Raises:
        TypeError, ValueError: See :func:`bitlinear.arguments.check_fused_linear`.
    """
    check_fused_linear(
        *(x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits),
        *(activation, norm_weight, norm_eps, residual, out_dtype),
    )
    values = apply_prologue(x, activation, norm_weight, norm_eps)
    outputs = [
        reference_linear(values, *operands, in_features, eps, group_size, act_bits)
        for operands in zip(w_packed, w_scale, bias)
    ]
    y = torch.cat(outputs, dim=-1)
    if residual is not None:
        y = y + residual.to(torch.float32)
    return y.to(out_dtype or x.dtype)


def _fake_fused_linear(
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
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_fused_linear(
        *(x, w_packed, w_scale, bias, in_features, eps, group_size, act_bits),
        *(activation, norm_weight, norm_eps, residual, out_dtype),
    )
    shape = (*x.shape[:-1], sum(w.shape[0] for w in w_packed))
    return x.new_empty(shape, dtype=out_dtype or x.dtype)


def reference_quantize_weight(
    weight: Tensor, eps: float = 1e-6, group_size: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantise a weight with absmean scales (BitNet b1.58) and pack it.

    Args:
        weight: Floating point, shape ``(N, K)``.
        eps: Lower bound of a scale.
        group_size: 0 for one scale per tensor, -1 for one per output feature, or the number of
            weights of an output feature that share one, a multiple of 32.

    Returns:
        ``w_packed``: uint8, shape ``(N, ceil(K/4))``, see :mod:`bitlinear.packing`; and
        ``w_scale``: fp32, shape ``(1,)``, ``(N, 1)`` or ``(N, ceil(K/group_size))``, the last as
        :func:`bitlinear.groups.round_scales` rounds them. A scale is NaN or infinite if one of its
        weights is (their codes are then 0); with groups, all scales of the row are NaN.
    """
    check_group_size(group_size)
    chunks = packing.enumerate_chunks(weight)
    sums = torch.cat([row_sums(part, group_size) for part in (weight[:0], *(r for _, r in chunks))])
    w_scale = scale_from_row_sums(sums, weight.shape[1], eps, group_size)

    def to_ternary(first: int, rows: Tensor) -> Tensor:
        scale = w_scale[first : first + len(rows)] if group_size else w_scale
        return ternarize(rows, scale, group_size)

    return packing.pack_quantized(weight, to_ternary), w_scale


def _fake_quantize_weight(
    weight: Tensor, eps: float = 1e-6, group_size: int = 0
) -> tuple[Tensor, Tensor]:
    check_group_size(group_size)
    shape = packing.packed_shape(*weight.shape)
    # Not len(weight), which would fix a symbolic number of rows.
    groups = count_groups(weight.shape[1], group_size) if group_size > 0 else 1
    scale_shape = (weight.shape[0], groups) if group_size else (1,)
    scale = weight.new_empty(scale_shape, dtype=torch.float32)
    return weight.new_empty(shape, dtype=torch.uint8), scale


def reference_expand_weight(
    w_packed: Tensor,
    in_features: int,
    w_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    group_size: int = 0,
) -> Tensor:
    """Unpack ternary weights, and multiply them with their scale if it is given.

    Args:
        w_packed: uint8, shape ``(N, ceil(K/4))``.
        in_features: K.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``; with groups ``(N, ceil(K/group_size))``.
        dtype: fp32 (if None), fp16 or bf16.
        group_size: The number of weights of a row that share a scale; 0 or -1 if all do.

    Returns:
        Shape ``(N, K)``.

    Raises:
        ValueError: ``group_size`` or the shape of ``w_scale`` is wrong.
    """
    check_group_size(group_size)
    if w_scale is not None:
        check_scale_shape(w_scale, w_packed.shape[0], in_features, group_size)
    weight = packing.unpack_unchecked(w_packed, in_features).to(torch.float32)
    if w_scale is not None:
        if group_size > 0:
            w_scale = repeat_scales(w_scale, group_size, in_features)
        weight = weight * w_scale
    return weight.to(dtype or torch.float32)


def _fake_expand_weight(
    w_packed: Tensor,
    in_features: int,
    w_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    group_size: int = 0,
) -> Tensor:
    check_group_size(group_size)
    shape = (w_packed.shape[0], in_features)
    if w_scale is not None:
        check_scale_shape(w_scale, w_packed.shape[0], in_features, group_size)
    return w_packed.new_empty(shape, dtype=dtype or torch.float32)


def _fake_quantize_activations(
    x: Tensor, eps: float = 1e-6, act_bits: int = 8
) -> tuple[Tensor, Tensor]:
    check_act_bits(act_bits)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=INTEGER_DTYPES[act_bits]), scale


def reference_expand_activations(
    q: Tensor, s_x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Dequantise activations: ``q * s_x`` in fp32, then rounded to ``dtype``.

    Args:
        q: int8 or int16, shape ``(..., K)``.
        s_x: fp32, shape ``(..., 1)``.
        dtype: fp32 (if None), fp16 or bf16.

    Returns:
        Shape ``(..., K)``.
    """
    return (q.to(torch.float32) * s_x).to(dtype or torch.float32)


def _fake_expand_activations(q: Tensor, s_x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype or torch.float32)


def reference_linear_with_activations(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    group_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``linear`` and ``quantize_activations`` of one input, which is quantised once.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``.
        w_packed, w_scale, bias, eps, group_size: As for :func:`reference_linear`.
        dtype: fp32, fp16 or bf16, of the output.

    Returns:
        The output, shape ``(..., N)``, and ``q`` and ``s_x``; see
        :func:`bitlinear.quantize.quantize_activations`.
    """
    K = _width(x)
    y = reference_linear(x, w_packed, w_scale, bias, K, eps, group_size, out_dtype=dtype)
    return y, *quantize_activations(x, eps)


def _fake_linear_with_activations(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    group_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    K = _width(x)
    y = _fake_linear(x, w_packed, w_scale, bias, K, eps, group_size, out_dtype=dtype)
    return y, *_fake_quantize_activations(x, eps)


def _width(x: Tensor) -> int:
    """``K``; for a scalar any number, because the check of ``x`` refuses it."""
    return x.shape[-1] if x.dim() else 1


def _autocast_rule(operator: Any, device_type: str, key: str) -> Any:
    """The rule for autocast: it rounds the output to 16 bits, but not ``x``."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    names = [argument.name for argument in operator._schema.arguments]

    def rule(*positional: Any, **by_name: Any) -> Any:
        arguments = {**dict(zip(names, positional)), **by_name}
        x = arguments["x"]
        is_rounded = x.device.type == device_type and x.dtype in ACTIVATION_DTYPES
        if is_rounded and arguments.get("out_dtype") is None:
            arguments["out_dtype"] = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(**arguments)

    return rule


def _vmap_rule(operator: Any) -> Callable[..., tuple[Any, int]]:
    """The rule for vmap: a batch of tokens is one more dimension; other batches are a loop."""
    names = [argument.name for argument in operator._schema.arguments]
    token_arguments = {"x", "q", "s_x", "q_sum", "residual"}.intersection(names)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, int]:
        given = {name for name, argument in zip(names, arguments) if argument is not None}
        batched = {name for name, dims in zip(names, in_dims) if tree_any(_is_batched, dims)}
        if batched == token_arguments & given:
            # A list of tensors, of which none is batched, has a list of dimensions.
            moved = (
                a.movedim(d, 0) if isinstance(d, int) else a for a, d in zip(arguments, in_dims)
            )
            return operator(*moved), 0
        if info.batch_size == 0:
            raise ValueError(f"{operator.name()}: vmap over weights needs a batch of at least 1")
        results = [
            operator(*(_element(a, d, i) for a, d in zip(arguments, in_dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results))), 0

    return rule


def _is_batched(dim: int | None) -> bool:
    return dim is not None


def _element(argument: Any, dim: Any, index: int) -> Any:
    """Element ``index`` of a batched argument; a list has a dimension for each of its tensors."""
    if isinstance(argument, (list, tuple)) and dim is not None:
        return [_element(a, d, index) for a, d in zip(argument, dim)]
    return argument if dim is None else argument.select(dim, index)


def _raise_no_derivative(name: str) -> Callable[..., Any]:
    """A backward pass that raises, with the message of C++ and what to call."""
    instead = {"linear": "deployed.deployed_linear", "fused_linear": "fused.fused_linear"}[name]

    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError(
            f"derivative for bitlinear::{name} is not implemented: call bitlinear.{instead}, "
            f"which has the gradient of x"
        )

    return backward
