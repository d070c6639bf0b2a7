"""Whole models: convert ``nn.Linear`` to BitLinear, deploy, set the quantisation strength."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from . import foreign, integrations
from .arguments import check_strength, parse_quant_type
from .conversion import coverage, references
from .conversion.exclusion import DEFAULT_EXCLUDE, Exclusion
from .conversion.layers import Convertibility, LinearLayer, find_linear_layers
from .conversion.replacement import replace_layer
from .conversion.weight_readers import READ_BY_ATTENTION, disable_fast_paths, read_by_attention
from .embedding import Embedding
from .messages import list_names
from .packable import pack_together, was_called
from .preconditions import why_not_deployable
from .ternary_layer import TernaryLayer
from .ties import tied_groups

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)


def convert(
    model: nn.Module,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    exclude: Iterable[str] = DEFAULT_EXCLUDE,
    quant_type: str = "ai8pc_wpt",
) -> nn.Module:
    """Replace the linear layers of a model by :class:`BitLinear`, in place.

    These classes are linear layers: ``nn.Linear``; its subclasses that define nothing but
    ``__init__``, ``reset_parameters`` and how they are printed, so that they compute the same and
    have the same state; ``Conv1D`` and ``FalconLinear`` of transformers. Other subclasses stay as
    they are. So do the output projection of ``nn.MultiheadAttention``, which is never called, and
    the adapters of PEFT; their base layers are converted. Embeddings stay as they are, too:
    :meth:`bitlinear.Embedding.from_embedding` makes a ternary one.

    The new layers share the parameters of the old ones (see :meth:`BitLinear.from_linear`): tied
    weights stay tied, an existing optimizer keeps working, a module that is used in several places
    stays one module, and forward and backward hooks move to the new layer. The weight of a
    ``Conv1D`` is transposed, in the same parameter: load checkpoints of such a model before you
    convert it.

    The call also replaces other references of the model to the old layers (in lists and
    dictionaries, bound methods, ``functools.partial``, closures, attributes of objects). Your own
    variables outside of the model keep the old layers.

    The logger ``"bitlinear"`` reports each layer at level INFO: converted, or not converted and
    why.

    Args:
        model: The model, or a single linear layer.
        filter_fn: Called with the qualified name and the module of every linear layer. A layer is
            converted only if it returns True.
        exclude: Layers to leave as they are. An entry is a qualified name, or its last components,
            with the wildcards of :mod:`fnmatch`: ``"lm_head"`` also excludes ``"model.lm_head"``,
            and ``"encoder.*"`` everything inside ``encoder``.
        quant_type: As for :class:`BitLinear`.

    Returns:
        ``model``; or the new layer, if ``model`` itself was converted.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or an entry of ``exclude`` is not a string.
        ValueError: ``quant_type`` is not valid.

    Warns:
        UserWarning: A reference to an old layer cannot be replaced, such as a reference in a
            generator.
        UserWarning: An entry of ``exclude`` matches nothing.
        UserWarning: The model is hardly ternary: more than a tenth of its weights, or at least
            half of its weight matrices, stay in floating point and are not excluded. Embeddings of
            tokens and image patches, and weights tied to them, do not count; nor do parameters
            whose first dimension is 1.
        UserWarning: The model has packed BitNet layers of transformers.
    """
    check_model(model, "convert")
    parse_quant_type(quant_type)
    exclusion = Exclusion(exclude, filter_fn)
    convertibility = Convertibility(model)
    layers = find_linear_layers(model)
    for layer in layers:
        layer.excluded = exclusion.why_excluded(layer)
        layer.reason = layer.excluded or convertibility.why_not(layer.module)
    converted = [layer for layer in layers if not layer.reason]
    model, stale = replace_layers(model, converted, lambda layer: quant_type)
    messages = [
        stale,
        *exclusion.unmatched_patterns(
            [name for layer in layers for name in layer.names],
            [name for name, module in model.named_modules() if coverage.has_matrix(module)],
        ),
        _why_incomplete(model, layers, exclusion, convertibility.adapters),
        _describe_bitnet_layers(model),
    ]
    disable_fast_paths(model)
    for layer in layers:
        if layer.reason:
            _logger.info("%s: not converted: %s", layer.label, layer.reason)
        else:
            _logger.info("%s: converted to %s", layer.label, layer.replacement)
    _logger.info("converted %d of %d linear layers to BitLinear", len(converted), len(layers))
    for message in messages:
        if message:
            warnings.warn(message, UserWarning, stacklevel=2)
    return model


def replace_layers(
    model: nn.Module, layers: list[LinearLayer], quant_type: Callable[[LinearLayer], str]
) -> tuple[nn.Module, str]:
    """Put a BitLinear of this type in place of each layer, and replace references to them.

    Returns:
        ``model``, or the new layer if ``model`` itself was replaced; and the message of a warning
        about references that still lead to old layers, or ``""``.
    """
    pairs = [(layer.module, replace_layer(layer, quant_type(layer))) for layer in layers]
    if pairs and pairs[0][0] is model:
        model = pairs[0][1]
    return model, _describe_stale_references(references.replace(model, pairs))


def finish_deployment(model: nn.Module) -> None:
    """Switch off fast paths around deployed layers, and tell transformers how to save them."""
    disable_fast_paths(model)
    integrations.attach_to_transformers(model)


def deploy(model: _Model) -> _Model:
    """Deploy every :class:`BitLinear` and :class:`Embedding` inside ``model``, in place.

    Layers that share one weight share the packed weight. If another kind of module uses the same
    weight (an ``nn.Embedding``, for example), that module keeps it in floating point.

    Args:
        model: The model, or a single layer.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: A layer cannot be deployed (see :meth:`BitLinear.deploy`), its weight is
            offloaded, or an Embedding and a layer tied to it differ in ``eps`` or in the kind of
            scale. The message names every such layer; the model is unchanged.

    Warns:
        UserWarning: The model has neither a BitLinear nor an Embedding of this package.
        UserWarning: Some layers have been called since they were made, and others have not. A
            module may use the weights of these others without a call of the layer, which trains
            in floating point.
    """
    check_model(model, "deploy")
    _warn_without_layers(model, "deploy")
    layers = {
        name or "(the model itself)": module
        for name, module in model.named_modules()
        if isinstance(module, TernaryLayer) and not module.is_deployed
    }
    _check_deployable(model, layers)
    never_called = _describe_never_called(layers)
    other_users = _parameters_outside(model, layers.values())
    tied: dict[tuple[int, float, int], list[str]] = {}
    for name, layer in layers.items():
        key = (id(layer.weight), layer.eps, layer._group_size)
        tied.setdefault(key, []).append(name)
    for (weight, *_), names in tied.items():
        pack_together([layers[name] for name in names])
        for name in names:
            user = other_users.get(weight)
            note = f"; {user} keeps the shared weight in floating point" if user else ""
            _logger.info("%s: deployed%s", name, note)
    embeddings = sum(isinstance(layer, Embedding) for layer in layers.values())
    note = f" and {embeddings} embeddings" if embeddings else ""
    _logger.info("deployed %d BitLinear layers%s", len(layers) - embeddings, note)
    finish_deployment(model)
    if never_called:
        warnings.warn(never_called, UserWarning, stacklevel=2)
    return model


def set_quantization_strength(model: nn.Module, strength: float) -> nn.Module:
    """Set the ``quantization_strength`` of every BitLinear and Embedding inside ``model``.

    A pretrained model loses accuracy if all of it is quantised at once. If the strength rises from
    0 to 1 over the first steps of fine-tuning, the weights can adapt::

        for step, batch in enumerate(loader):
            bitlinear.set_quantization_strength(model, min(1.0, step / 1000))
            ...

    Args:
        model: The model, or a single layer; modified in place.
        strength: From 0, plain linear layers, to 1, quantised layers.

    Returns:
        ``model``.

    Raises:
        ValueError: ``strength`` is not between 0 and 1, or is below 1 while a layer is deployed.
            No layer is changed.

    Warns:
        UserWarning: The model has neither a BitLinear nor an Embedding of this package.
    """
    check_model(model, "set_quantization_strength")
    _warn_without_layers(model, "set_quantization_strength")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TernaryLayer)}
    deployed = [name for name, layer in layers.items() if layer.is_deployed]
    check_strength(strength)
    if strength < 1 and deployed:
        raise ValueError(
            f"the quantization strength of a deployed layer is 1 and cannot be {strength}: call "
            f"undeploy() on {repr(deployed[0]) if deployed[0] else 'the model itself'} first (of "
            f"{len(deployed)} deployed)"
        )
    for layer in layers.values():
        layer.quantization_strength = strength
    return model


def check_model(model: Any, function: str) -> None:
    """Raise TypeError, which names the function, unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        value = f"the class {model.__name__}" if isinstance(model, type) else f"{model!r:.80}"
        raise TypeError(
            f"bitlinear.{function}() needs a torch.nn.Module, but got {value} "
            f"({type(model).__name__}): pass the model itself, as in "
            f"bitlinear.{function}(pipeline.model)"
        )


