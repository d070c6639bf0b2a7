"""References to layers that a model holds besides its submodules: in lists, closures, hooks, ...

:func:`replace` walks over everything that the attributes of a model's modules lead to, twice. The
first walk records who holds what. The second goes from the replaced layers upwards: a holder that
can change gets the new layer, and one that cannot (a tuple, a bound method) is made again, which
makes it a replaced object of its own.

Nothing here runs code of the user: values are read and written by the types' own functions, never
by an attribute access that a property could answer, and they are compared by identity.
"""

from __future__ import annotations

import enum
import functools
import gc
import inspect
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

# Values that lead nowhere, by their exact type: most of what there is.
_ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, bytearray, range, type(...)}
    | {torch.dtype, torch.device, torch.Size, types.CodeType}
)
# Objects that belong to more than one model, or whose content is numbers.
_CLOSED = (type, types.ModuleType, torch.Tensor, torch.UntypedStorage)

_FROZEN = (tuple, frozenset, types.MethodType, weakref.ref)

_PARTIAL: dict[str, Any] = {
    name: vars(functools.partial)[name] for name in ("func", "args", "keywords")
}


class _Slot(NamedTuple):
    """Where in its holder a value is: the kind of place, and its index, key or name."""

    kind: str
    key: Any = None


class _Visit(NamedTuple):
    """An object that was reached, and from where; no holder for a module of the model."""

    value: Any
    holder: Any
    slot: _Slot


class _CannotRebuild(Exception):
    """An object that holds a replaced layer can neither change nor be made again."""


