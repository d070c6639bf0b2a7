"""The linear layers of a model, and the ones among them that cannot be converted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from .. import foreign
from ..linear import BitLinear
from ..preconditions import why_no_plain_weight
from .weight_readers import READ_BY_ATTENTION, read_by_attention

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass
class LinearLayer:
    """One linear layer of a model, with every reference to it as a submodule.

    Attributes:
        module: The layer.
        names: Its qualified names. A layer that several modules share has several names; a model
            that is a linear layer itself has none.
        parents: The modules that hold it, each with the name of the layer in that module.
        excluded: Why the caller of ``bitlinear.convert`` excludes it, or ``""``.
        reason: Why it is not converted, for this or any other cause, or ``""``.
        replacement: The BitLinear in its place, after the conversion.
    """

    module: nn.Module
    names: list[str] = field(default_factory=list)
    parents: list[tuple[nn.Module, str]] = field(default_factory=list)
    excluded: str = ""
    reason: str = ""
    replacement: BitLinear | None = None

    @property
    def label(self) -> str:
        """All names, for a log line."""
        return " = ".join(self.names) or "(the model itself)"


def find_linear_layers(model: nn.Module) -> list[LinearLayer]:
    """Every linear layer of ``model`` once; ``model`` itself first, if it is one."""
    found: dict[int, LinearLayer] = {}
    if foreign.is_linear(model):
        found[id(model)] = LinearLayer(model)
    for prefix, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None and foreign.is_linear(child):
                layer = found.setdefault(id(child), LinearLayer(child))
                layer.names.append(f"{prefix}.{name}" if prefix else name)
                layer.parents.append((parent, name))
    return list(found.values())


class Convertibility:
    """The rules for layers that ``bitlinear.convert`` cannot replace.

    Attributes:
        adapters: The modules, by ``id``, that PEFT has added to the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._read_by_attention = read_by_attention(model)
        self._adapted, self.adapters = foreign.find_adapters(model)
        self._users = Counter(id(p) for m in model.modules() for p in m._parameters.values())

    def why_not(self, linear: nn.Module) -> str:
        """Why a linear layer of the model cannot be converted, or ``""``."""
        if isinstance(linear, BitLinear):
            return "it is a BitLinear already"
        if id(linear) in self._read_by_attention:
            return READ_BY_ATTENTION
        if id(linear) in self.adapters:
            return "it is part of an adapter of PEFT, which is merged in floating point"
        reason = why_no_plain_weight(linear) or foreign.why_not_linear(linear)
        if reason:
            return reason
        extras = {*linear._parameters, *linear._buffers, *linear._modules} - {"weight", "bias"}
        if extras:
            names = ", ".join(sorted(extras))
            return f"it has tensors or modules that nn.Linear does not have: {names}"
        hooks = [name for name in _STATE_HOOKS if vars(linear).get(name)]
        if hooks:
            return f"it has hooks that cannot be moved: {', '.join(hooks)}"
        if foreign.is_conv1d(linear):
            return self._why_not_transposable(linear)
        return ""

    def _why_not_transposable(self, conv1d: nn.Module) -> str:
        if self._users[id(conv1d.weight)] > 1:
            return "another module shares its weight, which the conversion would transpose"
        if id(conv1d) in self._adapted:
            return "an adapter of PEFT relies on its transposed weight: convert before adding it"
        return ""
