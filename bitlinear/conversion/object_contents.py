"""Reading and writing the references inside Python objects, without running the user's code.

The functions of the built-in types read and write the values. An attribute access could call a
property, and a method could be overridden in a subclass. Values are compared by identity.
"""

from __future__ import annotations

import enum
import functools
import gc
import inspect
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

# Values that refer to nothing, by their exact type: most values of a model.
_ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, bytearray, range, type(...)}
    | {torch.dtype, torch.device, torch.Size, types.CodeType}
)
# Objects that belong to more than one model, or that contain numbers.
_OPAQUE = (type, types.ModuleType, torch.Tensor, torch.UntypedStorage)

_IMMUTABLE = (tuple, frozenset, types.MethodType, weakref.ref)

_LRU_CACHE = type(functools.lru_cache(lambda: None))

_PARTIAL_MEMBERS: dict[str, Any] = {
    name: vars(functools.partial)[name] for name in ("func", "args", "keywords")
}


class Slot(NamedTuple):
    """The position of a value in its holder: the kind of position, and its index, key or name."""

    kind: str
    key: Any = None


class CannotRebuild(Exception):
    """Only the user's code can make an object like this one."""


def is_immutable(value: Any) -> bool:
    """Whether a value must be rebuilt to refer to something else."""
    return issubclass(type(value), _IMMUTABLE)


def is_leaf(value: Any) -> bool:
    """Whether a search for layers can skip a value and everything that it refers to.

    Data sets hold lists and tuples of atoms by the million, so these are leaves too.
    """
    kind = type(value)
    return (
        kind in _ATOMS
        or (kind in (tuple, list) and all(type(element) in _ATOMS for element in value))
        or issubclass(kind, _OPAQUE)
    )


# --- Reading ---


def contents(holder: Any) -> Iterator[tuple[Slot, Any]]:
    """The values that an object refers to, with their slots, without most atoms."""
    kind, is_container = type(holder), True
    if issubclass(kind, dict):
        for key, value in list(dict.items(holder)):
            if type(key) not in _ATOMS:
                yield Slot("key", key), key
            if type(value) not in _ATOMS:
                yield Slot("item", key), value
    elif issubclass(kind, (list, tuple, deque)):
        for index, value in enumerate(_elements(holder)):
            if type(value) not in _ATOMS:
                yield Slot("item", index), value
    elif issubclass(kind, (set, frozenset)):
        for value in _elements(holder):
            yield Slot("member"), value
    elif kind is types.MethodType:
        yield Slot("attribute", "__self__"), holder.__self__
        yield Slot("attribute", "__func__"), holder.__func__
    elif kind is types.FunctionType:
        yield Slot("attribute", "__defaults__"), holder.__defaults__
        yield Slot("attribute", "__kwdefaults__"), holder.__kwdefaults__
        for name, cell in zip(holder.__code__.co_freevars, holder.__closure__ or ()):
            yield Slot("closure", name), cell
    elif kind is types.CellType:
        yield from ((Slot("cell"), value) for value in gc.get_referents(holder))
    elif issubclass(kind, functools.partial):
        for name, member in _PARTIAL_MEMBERS.items():
            yield Slot("partial", name), member.__get__(holder)
    elif kind is np.ndarray and holder.dtype.hasobject:
        yield from ((Slot("hidden"), value) for value in holder.ravel())
    elif issubclass(kind, weakref.ref):
        yield Slot("referent"), weakref.ref.__call__(holder)
    else:
        is_container = False

    namespace, members = _namespace(holder), _slot_members(kind)
    if namespace is not None:
        yield Slot("namespace"), namespace
    for name, member in members:
        try:
            yield Slot("member_descriptor", (name, member)), member.__get__(holder)
        except AttributeError:  # The attribute is not set.
            continue
    if kind is _LRU_CACHE or not (is_container or namespace is not None or members):
        yield from ((Slot("hidden"), value) for value in _referents(holder))


def _elements(values: Any) -> list[Any]:
    """The elements of a built-in container, even if a subclass overrides ``__iter__``."""
    for base in (list, tuple, deque, set, frozenset):
        if issubclass(type(values), base):
            return list(base.__iter__(values))
    raise TypeError(type(values))


def _referents(holder: Any) -> list[Any]:
    """The values that the garbage collector sees in an object of C (a generator, ``map``).

    Global namespaces are left out.
    """
    return [
        value
        for value in gc.get_referents(holder)
        if type(value) is not dict or ("__builtins__" not in value and "__import__" not in value)
    ]


