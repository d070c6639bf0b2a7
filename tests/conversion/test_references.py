"""The replacement of references outside of the submodules: lists, closures, hooks, ..."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from bitlinear import BitLinear, convert
from bitlinear.conversion import object_contents

Pair = namedtuple("Pair", "layer number")
X = torch.randn(3, 8)


class Plain:
    """An object whose property, comparison and missing attributes must not be evaluated."""

    def __init__(self, layer):
        self.layer = layer

    @property
    def trap(self):
        raise AssertionError("the user's code was run")

    def __eq__(self, other):
        raise AssertionError("the user's code was run")

    __hash__ = None

    def __getattr__(self, name):
        raise AssertionError("the user's code was run")

    def run(self, x):
        return self.__dict__["layer"](x)


class Slotted:
    __slots__ = ("layer", "unset")

    def __init__(self, layer):
        self.layer = layer


@dataclass(frozen=True)
class Frozen:
    layer: nn.Module


class Hash:
    """A key whose hash must not be computed while ``silent``."""

    silent = False

    def __hash__(self):
        assert not Hash.silent
        return 1


def closure(layer):
    def run(x):
        return layer(x)

    return run


class Holder(nn.Module):
    """A module that calls its layer by ``use(self.held, x)``."""

    def __init__(self, hold, use):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.held, self.use = hold(self.layer), use

    def forward(self, x):
        return self.use(self.held, x)


REPLACED = {
    "list": (lambda layer: [torch.relu, layer], lambda held, x: held[1](x)),
    "tuple": (lambda layer: ((1, layer), 2), lambda held, x: held[0][1](x)),
    "namedtuple": (lambda layer: Pair(layer, 1), lambda held, x: held.layer(x)),
    "dict": (lambda layer: {"a": {"b": layer}}, lambda held, x: held["a"]["b"](x)),
    "ordered dict": (lambda layer: OrderedDict(a=layer, b=1), lambda held, x: held["a"](x)),
    "default dict": (
        lambda layer: defaultdict(list, {0: [layer]}),
        lambda held, x: held[0][0](x),
    ),
    "key": (
        lambda layer: {"first": 0, layer: 1, "last": 2},
        lambda held, x: list(held)[1](x) * held[list(held)[1]],
    ),
    "key of an ordered dict": (
        lambda layer: OrderedDict([(layer, layer), ("last", 2)]),
        lambda held, x: held.popitem(last=False)[1](x),
    ),
    "set": (lambda layer: {layer}, lambda held, x: next(iter(held))(x)),
    "tuple in a set, with the layer twice": (
        lambda layer: {(layer, (layer,))},
        lambda held, x: sum(pair[1][0](x) for pair in held),
    ),
    "frozenset": (lambda layer: frozenset([layer]), lambda held, x: next(iter(held))(x)),
    "deque": (lambda layer: deque([0, layer], maxlen=2), lambda held, x: held[1](x)),
    "bound method": (lambda layer: layer.forward, lambda held, x: held(x)),
    "bound call": (lambda layer: layer.__call__, lambda held, x: held(x)),
    "partial": (
        lambda layer: functools.partial(layer, input=X),
        lambda held, x: held(),
    ),
    "partial of a method": (
        lambda layer: functools.partial(layer.forward, X),
        lambda held, x: held(),
    ),
    "partial's arguments": (
        lambda layer: functools.partial(lambda f, x, g: f(x) + g(x), layer, g=layer),
        lambda held, x: held(x) / 2,
    ),
    "closure": (closure, lambda held, x: held(x)),
    "default value": (lambda layer: lambda x, f=layer: f(x), lambda held, x: held(x)),
    "keyword default": (
        lambda layer: [lambda x, *, f=layer: f(x)].pop(),
        lambda held, x: held(x),
    ),
    "object": (Plain, lambda held, x: vars(held)["layer"](x)),
    "method of an object": (lambda layer: Plain(layer).run, lambda held, x: held(x)),
    "slots": (Slotted, lambda held, x: held.layer(x)),
    "frozen dataclass": (Frozen, lambda held, x: held.layer(x)),
    "namespace": (
        lambda layer: types.SimpleNamespace(layer=layer),
        lambda held, x: held.layer(x),
    ),
    "read-only view": (
        lambda layer: types.MappingProxyType({"a": layer}),
        lambda held, x: held["a"](x),
    ),
    "weak reference": (weakref.ref, lambda held, x: held()(x)),
    "weak set": (lambda layer: weakref.WeakSet([layer]), lambda held, x: next(iter(held))(x)),
    "function attribute": (
        lambda layer: functools.wraps(layer)(lambda x: None),
        lambda held, x: held.__wrapped__(x),
    ),
    "module in a list": (
        lambda layer: [nn.Sequential(layer)],
        lambda held, x: held[0](x),
    ),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_other_references_to_layers_are_replaced(kind):
    model = Holder(*REPLACED[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model)
    assert type(model.layer) is BitLinear
    assert torch.equal(model(X), model.layer(X))


def generator(layer):
    while True:
        yield layer


def cached_call(layer):
    function = functools.lru_cache(lambda key: key)
    function(layer)
    return function


NOT_REPLACED = {
    "generator": (generator, r"held \((generator|frame)\)"),
    "started generator": (lambda layer: (next(g := generator(layer)), g)[1], "generator|frame"),
    "map": (lambda layer: map(layer, [X]), r"held \(map\)"),
    "array": (lambda layer: np.array([[layer], [0]]), r"held \(ndarray\)"),
    "cache": (cached_call, "lru_cache"),
    "key with a hash of its own": (lambda layer: {Hash(): layer}, r"held\[Hash\] \(dict\)"),
    "beside such a key": (lambda layer: {Hash(): 0, layer: 0}, r"held \(dict\)"),
    "weak dictionary": (lambda layer: weakref.WeakValueDictionary(a=layer), "KeyedRef"),
}


@pytest.mark.parametrize("kind", NOT_REPLACED)
def test_references_that_cannot_be_replaced_are_named(kind):
    hold, where = NOT_REPLACED[kind]
    model = nn.Sequential(Holder(hold, None))
    Hash.silent = True
    try:
        with pytest.warns(UserWarning, match=rf"(?s)cannot be: 0\..*{where}") as caught:
            convert(model)
    finally:
        Hash.silent = False
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert type(model[0].layer) is BitLinear


def test_attributes_outside_of_modules_are_replaced():
    model = nn.Sequential(nn.Linear(8, 8))
    vars(model)["alias"] = model[0]
    model[0].owner = Plain(model[0])
    convert(model)
    assert vars(model)["alias"] is model[0] is vars(model[0].owner)["layer"]


def test_hooks_with_closures_are_followed():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    first = model[0]
    model[1].register_forward_hook(lambda module, inputs, output: first(output))
    convert(model)
    assert torch.equal(model(X), model[0](model[1].forward(model[0](X))))


def test_shared_holders_stay_shared():
    """Two attributes with the same list, or the same tuple, still have the same one."""
    model = Holder(lambda layer: [layer], None)
    model.again = model.held
    model.pairs = [(model.layer, 1)]
    model.same = model.pairs[0]
    held = model.held
    convert(model)
    assert model.held is held is model.again
    assert model.same is model.pairs[0]
    assert model.same[0] is model.layer


def test_the_search_ends_in_cycles():
    model = Holder(lambda layer: [layer], None)
    model.held.append((model.held, model))
    model.held.append(model.held)
    convert(model)
    assert model.held[0] is model.held[1][0][0] is model.layer


def test_variables_outside_of_the_model_stay_as_they_are():
    model = nn.Sequential(nn.Linear(8, 8))
    mine = [model[0]]
    convert(model)
    assert type(mine[0]) is nn.Linear


def test_globals_and_classes_stay_as_they_are():
    class Shared:
        layers = []  # noqa: RUF012

    model = Holder(lambda layer: Shared(), None)
    Shared.layers.append(model.layer)
    convert(model)
    assert type(Shared.layers[0]) is nn.Linear


def test_references_to_excluded_layers_stay():
    model = Holder(lambda layer: (layer,), None)
    held, layer = model.held, model.layer
    convert(model, exclude=("layer",))
    assert model.held is held
    assert model.layer is layer


def test_a_long_chain_takes_linear_time(monkeypatch):
    steps, contents = [], object_contents.contents

    def counted(holder):
        for entry in contents(holder):
            steps.append(None)
            yield entry

    monkeypatch.setattr(object_contents, "contents", counted)
    end = model = Holder(Plain, None)
    for _ in range(10_000):
        end.__dict__["next"] = Plain((None, {"layer": model.layer}))
        end = end.__dict__["next"]
    convert(model)
    assert end.__dict__["layer"][1]["layer"] is model.layer
    assert len(steps) < 10 * 10_000
