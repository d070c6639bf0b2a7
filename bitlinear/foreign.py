"""Recognition of the layers and wrappers of other libraries, none of which is imported here.

A class is taken from the modules that are loaded already: a model that has such a layer has loaded
its library.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from torch import nn

# The subclasses of nn.Linear that override forward, but compute the same as F.linear.
_EQUIVALENT_SUBCLASSES = (
    # FalconLinear computes input @ weight.T + bias in two operations.
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"),
    ("bitlinear.integrations.transformers.decoding_head", "DecodingHead"),
)
_BITNET = [("transformers.integrations.bitnet", name) for name in ("BitLinear", "AutoBitLinear")]
# It computes addmm(bias, input, weight), with a weight of shape (K, N).
_CONV1D = ("transformers.pytorch_utils", "Conv1D")

# A subclass that defines only these names differs from its base in how the layer is made, filled
# and printed. Python adds the names with underscores.
_HARMLESS_NAMES = frozenset(
    {"__init__", "reset_parameters", "extra_repr", "__repr__", "_get_name", "__constants__"}
    | {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__"}
    | {"__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__"}
    | {"__static_attributes__", "__parameters__", "__orig_bases__", "__type_params__"}
)


# --- Linear layers ---


def is_linear(module: object) -> bool:
    """Whether it is an ``nn.Linear``, of any subclass, or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: object) -> bool:
    """Whether it is transformers' ``Conv1D``, a linear layer whose weight is ``(K, N)``."""
    conv1d = _loaded_class(*_CONV1D)
    return conv1d is not None and isinstance(module, conv1d)


def is_bitnet(module: object) -> bool:
    """Whether it is a layer of transformers' BitNet models."""
    classes = [cls for cls in (_loaded_class(*path) for path in _BITNET) if cls is not None]
    return isinstance(module, tuple(classes))


def bitnet_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that are :func:`is_bitnet`."""
    return [module for module in model.modules() if is_bitnet(module)]


CONVERT_BITNET = "bitlinear.integrations.transformers.convert(model)"
"""The call that converts BitNet layers of transformers."""


def why_not_linear(module: nn.Module) -> str:
    """Why a module might not compute the same as ``F.linear``, or ``""``.

    A subclass of ``nn.Linear`` computes the same if the classes that it adds define nothing but
    ``__init__``, ``reset_parameters`` and how the layer is printed: it then has the forward pass
    and the state of ``nn.Linear``. The same holds for subclasses of ``Conv1D``, of ``FalconLinear``
    and of our ``DecodingHead``.
    """
    if is_bitnet(module):
        return f"it is the {type(module).__name__} of transformers: call {CONVERT_BITNET}"
    return _why_changed(module, set(_linear_classes()), "nn.Linear")


def why_not_embedding(module: nn.Module, *classes: type) -> str:
    """Why a module might not compute the same as ``nn.Embedding`` or one of these, or ``""``.

    :func:`why_not_linear` states the rule.
    """
    return _why_changed(module, {nn.Embedding, *classes}, "nn.Embedding")


def _why_changed(module: nn.Module, classes: set[type], name: str) -> str:
    """Why a module might not compute the same as the class of these that it is derived from."""
    kind = type(module)
    base = next((cls for cls in kind.__mro__ if cls in classes), None)
    if base is None:
        return f"it is a {kind.__name__}, not an {name}"
    for cls in kind.__mro__:
        added = [] if cls in base.__mro__ else sorted(set(vars(cls)) - _HARMLESS_NAMES)
        if added:
            return (
                f"it is a {kind.__name__}, whose use of the weight is unknown: {cls.__name__} "
                f"defines {', '.join(added[:4])}{', ...' if len(added) > 4 else ''}"
            )
    if "forward" in vars(module):
        return (
            "its forward has been replaced on the instance, as accelerate's hooks do: convert the "
            "model before that"
        )
    return ""


def linear_weight(module: nn.Module) -> nn.Parameter:
    """The weight of a linear layer, shape ``(N, K)``.

    Returns:
        The parameter itself; for a ``Conv1D``, a new parameter with the transposed weight.
    """
    weight: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
    if is_conv1d(module):
        return nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    return weight


def _linear_classes() -> Iterator[type]:
    yield nn.Linear
    for module, name in (*_EQUIVALENT_SUBCLASSES, _CONV1D):
        cls = _loaded_class(module, name)
        if cls is not None:
            yield cls


def _loaded_class(module: str, name: str) -> type | None:
    """A class, if the Python module that defines it has been imported."""
    cls = getattr(sys.modules.get(module), "__dict__", {}).get(name)
    return cls if isinstance(cls, type) else None


# --- Wrappers ---


def find_adapters(model: nn.Module) -> tuple[set[int], set[int]]:
    """The layers of ``model`` that PEFT adapts, and the modules that it adds, by ``id``."""
    adapted: set[int] = set()
    added: set[int] = set()
    for module in model.modules():
        if "base_layer" in module._modules and hasattr(module, "adapter_layer_names"):
            base: nn.Module = module._modules["base_layer"]  # type: ignore[assignment]
            adapted.add(id(base))
            added.update(map(id, set(module.modules()) - {module} - set(base.modules())))
    return adapted, added


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP, of either generation, holds the parameters of a module.

    Between a forward pass and the next resharding they look like ordinary parameters.
    """
    names = {"FSDPModule", "FullyShardedDataParallel"}
    return any(
        cls.__name__ in names and cls.__module__.startswith("torch.distributed.")
        for cls in type(module).__mro__
    )


def is_offloaded(layer: nn.Module, ancestors: Iterable[nn.Module] = ()) -> bool:
    """Whether a hook of accelerate loads the values of a layer's weight in each call.

    A weight on the meta device without such a hook is not offloaded: a checkpoint can be loaded
    into it.

    Args:
        layer: The layer.
        ancestors: The modules that contain it: their hooks can place the weights of submodules.
    """
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_meta:
        return False
    outer_hooks = (hook for module in ancestors for hook in _accelerate_hooks(module))
    placing = [hook for hook in outer_hooks if getattr(hook, "place_submodules", False)]
    return any(getattr(hook, "offload", False) for hook in (*_accelerate_hooks(layer), *placing))


def _accelerate_hooks(module: nn.Module) -> Iterator[object]:
    """accelerate's hooks of a module, with the hooks inside a SequentialHook."""
    waiting = [vars(module).get("_hf_hook")]
    while waiting:
        hook = waiting.pop()
        if hook is not None:
            yield hook
            waiting.extend(getattr(hook, "hooks", ()))
