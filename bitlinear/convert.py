"""Whole models: ``nn.Linear`` to BitLinear, and BitLinear to its deployed form."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from . import integrations
from .linear import BitLinear, why_no_plain_weight
from .quantize import check_quant_type, check_strength

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)

# What nn.Module keeps about calls. The dictionaries move as they are, so that the handles which
# remove a hook keep working.
_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

_READ_BY_ATTENTION = (
    "its owner (nn.MultiheadAttention) reads its weight and never calls it: it has to be an "
    "nn.Linear"
)


def convert(
    model: nn.Module,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    exclude: Iterable[str] = ("lm_head",),
    quant_type: str = "ai8pc_wpt",
) -> nn.Module:
    """Replaces the ``nn.Linear`` layers of a model by :class:`BitLinear`, in place.

    The new layers share the parameters of the old ones (see :meth:`BitLinear.from_linear`): tied
    weights stay tied, a module used in several places stays one module, and forward and backward
    hooks move along. Subclasses of ``nn.Linear`` are left alone, as their forward pass or their
    owner may do anything with the weight. What was changed, and what was not and why, is logged
    by the logger ``"bitlinear"`` at level INFO.

    Args:
        model: The model, or a single ``nn.Linear``.
        filter_fn: Called with the qualified name and the module of every ``nn.Linear``; only those
            for which it returns True are converted.
        exclude: Layers to leave alone. An entry is a qualified name, or its last components, with
            the wildcards of :mod:`fnmatch`: ``"lm_head"`` also excludes ``"model.lm_head"``.
        quant_type: As for :class:`BitLinear`.

    Returns:
        ``model``; or the new layer, where ``model`` itself was converted.

    Raises:
        ValueError: ``quant_type`` is not valid.
    """
    check_quant_type(quant_type)
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    layers = _find_linears(model)
    attended = _read_by_attention(model)
    converted = 0
    for layer in layers:
        reason = (
            _READ_BY_ATTENTION
            if id(layer.module) in attended
            else _why_not_convertible(layer, filter_fn, patterns)
        )
        if reason:
            _logger.info("%s: not converted: %s", layer.label, reason)
            continue
        new = BitLinear.from_linear(layer.module, quant_type=quant_type)
        _move_extras(layer.module, new)
        for parent, key in layer.places:
            parent._modules[key] = new
        if layer.module is model:
            model = new
        converted += 1
        _logger.info("%s: converted to %s", layer.label, new)
    _keep_off_fast_paths(model)
    _logger.info("converted %d of %d linear layers to BitLinear", converted, len(layers))
    return model


def deploy(model: _Model) -> _Model:
    """Deploys every :class:`BitLinear` inside ``model``, in place.

    Layers that share one weight share the packed one. Where another kind of module uses the same
    weight (an embedding, say), that module keeps it in floating point.

    Args:
        model: The model, or a single BitLinear.

    Returns:
        ``model``.

    Raises:
        ValueError: A layer cannot be deployed (see :meth:`BitLinear.deploy`). The message names
            every such layer; the model is unchanged.
    """
    layers = {
        name or "(the model itself)": module
        for name, module in model.named_modules()
        if isinstance(module, BitLinear) and not module.is_deployed
    }
    attended = _read_by_attention(model)
    problems = {
        name: _READ_BY_ATTENTION if id(layer) in attended else layer._why_not_deployable()
        for name, layer in layers.items()
    }
    refused = [f"{name}: {reason}" for name, reason in problems.items() if reason]
    if refused:
        raise ValueError("BitLinear layers cannot be deployed:\n  " + "\n  ".join(refused))

    elsewhere = _parameters_outside(model, layers.values())
    tied: dict[tuple[int, float], list[str]] = {}
    for name, layer in layers.items():
        tied.setdefault((id(layer.weight), layer.eps), []).append(name)
    for (weight, _), names in tied.items():
        w_packed, w_scale = layers[names[0]]._pack()
        for name in names:
            layers[name]._drop_weight(w_packed, w_scale)
            keeper = elsewhere.get(weight)
            note = f"; {keeper} keeps the shared weight in floating point" if keeper else ""
            _logger.info("%s: deployed%s", name, note)
    _keep_off_fast_paths(model)
    _logger.info("deployed %d BitLinear layers", len(layers))
    integrations.attach_to_transformers(model)
    return model


@dataclass
class _Linear:
    """One ``nn.Linear`` of a model, with every place where it hangs."""

    module: nn.Linear
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return " = ".join(self.names) or "(the model itself)"


def _find_linears(model: nn.Module) -> list[_Linear]:
    found: dict[int, _Linear] = {}
    if isinstance(model, nn.Linear):
        found[id(model)] = _Linear(model)
    for prefix, parent in model.named_modules():
        for key, child in parent._modules.items():
            if isinstance(child, nn.Linear):
                linear = found.setdefault(id(child), _Linear(child))
                linear.names.append(f"{prefix}.{key}" if prefix else key)
                linear.places.append((parent, key))
    return list(found.values())


def _why_not_convertible(
    layer: _Linear, filter_fn: Callable[[str, nn.Module], bool] | None, patterns: Iterable[str]
) -> str:
    """Why :func:`convert` leaves a layer alone, or ``""``."""
    linear, names = layer.module, layer.names or [""]
    if isinstance(linear, BitLinear):
        return "it is a BitLinear already"
    for name in names:
        pattern = _matching_pattern(name, patterns)
        if pattern is not None:
            return f"excluded by {pattern!r}"
        if filter_fn is not None and not filter_fn(name, linear):
            return "filter_fn returned False"
    reason = why_no_plain_weight(linear)
    if reason:
        return reason
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, whose use of the weight is unknown"
    if "forward" in vars(linear):
        return "its forward has been replaced on the instance"
    extras = {*linear._parameters, *linear._buffers, *linear._modules} - {"weight", "bias"}
    if extras:
        return f"it has tensors or modules that nn.Linear has not: {', '.join(sorted(extras))}"
    hooks = [name for name in _STATE_HOOKS if vars(linear).get(name)]
    if hooks:
        return f"it has hooks that cannot be moved: {', '.join(hooks)}"
    return ""


def set_quantization_strength(model: nn.Module, strength: float) -> nn.Module:
    """Sets :attr:`BitLinear.quantization_strength` of every BitLinear inside.

    Quantising a pretrained model all at once loses what it knows; raised from 0 to 1 over the first
    steps of fine-tuning, the strength lets the weights follow::

        for step, batch in enumerate(loader):
            bitlinear.set_quantization_strength(model, min(1.0, step / 1000))
            ...

    Args:
        model: Modified in place; may itself be a BitLinear.
        strength: From 0, plain linear layers, to 1, quantised ones.

    Returns:
        The model.

    Raises:
        ValueError: ``strength`` is not between 0 and 1, or is below 1 while a layer is deployed.
            No layer was changed.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}
    deployed = [name for name, layer in layers.items() if layer.is_deployed]
    check_strength(strength)
    if strength < 1 and deployed:
        raise ValueError(
            f"the quantization strength of a deployed layer is 1 and cannot be {strength}: call "
            f"undeploy() on {deployed[0] or 'the model'!r} first (of {len(deployed)} deployed)"
        )
    for layer in layers.values():
        layer.quantization_strength = strength
    return model


