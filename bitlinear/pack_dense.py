"""Whole models whose dense weights are ternary already: packed without loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import nn

from . import foreign
from .arguments import QuantType, check_act_bits
from .conversion.exclusion import Exclusion
from .conversion.layers import Convertibility, LinearLayer, find_linear_layers
from .conversion.ternary import NotTernary, Scales, find_scales
from .conversion.ternary import pack as pack_signs
from .convert import check_model, finish_deployment, replace_layers
from .groups import LARGE_ROUNDING, describe_rounding
from .messages import list_names, warn
from .packing import describe_memory

_logger = logging.getLogger("bitlinear")


@torch.no_grad()
def pack(
    model: nn.Module,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    exclude: Iterable[str] = (),
    act_bits: int = 8,
) -> nn.Module:
    """Replace the linear layers whose weights are ternary times scales by deployed ones, in place.

    Such layers come from checkpoints that store ternary weights as dense ones: TriLM's unpacked
    checkpoints, BitCPM4, ParetoQ after quantisation, or any model that was quantised in simulation.
    The scales are found in the values (see :func:`bitlinear.conversion.ternary.find_scales` for the
    rule): one for a tensor, one for each output feature or one for each group of inputs, of the
    largest size that explains the weight. No value is rounded, except that scales of groups keep 15
    bits, relative to the largest of their output feature (:mod:`bitlinear.groups`). Every other
    layer stays as it is. Weights that are still to be rounded, as in masters that are quantised on
    the fly, need :func:`bitlinear.convert` and :func:`bitlinear.deploy`.

    The logger ``"bitlinear"`` reports each layer at level INFO: its scales, the share of zeros and
    the largest deviation of a magnitude from its scale (0 if the stored values are equal), or why
    it was not packed. At the end it reports the memory of all packed weights and of their scales.

    Args:
        model: The model, or a single linear layer. The classes are those of
            :func:`bitlinear.convert`.
        filter_fn, exclude: As for :func:`bitlinear.convert`; by default every linear layer counts.
        act_bits: The bits of quantised activations, 8 or 16. The values of the weights do not tell:
            use what the model was trained with; 16 if its activations were not quantised.

    Returns:
        ``model``; or the new layer, if ``model`` itself was packed.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or an entry of ``exclude`` is not a string.
        ValueError: ``act_bits`` is neither 8 nor 16; or a weight may be ternary, but is ambiguous
            or has scales that no groups can have. The message names every such layer; the
            model is unchanged. ``exclude`` leaves them as they are.

    Warns:
        UserWarning: Nothing was packed; or a scale of a group, far below the largest of its output
            feature, is rounded by more than 1/128 of its size, perhaps to 0; or a packed layer is
            tied to a module that stays dense; or an entry of ``exclude`` matches nothing, or a
            reference to an old layer cannot be replaced.
    """
    check_model(model, "pack")
    check_act_bits(act_bits)
    exclusion = Exclusion(exclude, filter_fn)
    convertibility = Convertibility(model)
    layers = find_linear_layers(model)
    found: dict[int, Scales | NotTernary] = {}
    for layer in layers:
        layer.excluded = exclusion.why_excluded(layer)
        layer.reason = layer.excluded or convertibility.why_not(layer.module)
        if not layer.reason:
            scales = _examine(layer, found)
            layer.reason = scales.reason if isinstance(scales, NotTernary) else ""
    _raise_for_refused(layers, found)
    packed = [layer for layer in layers if not layer.reason]
    doubled = _shared_with_dense_modules(model, packed)
    names = [name for layer in layers for name in layer.names]
    messages = exclusion.unmatched_patterns(names, [name for name, _ in model.named_modules()])
    scales_of = {id(layer.module): _scales(layer, found) for layer in packed}
    # Layers with one weight share the packed one, too.
    weights = [layer.module._parameters["weight"] for layer in packed]
    model, stale = replace_layers(
        model,
        packed,
        lambda layer: QuantType(act_bits, scales_of[id(layer.module)].group_size).name,
    )
    tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer, weight in zip(packed, weights):
        scales = scales_of[id(layer.module)]
        new = layer.replacement
        assert new is not None
        if id(weight) not in tensors:
            with torch.inference_mode(False):
                tensors[id(weight)] = (pack_signs(new.weight.detach()), scales.values.clone())
        shared = sum(other is weight for other in weights) > 1
        new._become_packed(*tensors[id(weight)], scales.group_size, shared)
        _logger.info("%s: packed as %s: %s", layer.label, new.quant_type, scales)
        if scales.rounding > LARGE_ROUNDING:
            messages.append(
                f"pack(): {layer.label}: {describe_rounding(scales.rounding)}, because they are "
                f"far below the largest of their output feature: name the layer in exclude to "
                f"leave it as it is"
            )
    if doubled:
        messages.append(
            f"pack(): {list_names(doubled)}: the other module stays dense, so the weight takes "
            f"memory twice, and a change of one does not reach the other: name the layer in "
            f"exclude to keep the tie"
        )
    for layer in layers:
        if layer.reason:
            _logger.info("%s: not packed: %s", layer.label, layer.reason)
    memory = describe_memory(tensors.values())
    _logger.info("packed %d of %d linear layers: %s", len(packed), len(layers), memory)
    finish_deployment(model)
    if not packed:
        reasons = [f"{layer.label}: {layer.reason}" for layer in layers]
        why = f": {list_names(reasons)}" if reasons else ""
        messages.append(f"pack() packed none of {len(layers)} linear layers{why}")
    for message in (*messages, stale):
        if message:
            warn(message)
    return model


def _shared_with_dense_modules(model: nn.Module, packed: list[LinearLayer]) -> list[str]:
    """The packed layers whose weight another module has too, such as an embedding."""
    modules = {id(layer.module) for layer in packed}
    owners = {
        id(parameter): name
        for name, module in model.named_modules()
        if id(module) not in modules
        for parameter in module._parameters.values()
        if parameter is not None
    }
    return [
        f"{layer.label} shares its weight with {owners[id(weight)]}"
        for layer in packed
        if id(weight := layer.module._parameters["weight"]) in owners
    ]


def _examine(layer: LinearLayer, found: dict[int, Scales | NotTernary]) -> Scales | NotTernary:
    """The scales of a layer's weight, which other layers may share."""
    weight = layer.module._parameters["weight"]
    assert weight is not None
    if id(weight) not in found:
        if weight.is_meta:
            found[id(weight)] = NotTernary("it is on the meta device, without values", True)
        else:
            found[id(weight)] = find_scales(foreign.linear_weight(layer.module).detach())
    return found[id(weight)]


def _scales(layer: LinearLayer, found: dict[int, Scales | NotTernary]) -> Scales:
    scales = _examine(layer, found)
    assert isinstance(scales, Scales)
    return scales


def _raise_for_refused(layers: list[LinearLayer], found: dict[int, Scales | NotTernary]) -> None:
    problems = []
    for layer in layers:
        scales = found.get(id(layer.module._parameters.get("weight")))
        if isinstance(scales, NotTernary) and scales.is_refused and not layer.excluded:
            problems.append(f"{layer.label}: {scales.reason}")
    if problems:
        raise ValueError(
            "pack() cannot pack these layers; name them in exclude to leave them as they are:\n  "
            + "\n  ".join(problems)
        )
