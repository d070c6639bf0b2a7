"""Why a layer cannot be converted or deployed.

Each function returns the reason, or ``""`` if there is none.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.utils import parametrize

from . import foreign
from .arguments import MAX_IN_FEATURES

if TYPE_CHECKING:
    from .ternary_layer import TernaryLayer

GATHER = (
    "gather its state with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)) and load it into a model that is not sharded"
)
"""The advice for a sharded layer that has to be whole."""


def is_distributed(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor; this does not import its class."""
    return hasattr(tensor, "full_tensor")


def why_no_plain_weight(linear: nn.Module) -> str:
    """Why the weight of ``linear`` is not an ordinary floating-point parameter ``(N, K)``."""
    if "w_packed" in linear._buffers:
        return f"it is a deployed {type(linear).__name__}; call undeploy() first"
    if parametrize.is_parametrized(linear):
        return "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is computed, not a parameter (weight_norm, pruning); remove that first"
    if getattr(linear, "bias", None) is not None and "bias" not in linear._parameters:
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
            f"own; convert the model before it is quantised, or dequantise it first"
        )
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    if weight.dim() != 2 or weight.numel() == 0:
        return f"its weight has shape {list(weight.shape)}; (N, K) with N and K >= 1 is needed"
    in_features = weight.shape[0 if foreign.is_conv1d(linear) else 1]
    if in_features > MAX_IN_FEATURES:
        return f"it has {in_features} in_features, more than {MAX_IN_FEATURES}; split it along them"
    return ""


def why_not_deployable(layer: TernaryLayer, ancestors: Collection[nn.Module] = ()) -> str:
    """Why ``layer``, which is not deployed, cannot be packed.

    Args:
        layer: The layer.
        ancestors: The modules that contain it, as far as the caller knows them: accelerate and
            FSDP can hold its weight through them.
    """
    if foreign.is_offloaded(layer, ancestors):
        return (
            "its weight is offloaded by accelerate, which loads it only while the layer runs: call "
            "accelerate.hooks.remove_hook_from_submodules(model) first, or deploy() the model "
            "before it is dispatched"
        )
    if any(foreign.is_fsdp(module) for module in (layer, *ancestors)):
        return (
            f"its weight is sharded by FSDP, which keeps it in floating point: {GATHER}, and "
            f"deploy that model"
        )
    if layer.quantization_strength < 1:
        return (
            f"its quantization_strength is {layer.quantization_strength:g}, and a deployed "
            f"layer's is 1: set that first"
        )
    reason = why_no_plain_weight(layer)
    if reason:
        return reason
    weight = layer.weight.detach()
    if weight.shape != layer.weight_shape:
        return (
            f"its weight has shape {list(weight.shape)}, but {' and '.join(layer._dimensions)} are "
            f"{list(layer.weight_shape)}: set these to the shape of the weight"
        )
    # Both bounds are NaN if any weight is. The check allocates nothing as large as the weight.
    has_values = not (weight.is_meta or isinstance(weight, FakeTensor))
    if has_values and not bool(torch.stack(weight.aminmax()).float().isfinite().all()):
        return "its weight has values that are NaN, infinite, or too large for float32"
    return ""


def _has_own_operations(weight: Tensor) -> bool:
    """Whether it is a tensor subclass (of torchao, optimum-quanto) that computes in its own way."""
    own: Any = type(weight).__torch_dispatch__
    return own is not Tensor.__torch_dispatch__ and not isinstance(weight, FakeTensor)