def _matching_pattern(name: str, patterns: Iterable[str]) -> str | None:
    parts = name.split(".")
    endings = [".".join(parts[first:]) for first in range(len(parts))]
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(ending, pattern) for ending in endings):
            return pattern
    return None


def _move_extras(old: nn.Linear, new: BitLinear) -> None:
    """Gives ``new`` the hooks of ``old``, and the attributes that somebody has put on it."""
    for name, value in vars(old).items():
        if name in _CALL_HOOKS or name not in vars(new):
            vars(new)[name] = value


def _read_by_attention(model: nn.Module) -> set[int]:
    """The layers, by ``id``, of which ``nn.MultiheadAttention`` takes the weight only."""
    return {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward  # another may well call it
    }


def _parameters_outside(model: nn.Module, layers: Iterable[BitLinear]) -> dict[int, str]:
    """Names of the parameters that modules other than ``layers`` hold, by ``id``."""
    inside = {id(layer) for layer in layers}
    return {
        id(parameter): f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        if id(module) not in inside
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def _keep_off_fast_paths(model: nn.Module) -> None:
    """Makes ``nn.TransformerEncoder`` call its linear layers.

    In evaluation its fast path reads ``linear1.weight`` and ``linear2.weight`` and never calls the
    layers. The two attributes set here only say whether that path may be taken.
    """

    def bypasses(module: Any) -> bool:
        return isinstance(module, nn.TransformerEncoderLayer) and (
            isinstance(module.linear1, BitLinear) or isinstance(module.linear2, BitLinear)
        )

    for name, module in model.named_modules():
        if bypasses(module) and module.activation_relu_or_gelu:
            module.activation_relu_or_gelu = 0
            _logger.info("%s: its fast path is off, as it does not call its layers", name)
        elif isinstance(module, nn.TransformerEncoder) and any(map(bypasses, module.layers)):
            module.use_nested_tensor = False
