"""The quantisers and the straight-through estimator, in plain torch.

Activations: absmax per token to int8. Weights: absmean per tensor to {-1, 0, +1}. Both as in
BitNet b1.58 (arXiv 2402.17764); the gradient passes through the rounding unchanged
(straight-through estimator, arXiv 1308.3432).

Every float operation here is one separately rounded fp32 operation, in the order in which the
kernels do it, so that the results are the same to the bit. Two spellings are deliberate: torch
computes ``127 / tensor`` as ``127 * (1 / tensor)``, and on CUDA ``tensor / 127`` as
``tensor * (1 / 127)``, which round twice. So divisors and dividends are tensors here.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from contextlib import AbstractContextManager
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import packing

QUANT_TYPES = ("ai8pc_wpt",)
"""``ai8pc_wpt``: int8 activations, one scale per token; ternary weights, one scale per tensor."""

MAX_IN_FEATURES = 500_000
"""Up to here int32 holds the product, 127 * K, and what the kernels accumulate on the way."""

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

MIN_EPS, MAX_EPS = 2e-36, 1e18
"""Between these, eps / 127 is a normal number of fp32, and 127 / eps and eps * eps are finite."""

_QMAX = 127

EXACT_K = (2**24 - 1) // _QMAX
"""fp32 adds integers exactly below 2**24; no sum of K products |q * t| <= 127 exceeds 127 * K."""


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``: the spelling that the C++ messages use too."""
    return str(dtype).replace("torch.", "")


def check_quant_type(quant_type: str) -> None:
    """Raises ValueError, listing the valid names, unless ``quant_type`` is one of them."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be one of {list(QUANT_TYPES)}, but it is {quant_type!r}")


def check_eps(eps: float) -> None:
    """Raises ValueError unless ``eps`` is between :data:`MIN_EPS` and :data:`MAX_EPS`."""
    if not isinstance(eps, (int, float)):
        raise TypeError(
            f"bitlinear: eps must be a number, but it is {eps!r}: pass device and dtype by name, "
            f"as eps and quant_type come before them"
        )
    if not MIN_EPS <= eps <= MAX_EPS:
        raise ValueError(
            f"bitlinear: eps must be between 2e-36 and 1e+18 (eps / 127, 127 / eps and eps * eps "
            f"have to fit float32), but it is {eps:g}"
        )


def check_features(in_features: int, out_features: int) -> None:
    """Raises TypeError or ValueError unless a layer can have so many features."""
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        try:
            operator.index(value)
        except TypeError:
            raise TypeError(f"bitlinear: {name} must be an integer, but it is {value!r}") from None
    if in_features < 1 or out_features < 1:
        raise ValueError(
            f"bitlinear: in_features and out_features must be at least 1, but they are "
            f"{in_features} and {out_features}"
        )
    if in_features > MAX_IN_FEATURES:
        raise ValueError(
            f"bitlinear: in_features must be at most {MAX_IN_FEATURES} (where int32 sums are "
            f"exact), but it is {in_features}: split the layer along in_features"
        )


def check_strength(strength: float) -> None:
    """Raises ValueError (or TypeError) unless the strength is a number between 0 and 1."""
    if not isinstance(strength, (int, float)):
        raise TypeError(f"quantization_strength must be a number, but it is {strength!r}")
    if not 0 <= strength <= 1:
        raise ValueError(f"quantization_strength must be between 0 and 1, not {strength}")


def refuse_layout(x: Tensor, *_: Any) -> NoReturn:
    """Raises the TypeError for a tensor whose values do not lie at strides."""
    layout = "torch.nested" if x.is_nested else str(x.layout)
    raise TypeError(
        f"bitlinear: x must be strided, but it is {layout}: convert it with x.to_dense(), or a "
        f"nested tensor to layout=torch.jagged"
    )


def check_activations(x: Tensor, in_features: int) -> None:
    """Raises TypeError for an unsuitable layout or dtype of ``x``, ValueError for its shape."""
    if x.layout != torch.strided or x.is_nested:
        refuse_layout(x)
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(
            f"bitlinear: x must be float32, float16 or bfloat16, but it is {dtype_name(x.dtype)}: "
            f"convert it, for example with x.float()"
        )
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"bitlinear: the last dimension of x must be in_features = {in_features}, but x has "
            f"shape {list(x.shape)}"
        )


def check_device(x: Tensor, name: str, other: Tensor | None) -> None:
    """Raises ValueError unless ``other`` (if given) is on the device of ``x``."""
    if other is not None and other.device != x.device:
        raise ValueError(
            f"bitlinear: all tensors must be on one device, but x is on {x.device} and {name} is "
            f"on {other.device}: move one of them with .to(device)"
        )


def _round_to_int8(values: Tensor, limit: int) -> Tensor:
    """Rounds half to even and clamps; NaN becomes 0 (its scale carries the NaN). Reuses values."""
    # Not clamp_: vmap has no rule for it.
    return values.round_().clamp(-limit, limit).nan_to_num_(nan=0.0).to(torch.int8)


def quantize_activations(x: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Absmax quantisation per token: ``x ~ q * s_x``.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``.
        eps: Lower bound of the absmax of a token.

    Returns:
        ``q``: int8 in [-127, 127], shape ``(..., K)``, and ``s_x``: fp32, shape ``(..., 1)``. A
        token with a NaN or an infinity gets ``q = 0`` and an ``s_x`` that makes products NaN.
    """
    x = x.to(torch.float32)
    return quantize_to_absmax(x, x.abs().amax(dim=-1, keepdim=True).clamp_min(eps))


