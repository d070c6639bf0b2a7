"""Layers and wrappers of other libraries: transformers, PEFT, torchao, subclasses of nn.Linear."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from torch import nn

from bitlinear import BitLinear, convert, deploy
from tests.models import (
    Block,
    Harmless,
    Mixed,
    OwnForward,
    OwnHelper,
    converted,
    with_forward_replaced,
)

# --- Subclasses of nn.Linear ---


@pytest.mark.parametrize("make", [Harmless, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_harmless_subclasses_are_converted(make):
    model, x = nn.Sequential(make(8, 8)), torch.randn(3, 8)
    old = model[0]
    convert(model)
    assert type(model[0]) is BitLinear
    assert model[0].weight is old.weight
    assert vars(model[0]).get("note") == vars(old).get("note")
    assert torch.equal(model(x), BitLinear.from_linear(old)(x))


@pytest.mark.parametrize("make", [OwnForward, OwnHelper, Mixed])
def test_from_linear_rejects_subclasses_with_methods(make):
    with pytest.raises(TypeError, match=r"from_linear cannot convert this .* defines"):
        BitLinear.from_linear(make(8, 8))


def test_from_linear_rejects_a_replaced_forward():
    with pytest.raises(TypeError, match="its forward has been replaced on the instance"):
        BitLinear.from_linear(with_forward_replaced())


def test_from_linear_of_a_number_raises():
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Linear, but got int: use bitlinear"):
        BitLinear.from_linear(3)


# --- Conv1D and FalconLinear of transformers ---


@pytest.fixture
def conv1d(monkeypatch):
    """A class like ``Conv1D`` of transformers, which need not be installed."""

    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf))
            self.bias = nn.Parameter(torch.randn(nf))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    library = types.ModuleType("transformers.pytorch_utils")
    library.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, library.__name__, library)
    return Conv1D


def test_a_conv1d_is_converted_and_keeps_its_parameter(conv1d):
    model, x = nn.Sequential(conv1d(6, 8)), torch.randn(3, 8)
    old, weight = model[0], model[0].weight
    values, before = weight.detach().clone(), old(x).detach()
    old(x).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert(model)
    layer = model[0]
    assert (type(layer), layer.in_features, layer.out_features) == (BitLinear, 8, 6)
    assert (layer.nf, layer.nx) == (6, 8)
    assert layer.weight is weight
    assert torch.equal(layer.weight, values.t())
    assert layer.weight.is_contiguous()
    assert torch.equal(old(x), before)  # User code may still hold the old layer.

    wanted = nn.Linear(8, 6)
    with torch.no_grad():
        wanted.weight.copy_(values.t())
        wanted.bias.copy_(old.bias)
    assert torch.equal(layer(x), BitLinear.from_linear(wanted)(x))
    optimizer.step()
    assert not torch.equal(layer.weight, values.t())
    optimizer.zero_grad()
    layer(x).sum().backward()
    optimizer.step()
    deploy(model)(x)


def test_from_linear_converts_a_conv1d(conv1d):
    old = conv1d(6, 8).eval()
    old.weight.requires_grad_(False)
    values = old.weight.clone()
    layer = BitLinear.from_linear(old)
    assert torch.equal(layer.weight, values.t())
    assert torch.equal(old.weight, values)
    assert layer.bias is old.bias
    assert (layer.training, layer.weight.requires_grad) == (False, False)


def test_a_conv1d_that_shares_its_weight_is_not_converted(conv1d, log):
    model = nn.Sequential(conv1d(8, 8), conv1d(8, 8), Block(), Block())
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match="another module shares its weight"):
        convert(model)
    assert type(model[0]) is type(model[1]) is conv1d
    assert any("another module shares its weight" in line for line in log())


def test_subclasses_of_a_conv1d_follow_the_same_rules(conv1d):
    class Harmless1D(conv1d):
        pass

    class Own1D(conv1d):
        def forward(self, x):
            return x

    assert type(convert(Harmless1D(6, 8))) is BitLinear
    with pytest.raises(TypeError, match="Own1D defines forward"):
        BitLinear.from_linear(Own1D(6, 8))


def test_conv1d_and_falcon_linear_of_transformers_are_converted():
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    x = torch.randn(3, 8)
    for layer in (falcon.FalconLinear(8, 6), falcon.FalconLinear(8, 6, bias=False), conv1d(6, 8)):
        weight = layer.weight.t() if type(layer) is conv1d else layer.weight
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
        plain = nn.Linear(8, 6, bias=layer.bias is not None)
        plain.weight = nn.Parameter(weight.detach().clone())
        plain.bias = layer.bias
        new = convert(nn.Sequential(layer))[0]
        assert type(new) is BitLinear
        assert torch.equal(new(x), BitLinear.from_linear(plain)(x))


@pytest.mark.filterwarnings("ignore:.*convert.*floating point")
def test_a_checkpoint_of_a_conv1d_does_not_load_silently():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    for n, k in ((32, 16), (16, 16)):
        model = nn.Sequential(pytorch_utils.Conv1D(n, k))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        converted = convert(model)
        state = {name: value.clone() for name, value in converted.state_dict().items()}
        if n == k:
            with pytest.warns(UserWarning, match=r"square weight .* was a Conv1D.*before"):
                converted.load_state_dict(before)
        else:
            with pytest.raises(RuntimeError, match=r"that of a Conv1D.*before bitlinear"):
                converted.load_state_dict(before)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            converted.load_state_dict(convert(nn.Sequential(nn.Linear(k, n))).state_dict())
        assert state.keys() == before.keys()


# --- Tensor subclasses ---


class Wrapped(torch.Tensor):
    """A tensor subclass like those of torchao and optimum-quanto."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.data_ = data

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data_)
        raise NotImplementedError(function)


