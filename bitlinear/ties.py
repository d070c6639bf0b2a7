"""Layers that share one weight, and the names of their weights while a model loads."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .packable import Packable

_layers: weakref.WeakSet[Packable] = weakref.WeakSet()
_lock = threading.Lock()


def register(layer: Packable) -> None:
    """Add ``layer`` to the layers that :func:`layers_with` and a load search."""
    with _lock:
        _layers.add(layer)


def layers_with(w_packed: Tensor) -> list[Packable]:
    """Every layer whose ``w_packed`` is this very tensor."""
    return [layer for layer in _all_layers() if layer._buffers.get("w_packed") is w_packed]


def tied_groups(layers: Iterable[Packable]) -> list[list[Packable]]:
    """Groups of two or more of ``layers`` that share one weight, packed or in floating point."""
    groups: dict[int, list[Packable]] = {}
    for layer in layers:
        weight = _weight_of(layer)
        if weight is not None:  # A computed weight (pruning) is None here.
            groups.setdefault(id(weight), []).append(layer)
    return [group for group in groups.values() if len(group) > 1]


def tied_layers(layer: Packable, missing_keys: list[str]) -> list[Packable]:
    """The other layers that have shared the weight of ``layer`` since the load began.

    They take the kind of weight that ``layer`` takes. The load reports weights that it does not
    find under the names from before, which this function records.

    Args:
        layer: A layer that is being loaded.
        missing_keys: The list of the load, which identifies it.
    """
    _load.enter(missing_keys)
    references = _load.tied.get(id(layer), ())
    layers = [reference() for reference in references]
    others = [other for other in layers if other is not None and _share_weight(layer, other)]
    for other in others:
        _load.former_names[id(other)] = _weight_names(other)
    return others


def rename_missing(layer: Packable, prefix: str, missing_keys: list[str]) -> None:
    """Report missing weights of ``layer`` under the names from before a tied layer changed it."""
    if _load.missing_keys is missing_keys and id(layer) in _load.former_names:
        current = {prefix + name for name in ("weight", "w_packed", "w_scale")}
        if not current.isdisjoint(missing_keys):
            former = [prefix + name for name in _load.former_names[id(layer)]]
            missing_keys[:] = [*(key for key in missing_keys if key not in current), *former]


class _Load(threading.local):
    """The ``load_state_dict`` of this thread, identified by its list of missing keys."""

    missing_keys: list[str] | None = None

    def enter(self, missing_keys: list[str]) -> None:
        """Record the ties at the first call in a load."""
        if self.missing_keys is missing_keys:
            return
        self.missing_keys = missing_keys
        # Weak references, because nothing tells when the load has ended.
        self.tied = {
            id(layer): [weakref.ref(other) for other in group if other is not layer]
            for group in tied_groups(_all_layers())
            for layer in group
        }
        self.former_names: dict[int, tuple[str, ...]] = {}


_load = _Load()


def _all_layers() -> list[Packable]:
    with _lock:
        return list(_layers)


def _weight_of(layer: Packable) -> Tensor | None:
    return layer._buffers.get("w_packed", layer._parameters.get("weight"))


def _weight_names(layer: Packable) -> tuple[str, ...]:
    return ("w_packed", "w_scale") if layer.is_deployed else ("weight",)


def _share_weight(layer: Packable, other: Packable) -> bool:
    return _weight_of(layer) is _weight_of(other)
