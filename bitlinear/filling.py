"""Models filled from files of other projects: ternary layers become deployed ones, all or none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import foreign, packing, state
from .arguments import QuantType, check_act_bits, check_eps, group_size_of
from .conversion.layers import Convertibility, LinearLayer, find_linear_layers
from .convert import finish_deployment, replace_layers
from .linear import BitLinear
from .loading import assign
from .messages import list_names

_Model = TypeVar("_Model", bound=nn.Module)


class PackedTensors(NamedTuple):
    """The weight of one layer.

    Attributes:
        w_packed: uint8, shape ``(N, ceil(K/4))``; see :mod:`bitlinear.packing`.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``; it multiplies.
    """

    w_packed: Tensor
    w_scale: Tensor


@torch.inference_mode(False)  # Nothing could be loaded into tensors made in inference mode.
@torch.no_grad()
def fill(
    model: _Model,
    packed: Mapping[str, PackedTensors],
    dense: Mapping[str, Tensor],
    *,
    source: str,
    act_bits: int = 8,
    eps: float = 1e-5,
) -> _Model:
    """Replace linear layers by deployed ones with these weights, and assign all other tensors.

    Layers that are a BitLinear already stay, with their ``eps`` and bits of activations.

    Args:
        model: The model, in place; on any devices, the meta device included. Each tensor goes to
            the device of the one that it replaces, and from the meta device to the CPU.
        packed: The weights, by the qualified names of the layers.
        dense: All other tensors of the state of ``model``, by their names in it. A tensor that is
            tied to another one can be absent. Their dtypes stay as they are.
        source: What the tensors come from, for messages.
        act_bits: The bits of quantised activations, 8 or 16.
        eps: Lower bound of the absmax of a token.

    Returns:
        ``model``.

    Raises:
        ValueError: A tensor of the model is in neither ``packed`` nor ``dense``, or one of these is
            not in the model; a shape does not fit; a packed weight has an invalid code, or a scale
            is not positive; or a layer cannot be replaced (see :func:`bitlinear.convert`). The
            model is unchanged.
    """
    check_act_bits(act_bits)
    check_eps(eps, act_bits)
    layers = _layers(model, packed, source)
    _check_names(model, packed, dense, source)
    old = {id(layer.module): name for name, layer in layers.items()}
    replaced = [layer for layer in layers.values() if not isinstance(layer.module, BitLinear)]
    _, stale = replace_layers(
        model, replaced, lambda layer: _quant_type(packed[old[id(layer.module)]], act_bits)
    )
    for layer in replaced:
        assert layer.replacement is not None
        layer.replacement.eps = eps
    tensors = dict(dense)
    for name, (w_packed, w_scale) in packed.items():
        tensors[f"{name}.w_packed"], tensors[f"{name}.w_scale"] = w_packed, w_scale
    assign(model, tensors, source=source)
    finish_deployment(model)
    if stale:
        warnings.warn(stale, UserWarning, stacklevel=3)
    return model


def _layers(
    model: nn.Module, packed: Mapping[str, PackedTensors], source: str
) -> dict[str, LinearLayer]:
    """The layers that get packed weights, by their names in ``packed``."""
    convertibility = Convertibility(model)
    by_name = {name: layer for layer in find_linear_layers(model) for name in layer.names}
    problems = []
    for name, tensors in packed.items():
        if name not in by_name:
            problems.append(f"{name}: the model has no linear layer of this name")
            continue
        module = by_name[name].module
        is_ours = isinstance(module, BitLinear)
        reason = "" if is_ours else convertibility.why_not(module)
        reason = reason or _why_not_fitting(module, tensors)
        if reason:
            problems.append(f"{name}: {reason}")
    if problems:
        raise ValueError(
            f"the ternary weights of {source} do not fit this {type(model).__name__}:\n  "
            + "\n  ".join(problems)
        )
    return {name: by_name[name] for name in packed}


def _why_not_fitting(linear: nn.Module, tensors: PackedTensors) -> str:
    out_features, in_features = foreign.linear_weight(linear).shape
    shape = packing.packed_shape(out_features, in_features)
    if tensors.w_packed.shape != shape:
        rows, columns = tensors.w_packed.shape
        return (
            f"its weight is {out_features} x {in_features}, but the packed one is {rows} x "
            f"{4 * columns - 3} to {4 * columns}"
        )
    try:
        packing.check_packed(tensors.w_packed, in_features)
        state.check_scale(tensors.w_scale, out_features)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _check_names(
    model: nn.Module,
    packed: Mapping[str, PackedTensors],
    dense: Mapping[str, Tensor],
    source: str,
) -> None:
    """Raise ValueError unless every tensor of the model has one of the same shape, and no more."""
    own = model.state_dict(keep_vars=True)
    weights = {f"{name}.weight" for name in packed}
    # One value is enough for tensors that are tied, unless a deployed layer takes it with it.
    given = {id(own[name]) for name in dense if name in own}
    missing = [n for n, t in own.items() if n not in weights and id(t) not in given]
    unexpected = [name for name in dense if name not in own or name in weights]
    problems = []
    if missing:
        problems.append(f"it has no values for {list_names(missing)}")
    if unexpected:
        problems.append(f"the model has no {list_names(unexpected)}")
    problems += [
        f"{name} has shape {list(tensor.shape)}, but in the model {list(own[name].shape)}"
        for name, tensor in dense.items()
        if name in own and name not in weights and tensor.shape != own[name].shape
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit this {type(model).__name__}, which is unchanged:\n  "
            + "\n  ".join(problems)
        )
    on_meta = [name for name, t in model.named_buffers() if t.is_meta and name not in own]
    if on_meta:
        raise ValueError(
            f"{list_names(on_meta)} are on the meta device, and no file has their values: make the "
            f"model with accelerate.init_empty_weights(), which leaves such buffers on the CPU"
        )


def _quant_type(tensors: PackedTensors, act_bits: int) -> str:
    return QuantType(act_bits, group_size_of(tensors.w_scale)).name