def test_weights_of_tensor_subclasses_are_rejected(log):
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(Wrapped(torch.randn(8, 8)), requires_grad=False)
    with pytest.raises(TypeError, match=r"its weight is a Wrapped, a tensor subclass.*dequantise"):
        BitLinear.from_linear(layer)
    with pytest.warns(UserWarning, match=r"Linear: its weight is a Wrapped"):
        convert(nn.Sequential(layer))
    assert any("0: not converted: its weight is a Wrapped" in line for line in log())
    hand_made = BitLinear(8, 8)
    hand_made.weight = layer.weight
    with pytest.raises(ValueError, match="its weight is a Wrapped"):
        deploy(hand_made)


def test_fake_weights_are_ordinary_weights():
    with torch._subclasses.FakeTensorMode():
        assert type(convert(nn.Sequential(nn.Linear(8, 8)))[0]) is BitLinear


# --- Adapters of PEFT ---


class Tuner(nn.Module):
    """A module like a LoRA layer of PEFT."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        self.router = nn.Linear(8, 8)


def test_adapters_are_not_converted(log):
    model = nn.Sequential(Tuner(nn.Linear(8, 8)), nn.Linear(8, 8), Tuner(Tuner(nn.Linear(8, 8))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model)
    assert converted(model) == {"0.base_layer", "1", "2.base_layer.base_layer"}
    assert sum("part of an adapter of PEFT" in line for line in log()) == 9


def test_a_conv1d_under_an_adapter_is_not_converted(conv1d):
    """A merge of its adapter adds a transposed matrix to the weight."""
    model = nn.Sequential(Tuner(conv1d(8, 8)), Block(), Block())
    with pytest.warns(UserWarning, match=r"0\.base_layer\.weight .*convert before adding it"):
        convert(model)
    assert type(model[0].base_layer) is conv1d


def test_peft_trains_adapters_over_converted_layers():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(base, config)
    convert(model)
    names = {"base_model.model.0.base_layer", "base_model.model.2"}
    assert converted(model) == names
    model(torch.randn(3, 8)).sum().backward()
