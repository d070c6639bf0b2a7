"""What the state of a layer must look like: the checks before a load.

A load either fits a layer as a whole or leaves it unchanged. :func:`check` makes every check before
the load changes the layer, and does not touch it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from . import packing
from .arguments import QUANT_TYPES, group_size_of
from .groups import GROUP_UNIT, count_groups, round_scales
from .packing import PACKED_NAMES
from .preconditions import GATHER, is_distributed, why_no_plain_weight

if TYPE_CHECKING:
    from .packable import Packable


class IncompleteState(Exception):
    """A strict load would miss tensors of a layer, or find tensors that it does not have.

    Attributes:
        missing, unexpected: Their names within the layer.
    """

    def __init__(self, missing: list[str], unexpected: list[str]) -> None:
        super().__init__(missing, unexpected)
        self.missing, self.unexpected = missing, unexpected


class CheckedState(NamedTuple):
    """A state that fits a layer.

    Attributes:
        tensors: The tensors of the state, by their names within the layer, ready to be loaded.
        kind: ``"packed"`` or ``"float"``, the kind of weights that it holds, or ``""`` for none.
    """

    tensors: dict[str, Tensor]
    kind: str


def metadata_of(layer: Packable) -> dict[str, Any]:
    """The metadata of a layer's state, except for the version of the format."""
    return {
        layer._dimensions[1]: layer.weight_shape[1],
        "eps": layer.eps,
        "quant_type": layer.quant_type,
    }


def check(
    layer: Packable,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    *,
    strict: bool = True,
    was_conv1d: bool = False,
) -> CheckedState:
    """Check the state of one layer.

    Args:
        layer: The layer to load it into.
        state_dict: The state of a model.
        prefix: The prefix of the layer's names in it.
        metadata: The layer's entry in the metadata of the state.
        strict: The argument of ``_load_from_state_dict``; ``load_state_dict`` always passes True.
        was_conv1d: Whether the layer was made from a Conv1D, whose weight is ``(K, N)``.

    Returns:
        The kind of the state, and the tensors to load into ``layer``.

    Raises:
        TypeError, ValueError: The state is newer, damaged, or does not fit the layer.
        IncompleteState: The load is strict, and the names are not those of the layer.
    """
    _check_version(metadata)
    found = {key[len(prefix) :]: t for key, t in state_dict.items() if key.startswith(prefix)}
    names = ("weight", *PACKED_NAMES, "bias")
    tensors = {name: found[name] for name in names if name in found}
    for name, value in tensors.items():
        if not torch.overrides.is_tensor_like(value):
            raise TypeError(f"{name} must be a tensor, but it is a {type(value).__name__}")
    _check_metadata(layer, metadata, tensors.get("w_scale"))
    kind = ""
    if any(name in tensors for name in PACKED_NAMES):
        kind = "packed"
        tensors = check_packed(layer, tensors)
    elif "weight" in tensors:
        kind = "float"
        shape = [*layer.weight_shape]
        if was_conv1d and "in_features" not in metadata:  # No BitLinear has written this state.
            _check_orientation(tensors["weight"], shape)
        _check_shape("weight", tensors["weight"], shape)
    if "bias" in tensors and getattr(layer, "bias", None) is not None:
        _check_shape("bias", tensors["bias"], [layer.weight_shape[0]])
    for name in ("weight", "bias"):
        if name in tensors and not tensors[name].is_floating_point():
            raise TypeError(f"{name} must be floating point, but it is {tensors[name].dtype}")
    _check_other_tensors(layer, {name: found[name] for name in found if name not in tensors})
    assigns = metadata.get("assign_to_params_buffers", False)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be strided, but it is {tensor.layout}: use to_dense()")
        if tensor.is_meta and not assigns and _device(layer).type != "meta":
            raise ValueError(f"{name} is on the meta device, so it has no values to load")
    if strict:
        _check_names(layer, found, kind)
    return CheckedState(tensors, kind)