def replace(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> list[str]:
    """Replaces every reference to an old layer that can be reached from ``model``, in place.

    It follows the attributes of all modules, hooks included, through dictionaries, lists, sets,
    deques, tuples, bound methods, ``functools.partial``, weak references, functions (closures and
    default values, but not their globals) and the attributes of any other object. It does not
    enter classes, Python modules and tensors. The time is linear in the number of references.

    Args:
        model: A model in whose modules the old layers have been replaced already.
        pairs: Every old layer, with the new one.

    Returns:
        Paths of the references that could not be replaced, such as that in a generator.
    """
    replaced: dict[int, Any] = {id(old): (old, new) for old, new in pairs}
    if not replaced:
        return []
    visits, users = _explore(model, replaced)
    waiting = _count_frozen_edges(replaced, users)
    keyed: dict[int, dict[Any, Any]] = {}
    failed: list[tuple[Any, _Slot]] = []

    queue = deque(replaced)
    while queue:
        old, new = replaced[queue.popleft()]
        for holder, slot in users.get(id(old), ()):
            if issubclass(type(holder), _FROZEN):
                waiting[id(holder)] -= 1
                if waiting[id(holder)] == 0:
                    try:
                        replaced[id(holder)] = (holder, _rebuild(holder, replaced))
                        queue.append(id(holder))
                    except _CannotRebuild:
                        failed.append((holder, slot))
            elif slot.kind == "key":
                keyed[id(holder)] = holder  # After its values, which are found by the old keys.
            elif not _assign(holder, slot, old, new):
                failed.append((holder, slot))
    for mapping in keyed.values():
        if not _replace_keys(mapping, replaced):
            failed.append((mapping, _Slot("key")))
    return list(dict.fromkeys(_path(visits, *place) for place in failed))


def _explore(
    model: nn.Module, replaced: dict[int, Any]
) -> tuple[dict[int, _Visit], dict[int, list[tuple[Any, _Slot]]]]:
    """Every object that ``model`` leads to, and the holders of each one that matters.

    These are the old layers, and what has to be made again if it holds one.
    """
    visits = {
        id(module): _Visit(module, None, _Slot("module", name))
        for name, module in model.named_modules()
    }
    users: dict[int, list[tuple[Any, _Slot]]] = defaultdict(list)
    stack = [visit.value for visit in visits.values()]
    while stack:
        holder = stack.pop()
        for slot, value in _contents(holder):
            kind = type(value)
            if _leads_nowhere(value) or issubclass(kind, _CLOSED):
                continue
            old = id(value) in replaced
            if old or issubclass(kind, _FROZEN):
                users[id(value)].append((holder, slot))
            # What an old layer leads to, the new one leads to as well.
            if not old and id(value) not in visits:
                visits[id(value)] = _Visit(value, holder, slot)
                stack.append(value)
    return visits, users


def _leads_nowhere(value: Any) -> bool:
    """Whether it is an atom, or a list or tuple of atoms, as data sets have them by the million."""
    kind = type(value)
    return kind in _ATOMS or (
        (kind is tuple or kind is list) and all(type(element) in _ATOMS for element in value)
    )


def _contents(holder: Any) -> Iterator[tuple[_Slot, Any]]:
    """What an object refers to, and where, without most atoms."""
    kind, opened = type(holder), True
    if issubclass(kind, dict):
        for key, value in list(dict.items(holder)):
            if type(key) not in _ATOMS:
                yield _Slot("key", key), key
            if type(value) not in _ATOMS:
                yield _Slot("item", key), value
    elif issubclass(kind, (list, tuple, deque)):
        for index, value in enumerate(_plain_list(holder)):
            if type(value) not in _ATOMS:
                yield _Slot("item", index), value
    elif issubclass(kind, (set, frozenset)):
        for value in _plain_list(holder):
            yield _Slot("member"), value
    elif kind is types.MethodType:
        yield _Slot("attribute", "__self__"), holder.__self__
        yield _Slot("attribute", "__func__"), holder.__func__
    elif kind is types.FunctionType:
        yield _Slot("attribute", "__defaults__"), holder.__defaults__
        yield _Slot("attribute", "__kwdefaults__"), holder.__kwdefaults__
        for name, cell in zip(holder.__code__.co_freevars, holder.__closure__ or ()):
            yield _Slot("closure", name), cell
    elif kind is types.CellType:
        yield from ((_Slot("cell"), value) for value in gc.get_referents(holder))
    elif issubclass(kind, functools.partial):
        for name, member in _PARTIAL.items():
            yield _Slot("partial", name), member.__get__(holder)
    elif kind is np.ndarray and holder.dtype.hasobject:
        yield from ((_Slot("hidden"), value) for value in holder.ravel())
    elif issubclass(kind, weakref.ref):
        yield _Slot("referent"), weakref.ref.__call__(holder)
    else:
        opened = False

    namespace, members = _namespace(holder), _members(kind)
    if namespace is not None:
        yield _Slot("namespace"), namespace
    for name, member in members:
        try:
            yield _Slot("member_descriptor", (name, member)), member.__get__(holder)
        except AttributeError:  # It has not been set.
            continue
    if kind is _LRU_CACHE or not (opened or namespace is not None or members):
        yield from ((_Slot("hidden"), value) for value in _hidden(holder))


_LRU_CACHE = type(functools.lru_cache(lambda: None))


def _plain_list(values: Any) -> list[Any]:
    """The elements of a container of Python, past an ``__iter__`` that a subclass has."""
    for base in (list, tuple, deque, set, frozenset):
        if issubclass(type(values), base):
            return list(base.__iter__(values))
    raise TypeError(type(values))


def _hidden(holder: Any) -> list[Any]:
    """What the garbage collector sees of an object of C (a generator, ``map``), but no globals."""
    return [
        value
        for value in gc.get_referents(holder)
        if type(value) is not dict or ("__builtins__" not in value and "__import__" not in value)
    ]


def _namespace(holder: Any) -> dict[str, Any] | None:
    """The ``__dict__`` of an object, if it has one that is not computed."""
    for cls in type(holder).__mro__:
        descriptor: Any = vars(cls).get("__dict__")
        if type(descriptor) in (types.GetSetDescriptorType, types.MemberDescriptorType):
            namespace = descriptor.__get__(holder)
            return namespace if issubclass(type(namespace), dict) else None
        if descriptor is not None:
            return None
    return None


def _members(kind: type) -> list[tuple[str, Any]]:
    """The slots (``__slots__``) of a class, with the descriptors that read and write them."""
    return [
        (name, member)
        for cls in kind.__mro__
        if "__slots__" in vars(cls)
        for name, member in vars(cls).items()
        if type(member) is types.MemberDescriptorType and name != "__dict__"
    ]


def _count_frozen_edges(
    replaced: dict[int, Any], users: dict[int, list[tuple[Any, _Slot]]]
) -> dict[int, int]:
    """For each object that has to be made again: how often it holds one that is replaced."""
    counts: dict[int, int] = defaultdict(int)
    queue = deque(replaced)
    while queue:
        for holder, _ in users.get(queue.popleft(), ()):
            if issubclass(type(holder), _FROZEN):
                if id(holder) not in counts:
                    queue.append(id(holder))
                counts[id(holder)] += 1
    return counts


def _rebuild(frozen: Any, replaced: dict[int, Any]) -> Any:
    """A copy of an object that cannot change, with the new values in it.

    Raises:
        _CannotRebuild: Nobody but the user's code can make such an object.
    """
    kind = type(frozen)

    def current(value: Any) -> Any:
        return replaced[id(value)][1] if id(value) in replaced else value

    if kind is types.MethodType:
        function, owner = frozen.__func__, frozen.__self__
        if id(owner) in replaced:
            function = _method_of(current(owner), function, owner)
        return types.MethodType(current(function), current(owner))
    if kind is weakref.ref:
        return weakref.ref(current(frozen()), frozen.__callback__)
    if issubclass(kind, tuple):
        try:
            copy = tuple.__new__(kind, map(current, _plain_list(frozen)))
        except TypeError:  # a type of C with a layout of its own
            raise _CannotRebuild from None
        attributes = _namespace(frozen)
        if attributes:
            vars(copy).update((name, current(value)) for name, value in attributes.items())
        return copy
    if kind is frozenset:
        values = [current(value) for value in frozen]
        if all(map(_has_plain_hash, values)):
            return frozenset(values)
    raise _CannotRebuild


def _method_of(new: Any, function: Any, old: Any) -> Any:
    """The function of the class of ``new`` that corresponds to one of the class of ``old``."""
    if type(function) is types.FunctionType:
        name = function.__name__
        if inspect.getattr_static(type(old), name, None) is function:
            return inspect.getattr_static(type(new), name, function)
    return function


def _assign(holder: Any, slot: _Slot, old: Any, new: Any) -> bool:
    """Puts ``new`` where ``old`` is; False if the holder cannot be changed there."""
    kind = type(holder)
    if slot.kind == "item" and issubclass(kind, dict):
        if not _has_plain_hash(slot.key):
            return False
        _dict_type(holder).__setitem__(holder, slot.key, new)
    elif slot.kind == "item":
        (list if issubclass(kind, list) else deque).__setitem__(holder, slot.key, new)
    elif slot.kind == "member":
        if not (_has_plain_hash(old) and _has_plain_hash(new)):
            return False
        set.discard(holder, old)
        set.add(holder, new)
    elif slot.kind == "attribute":
        setattr(holder, slot.key, new)  # __defaults__ of a function
    elif slot.kind == "cell":
        holder.cell_contents = new
    elif slot.kind == "partial":
        parts = {name: member.__get__(holder) for name, member in _PARTIAL.items()}
        parts[slot.key] = new
        functools.partial.__setstate__(holder, (*parts.values(), _namespace(holder)))  # type: ignore[attr-defined]
    elif slot.kind == "member_descriptor":
        slot.key[1].__set__(holder, new)
    else:
        return False
    return True


def _replace_keys(mapping: dict[Any, Any], replaced: dict[int, Any]) -> bool:
    """Fills a dictionary anew, in its order; False if that would run code of its keys."""
    items = [
        (replaced[id(key)][1] if id(key) in replaced else key, value)
        for key, value in dict.items(mapping)
    ]
    if not all(_has_plain_hash(key) for key, _ in items):
        return False
    base = _dict_type(mapping)
    base.clear(mapping)
    for key, value in items:
        base.__setitem__(mapping, key, value)
    return True


def _dict_type(mapping: Any) -> type[dict[Any, Any]]:
    """The class whose functions change ``mapping``, past those of the user's subclass."""
    return OrderedDict if issubclass(type(mapping), OrderedDict) else dict


def _has_plain_hash(value: Any) -> bool:
    """Whether to hash it runs no code of the user."""
    kind = type(value)
    if issubclass(kind, (tuple, frozenset)) and not all(map(_has_plain_hash, _plain_list(value))):
        return False
    function: Any = kind.__hash__
    return type(function) is types.WrapperDescriptorType or function is enum.Enum.__hash__


def _path(visits: dict[int, _Visit], holder: Any, slot: _Slot) -> str:
    """Where a value is, as a person would write it: ``encoder.steps[0]``."""
    kind, parts = type(holder).__name__, [slot]
    while True:
        _, parent, slot = visits[id(holder)]
        parts.append(slot)
        if parent is None:
            break
        holder = parent
    text, inside = "", ""
    for step in reversed(parts):
        text += _step(step, inside)
        inside = step.kind
    return f"{text.lstrip('.') or 'the model itself'} ({kind})"


def _step(slot: _Slot, inside: str) -> str:
    if slot.kind == "item":
        if inside == "namespace":
            return f".{slot.key}"
        known = type(slot.key) in (str, int)
        return f"[{slot.key!r}]" if known else f"[{type(slot.key).__name__}]"
    if slot.kind == "closure":
        return f".{slot.key}"
    if slot.kind == "member_descriptor":
        return f".{slot.key[0]}"
    return str(slot.key) if slot.kind == "module" else f".{slot.key}" if slot.key else ""
