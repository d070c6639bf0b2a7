"""What the state of a layer must look like, and the checks before it is loaded.

A load either fits a layer as a whole or leaves it as it was. Everything that can be wrong is looked
for before anything is changed: :func:`check` does not touch the layer.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.utils import parametrize

from . import foreign, packing
from .quantize import MAX_IN_FEATURES

if TYPE_CHECKING:
    from .linear import BitLinear

PACKED = ("w_packed", "w_scale")

GATHER = (
    "gather its state with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)) and load it into a model that is not sharded"
)


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor, of whose class this module need not know."""
    return hasattr(tensor, "full_tensor")


class IncompleteState(Exception):
    """A strict load would miss tensors of a layer, or find some that it does not have.

    Attributes:
        missing, unexpected: Their names within the layer.
    """

    def __init__(self, missing: list[str], unexpected: list[str]) -> None:
        super().__init__(missing, unexpected)
        self.missing, self.unexpected = missing, unexpected


class Checked(NamedTuple):
    """A state that fits a layer.

    Attributes:
        tensors: The tensors of the state, by their names within the layer, ready to be loaded.
        kind: ``"packed"`` or ``"float"``, whichever weights it holds, or ``""`` for none.
    """

    tensors: dict[str, Tensor]
    kind: str


def metadata_of(layer: BitLinear) -> dict[str, Any]:
    """What the metadata of a state says of its layer, besides the version of the format."""
    return {
        "in_features": layer.in_features,
        "eps": layer.eps,
        "quant_type": layer.quant_type,
    }


def check(
    layer: BitLinear,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool = True,
) -> Checked:
    """The tensors that a load is to put into ``layer``.

    ``strict`` is what ``_load_from_state_dict`` was told: ``load_state_dict`` always says True.

    Raises:
        TypeError, ValueError: The state is newer, damaged, or does not fit the layer.
        IncompleteState: The load is strict, and the names are not those of the layer.
    """
    _check_version(metadata)
    found = {key[len(prefix) :]: t for key, t in state_dict.items() if key.startswith(prefix)}
    names = ("weight", *PACKED, "bias")
    tensors = {name: found[name] for name in names if name in found}
    for name, value in tensors.items():
        if not torch.overrides.is_tensor_like(value):
            raise TypeError(f"{name} must be a tensor, but it is a {type(value).__name__}")
    kind = ""
    if any(name in tensors for name in PACKED):
        kind = "packed"
        tensors = check_packed(layer, tensors)
    elif "weight" in tensors:
        kind = "float"
        _check_orientation(layer, tensors["weight"], metadata)
        _check_shape("weight", tensors["weight"], [layer.out_features, layer.in_features])
    if "bias" in tensors and layer.bias is not None:
        _check_shape("bias", tensors["bias"], [layer.out_features])
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
    _check_metadata(layer, metadata)
    if strict:
        _check_names(layer, found, kind)
    return Checked(tensors, kind)


