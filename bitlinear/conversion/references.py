"""The references to layers outside of ``nn.Module._modules``: in lists, closures, hooks, ...

:func:`replace` walks twice over everything that the attributes of a model's modules lead to. The
first walk records the holders of each object. The second walk goes from the replaced layers to
their holders: a mutable holder gets the new layer. An immutable holder (a tuple, a bound method) is
rebuilt, and then counts as a replaced object itself.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from . import object_contents
from .object_contents import CannotRebuild, Slot

_Users = dict[int, list[tuple[Any, Slot]]]  # the holders of an object, by its id, and their slots


class _Visit(NamedTuple):
    """An object and the slot from which it was reached; the modules of the model have no holder."""

    value: Any
    holder: Any
    slot: Slot


def replace(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> list[str]:
    """Replace every reference to an old layer that can be reached from ``model``, in place.

    The search follows the attributes of all modules, hooks included, through dictionaries, lists,
    sets, deques, tuples, bound methods, ``functools.partial``, weak references, functions (closures
    and default values, but not their globals) and the attributes of any other object. It does not
    enter classes, Python modules and tensors. The time is linear in the number of references.

    Args:
        model: A model whose modules hold the new layers as submodules already.
        pairs: Every old layer, with the new one.

    Returns:
        Paths of the references that cannot be replaced, such as a reference in a generator.
    """
    replaced: dict[int, tuple[Any, Any]] = {id(old): (old, new) for old, new in pairs}
    if not replaced:
        return []
    visits, users = _explore(model, replaced)
    waiting = _count_references_from_immutables(replaced, users)
    rekeyed: dict[int, dict[Any, Any]] = {}
    failed: list[tuple[Any, Slot]] = []

    def current(value: Any) -> Any:
        return replaced[id(value)][1] if id(value) in replaced else value

    queue = deque(replaced)
    while queue:
        old, new = replaced[queue.popleft()]
        for holder, slot in users.get(id(old), ()):
            if object_contents.is_immutable(holder):
                # It is rebuilt once, after all values in it have been.
                waiting[id(holder)] -= 1
                if waiting[id(holder)] == 0:
                    try:
                        replaced[id(holder)] = (holder, object_contents.rebuild(holder, current))
                        queue.append(id(holder))
                    except CannotRebuild:
                        failed.append((holder, slot))
            elif slot.kind == "key":
                # The keys change last: the values are still assigned by the old keys.
                rekeyed[id(holder)] = holder
            elif not object_contents.assign(holder, slot, old, new):
                failed.append((holder, slot))
    for mapping in rekeyed.values():
        if not object_contents.replace_keys(mapping, current):
            failed.append((mapping, Slot("key")))
    return list(dict.fromkeys(_path(visits, holder, slot) for holder, slot in failed))


def _explore(model: nn.Module, replaced: dict[int, Any]) -> tuple[dict[int, _Visit], _Users]:
    """Visit every object that ``model`` leads to.

    Returns:
        The visits, by the ``id`` of the object, and the users of the old layers and of the
        immutable objects, which must be rebuilt if they hold an old layer.
    """
    visits = {
        id(module): _Visit(module, None, Slot("module", name))
        for name, module in model.named_modules()
    }
    users: _Users = defaultdict(list)
    stack = [visit.value for visit in visits.values()]
    while stack:
        holder = stack.pop()
        for slot, value in object_contents.contents(holder):
            if object_contents.is_leaf(value):
                continue
            is_old = id(value) in replaced
            if is_old or object_contents.is_immutable(value):
                users[id(value)].append((holder, slot))
            # The new layer has the attributes of the old one, so the walk does not enter the old.
            if not is_old and id(value) not in visits:
                visits[id(value)] = _Visit(value, holder, slot)
                stack.append(value)
    return visits, users


def _count_references_from_immutables(replaced: dict[int, Any], users: _Users) -> dict[int, int]:
    """For each immutable object that must be rebuilt: its number of references to replaced ones."""
    counts: dict[int, int] = defaultdict(int)
    queue = deque(replaced)
    while queue:
        for holder, _ in users.get(queue.popleft(), ()):
            if object_contents.is_immutable(holder):
                if id(holder) not in counts:
                    queue.append(id(holder))
                counts[id(holder)] += 1
    return counts


def _path(visits: dict[int, _Visit], holder: Any, slot: Slot) -> str:
    """The path to a value, as a person would write it: ``encoder.steps[0] (list)``."""
    kind, slots = type(holder).__name__, [slot]
    while True:
        _, parent, slot = visits[id(holder)]
        slots.append(slot)
        if parent is None:
            break
        holder = parent
    text, container = "", ""
    for step in reversed(slots):
        text += _path_step(step, container)
        container = step.kind
    return f"{text.lstrip('.') or 'the model itself'} ({kind})"


def _path_step(slot: Slot, container: str) -> str:
    if slot.kind == "item":
        if container == "namespace":
            return f".{slot.key}"
        is_printable = type(slot.key) in (str, int)
        return f"[{slot.key!r}]" if is_printable else f"[{type(slot.key).__name__}]"
    if slot.kind == "closure":
        return f".{slot.key}"
    if slot.kind == "member_descriptor":
        return f".{slot.key[0]}"
    return str(slot.key) if slot.kind == "module" else f".{slot.key}" if slot.key else ""
