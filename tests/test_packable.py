"""Moves, conversions and copies of a layer in either form."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear, packing
from tests import oracle
from tests.layers import deployed


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: m.half().float(),
    ],
)
def test_conversions_leave_packed_weights_and_scale(change):
    layer = deployed()
    before = {name: t.clone() for name, t in layer.named_buffers()}
    model = nn.Sequential(layer)
    assert change(model) is model
    for name in ("w_packed", "w_scale"):
        after = getattr(layer, name)
        assert after.dtype == before[name].dtype
        assert torch.equal(after, before[name])
    x = torch.randn(3, 20)
    t = packing.unpack_ternary(layer.w_packed, 20)
    oracle.assert_same_bits(layer(x), oracle.expected(x, t, before["w_scale"], layer.bias))


def test_conversions_of_an_undeployed_layer_are_those_of_nn_linear():
    layer = BitLinear(20, 6).half()
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert layer(torch.randn(2, 20)).dtype == torch.float32


def test_moving_between_devices():
    layer = deployed().half().to("meta")
    assert {t.device.type for t in layer.buffers()} == {"meta"}
    assert {n: t.dtype for n, t in layer.named_buffers()} == {
        "w_packed": torch.uint8,
        "w_scale": torch.float32,
        "bias": torch.float16,
    }
    layer.to_empty(device="cpu")
    assert {t.device.type for t in layer.buffers()} == {"cpu"}
    assert layer.w_scale.dtype == torch.float32


def test_share_memory():
    layer = deployed().share_memory()
    assert all(t.is_shared() for t in layer.buffers())


@pytest.mark.parametrize("make", [BitLinear, deployed])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(make, clone):
    layer, x = make(20, 6, eps=1e-3), torch.randn(3, 20)
    copied = clone(layer)
    assert torch.equal(copied(x), layer(x))
    assert repr(copied) == repr(layer)
    for name, tensor in layer.state_dict().items():
        assert copied.state_dict()[name].data_ptr() != tensor.data_ptr()
    copied.undeploy()
    assert layer.is_deployed == (make is deployed)


def test_a_whole_model_through_torch_save():
    model, x = nn.Sequential(deployed(), BitLinear(6, 3)), torch.randn(3, 20)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_channels_last():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), BitLinear(32, 4)
    )
    images = torch.randn(2, 3, 9, 9)
    for _ in range(2):
        before = copy.deepcopy(model[-1])
        model.to(memory_format=torch.channels_last)
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        # The convolution adds in another order now, so that its last bits depend on the CPU. The
        # layer's outputs for given features do not.
        features = model[:-1](images.to(memory_format=torch.channels_last))
        assert torch.equal(model[-1](features), before(features.contiguous()))
        bitlinear.deploy(model).to(memory_format=torch.contiguous_format)

    layer, x = deployed(3, 5), images.to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_a_meta_layer_gives_shapes():
    x = torch.empty(3, 20, dtype=torch.bfloat16, device="meta")
    for layer in (BitLinear(20, 6, device="meta"), BitLinear(20, 6, device="meta").deploy()):
        y = layer(x)
        assert (y.shape, y.dtype, y.is_meta) == ((3, 6), torch.bfloat16, True)


def test_layers_made_without_values():
    with torch.device("meta"):
        model = nn.Sequential(BitLinear(20, 6), deployed(6, 3))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    source = nn.Sequential(BitLinear(20, 6), deployed(6, 3))
    model.load_state_dict(source.state_dict())
    x = torch.randn(4, 20)
    assert torch.equal(model(x), source(x))

    layer = nn.utils.skip_init(BitLinear, 20, 6)
    layer.reset_parameters()
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assign(model):
    for layer in model:
        for name, tensor in layer.state_dict().items():
            setattr(layer, name, tensor.clone())
    return model


MADE = {
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "file": through_file,
    "device": lambda model: model.to("meta").to_empty(device="cpu"),
    "dtype": lambda model: copy.deepcopy(model).bfloat16().float(),
    "assign": lambda model: assign(copy.deepcopy(model)),
    "deploy": lambda model: bitlinear.deploy(nn.Sequential(*(BitLinear(20, 6) for _ in range(2)))),
}


@pytest.mark.parametrize("made", MADE)
def test_layers_made_in_inference_mode_have_ordinary_buffers(made):
    """Calls would check the codes of inference tensors every time, and nothing loads into them."""
    model = nn.Sequential(deployed(20, 6), deployed(20, 6))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        new = MADE[made](model)
    assert not any(buffer.is_inference() for buffer in new.buffers())
    new.load_state_dict(state)
    fresh = nn.Sequential(deployed(20, 6), deployed(20, 6))
    fresh.load_state_dict(state)
    x = torch.randn(4, 20)
    assert torch.equal(new[1](x), fresh[1](x))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_file])
def test_ties_stay_in_copies_made_in_inference_mode(copied):
    model = nn.Sequential(BitLinear(20, 6), BitLinear(20, 6))
    model[1].weight = model[0].weight
    bitlinear.deploy(model)
    with torch.inference_mode():
        new = copied(model)
    assert new[0].w_packed is new[1].w_packed
    assert new[0].w_packed is not model[0].w_packed
    assert new[0].undeploy().weight is new[1].weight


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_deployed_in_inference_mode_is_a_layer_like_any_other(bias):
    layer = BitLinear(20, 6, bias=bias)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.inference_mode():
        layer.deploy()
    layer.load_state_dict(layer.state_dict())
    layer.undeploy()
    layer(torch.randn(2, 20)).sum().backward()
    assert layer.weight.grad is not None
    with torch.inference_mode():
        layer.deploy()
        layer.undeploy()
        layer.deploy()
    layer.load_state_dict(state)
    layer(torch.randn(2, 20)).sum().backward()
    assert layer.weight.grad is not None