def _warn_without_layers(model: nn.Module, function: str) -> None:
    if not any(isinstance(module, TernaryLayer) for module in model.modules()):
        remedy = "call bitlinear.convert(model) first"
        if foreign.bitnet_layers(model):
            remedy = f"its BitNet layers need {foreign.CONVERT_BITNET}, which deploys them"
        warnings.warn(
            f"{function}() did nothing: this {type(model).__name__} has no BitLinear of this "
            f"package inside; {remedy}",
            UserWarning,
            stacklevel=3,
        )


def _describe_bitnet_layers(model: nn.Module) -> str:
    """The message of a warning about packed layers of transformers, or ``""``.

    They are no linear layers of torch, so that nothing else reports them.
    """
    packed = [layer for layer in foreign.bitnet_layers(model) if not foreign.is_linear(layer)]
    if not packed:
        return ""
    return (
        f"{len(packed)} layers are BitNet layers of transformers, which stay as they are: "
        f"{foreign.CONVERT_BITNET} converts them"
    )


def _describe_stale_references(paths: list[str]) -> str:
    """The message of a warning about references that still lead to old layers, or ``""``."""
    if not paths:
        return ""
    return (
        f"layers were replaced, but these references of the model to them cannot be: "
        f"{list_names(paths, 5)}. The references still lead to the old layers, in floating point: "
        f"create the objects that hold them again, from the converted model"
    )


