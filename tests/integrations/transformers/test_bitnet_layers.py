"""BitNet layers of transformers: the results of their replacements, and layers that are refused."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bitlinear
from bitlinear import BitLinear, packing
from tests import oracle
from tests.integrations.transformers.checkpoints import (
    NormedBitLinear,
    bitnet,
    convert,
    float_layer,
    packed_layer,
)


def converted(layer):
    (new,) = convert(nn.Sequential(layer))
    return new


def assert_close_to_reference(actual, reference, x, w_scale):
    """Check that the results differ by no more than a change of the int8 activations by 1.

    In fp32, at most one of up to 70 activations may differ: a tie. In bf16, transformers rounds the
    scale of the activations and the product with it to 8 bits, so many of them differ: by 0.5 in
    the root mean square, and at most by 1. It also rounds the result three or four times.
    """
    step = x.float().abs().amax(-1, keepdim=True) / 127 * float(w_scale)
    if x.dtype == torch.float32:
        steps, roundings = 1.001, 1e-6
    else:
        steps, roundings = 4 * 0.5 * x.shape[-1] ** 0.5 + 1, 4 * 2**-8
    limit = steps * step + roundings * (reference.float().abs() + 1)
    assert ((actual.float() - reference.float()).abs() <= limit).all()


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 70),
    seed=st.integers(0, 2**16),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_packed_layers_give_the_results_of_the_oracle_and_of_transformers(n, k, seed, bias, dtype):
    t = oracle.ternary(n, k, seed)
    bias_values = torch.randn(n).to(dtype) if bias else None
    layer = packed_layer(t, None, dtype=dtype)
    x = torch.randn(3, k).to(dtype)
    reference = layer(x)[:, :n] + (0 if bias_values is None else bias_values)
    new = converted(packed_layer(t, bias_values, dtype=dtype))
    w_scale = oracle.F32(1) / oracle.F32(3)
    assert new.w_scale.item() == w_scale
    oracle.assert_same_bits(new(x), oracle.expected(x, t, w_scale, bias_values, eps=1e-5))
    assert_close_to_reference(new(x), reference, x, w_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_offline_layers_scale_their_bias(bias, dtype):
    t = oracle.ternary(33, 70)
    bias_values = torch.randn(33).to(dtype) if bias else None
    layer = float_layer(t, bias_values, 0.3, dtype)
    scale = layer.weight_scale.float()
    x = torch.randn(3, 70).to(dtype)
    reference = layer(x)
    new = converted(layer)
    scaled = None if bias_values is None else bias_values.float() * scale
    oracle.assert_same_bits(new(x), oracle.expected(x, t, scale, scaled, eps=1e-5))
    assert_close_to_reference(new(x), reference, x, scale)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("spread", [0.02, 1e-6, 0.0])
def test_online_layers_have_the_weights_of_a_forward_pass(spread, dtype):
    weight = spread * torch.randn(300, 4096)  # more than one chunk
    layer = float_layer(weight, torch.randn(300), dtype=dtype)
    reference = bitnet.WeightQuant.apply(layer.weight.detach()).float()
    x = torch.randn(3, 4096).to(dtype)
    wanted = layer(x).detach()
    new = converted(layer)
    t = packing.unpack_ternary(new.w_packed, 4096)
    assert torch.equal(t * new.w_scale, reference)
    assert (t.count_nonzero() > 0) == (spread == 0.02)
    assert_close_to_reference(new(x), wanted, x, new.w_scale)


@pytest.mark.parametrize("online", [True, False])
def test_convert_keeps_a_norm(online):
    layer = bitnet.AutoBitLinear(20, 6, online_quant=online, use_rms_norm=True, rms_norm_eps=0.5)
    if not online:
        layer.weight = nn.Parameter(torch.from_numpy(oracle.ternary(6, 20)).float())
    norm, x = layer.rms_norm, torch.randn(2, 3, 20)
    norm.weight.data.uniform_(0.5, 1.5)
    reference = layer(x)
    new = converted(layer)
    assert isinstance(new, NormedBitLinear)
    assert new.rms_norm is norm
    with torch.no_grad():
        torch.testing.assert_close(new(x), reference, rtol=1e-5, atol=1e-5)


def test_a_layer_with_a_norm_is_a_leaf_of_a_symbolic_trace():
    layer = bitnet.AutoBitLinear(20, 6, online_quant=True, use_rms_norm=True)
    model, x = convert(nn.Sequential(layer)), torch.randn(3, 20)
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["0"]
    with torch.no_grad():
        oracle.assert_same_bits(traced(x), model(x))


# --- Other modules, hooks, and layers that are refused ---


def test_other_modules_hooks_and_modes_stay_as_they_are(caplog):
    caplog.set_level(logging.INFO, logger="bitlinear")
    layer, calls = packed_layer(oracle.ternary(8, 8)).eval(), []
    handle = layer.register_forward_hook(lambda module, *_: calls.append(type(module)))
    plain = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "plain": plain})
    convert(model)
    assert model["a"] is model["b"][0]
    assert model["plain"] is plain
    assert (model["a"].training, model["plain"].training) == (False, True)
    model["a"](torch.randn(2, 8))
    handle.remove()
    model["a"](torch.randn(2, 8))
    assert calls == [BitLinear]
    assert caplog.messages[-1] == "converted 1 BitNet layers"


def damaged(change):
    layer = packed_layer(oracle.ternary(10, 8))
    change(layer)
    return layer


def damaged_float(change):
    layer = float_layer(torch.ones(4, 8), scale=1.0)
    change(layer)
    return layer


class Subclass(bitnet.BitLinear):
    pass


def code_3(layer):
    layer.weight[1, 5] |= 0b11_00_00


WRONG = [
    (lambda: damaged(code_3), r"invalid code 3, first in row 7 and column 5"),
    (
        lambda: damaged(lambda layer: setattr(layer, "weight", layer.weight[:2])),
        r"weight must have shape \[3, 8\] for out_features=10 .* it has \[2, 8\]",
    ),
    (
        lambda: damaged(lambda layer: setattr(layer, "weight", layer.weight.float())),
        r"must be uint8, but it is torch\.float32",
    ),
    (lambda: damaged(lambda layer: layer.weight_scale.fill_(0)), "positive, but it is 0"),
    (lambda: damaged(lambda layer: layer.weight_scale.fill_(float("nan"))), "but it is nan"),
    (
        lambda: damaged(lambda layer: setattr(layer, "weight_scale", torch.ones(2))),
        r"one number, but it has shape \[2\]",
    ),
    (lambda: damaged(lambda layer: layer.to("meta")), "on the meta device: load its weights"),
    (lambda: damaged(lambda layer: setattr(layer, "forward", layer.forward)), "without offload"),
    (lambda: Subclass(8, 8, bias=False), "it is a Subclass"),
    (
        lambda: damaged_float(
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(2, 8)))
        ),
        r"weight must have shape \[4, 8\], but it has \[2, 8\]",
    ),
    (lambda: float_layer(torch.full((4, 8), 0.5), scale=1.0), r"weight\[0, 0\] is 0\.5, but"),
    (lambda: float_layer(torch.full((4, 8), float("nan")), scale=1.0), "is nan, but weights of"),
    (lambda: float_layer(torch.full((4, 8), float("inf"))), "NaN, infinite"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_invalid_layers_are_named_and_nothing_changes(make, message):
    model = nn.Sequential(packed_layer(oracle.ternary(8, 8)), make())
    before = list(model)
    with pytest.raises(ValueError, match=message) as error:
        convert(model)
    assert "\n  1: " in str(error.value)
    assert "\n  0: " not in str(error.value)
    assert all(a is b for a, b in zip(model, before))


def test_models_without_bitnet_layers_raise():
    with pytest.raises(ValueError, match=r"Linear has no BitNet layer.*use bitlinear\.convert"):
        convert(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="pass the model that holds this layer"):
        convert(packed_layer(oracle.ternary(8, 8)))


def test_bitlinear_convert_keeps_bitnet_layers():
    model = nn.Sequential(float_layer(torch.randn(8, 8)), packed_layer(oracle.ternary(8, 8)))
    before = list(model)
    bitlinear.convert(model)
    assert all(a is b for a, b in zip(model, before))
