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


@pytest.mark.parametrize("shape", [(32,), (32, 1), (1, 32)])
@pytest.mark.parametrize("kind", ["packed", "offline"])
def test_scales_for_each_output_feature(kind, shape):
    t, bias = oracle.ternary(32, 70), torch.randn(32)
    scale = torch.rand(32) * 30 + 5
    layer = packed_layer(t, bias) if kind == "packed" else float_layer(t, bias, 1.0)
    layer.weight_scale = scale.clone()
    x = torch.randn(3, 70)
    reference = layer(x)[:, :32]
    layer.weight_scale = scale.reshape(shape)
    new = converted(layer)
    assert new.quant_type == "ai8pc_wpc"
    factor = scale if kind == "offline" else 1 / scale
    oracle.assert_same_bits(new.w_scale, factor[:, None])
    added = bias * scale if kind == "offline" else bias
    oracle.assert_same_bits(new(x), oracle.expected(x, t, factor[:, None], added, eps=1e-5))
    step = x.abs().amax(-1, keepdim=True) / 127 * factor
    assert ((new(x) - reference).abs() <= 1.001 * step + 1e-5 * reference.abs()).all()


class BitNetLinear(nn.Module):
    """What ``BitNetLinear`` of onebitllms computes; its own kernels need Triton and a GPU."""

    __module__ = "onebitllms.layers.bitnet"

    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.randn(out_features)) if bias else None)

    def quantized_weight(self):
        scale = 1 / self.weight.abs().mean().clamp(min=1e-5)
        return torch.clamp(torch.floor(self.weight * scale + 0.5), -1, 1) / scale


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_onebitllms(bias):
    layer = BitNetLinear(70, 33, bias)
    with torch.no_grad():  # Its mean is 2, and 1 and -1 are ties, which it rounds up.
        layer.weight.copy_(2.0)
        layer.weight[:, ::7], layer.weight[:, 1::7] = 1.0, -1.0
        layer.weight[:, 2::7] = 4.0
    wanted = layer.quantized_weight()
    assert layer.weight.abs().mean() == 2
    assert set(wanted.unique().tolist()) == {0.0, 2.0}
    new = converted(layer)
    assert torch.equal(new.dequantize(), wanted)
    assert (new.bias is not None) == bias
    assert new.eps == 1e-5


class Projection(nn.Linear):
    """A layer of a model's own class: a norm, then int8 activations and ternary weights."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        self.norm = nn.RMSNorm(in_features, eps=1e-6)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x):
        x = self.norm(x)
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        x = (x * scale).round().clamp(-128, 127) / scale
        return nn.functional.linear(x, weight_quant(self.weight), self.bias)


def weight_quant(w):
    scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
    return (w * scale).round().clamp_(-1, 1) / scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_a_models_own_class(bias, dtype):
    torch.manual_seed(0)
    layer = Projection(64, 24, bias).to(dtype)
    x = torch.randn(5, 64).to(dtype)
    with torch.no_grad():
        wanted, weight = layer(x), weight_quant(layer.weight)
    norm = layer.norm
    model = convert(nn.Sequential(layer), weight_quantizers={Projection: weight_quant})
    (new,) = model
    assert isinstance(new, NormedBitLinear)
    assert new.rms_norm is norm
    assert torch.equal(new.dequantize(), weight.float())
    with torch.no_grad():
        assert_close_to_reference(new(x), wanted, norm(x), new.w_scale)


class Gated(Projection):
    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("kind", "function", "message"),
    [
        (Projection, lambda w: w, r"not ternary after the function for it: .*several magnitudes"),
        (Projection, lambda w: w[:4], r"must return .* \[8, 8\], but it returned .* \[4, 8\]"),
        (Gated, weight_quant, "modules other than a norm, whose use is unknown: gate"),
        (Projection, lambda w: w @ w[:4], "the function for its weight raised RuntimeError: "),
    ],
)
def test_functions_for_own_classes_are_checked(kind, function, message):
    model = nn.Sequential(kind(8, 8))
    (layer,) = model
    with pytest.raises(ValueError, match=message):
        convert(model, weight_quantizers={kind: function})
    assert model[0] is layer


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
    assert "converted 1 BitNet layers" in caplog.messages


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
        r"one number, or one for each of 10 output features, but it has shape \[2\]",
    ),
    (lambda: damaged(lambda layer: layer.to("meta")), "on the meta device: load its weights"),
    (lambda: damaged(lambda layer: setattr(layer, "forward", layer.forward)), "without offload"),
    (lambda: Subclass(8, 8, bias=False), "it is a Subclass"),
    (
        lambda: damaged(lambda layer: setattr(layer, "bias", torch.zeros(1, 10))),
        r"bias must have shape \[10\], but it has \[1, 10\]",
    ),
    (
        lambda: damaged(lambda layer: setattr(layer, "bias", torch.zeros(10, dtype=torch.int32))),
        "bias must be a floating-point tensor",
    ),
    (
        lambda: damaged_float(
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(2, 8)))
        ),
        r"weight must have shape \[4, 8\], but it has \[2, 8\]",
    ),
    (lambda: float_layer(torch.full((4, 8), 0.5), scale=1.0), r"weight\[0, 0\] is 0\.5, but"),
    (lambda: float_layer(torch.full((4, 8), float("nan")), scale=1.0), "is nan, but it must be"),
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
    with pytest.raises(ValueError, match=r"not deployed: bitlinear\.deploy"):
        convert(nn.Sequential(BitLinear(8, 8)))
    with pytest.raises(ValueError, match="pass the model that holds this layer"):
        convert(packed_layer(oracle.ternary(8, 8)))


def test_bitlinear_convert_keeps_bitnet_layers():
    model = nn.Sequential(float_layer(torch.randn(8, 8)), packed_layer(oracle.ternary(8, 8)))
    before = list(model)
    bitlinear.convert(model)
    assert all(a is b for a, b in zip(model, before))