def _why_incomplete(
    model: nn.Module, layers: list[LinearLayer], exclusion: Exclusion, adapters: set[int]
) -> str:
    """The message of a warning about a model that is hardly ternary, or ``""``."""
    excluded = adapters | {id(layer.module) for layer in layers if layer.excluded}
    reasons = {name: layer.reason for layer in layers for name in layer.names or [""]}

    def is_excluded(name: str, module: nn.Module) -> bool:
        return id(module) in excluded or exclusion.matches_module(name)

    return coverage.why_incomplete(model, is_excluded, reasons)


def _check_deployable(model: nn.Module, layers: dict[str, TernaryLayer]) -> None:
    """Raise ValueError with the name of every layer that cannot be deployed."""
    attention_weights = read_by_attention(model)
    problems = _different_ties(layers)
    for name, layer in layers.items():
        if id(layer) in attention_weights:
            reason = READ_BY_ATTENTION
        else:
            reason = why_not_deployable(layer, _ancestors(model, name))
        if reason:
            problems.append(f"{name}: {reason}")
    if problems:
        raise ValueError("these layers cannot be deployed:\n  " + "\n  ".join(problems))


def _different_ties(layers: dict[str, TernaryLayer]) -> list[str]:
    """The embeddings whose tied layers would need another packed weight, each with the reason.

    Two linear layers are packed apart then. An embedding is tied to save the memory of its table.
    """
    names = {id(layer): name for name, layer in layers.items()}
    return [
        f"{names[id(layer)]}: {names[id(other)]} has the same weight, but another quantisation "
        f"(eps={other.eps:g} and quant_type={other.quant_type!r}, not {layer.eps:g} and "
        f"{layer.quant_type!r}): make eps and the kind of scale equal"
        for group in tied_groups(layers.values())
        for layer in group
        for other in group
        if isinstance(layer, Embedding)
        and (layer.eps, layer._group_size) != (other.eps, other._group_size)
    ]


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules around the module of this qualified name, ``model`` included."""
    ancestors = [model]
    for key in name.split(".")[:-1]:
        ancestors.append(ancestors[-1]._modules[key])  # type: ignore[arg-type]
    return ancestors


def _describe_never_called(layers: dict[str, TernaryLayer]) -> str:
    """The message of a warning about layers whose weights another module may read, or ``""``."""
    idle = [name for name, layer in layers.items() if not was_called(layer)]
    if not idle or len(idle) == len(layers):
        return ""
    return (
        f"deploy(): {len(idle)} of {len(layers)} BitLinear layers and embeddings have never been "
        f"called, but the others have: {list_names(idle, 5)}. If the module around them reads "
        f"their weights without a call of the layer, it has trained and used them in floating "
        f"point: name them in exclude of convert(). If no input has reached them yet, or they only "
        f"ran inside of torch.compile, nothing is wrong"
    )


def _parameters_outside(model: nn.Module, layers: Iterable[TernaryLayer]) -> dict[int, str]:
    """The names, by ``id``, of the parameters that modules other than ``layers`` hold."""
    inside = {id(layer) for layer in layers}
    return {
        id(parameter): f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        if id(module) not in inside
        for key, parameter in module._parameters.items()
        if parameter is not None
    }