def quantize_to_absmax(x: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_activations`, of fp32, where the absmax of the tokens is known."""
    qmax = torch.full_like(absmax, _QMAX)
    return _round_to_int8(_multiply(x, qmax / absmax), _QMAX), absmax / qmax


# Before torch 2.13 vmap has no rule for a view of another dtype; for a copy it has a loop.
_reinterpret = Tensor.view if torch.__version__ >= "2.13" else torch.view_copy


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor`` in fp32, subnormal ``x`` included where torch.set_flush_denormal is on."""
    product = x * factor
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._is_tracing():
        return product
    # A subnormal number is an integer, its low bits, times 2**-149. Both factors here are normal,
    # and powers of two do not round; where inv * 2**-24 is not, the product rounds to 0 anyway.
    bits = _reinterpret(x, torch.int32)
    magnitude = bits & 0x7FFFFFFF
    signed = torch.where(bits < 0, -magnitude, magnitude).to(torch.float32)
    return torch.where(magnitude < 0x00800000, (signed * 2.0**-125) * (factor * 2.0**-24), product)


def absmean_scale(weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``max(mean(|weight|), eps)``, fp32, shape ``(1,)``; NaN or infinite if a weight is."""
    return scale_of_sums(row_sums(weight), weight.numel(), eps)


def row_sums(weight: Tensor) -> Tensor:
    """The sum of the magnitudes in each row.

    In float64, so that it hardly matters in which order they are added. (MPS has no float64.)
    """
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    return weight.abs().sum(dim=-1, dtype=wide)


def scale_of_sums(sums: Tensor, count: int, eps: float) -> Tensor:
    """:func:`absmean_scale` of ``count`` weights with these :func:`row_sums`."""
    # Rows first, then their sums: the same for any number of threads, so that a layer quantises to
    # the same bits in every call.
    return (sums.sum() / count).to(torch.float32).clamp_min(eps).reshape(1)


def ternarize(weight: Tensor, scale: Tensor) -> Tensor:
    """``clamp(rint(weight / scale), -1, 1)`` as int8, in the shape of ``weight``."""
    return _round_to_int8(weight.to(torch.float32) / scale, 1)


def quantize_weights(weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Absmean quantisation per tensor (BitNet b1.58): ``weight ~ t * s_w``.

    Args:
        weight: Floating point, shape ``(N, K)``.
        eps: Lower bound of the scale.

    Returns:
        ``t``: int8 in {-1, 0, 1}, shape ``(N, K)``, and ``s_w``: fp32, shape ``(1,)``.
    """
    scale = absmean_scale(weight, eps)
    return ternarize(weight, scale), scale


def scale_ternary(weight: Tensor, w_packed: Tensor, w_scale: Tensor) -> None:
    """Fills ``weight`` with packed weights, scaled so that they quantise to the same ones again.

    The absmean of ``ternary * v`` is ``v * mean|ternary|``, so ``v = w_scale / mean|ternary|``.
    Where rounding ``v`` would give another absmean than ``w_scale``, ``v`` is rounded up for the
    first weights and down for the others.

    Args:
        weight: Floating point, shape ``(N, K)``; overwritten.
        w_packed: uint8, shape ``(N, ceil(K/4))``.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``.

    Raises:
        ValueError: A weight would overflow its dtype.
    """
    in_features = weight.shape[1]
    per_row = w_scale.dim() == 2

    def expand(first: int, rows: Tensor) -> Tensor:
        return packing.expand(w_packed[first : first + len(rows)], in_features)

    chunks = packing.enumerate_chunks(weight)
    in_rows = torch.cat([expand(*chunk).count_nonzero(dim=1) for chunk in chunks])
    nonzero = in_rows if per_row else in_rows.sum(dim=0, keepdim=True)
    size = in_features if per_row else weight.numel()
    low, step, ups = _magnitudes(w_scale.reshape(-1), nonzero, size, weight.dtype)
    if not per_row:  # the first weights of the tensor
        ups = (ups - (in_rows.cumsum(dim=0) - in_rows)).clamp_min(0)
    ups = ups.minimum(in_rows)[:, None]
    low, step = (value.reshape(-1, 1).expand(len(weight), 1) for value in (low, step))
    all_up = ups == in_rows[:, None]
    for first, rows in chunks:
        part = slice(first, first + len(rows))
        t = expand(first, rows)
        rows.copy_(t * (low[part] + all_up[part] * step[part]).to(torch.float32))
        for n in ((ups[part] > 0) & ~all_up[part])[:, 0].nonzero()[:, 0]:
            some = slice(first + n, first + n + 1)
            up = (t[n] != 0).cumsum(dim=0) <= ups[some]
            rows[n] = t[n] * (low[some] + up * step[some])[0]


def _magnitudes(
    w_scale: Tensor, nonzero: Tensor, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes of ``dtype`` whose sum, over ``nonzero`` weights, is ``w_scale * size``.

    Returns:
        The lower magnitude and the distance to the next one, fp64, and the number of weights that
        get the upper one; each in the shape of ``w_scale``, ``(1,)`` or ``(N,)``.
    """
    info = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    exact = w_scale.double() * size / nonzero.clamp_min(1)
    if bool((exact > info.max).any()):
        raise ValueError(
            f"the weight would overflow {dtype_name(dtype)}, as few of the ternary weights are not "
            f"0: call float() on the layer first"
        )
    exponent = torch.frexp(exact.clamp_min(info.tiny)).exponent - 1
    step = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    nearest = (exact / step).round() * step
    mean = (nearest * nonzero / size).float()
    low = torch.where(mean == w_scale, nearest, (exact / step).floor() * step)
    ups = ((w_scale.double() * size - low * nonzero) / step).round().long()
    return low, step, torch.where(mean == w_scale, 0, ups)


def integer_product(q: Tensor, t: Tensor) -> Tensor:
    """``q @ t.T`` exactly, then rounded once to fp32.

    Args:
        q: fp32 integers in [-127, 127], shape ``(M, K)``.
        t: fp32 integers in {-1, 0, 1}, shape ``(N, K)``.

    Returns:
        fp32, shape ``(M, N)``.
    """
    if q.shape[-1] <= EXACT_K:
        return (q @ t.T).add_(0.0)  # an integer 0 has no sign
    parts = [a @ b.T for a, b in zip(q.split(EXACT_K, dim=-1), t.split(EXACT_K, dim=-1))]
    return torch.stack([part.to(torch.int32) for part in parts]).sum(dim=0).to(torch.float32)


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


class _Edges(torch.autograd.Function):
    """Tensors of the shapes and dtypes of the operands, through which gradients reach them.

    They have no memory of their own. A backward pass that will itself be differentiated needs the
    operands' places in the graph, and saving the operands would keep 4 bytes of each value.
    """

    generate_vmap_rule = True

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


class _Attached(torch.autograd.Function):
    """Values, with the gradient of ``edge``: the straight-through estimator of a backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, edge: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _attached(values: Tensor, edge: Tensor) -> Tensor:
    # Under torch.compile there is no second derivative, and torch says so.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return values
    return cast(Tensor, _Attached.apply(values, edge))  # type: ignore[no-untyped-call]


class _StraightThroughLinear(torch.autograd.Function):
    """Quantised product forward; gradients as if neither operand had been rounded.

    ``x_edge`` and ``weight_edge`` stand for the operands in the graph (see :class:`_Edges`); the
    values come from ``x`` and from ``w_packed`` and ``w_scale``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x_edge: Tensor,
        weight_edge: Tensor,
        bias: Tensor | None,
        x: Tensor,
        eps: float,
        dtype: torch.dtype,
        w_packed: Tensor,
        w_scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(x.device.type):
            # In the order in which they are returned: torch.onnx.export(dynamo=False) takes outputs
            # to be those of the order in which they are computed.
            y = packed_linear(x, w_packed, w_scale, bias, eps, dtype)
            # The product has quantised x, into its kernel's own layout: a hundredth of the time.
            q, s_x = torch.ops.bitlinear.quantize_activations.default(x, eps)
        return y, q, s_x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x_edge, weight_edge, bias, _, _, _, w_packed, w_scale = inputs
        _, q, s_x = output
        ctx.mark_non_differentiable(q, s_x)
        ctx.set_materialize_grads(False)  # no zeros in the place of their gradients
        # 1 byte per activation and 2 bits per weight, where nn.Linear keeps 4 bytes of each.
        ctx.save_for_backward(q, s_x, w_packed, w_scale)
        # Not saved, as hooks of saved tensors (offloading to the CPU) would give them memory.
        ctx.edges = (x_edge, weight_edge)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        expand_weight = torch.ops.bitlinear.expand_weight.default
        expand_activations = torch.ops.bitlinear.expand_activations.default
        q, s_x, w_packed, w_scale = ctx.saved_tensors
        x_edge, weight_edge = ctx.edges
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        device_type = grad.device.type
        grad_x = grad_weight = grad_bias = None
        with without_autocast(device_type):
            dtype = product_dtype(device_type, grad.dtype)
            g = grad.reshape(-1, grad.shape[-1]).to(dtype)
            if needs_x:
                weight = expand_weight(w_packed, q.shape[-1], w_scale, dtype)
                grad_x = g @ _attached(weight, weight_edge)
                grad_x = grad_x.to(x_edge.dtype).reshape(q.shape)
            if needs_weight:
                tokens = _attached(expand_activations(q, s_x, dtype), x_edge)
                grad_weight = g.T @ tokens.reshape(-1, q.shape[-1])
                grad_weight = grad_weight.to(weight_edge.dtype)
            if needs_bias:
                grad_bias = g.sum(dim=0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


# apply() asks for it in every call, and finding it out takes as long as a small forward pass.
for _function in (_Edges, _Attached, _StraightThroughLinear):
    setattr(_function.forward, "__signature__", inspect.signature(_function.forward))  # noqa: B010


def product_dtype(device_type: str, grad_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products of a backward pass.

    A GPU multiplies 16 bits many times as fast, and the operands are then rounded as those of
    ``nn.Linear`` are. CPUs gain little, or lose.
    """
    return grad_dtype if device_type == "cuda" else torch.float32


def packed_linear(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The deployed operator, with an output of any ``dtype`` that it can write."""
    output: Tensor = torch.ops.bitlinear.linear.default(
        x, w_packed, w_scale, bias, x.shape[-1], eps, 0, 8, dtype
    )
    return output


def straight_through_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Linear map with quantised operands and straight-through gradients, for training.

    The forward pass quantises the weight and computes what the deployed layer computes, to the bit.
    With ``q, s_x`` and ``t, s_w`` the quantised operands, the gradients are
    ``grad_x = grad @ (s_w * t)``, ``grad_weight = grad.T @ (s_x * q)`` and
    ``grad_bias = grad.sum(0)``, computed in fp32 (on a GPU, where ``grad`` has 16 bits, with both
    operands in its dtype) and returned in the dtypes of the inputs. Higher derivatives are those of
    these formulas, straight through both quantisers.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``.
        weight: Floating point, shape ``(N, K)``.
        bias: Floating point, shape ``(N,)``, or None.
        eps: Lower bound of the absmax of a token and of the absmean of the weights.

    Returns:
        Shape ``(..., N)``, in the dtype of ``x``; under autocast, in the dtype of autocast.

    Raises:
        TypeError: ``x`` is neither fp32, fp16 nor bf16.
        ValueError: Shapes or devices do not fit.
    """
    compiling = torch.compiler.is_compiling()
    trains = torch.is_grad_enabled()
    if trains and compiling and _is_transformed():
        # There torch.compile passes over the backward() of a Function: its gradient would be 0.
        return blended_linear(x, weight, bias, torch.ones(()), eps)
    dtype = _check_operands(x, weight, bias)
    w_packed, w_scale = torch.ops.bitlinear.quantize_weight.default(weight.detach(), eps)
    if not trains:
        with without_autocast(x.device.type):
            return packed_linear(x, w_packed, w_scale, bias, eps, dtype)
    edges = (x, weight) if compiling else _Edges.apply(x, weight)  # type: ignore[no-untyped-call]
    output, *_ = _StraightThroughLinear.apply(  # type: ignore[no-untyped-call]
        *edges, bias, x.detach(), eps, dtype, w_packed, w_scale
    )
    return cast(Tensor, output)


def blended_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, strength: Tensor, eps: float = 1e-6
) -> Tensor:
    """``linear(x + strength * (Q(x) - x), weight + strength * (Q(weight) - weight), bias)``.

    ``Q`` quantises and multiplies with the scale again; gradients pass as if it did nothing.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``.
        weight: Floating point, shape ``(N, K)``.
        bias: Floating point, shape ``(N,)``, or None.
        strength: fp32, shape ``()``: 0 for a plain linear layer, 1 for quantised operands.
        eps: Lower bound of the absmax of a token and of the absmean of the weights.

    Returns:
        Shape ``(..., N)``, in the dtype of ``x``; under autocast, in the dtype of autocast.

    Raises:
        TypeError: ``x`` is neither fp32, fp16 nor bf16.
        ValueError: Shapes or devices do not fit.
    """
    dtype = _check_operands(x, weight, bias)
    with without_autocast(x.device.type):
        with torch.no_grad():
            q, s_x = quantize_activations(x, eps)
            t, s_w = quantize_weights(weight, eps)
            step_x = strength * (q * s_x - x)
            step_w = strength * (t * s_w - weight)
        operands = ((x + step_x).float(), (weight + step_w).float())
        y = F.linear(*operands, None if bias is None else bias.float())
    return y.to(dtype)


def _is_transformed() -> bool:
    """Whether torch.compile traces a transform of torch.func; torch 2.4 cannot be asked."""
    return torch.__version__ >= "2.13" and torch._C._are_functorch_transforms_active()


def _check_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the output; raises TypeError or ValueError for operands that do not fit."""
    check_activations(x, weight.shape[-1])
    check_device(x, "weight", weight)
    check_device(x, "bias", bias)
    return output_dtype(x)


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a layer's output for the input ``x``."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if _autocasts(device_type) else x.dtype


def _autocasts(device_type: str) -> bool:
    # is_autocast_enabled raises for "meta".
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context in which autocast does not round products to 16 bits."""
    if _autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