def _namespace(holder: Any) -> dict[str, Any] | None:
    """The ``__dict__`` of an object, unless a property computes it."""
    for cls in type(holder).__mro__:
        descriptor: Any = vars(cls).get("__dict__")
        if type(descriptor) in (types.GetSetDescriptorType, types.MemberDescriptorType):
            namespace = descriptor.__get__(holder)
            return namespace if issubclass(type(namespace), dict) else None
        if descriptor is not None:
            return None
    return None


def _slot_members(kind: type) -> list[tuple[str, Any]]:
    """The ``__slots__`` of a class, with the descriptors that read and write them."""
    return [
        (name, member)
        for cls in kind.__mro__
        if "__slots__" in vars(cls)
        for name, member in vars(cls).items()
        if type(member) is types.MemberDescriptorType and name != "__dict__"
    ]


# --- Writing ---


def assign(holder: Any, slot: Slot, old: Any, new: Any) -> bool:
    """Replace ``old`` by ``new`` in a slot; return False if the holder cannot change there."""
    kind = type(holder)
    if slot.kind == "item" and issubclass(kind, dict):
        if not _has_builtin_hash(slot.key):
            return False
        _dict_type(holder).__setitem__(holder, slot.key, new)
    elif slot.kind == "item":
        (list if issubclass(kind, list) else deque).__setitem__(holder, slot.key, new)
    elif slot.kind == "member":
        if not (_has_builtin_hash(old) and _has_builtin_hash(new)):
            return False
        set.discard(holder, old)
        set.add(holder, new)
    elif slot.kind == "attribute":
        setattr(holder, slot.key, new)  # __defaults__ of a function
    elif slot.kind == "cell":
        holder.cell_contents = new
    elif slot.kind == "partial":
        parts = {name: member.__get__(holder) for name, member in _PARTIAL_MEMBERS.items()}
        parts[slot.key] = new
        functools.partial.__setstate__(holder, (*parts.values(), _namespace(holder)))  # type: ignore[attr-defined]
    elif slot.kind == "member_descriptor":
        slot.key[1].__set__(holder, new)
    else:
        return False
    return True


def replace_keys(mapping: dict[Any, Any], current: Callable[[Any], Any]) -> bool:
    """Refill a dictionary with the current keys, in its order.

    Returns:
        False if this would run code of the user's keys; the dictionary is then unchanged.
    """
    items = [(current(key), value) for key, value in dict.items(mapping)]
    if not all(_has_builtin_hash(key) for key, _ in items):
        return False
    base = _dict_type(mapping)
    base.clear(mapping)
    for key, value in items:
        base.__setitem__(mapping, key, value)
    return True


def rebuild(immutable: Any, current: Callable[[Any], Any]) -> Any:
    """Copy an immutable object, with ``current(value)`` in place of each value in it.

    Raises:
        CannotRebuild: Only the user's code can make such an object.
    """
    kind = type(immutable)
    if kind is types.MethodType:
        function, owner = immutable.__func__, immutable.__self__
        new_owner = current(owner)
        if new_owner is not owner:
            function = _corresponding_method(function, owner, new_owner)
        return types.MethodType(current(function), new_owner)
    if kind is weakref.ref:
        return weakref.ref(current(immutable()), immutable.__callback__)
    if issubclass(kind, tuple):
        try:
            copy = tuple.__new__(kind, map(current, _elements(immutable)))
        except TypeError:  # A type of C has a layout of its own.
            raise CannotRebuild from None
        attributes = _namespace(immutable)
        if attributes:
            vars(copy).update((name, current(value)) for name, value in attributes.items())
        return copy
    if kind is frozenset:
        values = [current(value) for value in immutable]
        if all(map(_has_builtin_hash, values)):
            return frozenset(values)
    raise CannotRebuild


def _corresponding_method(function: Any, old: Any, new: Any) -> Any:
    """The method of the class of ``new`` in place of a method of the class of ``old``."""
    if type(function) is types.FunctionType:
        name = function.__name__
        if inspect.getattr_static(type(old), name, None) is function:
            return inspect.getattr_static(type(new), name, function)
    return function


def _dict_type(mapping: Any) -> type[dict[Any, Any]]:
    """The built-in class whose methods change ``mapping``, even if a subclass overrides them."""
    return OrderedDict if issubclass(type(mapping), OrderedDict) else dict


def _has_builtin_hash(value: Any) -> bool:
    """Whether hashing a value runs no code of the user."""
    kind = type(value)
    if issubclass(kind, (tuple, frozenset)) and not all(map(_has_builtin_hash, _elements(value))):
        return False
    function: Any = kind.__hash__
    return type(function) is types.WrapperDescriptorType or function is enum.Enum.__hash__
