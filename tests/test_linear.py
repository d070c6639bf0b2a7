"""BitLinear, the module."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from bitlinear import BitLinear, packing, quantize
from tests import oracle
from tests.layers import deployed

# --- It is an nn.Linear ---


def test_it_is_an_nn_linear_to_the_code_around_it():
    torch.manual_seed(1)
    layer = BitLinear(20, 6, dtype=torch.bfloat16)
    torch.manual_seed(1)
    linear = nn.Linear(20, 6, dtype=torch.bfloat16)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.is_deployed) == (20, 6, False)
    for name, parameter in linear.named_parameters():
        assert torch.equal(getattr(layer, name), parameter)
    assert layer.state_dict().keys() == linear.state_dict().keys()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, linear.weight)


def test_repr():
    assert (
        repr(BitLinear(20, 6, bias=False))
        == "BitLinear(in_features=20, out_features=6, bias=False, quant_type=ai8pc_wpt)"
    )
    assert repr(deployed(eps=0.5)).endswith(
        "bias=True, quant_type=ai8pc_wpt, eps=0.5, deployed=True)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_type": "fp4"}, r"one of \['ai8pc_wpt', 'ai8pc_wpc', .*, but it is 'fp4'"),
        ({"eps": 0.0}, "eps must be between 2e-36 and 1e"),
        ({"eps": float("nan")}, "eps must be between"),
        ({"in_features": 0}, "at least 1, but they are 0 and 6"),
        ({"out_features": 0}, "at least 1, but they are 20 and 0"),
        ({"in_features": 500_001}, "at most 500000 .* but it is 500001: split the layer"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BitLinear(**{"in_features": 20, "out_features": 6, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64.0, 4), r"in_features must be an integer, but it is 64\.0"),
        ((64, "4"), "out_features must be an integer, but it is '4'"),
        # Where nn.Linear has device and dtype.
        ((4, 4, True, "cpu", torch.float32), "eps must be a number, but it is 'cpu': pass device"),
        ((4, 4, True, None), "eps must be a number, but it is None"),
    ],
)
def test_arguments_of_a_wrong_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        BitLinear(*arguments)
    with pytest.raises(TypeError, match="dtype must be floating point"):
        BitLinear(4, 4, dtype=torch.complex64)


@pytest.mark.parametrize("make", [BitLinear, deployed])
def test_wrong_inputs(make):
    layer = make(20, 6)
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(TypeError, match=r"float32, float16 or bfloat16.*convert it"):
            layer(torch.ones(2, 20, dtype=dtype))
    with pytest.raises(ValueError, match=r"in_features = 20, but x has shape \[2, 21\]"):
        layer(torch.ones(2, 21))
    with pytest.raises(ValueError, match=r"x is on meta and .* is on cpu"):
        layer(torch.ones(2, 20, device="meta"))
    with pytest.raises(TypeError, match=r"needs a torch\.Tensor, but got ndarray: convert it"):
        layer(np.ones((2, 20), np.float32))


# --- from_linear ---


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_parameters_and_keeps_everything(bias):
    linear = nn.Linear(20, 6, bias=bias, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    layer = BitLinear.from_linear(linear, eps=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.training, layer.eps, layer.weight.requires_grad) == (False, 0.5, False)
    assert dict(layer.named_parameters()).keys() == dict(linear.named_parameters()).keys()
    assert layer.deploy().undeploy().weight.dtype == torch.bfloat16


def test_from_linear_on_another_device():
    assert BitLinear.from_linear(nn.Linear(20, 6, device="meta")).weight.is_meta


def test_from_linear_rejects_a_weight_that_is_not_a_plain_parameter():
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Linear, but got Conv1d"):
        BitLinear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(TypeError, match="LazyLinear: it is lazy"):
        BitLinear.from_linear(nn.LazyLinear(3))
    with pytest.raises(TypeError, match="parametrized"):
        BitLinear.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    pruned = nn.Linear(4, 3)
    prune.l1_unstructured(pruned, "weight", 2)
    with pytest.raises(TypeError, match="pruning"):
        BitLinear.from_linear(pruned)
    with pytest.raises(TypeError, match="deployed BitLinear"):
        BitLinear.from_linear(deployed())
    with pytest.raises(ValueError, match="quant_type"):
        BitLinear.from_linear(nn.Linear(4, 3), quant_type="int4")


# --- Training ---


def test_it_trains_with_an_optimizer():
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    target = (x @ torch.randn(16, 3)).argmax(1)
    model = nn.Sequential(BitLinear(16, 64), nn.ReLU(), BitLinear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x).argmax(1) == target).float().mean() > 0.9


# --- Deploying ---


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", [(7, 70), (2, 3, 70), (70,), (0, 70)])
@pytest.mark.parametrize("bias", [True, False])
def test_eval_and_deployed_agree_to_the_bit(shape, dtype, bias):
    layer = BitLinear(70, 33, bias=bias).eval()
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        before = layer(x)
        oracle.assert_same_bits(layer.deploy()(x), before)


@pytest.mark.parametrize("k", [1, 130_000, 140_000])
def test_eval_and_deployed_agree_for_any_number_of_features(k):
    layer = BitLinear(k, 3)
    x = torch.rand(2, k)
    before = layer(x).detach()
    oracle.assert_same_bits(layer.deploy()(x), before)


@pytest.mark.parametrize("bias", [True, False])
def test_deploy_packs_the_bytes_of_the_oracle(bias):
    layer = BitLinear(70, 33, bias=bias)
    w, b = layer.weight.detach(), layer.bias
    assert layer.deploy() is layer
    assert layer.is_deployed
    assert not list(layer.parameters())
    assert dict(layer.named_buffers()).keys() == {"w_packed", "w_scale"} | (
        {"bias"} if bias else set()
    )
    assert layer.state_dict().keys() == dict(layer.named_buffers()).keys()
    assert (layer.w_scale.dtype, layer.w_scale.shape) == (torch.float32, (1,))
    t = oracle.ternarize(w, layer.w_scale)
    np.testing.assert_array_equal(layer.w_packed.numpy(), oracle.pack(t))
    np.testing.assert_allclose(layer.w_scale.item(), oracle.weight_scale(w), rtol=3e-7)
    assert layer.bias is None if b is None else torch.equal(layer.bias, b)


def test_deploy_packs_large_layers_chunk_by_chunk():
    layer = BitLinear(4096, 300)
    t, _ = quantize.quantize_weights(layer.weight.detach())
    assert torch.equal(packing.unpack_ternary(layer.deploy().w_packed, 4096), t)


def test_deploy_is_idempotent_and_stays_in_train_mode():
    layer = deployed()
    tensors = dict(layer.named_buffers())
    layer.deploy().train()
    assert layer.training
    assert layer.is_deployed
    assert all(tensor is tensors[name] for name, tensor in layer.named_buffers())
    assert not layer(torch.randn(2, 20)).requires_grad


def test_a_missing_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = deployed().nonsense


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_deploy_rejects_weights_that_are_not_finite(bad):
    layer = BitLinear(20, 6)
    with torch.no_grad():
        layer.weight[3, 4] = bad
    with pytest.raises(ValueError, match="NaN, infinite"):
        layer.deploy()
    assert not layer.is_deployed
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(layer.bias, nn.Parameter)


def test_an_optimizer_that_still_holds_the_bias_does_not_reach_the_deployed_one():
    layer = BitLinear(20, 6)
    parameter = layer.bias
    layer.deploy()
    bias = layer.bias.clone()
    with torch.no_grad():
        parameter.add_(1)
    assert torch.equal(layer.bias, bias)


def test_deploy_rejects_a_weight_of_another_shape():
    layer, x = BitLinear(20, 6), torch.randn(3, 12)
    layer.weight = nn.Parameter(torch.randn(6, 12))  # as after pruning by hand
    y = layer(x)
    with pytest.raises(ValueError, match=r"shape \[6, 12\], but .* are \[6, 20\]: set these"):
        layer.deploy()
    layer.in_features = 12
    oracle.assert_same_bits(layer.deploy()(x), y)


def test_bad_tokens_and_zeros():
    layer = deployed()
    x = torch.randn(3, 20)
    clean = layer(x)
    x[1, 3] = float("nan")
    y = layer(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert torch.equal(layer(torch.zeros(20)), layer.bias)


@pytest.mark.parametrize("make", [BitLinear, deployed])
@pytest.mark.parametrize("scale", [(1,), (6, 1)])
def test_dequantize(make, scale):
    layer = make(20, 6)
    if layer.is_deployed:
        layer.load_state_dict({**layer.state_dict(), "w_scale": torch.rand(scale) + 0.1})
    weight = layer.dequantize()
    assert (weight.dtype, weight.requires_grad) == (torch.float32, False)
    layer.deploy()
    t = packing.unpack_ternary(layer.w_packed, 20)
    assert torch.equal(weight, t * layer.w_scale)
