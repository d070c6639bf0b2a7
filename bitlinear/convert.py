"""Whole models: ``nn.Linear`` to BitLinear, and BitLinear to its deployed form."""

from __future__ import annotations

import fnmatch
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from . import foreign, integrations
from .conversion import coverage, references
from .linear import BitLinear
from .quantize import check_quant_type, check_strength
from .state import why_no_plain_weight

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

# The output layer of a language model, by its name in transformers.
_DEFAULT_EXCLUDE = ("lm_head",)

_READ_BY_ATTENTION = (
    "its owner (nn.MultiheadAttention) reads its weight and never calls it: it has to be an "
    "nn.Linear"
)


def convert(
    model: nn.Module,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    exclude: Iterable[str] = _DEFAULT_EXCLUDE,
    quant_type: str = "ai8pc_wpt",
) -> nn.Module:
    """Replaces the linear layers of a model by :class:`BitLinear`, in place.

    Linear layers are ``nn.Linear``; its subclasses that define nothing but ``__init__``,
    ``reset_parameters`` and how they are printed, so that they compute the same and have the same
    state; and of transformers ``Conv1D`` and ``FalconLinear``. Left alone are other subclasses,
    the output projection of ``nn.MultiheadAttention``, which is never called, and the adapters of
    PEFT, whose base layers are converted.

    The new layers share the parameters of the old ones (see :meth:`BitLinear.from_linear`): tied
    weights stay tied, an optimizer made before keeps working, a module used in several places
    stays one module, and forward and backward hooks move along. The weight of a ``Conv1D`` is
    transposed, in the same parameter: load checkpoints of such a model before it is converted.

    References to the old layers that the model also holds elsewhere (in lists and dictionaries,
    bound methods, ``functools.partial``, closures, attributes of objects) are replaced too.
    Variables of your own, outside of the model, keep the old layers.

    What was changed, and what was not and why, is logged by the logger ``"bitlinear"`` at level
    INFO. A UserWarning tells of

    * references to old layers that cannot be replaced, as in a generator,
    * an entry of ``exclude`` that matches nothing,
    * a model that is hardly ternary: more than a tenth of its weights, or half of its weight
      matrices or more, stay in floating point without having been excluded. Embeddings of tokens
      and image patches, and what is tied to them, do not count, nor do parameters whose first
      dimension is 1.

    Args:
        model: The model, or a single linear layer.
        filter_fn: Called with the qualified name and the module of every linear layer; only those
            for which it returns True are converted.
        exclude: Layers to leave alone. An entry is a qualified name, or its last components, with
            the wildcards of :mod:`fnmatch`: ``"lm_head"`` also excludes ``"model.lm_head"``, and
            ``"encoder.*"`` everything inside ``encoder``.
        quant_type: As for :class:`BitLinear`.

    Returns:
        ``model``; or the new layer, where ``model`` itself was converted.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``exclude`` holds something else than strings.
        ValueError: ``quant_type`` is not valid.
    """
    _check_model(model, "convert")
    check_quant_type(quant_type)
    patterns = _checked_patterns(exclude)
    survey = _Survey.of(model, patterns)
    layers = _find_linears(model)
    for layer in layers:
        layer.chosen_out = _why_chosen_out(layer, filter_fn, patterns)
        layer.reason = layer.chosen_out or survey.why_not_convertible(layer.module)
    pairs = [(layer.module, _replace(layer, quant_type)) for layer in layers if not layer.reason]
    if pairs and pairs[0][0] is model:
        model = pairs[0][1]
    messages = [
        _why_kept(references.replace(model, pairs)),
        *survey.why_unmatched(layers),
        survey.why_incomplete(model, layers),
    ]
    _keep_off_fast_paths(model)
    for layer in layers:
        what = f"not converted: {layer.reason}" if layer.reason else f"converted to {layer.new}"
        _logger.info("%s: %s", layer.label, what)
    _logger.info("converted %d of %d linear layers to BitLinear", len(pairs), len(layers))
    for message in messages:
        if message:
            warnings.warn(message, UserWarning, stacklevel=2)
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
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: A layer cannot be deployed (see :meth:`BitLinear.deploy`), or its weight is
            offloaded. The message names every such layer; the model is unchanged.

    Warns:
        UserWarning: There is no BitLinear inside; or some layers have been called since they were
            made, and others have not: what owns these may use their weights without calling them,
            which trains in floating point.
    """
    _check_model(model, "deploy")
    _warn_without_layers(model, "deploy")
    layers = {
        name or "(the model itself)": module
        for name, module in model.named_modules()
        if isinstance(module, BitLinear) and not module.is_deployed
    }
    attended = _read_by_attention(model)
    problems = {
        name: _READ_BY_ATTENTION
        if id(layer) in attended
        else _why_held_elsewhere(layer, _ancestors(model, name)) or layer._why_not_deployable()
        for name, layer in layers.items()
    }
    refused = [f"{name}: {reason}" for name, reason in problems.items() if reason]
    if refused:
        raise ValueError("BitLinear layers cannot be deployed:\n  " + "\n  ".join(refused))

    never_called = _why_never_called(layers)
    elsewhere = _parameters_outside(model, layers.values())
    tied: dict[tuple[int, float], list[str]] = {}
    for name, layer in layers.items():
        tied.setdefault((id(layer.weight), layer.eps), []).append(name)
    for (weight, _), names in tied.items():
        w_packed, w_scale = layers[names[0]]._pack()
        for name in names:
            layers[name]._drop_weight(w_packed, w_scale, shared=len(names) > 1)
            keeper = elsewhere.get(weight)
            note = f"; {keeper} keeps the shared weight in floating point" if keeper else ""
            _logger.info("%s: deployed%s", name, note)
    _keep_off_fast_paths(model)
    _logger.info("deployed %d BitLinear layers", len(layers))
    integrations.attach_to_transformers(model)
    if never_called:
        warnings.warn(never_called, UserWarning, stacklevel=2)
    return model


def _why_held_elsewhere(layer: BitLinear, ancestors: list[nn.Module]) -> str:
    return foreign.why_offloaded(layer, ancestors) or foreign.why_sharded(layer, ancestors)


def _check_model(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"{model!r:.80}"
        raise TypeError(
            f"bitlinear.{function}() needs a torch.nn.Module, but got {what} "
            f"({type(model).__name__}): pass the model itself, as in "
            f"bitlinear.{function}(pipeline.model)"
        )


def _warn_without_layers(model: nn.Module, function: str) -> None:
    if not any(isinstance(module, BitLinear) for module in model.modules()):
        warnings.warn(
            f"{function}() did nothing: this {type(model).__name__} has no BitLinear inside; call "
            f"bitlinear.convert(model) first",
            UserWarning,
            stacklevel=3,
        )


@dataclass
class _Linear:
    """One linear layer of a model, with every place where it hangs.

    Attributes:
        chosen_out: Why the caller of :func:`convert` wants it left alone, or ``""``.
        reason: Why it is left alone, by anybody's decision, or ``""``.
        new: The layer in its place, once it has been converted.
    """

    module: nn.Module
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    chosen_out: str = ""
    reason: str = ""
    new: BitLinear | None = None

    @property
    def label(self) -> str:
        return " = ".join(self.names) or "(the model itself)"


def _find_linears(model: nn.Module) -> list[_Linear]:
    found: dict[int, _Linear] = {}
    if foreign.is_linear(model):
        found[id(model)] = _Linear(model)
    for prefix, parent in model.named_modules():
        for key, child in parent._modules.items():
            if child is not None and foreign.is_linear(child):
                linear = found.setdefault(id(child), _Linear(child))
                linear.names.append(f"{prefix}.{key}" if prefix else key)
                linear.places.append((parent, key))
    return list(found.values())


def _why_chosen_out(
    layer: _Linear, filter_fn: Callable[[str, nn.Module], bool] | None, patterns: Iterable[str]
) -> str:
    """Why the caller of :func:`convert` wants a layer left alone, or ``""``."""
    if isinstance(layer.module, BitLinear):
        return ""
    for name in layer.names or [""]:
        pattern = _matching_pattern(name, patterns)
        if pattern is not None:
            return f"excluded by {pattern!r}"
        if filter_fn is not None and not filter_fn(name, layer.module):
            return "filter_fn returned False"
    return ""


@dataclass
class _Survey:
    """What :func:`convert` has to know of a whole model, before it is changed.

    Attributes:
        patterns: What the caller excludes.
        attended: The layers, by ``id``, of which ``nn.MultiheadAttention`` takes the weight only.
        adapted: The layers, by ``id``, that PEFT adapts.
        adapters: The modules, by ``id``, that PEFT has added.
        holders: How many modules hold a parameter, by its ``id``.
        matrices: Names of the modules that hold parameters of two or more dimensions.
    """

    patterns: tuple[str, ...]
    attended: set[int]
    adapted: set[int]
    adapters: set[int]
    holders: Counter[int]
    matrices: list[str]

    @classmethod
    def of(cls, model: nn.Module, patterns: tuple[str, ...]) -> _Survey:
        holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        matrices = [name for name, module in model.named_modules() if coverage.has_matrix(module)]
        attended = _read_by_attention(model)
        return cls(patterns, attended, *foreign.adapters(model), holders, matrices)

    def why_not_convertible(self, linear: nn.Module) -> str:
        """Why :func:`convert` leaves a layer alone, or ``""``."""
        if isinstance(linear, BitLinear):
            return "it is a BitLinear already"
        if id(linear) in self.attended:
            return _READ_BY_ATTENTION
        if id(linear) in self.adapters:
            return "it is part of an adapter of PEFT, which is merged in floating point"
        reason = why_no_plain_weight(linear) or foreign.why_not_linear(linear)
        if reason:
            return reason
        extras = {*linear._parameters, *linear._buffers, *linear._modules} - {"weight", "bias"}
        if extras:
            return f"it has tensors or modules that nn.Linear has not: {', '.join(sorted(extras))}"
        hooks = [name for name in _STATE_HOOKS if vars(linear).get(name)]
        if hooks:
            return f"it has hooks that cannot be moved: {', '.join(hooks)}"
        if foreign.is_conv1d(linear):
            # Its weight is going to be transposed.
            if self.holders[id(linear.weight)] > 1:
                return "another module shares its weight, which would have to be transposed"
            if id(linear) in self.adapted:
                return (
                    "an adapter of PEFT relies on its transposed weight: convert before adding it"
                )
        return ""

    def why_unmatched(self, layers: Iterable[_Linear]) -> list[str]:
        """The messages of warnings about entries of ``exclude`` that exclude nothing."""
        linears = [name for layer in layers for name in layer.names]
        # A name of any module with a matrix is of use: it keeps convert() from warning of it.
        names = [*linears, *self.matrices]
        return [
            f"exclude={pattern!r} matches no linear layer of the model: "
            f"{_what_would_match(pattern, linears)}"
            for pattern in dict.fromkeys(self.patterns)
            if pattern not in _DEFAULT_EXCLUDE
            and not any(_matching_pattern(name, [pattern]) for name in names)
        ]

    def why_incomplete(self, model: nn.Module, layers: Iterable[_Linear]) -> str:
        """The message of a warning about a model that is hardly ternary, or ``""``."""
        chosen_out = self.adapters | {id(layer.module) for layer in layers if layer.chosen_out}
        reasons = {name: layer.reason for layer in layers for name in layer.names or [""]}

        def is_chosen_out(name: str, module: nn.Module) -> bool:
            parts = name.split(".")
            owners = [".".join(parts[: n + 1]) for n in range(len(parts))]  # itself included
            return id(module) in chosen_out or any(
                _matching_pattern(owner, self.patterns) is not None for owner in owners
            )

        return coverage.why_incomplete(model, is_chosen_out, reasons)


def _what_would_match(pattern: str, names: list[str]) -> str:
    """Advice about a pattern that matches none of the ``names``."""
    for name in names:
        parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        if any(_matching_pattern(parent, [pattern]) for parent in parents):
            return (
                f"it is the name of a module, and layers are excluded by their own names; "
                f"{pattern + '.*'!r} excludes those inside, such as {name}"
            )
    return f"names of layers here are {_listed(names, 3)}" if names else "it has none"


def _replace(layer: _Linear, quant_type: str) -> BitLinear:
    """Puts a BitLinear in all places of a layer, hooks and attributes included."""
    linear = layer.module
    layer.new = new = BitLinear.from_linear(linear, quant_type=quant_type)  # type: ignore[arg-type]
    if foreign.is_conv1d(linear):
        _keep_parameter(linear, new)
    _move_extras(linear, new)
    for parent, key in layer.places:
        parent._modules[key] = new
    return new


def _keep_parameter(linear: Any, new: BitLinear) -> None:
    """Makes the parameter of a Conv1D that of ``new``; ``linear`` keeps its values in another.

    An optimizer that was made before holds the parameter, not the layer.
    """
    weight: nn.Parameter = linear.weight
    grad = weight.grad
    linear.weight = nn.Parameter(weight.data, requires_grad=weight.requires_grad)
    weight.grad = None
    weight.data = new.weight.data
    weight.grad = None if grad is None else grad.t().contiguous()
    new.weight = weight


def _why_kept(paths: list[str]) -> str:
    """The message of a warning about references to old layers, or ``""``."""
    if not paths:
        return ""
    return (
        f"convert() replaced layers that the model also holds where it cannot replace them: "
        f"{_listed(paths)}. These still use the old layers, in floating point: make them anew from "
        f"the converted model"
    )


def _why_never_called(layers: dict[str, BitLinear]) -> str:
    """The message of a warning about layers that only others than themselves compute, or ``""``."""
    idle = [name for name, layer in layers.items() if not vars(layer).get("_called", False)]
    if not idle or len(idle) == len(layers):
        return ""
    return (
        f"deploy(): {len(idle)} of {len(layers)} BitLinear layers have never been called, while "
        f"the others have: {_listed(idle)}. If the module around them uses their weights without "
        f"calling them, they were trained and used in floating point, not ternary: name them in "
        f"exclude of convert(). If no input has reached them yet, or they only ran inside of "
        f"torch.compile, all is well"
    )


def _listed(names: list[str], first: int = 5) -> str:
    more = f" and {len(names) - first} more" if len(names) > first else ""
    return ", ".join(names[:first]) + more


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that contain the one of this qualified name, the model included."""
    parents = [model]
    for key in name.split(".")[:-1]:
        parents.append(parents[-1]._modules[key])  # type: ignore[arg-type]
    return parents


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
    _warn_without_layers(model, "set_quantization_strength")
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


def _checked_patterns(exclude: Iterable[str]) -> tuple[str, ...]:
    several = isinstance(exclude, Iterable) and not isinstance(exclude, str)
    patterns: tuple[Any, ...] = tuple(exclude) if several else (exclude,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"exclude must hold names of layers, but it holds {pattern!r:.80} "
                f"({type(pattern).__name__}): use filter_fn to choose by anything else"
            )
    return patterns


def _matching_pattern(name: str, patterns: Iterable[str]) -> str | None:
    parts = name.split(".")
    endings = [".".join(parts[first:]) for first in range(len(parts))]
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(ending, pattern) for ending in endings):
            return pattern
    return None


def _move_extras(old: nn.Module, new: BitLinear) -> None:
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
