"""Layers that share one weight, and the states of models with such layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear


class Tied(nn.Module):
    """Two layers with one weight; ``first`` says which of them torch visits first."""

    def __init__(self, bias=True, first="a"):
        super().__init__()
        for name in ("a", "b") if first == "a" else ("b", "a"):
            setattr(self, name, BitLinear(32, 32, bias=bias))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


def are_tied(model):
    if model.a.is_deployed:
        return model.a.w_packed is model.b.w_packed and model.a.w_scale is model.b.w_scale
    return model.a.weight is model.b.weight


def trained(deployed, **kwargs):
    model = Tied(**kwargs)
    return bitlinear.deploy(model) if deployed else model


target_forms = pytest.mark.parametrize("deployed", [True, False])
source_forms = pytest.mark.parametrize("from_deployed", [True, False])
biases = pytest.mark.parametrize("bias", [True, False])
orders = pytest.mark.parametrize("first", ["a", "b"])


@target_forms
@source_forms
@biases
@orders
def test_load_state_dict_keeps_ties(deployed, from_deployed, bias, first):
    source, x = trained(from_deployed, bias=bias), torch.randn(4, 32)
    target = trained(deployed, bias=bias, first=first)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))
    assert are_tied(target)
    assert target.a.is_deployed == target.b.is_deployed == from_deployed
    target.load_state_dict(source.state_dict())  # again, now that they are of one kind
    assert torch.equal(target(x), source(x))
    assert are_tied(target)
    target.a.undeploy()
    assert are_tied(target)


@target_forms
@source_forms
@biases
@orders
def test_safetensors_load_model(deployed, from_deployed, bias, first, tmp_path):
    """Of tensors that share memory, save_model writes one."""
    source, x = trained(from_deployed, bias=bias, first=first), torch.randn(4, 32)
    safetensors.torch.save_model(source, str(tmp_path / "model.safetensors"))
    target = trained(deployed, bias=bias, first=first)
    result = safetensors.torch.load_model(target, tmp_path / "model.safetensors", strict=True)
    assert result == (set(), [])
    assert torch.equal(target(x), source(x))
    assert are_tied(target)


@target_forms
@source_forms
@pytest.mark.parametrize("kept", ["a", "b"])
@orders
def test_a_state_that_has_the_weight_once(deployed, from_deployed, kept, first):
    source, x = trained(from_deployed, bias=False), torch.randn(4, 32)
    state = {key: value for key, value in source.state_dict().items() if key.startswith(kept)}
    target = trained(deployed, bias=False, first=first)
    other = "b" if kept == "a" else "a"
    result = target.load_state_dict(state, strict=False)
    # The names from before the load, as for the missing weight of a linear layer.
    names = ["w_packed", "w_scale"] if deployed else ["weight"]
    assert result.missing_keys == [f"{other}.{name}" for name in names]
    assert result.unexpected_keys == []
    assert torch.equal(target(x), source(x))
    assert are_tied(target)


@target_forms
def test_load_deployed_keeps_ties(deployed, tmp_path):
    source, x = trained(True), torch.randn(4, 32)
    safetensors.torch.save_model(source, str(tmp_path / "model.safetensors"))
    target = bitlinear.load_deployed(tmp_path / "model.safetensors", trained(deployed))
    assert torch.equal(target(x), source(x))
    assert are_tied(target)
    target.a.undeploy()
    assert are_tied(target)


def test_undeploy_keeps_ties():
    model, x = trained(True), torch.randn(4, 32)
    y = model(x)
    for layer in (model.a, model.b):
        layer.undeploy()
    assert are_tied(model)
    assert torch.equal(model(x), y)
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert are_tied(model)
    assert len(list(model.parameters())) == 3


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_tied_among_themselves(clone):
    model = trained(True)
    copied = clone(model)
    assert are_tied(copied)
    assert copied.a.w_packed is not model.a.w_packed
    copied.a.undeploy()
    assert are_tied(copied)
    assert not copied.b.is_deployed
    assert model.a.is_deployed
    assert model.b.is_deployed


@pytest.mark.parametrize(
    "move", [lambda m: m.to("meta"), lambda m: m.half(), lambda m: m.to_empty(device="cpu")]
)
def test_moves_keep_ties(move):
    assert are_tied(move(trained(True)))


def test_a_scale_of_another_shape_reaches_tied_layers():
    model, x = trained(True, bias=False), torch.randn(4, 32)
    state = model.state_dict()
    state["a.w_scale"] = state["b.w_scale"] = torch.rand(32, 1) + 0.1
    model.load_state_dict({k: v for k, v in state.items() if k.startswith("a")}, strict=False)
    assert model.b.w_scale.shape == (32, 1)
    y = model(x)
    model.load_state_dict(state)
    assert torch.equal(model(x), y)


def test_assigning_unties_as_in_any_other_module():
    source, target, x = trained(True, bias=False), trained(False, bias=False), torch.randn(4, 32)
    state = {key: value for key, value in source.state_dict().items() if key.startswith("a")}
    before = target.b(x)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "b.weight"'):
        target.load_state_dict(state, assign=True)
    assert target.a.is_deployed
    assert torch.equal(target.b(x), before)


def test_a_layer_that_was_untied_stays_as_it_is():
    model = trained(True)
    model.a.undeploy()
    model.b.weight = nn.Parameter(torch.randn(32, 32))
    x = torch.randn(4, 32)
    y = model.b(x)
    model.a.load_state_dict(BitLinear(32, 32).deploy().state_dict())
    assert torch.equal(model.b(x), y)


def test_a_rejected_load_leaves_tied_layers_unchanged():
    model, x = trained(False), torch.randn(4, 32)
    y, state = model(x), trained(True).state_dict()
    state["a.w_packed"] = state["b.w_packed"] = torch.full((32, 8), 255, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="code 3"):
        model.load_state_dict(state)
    assert torch.equal(model(x), y)
    assert are_tied(model)


def test_shallow_copies():
    """They share the dictionaries of the layer, not only its tensors."""
    layer, x = BitLinear(16, 8), torch.randn(4, 16)
    source = BitLinear(16, 8).deploy()
    copied = copy.copy(layer)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))
    assert torch.equal(copied(x), source(x))
    copied.undeploy()
    assert torch.equal(layer(x), source(x))
    bitlinear.deploy(nn.Sequential(layer, nn.Linear(8, 16), copied))
    assert torch.equal(layer(x), source(x))

    layer.undeploy().quantization_strength = 0.5
    y, copied = layer(x), copy.copy(layer)
    copied.quantization_strength = 0.0
    assert layer.quantization_strength == 0.5
    assert torch.equal(layer(x), y)


def test_loads_in_many_threads():
    """Loads in different threads are independent."""
    from concurrent.futures import ThreadPoolExecutor

    source, x = trained(True, bias=False), torch.randn(4, 32)
    state = {key: value for key, value in source.state_dict().items() if key.startswith("a")}

    def load(_):
        target = trained(False, bias=False)
        missing = target.load_state_dict(state, strict=False).missing_keys
        return missing == ["b.weight"] and torch.equal(target(x), source(x))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(load, range(200)))
