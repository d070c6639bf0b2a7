"""Models filled from files of other projects: ternary layers become deployed ones, all or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import foreign, packing, state
from .arguments import QuantType, check_act_bits, check_eps, group_size_of
from .conversion.layers import Convertibility, LinearLayer, find_linear_layers
from .conversion.weight_readers import disable_fast_paths
from .convert import replace_layers
from .embedding import Embedding
from .loading import assign
from .messages import list_names, warn
from .packing import PACKED_NAMES
from .ternary_layer import TernaryLayer

_Model = TypeVar("_Model", bound=nn.Module)


class PackedTensors(NamedTuple):
    """The weight of one layer.

    Attributes:
        w_packed: uint8, shape ``(N, ceil(K/4))``; see :mod:`bitlinear.packing`.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``; with groups ``(N, ceil(K/group_size))``, as
            :func:`bitlinear.groups.round_scales` rounds them. It multiplies.
        group_size: The number of weights of a row that share a scale; None if all do.
    """

    w_packed: Tensor
    w_scale: Tensor
    group_size: int | None = None

    @property
    def own_group_size(self) -> int:
        """``group_size`` as :class:`~bitlinear.arguments.QuantType` has it."""
        return self.group_size or group_size_of(self.w_scale)

    def quant_type(self, act_bits: int) -> str:
        """The type of a layer with this weight."""
        return QuantType(act_bits, self.own_group_size).name


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

    Layers that are a BitLinear already stay, with their ``eps`` and bits of activations, and so
    does a :class:`bitlinear.Embedding`.

    Args:
        model: The model, in place; on any devices, the meta device included. Each tensor goes to
            the device of the one that it replaces, and from the meta device to the CPU.
        packed: The weights, by the qualified names of the linear layers and Embeddings.
        dense: All other tensors of the state of ``model``, by their names in it. Of tensors that
            are tied, one is enough. Their dtypes stay as they are.
        source: What the tensors come from, for messages.
        act_bits: The bits of quantised activations, 8 or 16.
        eps: Lower bound of the absmax of a token.

    Returns:
        ``model``.

    Raises:
        ValueError: A tensor of the model is in neither ``packed`` nor ``dense``, or one of these is
            not in the model; a shape does not fit; a packed weight has an invalid code, or a scale
            is not positive; a tensor has no values, or is floating point where the model's is not;
            or a layer cannot be replaced (see :func:`bitlinear.convert`). The model is unchanged,
            as it is after any other exception.
    """
    check_act_bits(act_bits)
    check_eps(eps, act_bits)
    layers = _layers(model, packed, source)
    dense = {name: _checked(name, tensor, source) for name, tensor in dense.items()}
    _check_names(model, layers, dense, source)
    quant_types = {
        id(layer.module): packed[name].quant_type(act_bits) for name, layer in layers.items()
    }
    # A module can have several names.
    new = {id(layer.module): layer for layer in layers.values() if not _is_ours(layer)}
    tensors = dict(dense)
    for given, layer in layers.items():
        for name in layer.names:
            tensors[f"{name}.w_packed"] = packed[given].w_packed
            tensors[f"{name}.w_scale"] = packed[given].w_scale
    with unchanged_on_error(model):
        _, stale = replace_layers(
            model, list(new.values()), lambda layer: quant_types[id(layer.module)]
        )
        for layer in new.values():
            assert layer.replacement is not None
            layer.replacement.eps = eps
        assign(model, tensors, source=source)
        disable_fast_paths(model)
    if stale:
        warn(stale)
    return model


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give all modules their tensors, submodules and attributes back if an exception is raised.

    It does not restore values that were written into a tensor.
    """
    containers = ("_parameters", "_buffers", "_modules")
    saved = [
        (module, dict(vars(module)), [dict(vars(module)[key]) for key in containers])
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, attributes, contents in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for key, content in zip(containers, contents):
                container = vars(module)[key]
                container.clear()
                container.update(content)
        raise


def _is_ours(layer: LinearLayer) -> bool:
    return isinstance(layer.module, TernaryLayer)


def _layers(
    model: nn.Module, packed: Mapping[str, PackedTensors], source: str
) -> dict[str, LinearLayer]:
    """The layers that get packed weights, by their names in ``packed``."""
    convertibility = Convertibility(model)
    by_name = {name: layer for layer in find_linear_layers(model) for name in layer.names}
    for name, module in model.named_modules():
        if isinstance(module, Embedding):
            by_name[name] = LinearLayer(module, [name])
    problems = []
    found: dict[int, str] = {}
    for name, tensors in packed.items():
        if name not in by_name:
            problems.append(f"{name}: the model has no linear layer of this name")
            continue
        layer = by_name[name]
        reason = "" if _is_ours(layer) else convertibility.why_not(layer.module)
        reason = reason or _why_not_fitting(layer.module, tensors)
        other = found.setdefault(id(layer.module), name)
        if other != name:
            reason = f"in the model it is the same layer as {other}: give the weight for one name"
        if reason:
            problems.append(f"{name}: {reason}")
    if problems:
        raise ValueError(
            f"the ternary weights of {source} do not fit this {type(model).__name__}:\n  "
            + "\n  ".join(problems)
        )
    return {name: by_name[name] for name in packed}


def _why_not_fitting(linear: Any, tensors: PackedTensors) -> str:
    if isinstance(linear, TernaryLayer):
        out_features, in_features = linear.weight_shape
    else:
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
        state.check_scale(tensors.w_scale, out_features, in_features, tensors.group_size or 0)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _checked(name: str, tensor: Any, source: str) -> Tensor:
    """The tensor as one that a model can hold.

    Raises:
        ValueError: It is not an ordinary tensor with values.
    """
    kind = ""
    if not isinstance(tensor, Tensor):
        kind = f"a {type(tensor).__name__}"
    elif tensor.layout != torch.strided or tensor.is_nested:
        kind = f"of layout {tensor.layout}"
    elif tensor.is_meta:
        kind = "on the meta device, without values"
    elif tensor.is_complex():
        kind = f"{tensor.dtype}"
    if kind:
        raise ValueError(f"{name} of {source} must be an ordinary tensor, but it is {kind}")
    return state.as_buffer(tensor)


def _check_names(
    model: nn.Module, layers: Mapping[str, LinearLayer], dense: Mapping[str, Tensor], source: str
) -> None:
    """Raise ValueError unless every tensor of the model has one of the same shape, and no more."""
    own = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)  # A module can save something else beside.
    }
    names = {name for layer in layers.values() for name in layer.names}
    weights = {f"{name}.{part}" for name in names for part in ("weight", *PACKED_NAMES)}
    # One value is enough for tensors that are tied. A weight that is packed is not such a value.
    given = {id(own[name]) for name in dense if name in own}
    missing = [n for n, t in own.items() if n not in weights and id(t) not in given]
    twice = [name for name in dense if name in weights]
    unexpected = [name for name in dense if name not in own and name not in weights]
    problems = []
    if missing:
        problems.append(f"it has no values for {list_names(missing)}")
    if twice:
        problems.append(f"it has {list_names(twice)} beside packed weights of the same layer")
    if unexpected:
        problems.append(f"the model has no {list_names(unexpected)}")
    for name, tensor in dense.items():
        if name not in own or name in weights:
            continue
        wanted = own[name]
        if tensor.shape != wanted.shape:
            problems.append(
                f"{name} has shape {list(tensor.shape)}, but in the model {list(wanted.shape)}"
            )
        elif tensor.is_floating_point() != wanted.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, but in the model {wanted.dtype}")
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
