"""Which modules compute as one fused product, and the product of those that do.

:class:`~bitlinear.LinearGroup` and the decoder layers of transformers decide it here, in every
call: a hook, an adapter or a layer that is replaced counts from the next call on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .autograd import output_dtype
from .fused import fused_linear
from .linear import BitLinear
from .preconditions import is_distributed

# torch adds hooks to these dictionaries, and never replaces them.
_FORWARD, _FORWARD_PRE, _BACKWARD, _BACKWARD_PRE = (
    getattr(nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
)

# The attribute of a norm that holds its eps, for each class of norms and its forward, which can be
# replaced; "" for another class.
_EPS_NAMES: dict[tuple[type, Any], str] = {(nn.RMSNorm, nn.RMSNorm.forward): "eps"}


def fused_products(
    parent: nn.Module,
    names: Sequence[str],
    x: Tensor,
    norm: nn.Module | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor | None:
    """Apply layers to one input by :func:`bitlinear.fused.fused_linear`, if that is possible.

    Args:
        parent: The module that holds the layers.
        names: The names of the layers in ``parent``; 1 to 4.
        x: fp32, fp16 or bf16, shape ``(..., K)``; with an activation ``(..., 2 K)``.
        norm: The norm in front of the layers, behind the gate; or None.
        activation: ``"silu"``, ``"relu2"``, or None for no gate.
        residual: Added to the output, whose shape it has; or None.

    Returns:
        The outputs side by side, shape ``(..., N_0 + N_1 + ...)``. None if the modules must be
        called one after the other: for a reason that :func:`why_not_fused` gives, because ``x`` is
        no ordinary tensor (nested, distributed, a proxy), or because the dtypes of ``x``, of the
        norm's weight and of the residual differ, so that the output would have another dtype.
    """
    is_ordinary = type(x) is Tensor or (
        isinstance(x, Tensor) and not x.is_nested and not is_distributed(x)
    )
    if not is_ordinary:
        return None
    operands = _operands(parent, names, norm)
    if isinstance(operands, str):
        return None
    norm_weight: Any = None
    norm_eps = 0.0
    if norm is not None:
        norm_weight = norm._parameters["weight"]
        norm_eps = getattr(norm, _eps_name(type(norm)))
        if norm_weight.dtype != x.dtype:
            return None
    if residual is not None and residual.dtype != output_dtype(x):
        return None
    return fused_linear(x, *operands, activation, norm_weight, norm_eps, residual)


def why_not_fused(parent: nn.Module, names: Sequence[str], norm: nn.Module | None = None) -> str:
    """Why these layers, with this norm in front, are not computed as one product, or ``""``.

    Args:
        parent: The module that holds the layers.
        names: The names of the layers in ``parent``; 1 to 4.
        norm: The norm in front of them, or None.
    """
    operands = _operands(parent, names, norm)
    return operands if isinstance(operands, str) else ""


def _operands(
    parent: nn.Module, names: Sequence[str], norm: nn.Module | None
) -> str | tuple[list[Tensor], list[Tensor], list[Tensor | None], int, float, int, int]:
    """The arguments of ``fused_linear`` after ``x`` that the layers hold; or why not."""
    modules = parent._modules
    first: Any = modules[names[0]]
    w_packed: list[Any] = []
    w_scale: list[Any] = []
    bias: list[Any] = []
    for name in names:
        layer: Any = modules[name]
        if type(layer) is not BitLinear:
            return f"{name} is a {type(layer).__name__}, not a BitLinear"
        reason = why_called(layer)
        if reason:
            return f"{name} {reason}"
        buffers = layer._buffers
        if "w_packed" not in buffers:
            return f"{name} is not deployed"
        packed: Any = buffers["w_packed"]
        if type(packed) is not Tensor and is_distributed(packed):
            return f"{name} is divided among processes"
        w_packed.append(packed)
        w_scale.append(buffers["w_scale"])
        bias.append(buffers["bias"] if "bias" in buffers else layer.bias)  # noqa: SIM401
        if layer is not first:
            if layer.in_features != first.in_features:
                return f"{names[0]} and {name} differ in in_features"
            if layer.eps != first.eps or layer._act_bits != first._act_bits:
                return f"{names[0]} and {name} quantise activations in different ways"
            if max(layer._group_size, 0) != max(first._group_size, 0):
                return (
                    f"{names[0]} has quant_type {first.quant_type}, but {name} has "
                    f"{layer.quant_type}: one product has one size of groups"
                )
            if packed.device != w_packed[0].device:
                return f"{names[0]} and {name} are on different devices"
    if norm is not None:
        reason = why_not_norm(norm)
        if reason:
            return reason
    quantisation = first.eps, first._group_size, first._act_bits
    return w_packed, w_scale, bias, first.in_features, *quantisation


def why_called(module: nn.Module, recorders: str = "") -> str:
    """Why ``module`` has to be called, rather than computed together with others, or ``""``.

    Args:
        module: The module.
        recorders: The qualified name of the Python module whose forward hooks do not count, because
            the caller calls them itself.
    """
    if "forward" in module.__dict__:
        return "has a forward that was replaced on the instance"
    hooks = module._forward_hooks
    if (
        hooks
        and recorders
        and all(getattr(hook, "__module__", "") == recorders for hook in hooks.values())
    ):
        hooks = {}
    if hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if _FORWARD or _FORWARD_PRE or _BACKWARD or _BACKWARD_PRE:
        return "is seen by a hook of all modules"
    return ""


def why_not_norm(norm: nn.Module) -> str:
    """Why ``norm`` cannot be a part of a product, or ``""``."""
    kind = type(norm).__name__
    eps_name = _eps_name(type(norm))
    if not eps_name:
        return f"the norm is a {kind}, which is not known to be a plain RMSNorm"
    reason = why_called(norm)
    if reason:
        return f"the norm {reason}"
    weight = norm._parameters.get("weight")
    if type(weight) is not nn.Parameter and (weight is None or is_distributed(weight)):
        return "the norm has no weight that is an ordinary parameter"
    if weight.dim() != 1:
        return f"the norm is over {weight.dim()} dimensions"
    if getattr(norm, eps_name) is None:
        return "the norm has no eps, so that its result depends on the version of torch"
    return ""


def _eps_name(kind: type) -> str:
    """The attribute that holds the eps of an RMSNorm of this class; ``""`` for another class."""
    key = (kind, getattr(kind, "forward", None))
    name = _EPS_NAMES.get(key)
    if name is None:
        is_plain = same_computation(key[1], _rms_norm_forward)
        name = _EPS_NAMES[key] = "variance_epsilon" if is_plain else ""
    return name


def same_computation(one: Any, other: Any) -> bool:
    """Whether two functions of Python have the same compiled code and defaults."""
    return bool(_instructions(one) == _instructions(other))


def _instructions(function: Any) -> Any:
    """What a function of Python computes: its compiled code without the docstring."""
    code = getattr(function, "__code__", None)
    if code is None:
        return function
    constants = [value for value in code.co_consts if value is not None and type(value) is not str]
    defaults = function.__defaults__, function.__kwdefaults__
    return code.co_code, code.co_names, code.co_argcount, constants, defaults


def _rms_norm_forward(self: Any, hidden_states: Any) -> Any:
    # The forward of LlamaRMSNorm. The norms of most models in transformers, and of many models with
    # code of their own, are copies of that class: their compiled code is this one.
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
