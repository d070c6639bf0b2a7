"""What the layers and wrappers of other libraries look like. None of them is imported here.

A class is looked up among the modules that are loaded already: a model that has such a layer has
loaded its library.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from torch import nn

# Subclasses of nn.Linear with a forward pass that computes what F.linear does.
_SAME_AS_LINEAR = (
    # input @ weight.T + bias, in two operations
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"),
)
# addmm(bias, input, weight), with a weight of shape (K, N)
_CONV1D = ("transformers.pytorch_utils", "Conv1D")

# What a subclass may define: how the layer is made, filled and printed, and what Python adds.
_HARMLESS = frozenset(
    {"__init__", "reset_parameters", "extra_repr", "__repr__", "_get_name", "__constants__"}
    | {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__"}
    | {"__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__"}
    | {"__static_attributes__", "__parameters__", "__orig_bases__", "__type_params__"}
)


def is_linear(module: object) -> bool:
    """Whether it is an ``nn.Linear``, of any subclass, or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: object) -> bool:
    """Whether it is transformers' ``Conv1D``, a linear layer whose weight is ``(K, N)``."""
    conv1d = _loaded(*_CONV1D)
    return conv1d is not None and isinstance(module, conv1d)


def why_not_linear(module: nn.Module) -> str:
    """Why a module might compute something else than ``F.linear``, or ``""``.

    A subclass of ``nn.Linear`` computes the same if the classes that it adds define nothing but
    ``__init__``, ``reset_parameters`` and how the layer is printed: its forward pass and its
    state are then those of ``nn.Linear``. The same holds for a subclass of the few classes with
    another forward pass that are known here.
    """
    kind = type(module)
    base = next((cls for cls in kind.__mro__ if cls in set(_linear_classes())), None)
    if base is None:
        return f"it is a {kind.__name__}, not an nn.Linear"
    for cls in kind.__mro__:
        own = [] if cls in base.__mro__ else sorted(set(vars(cls)) - _HARMLESS)
        if own:
            return (
                f"it is a {kind.__name__}, whose use of the weight is unknown: {cls.__name__} "
                f"defines {', '.join(own[:4])}{', ...' if len(own) > 4 else ''}"
            )
    if "forward" in vars(module):
        return (
            "its forward has been replaced on the instance, as accelerate's hooks do: convert first"
        )
    return ""


def linear_weight(module: nn.Module) -> nn.Parameter:
    """The weight ``(N, K)``: the parameter itself, but a new one of a Conv1D, which has (K, N)."""
    weight: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
    if is_conv1d(module):
        return nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    return weight


def adapters(model: nn.Module) -> tuple[set[int], set[int]]:
    """The layers of ``model`` that PEFT adapts, and the modules that it adds, by ``id``."""
    adapted: set[int] = set()
    added: set[int] = set()
    for module in model.modules():
        if "base_layer" in module._modules and hasattr(module, "adapter_layer_names"):
            base: nn.Module = module._modules["base_layer"]  # type: ignore[assignment]
            adapted.add(id(base))
            added.update(map(id, set(module.modules()) - {module} - set(base.modules())))
    return adapted, added


def why_sharded(layer: nn.Module, ancestors: Iterable[nn.Module] = ()) -> str:
    """Why a layer is not its own to change, or ``""``: FSDP holds its parameters.

    Between a forward pass and the next resharding they look like ordinary ones.

    Args:
        layer: The layer.
        ancestors: The modules that contain it.
    """
    if not any(_is_fsdp(module) for module in (layer, *ancestors)):
        return ""
    return (
        "its weight is sharded by FSDP, which keeps the one in floating point: gather the state "
        "with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
        "options=StateDictOptions(full_state_dict=True)), load it into a model that is not "
        "sharded, and deploy that"
    )


def _is_fsdp(module: nn.Module) -> bool:
    names = {"FSDPModule", "FullyShardedDataParallel"}
    return any(
        cls.__name__ in names and cls.__module__.startswith("torch.distributed.")
        for cls in type(module).__mro__
    )


def why_offloaded(layer: nn.Module, ancestors: Iterable[nn.Module] = ()) -> str:
    """Why the weight of a layer is not there to be packed, or ``""``.

    A weight on the meta device is a reason only if a hook of accelerate brings its values in each
    call: a model that was built on the meta device deploys, to have a checkpoint loaded into it.

    Args:
        layer: The layer.
        ancestors: The modules that contain it: a hook of theirs may place all submodules.
    """
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_meta:
        return ""
    hooks = [hook for module in ancestors for hook in _hooks(module)]
    placing = [hook for hook in hooks if getattr(hook, "place_submodules", False)]
    if not any(getattr(hook, "offload", False) for hook in (*_hooks(layer), *placing)):
        return ""
    return (
        "its weight is offloaded by accelerate, which brings it only while the layer runs: call "
        "accelerate.hooks.remove_hook_from_submodules(model) first, or deploy() the model before "
        "it is dispatched"
    )


def _hooks(module: nn.Module) -> Iterator[object]:
    """accelerate's hooks of a module, those inside a SequentialHook included."""
    waiting = [vars(module).get("_hf_hook")]
    while waiting:
        hook = waiting.pop()
        if hook is not None:
            yield hook
            waiting.extend(getattr(hook, "hooks", ()))


def _linear_classes() -> Iterator[type]:
    yield nn.Linear
    for place in (*_SAME_AS_LINEAR, _CONV1D):
        cls = _loaded(*place)
        if cls is not None:
            yield cls


def _loaded(module: str, name: str) -> type | None:
    """A class, if the Python module that defines it has been imported."""
    cls = getattr(sys.modules.get(module), "__dict__", {}).get(name)
    return cls if isinstance(cls, type) else None