def check_packed(layer: BitLinear, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a deployed state of ``layer``, ready to be loaded.

    Raises:
        TypeError, ValueError: The state is incomplete, damaged, or does not fit the layer.
    """
    if "weight" in state:
        raise ValueError(
            "it holds both 'weight' and packed weights: remove the ones that are not meant"
        )
    absent = set(PACKED) - set(state)
    if absent:
        raise ValueError(f"{absent.pop()} is missing: a deployed layer has w_packed and w_scale")
    reason = "" if layer.is_deployed else why_no_plain_weight(layer)
    if reason:
        raise ValueError(f"the layer cannot become a deployed one: {reason}")
    sharded = is_distributed(state["w_packed"])
    divided = is_distributed(layer._buffers.get("w_packed"))
    if sharded and not divided:
        raise ValueError(f"its tensors are sharded, but those of the layer are not: {GATHER}")
    if divided and not sharded:
        raise ValueError(
            "the layer is divided among processes, but the state is not: load it with "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict(model, state, "
            "options=StateDictOptions(full_state_dict=True)), or before parallelize_module"
        )
    tensors = {name: as_buffer(value) for name, value in state.items()}
    shape = packing.packed_shape(layer.out_features, layer.in_features)
    _check_shape("w_packed", tensors["w_packed"], list(shape))
    w_packed = _local_part(tensors["w_packed"])
    # A part of the columns is a whole number of bytes.
    packing.check_packed(w_packed, min(layer.in_features, 4 * w_packed.shape[1]))
    tensors["w_scale"] = _checked_scale(tensors["w_scale"], layer.out_features)
    return tensors


def as_buffer(tensor: Tensor) -> Tensor:
    """``tensor``, fit to be a buffer.

    A Parameter would be registered as one by ``assign=True``. Of an inference tensor nothing counts
    the changes, so that its codes would be checked in every call, and nothing could be loaded into
    it.
    """
    if tensor.is_inference():
        with torch.inference_mode(False):
            return tensor.clone()
    return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor


def why_no_plain_weight(linear: nn.Module) -> str:
    """Why the weight of ``linear`` cannot be taken as an ordinary parameter, or ``""``."""
    if "w_packed" in linear._buffers:
        return "it is a deployed BitLinear; call undeploy() first"
    if parametrize.is_parametrized(linear):
        return "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is computed, not a parameter (weight_norm, pruning); remove that first"
    if linear.bias is not None and "bias" not in linear._parameters:
        return "its bias is computed, not a parameter (pruning); remove that first"
    if nn.parameter.is_lazy(weight):
        return "it is lazy; run it once on an example, so that its weight gets a shape"
    if is_distributed(weight):
        return (
            f"its weight is sharded (a DTensor); convert before sharding, and to deploy, {GATHER}"
        )
    if _has_own_operations(weight):
        return (
            f"its weight is a {type(weight).__name__}, a tensor subclass with operations of its "
            f"own: convert the model before it is quantised, or dequantise it first"
        )
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    if weight.dim() != 2 or weight.numel() == 0:
        return f"its weight has shape {list(weight.shape)}; (N, K) with N and K >= 1 is needed"
    in_features = weight.shape[0 if foreign.is_conv1d(linear) else 1]
    if in_features > MAX_IN_FEATURES:
        return f"it has {in_features} in_features, more than {MAX_IN_FEATURES}; split it along them"
    return ""


def _has_own_operations(weight: Tensor) -> bool:
    """Whether a tensor subclass (of torchao, optimum-quanto, ...) computes in its own way."""
    own: Any = type(weight).__torch_dispatch__
    return own is not Tensor.__torch_dispatch__ and not isinstance(weight, FakeTensor)


def _check_version(metadata: dict[str, Any]) -> None:
    version = metadata.get("version") or 1  # What has no version is version 1.
    if version > packing.FORMAT_VERSION:
        raise ValueError(
            f"it is in format version {version}, but this bitlinear reads up to version "
            f"{packing.FORMAT_VERSION}: upgrade bitlinear"
        )


def _check_metadata(layer: BitLinear, metadata: dict[str, Any]) -> None:
    for name, value in metadata_of(layer).items():
        saved = metadata.get(name, value)
        if saved != value:
            raise ValueError(
                f"it was saved by a layer with {name}={saved!r}, but this one has "
                f"{name}={value!r}: make the layer with the {name} of the state"
            )


def _check_other_tensors(layer: BitLinear, found: dict[str, Any]) -> None:
    """Raises ValueError for what a subclass has beside the tensors of a BitLinear."""
    own = {**layer._parameters, **layer._buffers}
    for name, value in found.items():
        mine = own.get(name)
        if mine is not None and torch.overrides.is_tensor_like(value):
            _check_shape(name, value, list(mine.shape))


def _check_orientation(layer: BitLinear, weight: Tensor, metadata: dict[str, Any]) -> None:
    """Tells of a weight that may be the transposed one of the Conv1D that the layer was.

    Raises:
        ValueError: It is, by its shape.
    """
    shape = (layer.out_features, layer.in_features)
    if not layer._was_conv1d or "in_features" in metadata:  # which a BitLinear has written
        return
    remedy = "load checkpoints of such a model before bitlinear.convert()"
    if weight.shape != shape and weight.shape == shape[::-1]:
        raise ValueError(
            f"size mismatch for weight: it has shape {list(weight.shape)}, which is that of a "
            f"Conv1D, and this layer needs {list(shape)}: {remedy}"
        )
    if weight.shape == shape == shape[::-1]:
        warnings.warn(
            f"a square weight is loaded into a BitLinear that was a Conv1D, and nothing says which "
            f"of them it was saved by: it is taken for that of a BitLinear, (N, K); {remedy}",
            stacklevel=2,
        )


def _check_names(layer: BitLinear, found: Iterable[str], kind: str) -> None:
    """Raises IncompleteState if the load is strict and the names are not those of the layer."""
    own = [*layer._parameters.items(), *layer._buffers.items()]
    transient = layer._non_persistent_buffers_set
    wanted = [name for name, value in own if value is not None and name not in transient]
    if kind:
        weights = PACKED if kind == "packed" else ("weight",)
        wanted = [*weights, *(n for n in wanted if n not in ("weight", *PACKED))]
    known = {*wanted, *layer._modules, "_extra_state"}
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name.split(".")[0] not in known]
    if (missing or unexpected) and _load_is_strict():
        raise IncompleteState(missing, unexpected)


def _load_is_strict() -> bool:
    """Whether the ``load_state_dict`` under way is strict, which it does not tell its modules."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals["strict"])
    return True


def _device(layer: BitLinear) -> torch.device:
    tensors = {**layer._parameters, **layer._buffers}
    return next(t.device for t in tensors.values() if t is not None)


def _local_part(tensor: Any) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor as it is."""
    part: Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return part


def _check_shape(name: str, tensor: Tensor, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(
            f"size mismatch for {name}: it has shape {list(tensor.shape)}, but this layer needs "
            f"{shape}"
        )


def _checked_scale(w_scale: Tensor, out_features: int) -> Tensor:
    """``w_scale`` of a checkpoint, a scalar reshaped to ``(1,)``."""
    if w_scale.dtype != torch.float32:
        raise TypeError(
            f"w_scale must be float32, but it is {w_scale.dtype}: a tool has converted the "
            f"checkpoint; convert w_scale back with .float()"
        )
    if w_scale.dim() == 0:
        w_scale = w_scale.reshape(1)
    if list(w_scale.shape) not in ([1], [out_features, 1]):
        raise ValueError(
            f"w_scale must have shape [1] or [{out_features}, 1], one scale per tensor or per "
            f"output feature, but it has {list(w_scale.shape)}; scales per group are not supported "
            f"by this version"
        )
    values = _local_part(w_scale)
    if not values.is_meta and not bool((values.isfinite() & (values > 0)).all()):
        raise ValueError("w_scale must be finite and positive: the checkpoint is damaged")
    return w_scale


# --- Layers that share one weight ---

_layers: weakref.WeakSet[BitLinear] = weakref.WeakSet()
_lock = threading.Lock()


def remember(layer: BitLinear) -> None:
    """Makes ``layer`` one that :func:`layers_with` and a load can find."""
    with _lock:
        _layers.add(layer)


def layers_with(w_packed: Tensor) -> list[BitLinear]:
    """Every layer whose ``w_packed`` is this very tensor."""
    return [layer for layer in _all_layers() if layer._buffers.get("w_packed") is w_packed]


def find_ties(layers: Iterable[BitLinear]) -> None:
    """Has those of ``layers`` that hold one packed weight know that they share it."""
    for group in _tied_groups(layers):
        for layer in group:
            layer._shares_packed = layer.is_deployed


def _all_layers() -> list[BitLinear]:
    with _lock:
        return list(_layers)


def _tied_groups(layers: Iterable[BitLinear]) -> list[list[BitLinear]]:
    """Those of ``layers`` that share their weight with others of them, together."""
    holders: dict[int, list[BitLinear]] = {}
    for layer in layers:
        weight = _weight_of(layer)
        if weight is not None:  # as it is where the weight is computed (pruning)
            holders.setdefault(id(weight), []).append(layer)
    return [group for group in holders.values() if len(group) > 1]


class _Load(threading.local):
    """The ``load_state_dict`` under way in this thread, known by its list of missing keys."""

    missing_keys: list[str] | None = None

    def enter(self, missing_keys: list[str]) -> None:
        """Prepares for a load, when its first layer calls this."""
        if self.missing_keys is missing_keys:
            return
        self.missing_keys = missing_keys
        # Weak references: nothing tells when the load has ended.
        self.tied = {
            id(layer): [weakref.ref(other) for other in group if other is not layer]
            for group in _tied_groups(_all_layers())
            for layer in group
        }
        self.former_names: dict[int, tuple[str, ...]] = {}


_load = _Load()


def tied_layers(layer: BitLinear, missing_keys: list[str]) -> list[BitLinear]:
    """The other layers that shared the weight of ``layer`` when the load began.

    Their kind changes with that of ``layer``. They are remembered under the names that their
    weights had, as those are the names that the load finds missing.
    """
    _load.enter(missing_keys)
    found = [reference() for reference in _load.tied.get(id(layer), ())]
    others = [other for other in found if other is not None and not _is_parted(layer, other)]
    for other in others:
        _load.former_names[id(other)] = PACKED if other.is_deployed else ("weight",)
    return others


def rename_missing(layer: BitLinear, prefix: str, missing_keys: list[str]) -> None:
    """Names missing weights of a layer that a tied one has changed as they were named before."""
    if _load.missing_keys is missing_keys and id(layer) in _load.former_names:
        now = {prefix + name for name in ("weight", *PACKED)}
        if not now.isdisjoint(missing_keys):
            former = [prefix + name for name in _load.former_names[id(layer)]]
            missing_keys[:] = [*(key for key in missing_keys if key not in now), *former]


def _weight_of(layer: BitLinear) -> Tensor | None:
    return layer._buffers.get("w_packed", layer._parameters.get("weight"))


def _is_parted(layer: BitLinear, other: BitLinear) -> bool:
    """Whether the two no longer share a weight."""
    return _weight_of(layer) is not _weight_of(other)
