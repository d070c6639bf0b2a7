"""Replacing one layer of a model: its parameters, its hooks, and its entries in other modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .. import foreign
from ..linear import BitLinear
from .layers import LinearLayer

# The attributes of nn.Module that concern calls. The dictionaries move as they are, so that the
# handles that remove a hook keep working.
CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def replace_layer(layer: LinearLayer, quant_type: str) -> BitLinear:
    """Put a BitLinear in place of a linear layer, with the hooks and the attributes of the layer.

    Raises:
        ValueError: ``quant_type`` is not valid.
    """
    linear: Any = layer.module
    layer.replacement = new = BitLinear.from_linear(linear, quant_type=quant_type)
    if foreign.is_conv1d(linear):
        _keep_parameter(linear, new)
    for name, value in vars(linear).items():
        if name in CALL_HOOKS or name not in vars(new):
            vars(new)[name] = value
    set_child(layer.parents, new)
    return new


def set_child(parents: Iterable[tuple[nn.Module, str]], child: nn.Module) -> None:
    """Make ``child`` the submodule of each parent under the name that stands beside the parent."""
    for parent, name in parents:
        parent._modules[name] = child


def find_parents(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that hold each module, by its ``id``, and its name in each of them."""
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            parents.setdefault(id(child), []).append((parent, name))
    return parents


def _keep_parameter(conv1d: Any, new: BitLinear) -> None:
    """Give ``new`` the parameter of a Conv1D, and the Conv1D a new one with the same values.

    An optimizer that exists already holds the parameter, not the layer.
    """
    weight: nn.Parameter = conv1d.weight
    grad = weight.grad
    conv1d.weight = nn.Parameter(weight.data, requires_grad=weight.requires_grad)
    weight.grad = None
    weight.data = new.weight.data
    weight.grad = None if grad is None else grad.t().contiguous()
    new.weight = weight