def check_packed(layer: Packable, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Check the tensors of a deployed state, by their names within ``layer``.

    Returns:
        The tensors to load into ``layer``.

    Raises:
        TypeError, ValueError: The state is incomplete, damaged, or does not fit the layer.
    """
    if "weight" in state:
        raise ValueError("it holds both 'weight' and packed weights: remove one of them")
    absent = set(PACKED_NAMES) - set(state)
    if absent:
        raise ValueError(f"{absent.pop()} is missing: a deployed layer has w_packed and w_scale")
    reason = "" if layer.is_deployed else why_no_plain_weight(layer)
    if reason:
        raise ValueError(f"the layer cannot become a deployed one: {reason}")
    state_is_sharded = is_distributed(state["w_packed"])
    layer_is_sharded = is_distributed(layer._buffers.get("w_packed"))
    if state_is_sharded and not layer_is_sharded:
        raise ValueError(f"its tensors are sharded, but those of the layer are not: {GATHER}")
    if layer_is_sharded and not state_is_sharded:
        raise ValueError(
            "the layer is divided among processes, but the state is not: load it with "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict(model, state, "
            "options=StateDictOptions(full_state_dict=True)), or before parallelize_module"
        )
    tensors = {name: as_buffer(value) for name, value in state.items()}
    rows, columns = layer.weight_shape
    _check_shape("w_packed", tensors["w_packed"], [*packing.packed_shape(rows, columns)])
    w_packed = _local_part(tensors["w_packed"])
    # A shard of the columns holds whole bytes.
    packing.check_packed(w_packed, min(columns, 4 * w_packed.shape[1]))
    tensors["w_scale"] = check_scale(tensors["w_scale"], rows, columns, layer._group_size)
    return tensors


def group_size_in(layer: Packable, w_scale: Tensor) -> int:
    """The ``group_size`` of a layer with this ``w_scale``, which :func:`check` has accepted."""
    own = layer._group_size
    if own > 0 and _has_groups(w_scale, layer.weight_shape[1], own):
        return own
    return group_size_of(w_scale)


def _has_groups(w_scale: Tensor, in_features: int, group_size: int) -> bool:
    """Whether scales of the right shape are of groups.

    A row that is one group has one scale. Groups round it, so an unrounded one is per row.
    """
    groups = count_groups(in_features, group_size)
    if list(w_scale.shape[1:]) != [groups]:
        return False
    values = _local_part(w_scale)
    return groups > 1 or values.is_meta or torch.equal(round_scales(values), values)


def as_buffer(tensor: Tensor) -> Tensor:
    """Make ``tensor`` fit to be a buffer: no Parameter and no inference tensor.

    ``assign=True`` would register a Parameter as such. An inference tensor has no version counter,
    so that every call would check its codes, and no state could be loaded into it.
    """
    if tensor.is_inference():
        with torch.inference_mode(False):
            return tensor.clone()
    return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor


def as_buffer_of_copies(tensor: Tensor) -> Tensor:
    """As :func:`as_buffer`, but layers that share ``tensor`` get one tensor."""
    if not tensor.is_inference():
        return tensor
    if tensor not in _copied:
        _copied[tensor] = as_buffer(tensor)
    return _copied[tensor]


# The inference tensors of layers that are being copied or unpickled live as long as that takes.
_copied: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()


def _check_version(metadata: dict[str, Any]) -> None:
    version = metadata.get("version") or 1  # A state without a version has version 1.
    if version > packing.FORMAT_VERSION:
        raise ValueError(
            f"it is in format version {version}, but this bitlinear reads up to version "
            f"{packing.FORMAT_VERSION}: upgrade bitlinear"
        )


def check_scale(
    w_scale: Tensor, out_features: int, in_features: int, group_size: int = 0
) -> Tensor:
    """Check the scales of a weight, and reshape a scalar to ``(1,)``.

    Args:
        w_scale: Shape ``(1,)`` or ``(N, 1)``; with groups also ``(N, ceil(K/group_size))``.
        out_features, in_features: ``N`` and ``K``.
        group_size: The number of weights of a row that share a scale; 0 or -1 if all do.

    Raises:
        TypeError: The dtype is not fp32.
        ValueError: The shape is wrong, or a scale is not finite, negative, or 0 without groups.
    """
    if w_scale.dtype != torch.float32:
        raise TypeError(
            f"w_scale must be float32, but it is {w_scale.dtype}: a tool has converted the "
            f"checkpoint; convert w_scale back with .float()"
        )
    if w_scale.dim() == 0:
        w_scale = w_scale.reshape(1)
    shape, valid = list(w_scale.shape), [[1], [out_features, 1]]
    groups = count_groups(in_features, group_size) if group_size > 0 else 1
    if groups > 1:
        valid.append([out_features, groups])
    if shape not in valid:
        remedy = f", for {out_features} output features of {in_features} inputs"
        if group_size > 0:
            remedy += f" in groups of {group_size}"
        if w_scale.dim() == 2 and shape[0] == out_features:
            remedy = f": {_name_groups(in_features, shape[1])}"
        shapes = " or ".join(map(str, valid))
        raise ValueError(f"w_scale must have shape {shapes}, but it has {shape}{remedy}")
    values = _local_part(w_scale)
    has_groups = group_size > 0 and _has_groups(w_scale, in_features, group_size)
    # The scale of a group is rounded to 0 if it is far below the largest of its row.
    is_valid = values >= 0 if has_groups else values > 0
    if not values.is_meta and not bool((values.isfinite() & is_valid).all()):
        positive = "not negative" if has_groups else "positive"
        raise ValueError(f"w_scale must be finite and {positive}: the checkpoint is damaged")
    if has_groups and not values.is_meta and not torch.equal(round_scales(values), values):
        raise ValueError(
            "w_scale has scales that are no multiples, by integers of 15 bits, of one power of two "
            "per row: round them with bitlinear.groups.round_scales"
        )
    return w_scale


def _name_groups(in_features: int, groups: int) -> str:
    """Which layer would take so many scales in each row."""
    fitting = [
        size
        for size in range(GROUP_UNIT, in_features + GROUP_UNIT, GROUP_UNIT)
        if count_groups(in_features, size) == groups
    ]
    if not fitting:
        return f"no groups of a multiple of {GROUP_UNIT} weights have {groups} scales in a row"
    types = f"'wpg{fitting[0]}'"
    if len(fitting) > 1:
        types += (
            f", or another multiple of {GROUP_UNIT} up to {fitting[-1]}: the one that it was saved "
            f"with, as any other is silently wrong"
        )
    return f"it has scales for groups of inputs; make the layer with a type that ends in {types}"


def _check_orientation(weight: Tensor, shape: list[int]) -> None:
    """Raise ValueError for the transposed weight of a Conv1D; warn if it might be one."""
    remedy = "load checkpoints of such a model before bitlinear.convert()"
    transposed = shape[::-1]
    if list(weight.shape) == transposed != shape:
        raise ValueError(
            f"size mismatch for weight: it has shape {list(weight.shape)}, which is that of a "
            f"Conv1D, and this layer needs {shape}: {remedy}"
        )
    if list(weight.shape) == transposed == shape:
        warnings.warn(
            f"a square weight is loaded into a BitLinear that was a Conv1D, and the state does not "
            f"tell which of them saved it: it is taken for a BitLinear's, (N, K); {remedy}",
            stacklevel=2,
        )


def _check_shape(name: str, tensor: Tensor, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(
            f"size mismatch for {name}: it has shape {list(tensor.shape)}, but this layer needs "
            f"{shape}"
        )


def _check_other_tensors(layer: Packable, found: dict[str, Any]) -> None:
    """Check the shapes of the tensors that a subclass adds."""
    own = {**layer._parameters, **layer._buffers}
    for name, value in found.items():
        tensor = own.get(name)
        if tensor is not None and torch.overrides.is_tensor_like(value):
            _check_shape(name, value, list(tensor.shape))


def _check_metadata(layer: Packable, metadata: dict[str, Any], w_scale: Tensor | None) -> None:
    for name, own in metadata_of(layer).items():
        value, saved = own, metadata.get(name, own)
        if name == "quant_type" and saved != value and saved in QUANT_TYPES and w_scale is not None:
            # Version 0.2 named one type for scales of any shape.
            saved = QUANT_TYPES[saved]._replace(group_size=group_size_of(w_scale)).name
        if name == "quant_type" and str(saved).startswith("w") != value.startswith("w"):
            # An embedding and a linear layer: only the type of the weights is of both.
            value, saved = (text.rpartition("_")[2] for text in (value, saved))
        if saved != value:
            must_undeploy = name == "quant_type" and layer.is_deployed
            undeploys = "undeploy the layer and " if must_undeploy else ""
            raise ValueError(
                f"it was saved by a layer with {name}={saved!r}, but this one has "
                f"{name}={value!r}: make the layer with the {name} of the state, or {undeploys}"
                f"assign it"
            )


def _check_names(layer: Packable, found: Iterable[str], kind: str) -> None:
    """Raise IncompleteState if the load is strict and the names are not those of the layer."""
    own = [*layer._parameters.items(), *layer._buffers.items()]
    transient = layer._non_persistent_buffers_set
    expected = [name for name, value in own if value is not None and name not in transient]
    if kind:
        weights = PACKED_NAMES if kind == "packed" else ("weight",)
        expected = [*weights, *(n for n in expected if n not in ("weight", *PACKED_NAMES))]
    known = {*expected, *layer._modules, "_extra_state"}
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name.split(".")[0] not in known]
    if (missing or unexpected) and _load_is_strict():
        raise IncompleteState(missing, unexpected)


def _load_is_strict() -> bool:
    """Whether the current ``load_state_dict`` is strict, which it does not tell its modules."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals["strict"])
    return True


def _device(layer: Packable) -> torch.device:
    tensors = {**layer._parameters, **layer._buffers}
    return next(t.device for t in tensors.values() if t is not None)


def _local_part(tensor: Any) -> Tensor:
    """The local part of a DTensor; any other tensor unchanged."""
    part: Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return part
