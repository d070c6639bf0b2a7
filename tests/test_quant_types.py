"""The quantisation types: bits of activations; scales per tensor, output feature or group."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear, ops, quantize
from bitlinear.arguments import QUANT_TYPES
from bitlinear.training import straight_through_linear
from tests import oracle

OPS = torch.ops.bitlinear

TYPES = [*QUANT_TYPES, "ai8pc_wpg32", "ai16pc_wpg32", "ai8pc_wpg64"]

types = pytest.mark.parametrize("quant_type", TYPES)


def is_per_row(quant_type):
    return quant_type.endswith("wpc")


def act_bits_of(quant_type):
    return 16 if quant_type.startswith("ai16") else 8


def groups_of(quant_type):
    """The ``group_size``, or 0 without groups."""
    return int(quant_type.partition("wpg")[2] or 0)


def scale_shape(quant_type, out_features=7, in_features=33):
    if group_size := groups_of(quant_type):
        return (out_features, -(-in_features // group_size))
    return (out_features, 1) if is_per_row(quant_type) else (1,)


def spread(scale, quant_type, in_features=33):
    """The scales in a shape that weights can be multiplied with."""
    group_size = groups_of(quant_type)
    return oracle.spread(scale, group_size, in_features) if group_size else scale


def layer_of(quant_type, in_features=33, out_features=7, **kwargs):
    layer = BitLinear(in_features, out_features, quant_type=quant_type, **kwargs)
    with torch.no_grad():  # rows of different magnitudes, whose scales differ
        layer.weight.mul_(torch.logspace(-1, 1, out_features)[:, None])
    return layer


def oracle_of(layer, x):
    """The output by the oracle, from the layer's own scales, which may be off by an ulp."""
    quant_type = layer.quant_type
    w_scale = copy.deepcopy(layer).deploy().w_scale
    group_size = groups_of(quant_type)
    wanted = oracle.weight_scale(
        layer.weight.detach(), layer.eps, is_per_row(quant_type), group_size
    )
    assert w_scale.shape == scale_shape(quant_type, *layer.weight.shape)
    if group_size:
        _, unit = oracle.integer_scales(wanted)
        assert (np.abs(w_scale.numpy() - wanted) <= 0.5001 * unit).all()
        m, unit = oracle.integer_scales(w_scale)
        np.testing.assert_array_equal(w_scale, m * unit)
    else:
        np.testing.assert_allclose(w_scale.squeeze(), np.squeeze(wanted), rtol=1.2e-7)
    t = oracle.ternarize(layer.weight.detach(), spread(w_scale, quant_type, layer.in_features))
    bits = act_bits_of(quant_type)
    return oracle.expected(
        x, t, w_scale, layer.bias, layer.eps, act_bits=bits, group_size=group_size
    )


# --- The layer -----------------------------------------------------------------------------------


@types
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 33), (33,), (0, 33), (1, 33)])
def test_the_layer_equals_the_oracle_in_training_and_deployed(quant_type, dtype, shape):
    layer = layer_of(quant_type)
    x = torch.randn(shape).to(dtype)
    wanted = oracle_of(layer, x)
    oracle.assert_same_bits(layer(x), wanted)
    with torch.no_grad():
        oracle.assert_same_bits(layer(x), wanted)
    layer.deploy()
    assert layer.w_scale.shape == scale_shape(quant_type)
    oracle.assert_same_bits(layer(x), wanted)
    with torch.no_grad():
        oracle.assert_same_bits(layer(x), wanted)
    oracle.assert_same_bits(torch.nn.functional.linear(x, layer.weight, layer.bias), wanted)


@types
def test_the_name_and_the_types_of_a_model(quant_type):
    layer = layer_of(quant_type)
    assert layer.quant_type == quant_type
    assert f"quant_type={quant_type}" in repr(layer)
    model = bitlinear.convert(nn.Sequential(nn.Linear(8, 3)), quant_type=quant_type)
    assert model[0].quant_type == quant_type
    assert BitLinear.from_linear(nn.Linear(8, 3), quant_type=quant_type).quant_type == quant_type


@types
def test_gradients_are_those_of_the_formula(quant_type):
    layer = layer_of(quant_type)
    x = torch.randn(5, 33, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    w = layer.weight.detach()
    s_w = copy.deepcopy(layer).deploy().w_scale.double().numpy()
    s_w = spread(s_w, quant_type)
    t = oracle.ternarize(w, s_w)
    q, s_x = oracle.quantize_activations(x.detach(), 1e-6, act_bits_of(quant_type))
    g = grad.double().numpy()
    np.testing.assert_allclose(x.grad, g @ (s_w * t), rtol=1e-4, atol=1e-4)
    wanted = g.T @ (s_x.astype(np.float64) * q)
    np.testing.assert_allclose(layer.weight.grad, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.bias.grad, g.sum(0), rtol=1e-5, atol=1e-5)
    deployed = copy.deepcopy(layer).deploy()
    again = x.detach().clone().requires_grad_()
    deployed(again).backward(grad)
    np.testing.assert_allclose(again.grad, x.grad, rtol=1e-5, atol=1e-5)


@types
def test_a_blend_goes_from_the_plain_layer_to_the_quantised_one(quant_type):
    layer = layer_of(quant_type)
    x = torch.randn(5, 33)
    full = layer(x)
    layer.quantization_strength = 0.0
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.quantization_strength = 1.0 - 2**-20
    torch.testing.assert_close(layer(x), full, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        step = layer(x) - nn.functional.linear(x, layer.weight, layer.bias)
    assert step.abs().max() > 0.01


@types
def test_undeploying_keeps_the_function(quant_type):
    layer = layer_of(quant_type).deploy()
    packed, scale = layer.w_packed.clone(), layer.w_scale.clone()
    x = torch.randn(5, 33)
    y = layer(x)
    layer.undeploy()
    assert layer.quant_type == quant_type
    assert torch.equal(layer(x), y)
    layer.deploy()
    assert torch.equal(layer.w_packed, packed)
    assert torch.equal(layer.w_scale, scale)


def test_a_row_of_zeros_keeps_its_packed_weights():
    layer = layer_of("ai8pc_wpc")
    with torch.no_grad():
        layer.weight[3] = 0
    layer.deploy()
    assert layer.w_scale[3] == torch.tensor(layer.eps)
    y = layer(torch.randn(2, 33))
    assert torch.equal(y[:, 3], layer.bias[3].expand(2))
    packed = layer.w_packed.clone()
    assert torch.equal(layer.undeploy().deploy().w_packed, packed)


@types
def test_it_trains(quant_type):
    torch.manual_seed(0)
    x, wanted = torch.randn(64, 20), torch.randn(64, 4)
    layer = BitLinear(20, 4, quant_type=quant_type)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@types
@pytest.mark.slow
def test_compiled(quant_type):
    torch._dynamo.reset()  # each type is compiled, and torch allows eight in a process
    layer = layer_of(quant_type)
    x = torch.randn(4, 33, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    gradient, layer.weight.grad, x.grad = layer.weight.grad, None, None
    compiled = torch.compile(layer, fullgraph=True)
    output = compiled(x)
    assert torch.equal(output, y)
    output.sum().backward()
    torch.testing.assert_close(layer.weight.grad, gradient)
    layer.deploy()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), y)


# --- Changing the type ---------------------------------------------------------------------------


def test_the_type_can_change_while_the_layer_trains():
    layer = layer_of("ai8pc_wpt")
    x = torch.randn(3, 33)
    for quant_type in TYPES:
        layer.quant_type = quant_type
        oracle.assert_same_bits(layer(x), oracle_of(layer, x))


def test_a_deployed_layer_can_change_only_its_activations():
    layer = layer_of("ai8pc_wpc").deploy()
    layer.quant_type = "ai16pc_wpc"
    assert layer.quant_type == "ai16pc_wpc"
    with pytest.raises(ValueError, match=r"w_scale of shape \[7, 1\].*call undeploy\(\) first"):
        layer.quant_type = "ai16pc_wpt"
    assert layer.quant_type == "ai16pc_wpc"
    with pytest.raises(ValueError, match="quant_type must be one of"):
        layer.quant_type = "ai4pc_wpt"


def test_eps_has_a_higher_bound_for_16_bits():
    for eps, quant_type in ((2e-36, "ai8pc_wpt"), (4e-34, "ai16pc_wpt")):
        layer = BitLinear(4, 2, eps=eps, quant_type=quant_type)
        assert layer(torch.full((1, 4), 1e-30)).isfinite().all()
    message = r"eps must be between 4e-34 and 1e\+18 \(eps / 32385, .*, but it is 1e-35"
    with pytest.raises(ValueError, match=message):
        BitLinear(4, 2, eps=1e-35, quant_type="ai16pc_wpt")
    layer = BitLinear(4, 2, eps=1e-35)
    with pytest.raises(ValueError, match=message):
        layer.quant_type = "ai16pc_wpt"
    layer.deploy()
    with pytest.raises(ValueError, match=message):
        OPS.linear(torch.ones(4), layer.w_packed, layer.w_scale, None, 4, 1e-35, 0, 16)
    with pytest.raises(ValueError, match=message):
        OPS.quantize_activations(torch.ones(4), 1e-35, 16)


@pytest.mark.parametrize("act_bits", [0, 4, 7, 32, -8])
def test_other_numbers_of_bits(act_bits):
    layer = BitLinear(4, 2).deploy()
    message = f"act_bits must be 8 or 16, but it is {act_bits}"
    for function in (OPS.linear, ops.reference_linear):
        with pytest.raises(ValueError, match=message):
            function(torch.ones(4), layer.w_packed, layer.w_scale, None, 4, 1e-6, 0, act_bits)
    with pytest.raises(ValueError, match=message):
        OPS.quantize_activations(torch.ones(4), 1e-6, act_bits)
    with pytest.raises(ValueError, match=message):
        OPS.quantize_activations(torch.ones(4, device="meta"), 1e-6, act_bits)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("group_size", [-2, 1, 16, 48, 500_032, 2**63 - 32])
def test_other_groups_of_weights(device, group_size):
    message = rf"group_size must be 0 .* multiple of 32 up to 500000, but it is {group_size}"
    with pytest.raises(ValueError, match=message):
        OPS.quantize_weight(torch.ones(4, 128, device=device), 1e-6, group_size)
    layer = BitLinear(8, 2, device=device).deploy()
    for function in (OPS.linear, ops.reference_linear):
        with pytest.raises(ValueError, match=message):
            function(
                torch.ones(8, device=device),
                layer.w_packed,
                layer.w_scale,
                None,
                8,
                1e-6,
                group_size,
            )


@pytest.mark.parametrize("group_size", [96, 1024, 500_000])
@pytest.mark.parametrize("M", [1, 40])
def test_a_group_longer_than_a_row_ends_with_it(group_size, M):
    weight, x = torch.randn(9, 70), torch.randn(M, 70)
    w_packed, w_scale = OPS.quantize_weight(weight, 1e-6, group_size)
    assert w_scale.shape == (9, 1)
    wanted = ops.reference_linear(x, w_packed, w_scale, None, 70, 1e-6, 96)
    for function in (OPS.linear, ops.reference_linear):
        assert torch.equal(function(x, w_packed, w_scale, None, 70, 1e-6, group_size), wanted)
    dense = OPS.expand_weight(w_packed, 70, w_scale, None, group_size)
    assert torch.equal(dense, ops.reference_expand_weight(w_packed, 70, w_scale, None, group_size))
    layer = BitLinear(70, 9, bias=False, quant_type=f"ai8pc_wpg{group_size}")
    layer.weight.data.copy_(weight)
    assert torch.equal(layer.eval()(x), layer.deploy()(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_expanding_checks_groups_and_scales(device):
    w_packed = torch.zeros(4, 25, dtype=torch.uint8, device=device)
    functions = (OPS.expand_weight,) if device == "meta" else (ops.reference_expand_weight,)
    for function in (OPS.expand_weight, *functions):
        with pytest.raises(ValueError, match=r"group_size must be 0 .* but it is 33"):
            function(w_packed, 100, torch.ones(4, 1, device=device), None, 33)
        with pytest.raises(ValueError, match=r"w_scale must .* \(4, 4\).* shape \[4, 3\]"):
            function(w_packed, 100, torch.ones(4, 3, device=device), None, 32)


# --- States --------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("is_deployed", [False, True])
@pytest.mark.parametrize("group_size", [96, 32])
def test_a_scale_per_row_loads_into_a_layer_of_groups(group_size, is_deployed, assign):
    """Rows of 70 are one group of 96, so both layers have scales of one shape."""
    saved = BitLinear(70, 9, quant_type="ai8pc_wpc").deploy()
    layer = BitLinear(70, 9, quant_type=f"ai8pc_wpg{group_size}")
    if is_deployed:
        layer.deploy()
    layer.load_state_dict(dict(saved.state_dict()), assign=assign)
    assert layer.quant_type == "ai8pc_wpc"
    assert torch.equal(layer.w_scale, saved.w_scale)
    x = torch.randn(2, 70)
    layer.bias = saved.bias
    assert torch.equal(layer(x), saved(x))


def test_a_layer_whose_rows_are_one_group_stays_one():
    one_group = BitLinear(70, 9, quant_type="ai8pc_wpg96").deploy()
    layer = BitLinear(70, 9, quant_type="ai8pc_wpg96")
    layer.load_state_dict(dict(one_group.state_dict()))
    assert layer.quant_type == "ai8pc_wpg96"


def test_groups_of_another_size_are_named():
    embedding = bitlinear.Embedding(5, 320, quant_type="wpg128").deploy()
    message = r"w_scale must have shape .* it has \[5, 3\]: .* a type that ends in 'wpg128'"
    for quant_type in ("wpt", "wpg64"):
        other = bitlinear.Embedding(5, 320, quant_type=quant_type)
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(dict(embedding.state_dict()))


def test_the_remedy_for_groups_of_another_size_works():
    saved = BitLinear(512, 9, quant_type="ai8pc_wpg128").deploy()
    layer = BitLinear(512, 9, quant_type="ai8pc_wpg64").deploy()
    with pytest.raises(RuntimeError, match=r"of the state, or undeploy the layer and assign it"):
        layer.load_state_dict(saved.state_dict())
    layer.undeploy().quant_type = saved.quant_type
    layer.load_state_dict(saved.state_dict())
    assert torch.equal(layer.dequantize(), saved.dequantize())


def test_a_scale_of_a_wrong_shape_names_the_groups():
    layer = BitLinear(512, 9, quant_type="ai8pc_wpg64").deploy()
    state = {**layer.state_dict(), "w_scale": torch.ones(9)}
    message = r"it has \[9\], for 9 output features of 512 inputs in groups of 64"
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


def test_a_scale_of_0_has_no_latent_weight():
    layer = BitLinear(64, 2, bias=False, quant_type="ai8pc_wpg32").deploy()
    layer.w_scale[1, 0] = 0
    with pytest.raises(ValueError, match=r"w_scale is 0, .*: replace it, by any scale if"):
        layer.undeploy()
    assert layer.is_deployed


@types
def test_states_and_copies(quant_type, tmp_path):
    layer = layer_of(quant_type).deploy()
    x = torch.randn(3, 33)
    y = layer(x)
    other = BitLinear(33, 7, quant_type=quant_type)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert same.is_deployed
        assert same.quant_type == quant_type
        assert torch.equal(same(x), y)


@types
def test_a_mapped_file(quant_type, tmp_path):
    """It has no metadata: the scales tell their own shape, and the layer says the activations."""
    safetensors = pytest.importorskip("safetensors.torch")
    saved = nn.Sequential(layer_of(quant_type).deploy())
    safetensors.save_model(saved, tmp_path / "model.safetensors")
    x = torch.randn(3, 33)
    with torch.device("meta"):
        model = nn.Sequential(BitLinear(33, 7, quant_type=quant_type))
    bitlinear.load_deployed(tmp_path / "model.safetensors", model)
    assert model[0].quant_type == quant_type
    oracle.assert_same_bits(model(x), saved(x))


def test_the_scale_of_a_state_without_metadata_decides_the_type():
    """As in safetensors."""
    for saved, loaded in (("wpt", "wpc"), ("wpc", "wpt")):
        layer = layer_of(f"ai16pc_{saved}").deploy()
        for is_deployed in (False, True):
            other = layer_of(f"ai16pc_{loaded}")
            if is_deployed:
                other.deploy()
            other.load_state_dict(dict(layer.state_dict()))
            assert other.quant_type == f"ai16pc_{saved}"
            x = torch.randn(3, 33)
            assert torch.equal(other(x), layer(x))
            assert torch.equal(other.undeploy()(x), layer(x))


@types
def test_a_state_that_names_another_type_is_rejected(quant_type):
    state = layer_of(quant_type).deploy().state_dict()
    for other in TYPES:
        layer = layer_of(other)
        if other == quant_type:
            layer.load_state_dict(state)
            continue
        with pytest.raises(RuntimeError, match=f"with quant_type='{quant_type}', but this one"):
            layer.load_state_dict(state)
        assert not layer.is_deployed


def test_a_layer_pickled_by_an_older_version():
    """It had ``quant_type`` as an attribute, and no other type than one."""
    for scale, quant_type in ((torch.ones(1), "ai8pc_wpt"), (torch.ones(7, 1), "ai8pc_wpc")):
        layer = layer_of("ai8pc_wpt").deploy()
        layer._buffers["w_scale"] = scale
        state = layer.__getstate__() if hasattr(layer, "__getstate__") else vars(layer)
        state = {**state, "quant_type": "ai8pc_wpt"}
        for name in ("_act_bits", "_group_size"):
            state.pop(name, None)
        old = BitLinear.__new__(BitLinear)
        old.__setstate__(state)
        assert old.quant_type == quant_type
        assert old(torch.randn(2, 33)).shape == (2, 7)


# --- The operators -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*oracle.DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (40, 2050), (0, 8)])
def test_weights_with_a_scale_per_row(dtype, shape):
    w = (torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None]).to(dtype)
    w_packed, w_scale = OPS.quantize_weight(w, 1e-6, -1)
    assert w_scale.shape == (shape[0], 1)
    wanted = oracle.weight_scale(w.float(), 1e-6, per_row=True)
    np.testing.assert_allclose(w_scale, wanted, rtol=1.2e-7)
    t = oracle.ternarize(w.float(), w_scale)
    np.testing.assert_array_equal(w_packed, oracle.pack(t))
    for expand in (OPS.expand_weight, ops.reference_expand_weight):
        np.testing.assert_array_equal(expand(w_packed, shape[1], w_scale), t * w_scale.numpy())
    reference = ops.reference_quantize_weight(w, 1e-6, -1)
    np.testing.assert_allclose(reference[1], w_scale, rtol=1.2e-7)
    same = (reference[1] == w_scale)[:, 0]
    assert torch.equal(reference[0][same], w_packed[same])
    assert torch.equal(quantize.quantize_weights(w, 1e-6, -1)[1], reference[1])


@pytest.mark.parametrize("dtype", [*oracle.DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("group_size", [32, 96, 128])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (40, 2050), (0, 8), (3, 256)])
def test_weights_with_scales_of_groups(shape, group_size, dtype):
    magnitudes = torch.logspace(-6, 3, shape[1])[torch.randperm(shape[1])]
    w = (torch.randn(shape) * magnitudes).to(dtype)
    w_packed, w_scale = OPS.quantize_weight(w, 1e-6, group_size)
    assert w_scale.shape == (shape[0], -(-shape[1] // group_size))
    wanted = oracle.weight_scale(w.float(), 1e-6, group_size=group_size)
    if shape[0] > 0:
        _, unit = oracle.integer_scales(wanted)
        assert (np.abs(w_scale.numpy() - wanted) <= 0.5001 * unit).all()
        m, unit = oracle.integer_scales(w_scale)
        np.testing.assert_array_equal(w_scale, m * unit)
    with np.errstate(all="ignore"):
        scales = oracle.spread(w_scale, group_size, shape[1])
        quotients = np.asarray(w.float()) / scales
        t = np.nan_to_num(np.clip(np.rint(quotients), -1, 1)).astype(np.int64)
    np.testing.assert_array_equal(w_packed, oracle.pack(t))
    for expand in (OPS.expand_weight, ops.reference_expand_weight):
        values = expand(w_packed, shape[1], w_scale, None, group_size)
        np.testing.assert_array_equal(values, t * scales)
    reference = ops.reference_quantize_weight(w, 1e-6, group_size)
    same = (reference[1] == w_scale).all(dim=1)
    assert torch.equal(reference[0][same], w_packed[same])
    assert torch.equal(quantize.quantize_weights(w, 1e-6, group_size)[1], reference[1])


def test_a_row_that_is_not_finite_leaves_the_others_alone():
    w = torch.randn(3, 50)
    wanted = OPS.quantize_weight(w, 1e-6, -1)
    w[1, 20] = float("nan")
    w_packed, w_scale = OPS.quantize_weight(w, 1e-6, -1)
    assert w_scale[1].isnan()
    for row in (0, 2):
        assert torch.equal(w_packed[row], wanted[0][row])
        assert torch.equal(w_scale[row], wanted[1][row])
    assert not OPS.expand_weight(w_packed, 50)[1].any()


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 63, 1025, 5000])
def test_activations_of_16_bits(k, dtype):
    rows = oracle.adversarial_rows(k, act_bits=16)
    x = torch.from_numpy(rows).to(dtype)
    x = torch.cat([x, torch.full((1, k), float("inf"), dtype=dtype)])
    wanted, scale = oracle.quantize_activations(x.float(), act_bits=16)
    for quantise in (OPS.quantize_activations, quantize.quantize_activations):
        q, s_x = quantise(x, 1e-6, 16)
        assert q.dtype == torch.int16
        np.testing.assert_array_equal(q, wanted)
        finite = torch.from_numpy(np.isfinite(scale[:, 0]))
        np.testing.assert_array_equal(s_x[finite], scale[finite])
        assert not s_x[~finite].isfinite().any()
        expanded = OPS.expand_activations(q, s_x, dtype)
        assert torch.equal(expanded[finite], (q.float() * s_x).to(dtype)[finite])


def test_every_value_of_16_bits_is_split():
    q = torch.arange(-32385, 32386)
    high, low = quantize.split_activations(q)
    assert high.abs().max() == low.abs().max() == 127
    assert torch.equal(quantize.join_products(high, low), q)


@types
def test_the_reference_gives_the_bits_of_the_kernel(quant_type):
    layer = layer_of(quant_type, 1100, 40).deploy()
    for rows in (1, 3, 40):
        x = torch.randn(rows, 1100)
        quantisation = 1e-6, layer._group_size, layer._act_bits
        arguments = (x, layer.w_packed, layer.w_scale, layer.bias, 1100, *quantisation)
        assert torch.equal(ops.reference_linear(*arguments), OPS.linear(*arguments))


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("group_size", [0, -1, 32])
def test_operators_pass_the_checks_of_torch(act_bits, group_size):
    x, weight = torch.randn(2, 6, 43), torch.randn(6, 43)
    w_packed, w_scale = OPS.quantize_weight(weight, 1e-6, group_size)
    for operator, arguments in (
        (OPS.quantize_weight, (weight, 1e-6, group_size)),
        (OPS.expand_weight, (w_packed, 43, w_scale, None, group_size)),
        (OPS.quantize_activations, (x, 1e-6, act_bits)),
        (OPS.expand_activations, OPS.quantize_activations(x, 1e-6, act_bits)),
        (OPS.linear, (x, w_packed, w_scale, None, 43, 1e-6, group_size, act_bits)),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_little_is_saved_for_the_backward_pass_of_16_bits():
    x, w = torch.randn(64, 256, requires_grad=True), torch.randn(128, 256, requires_grad=True)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        straight_through_linear(x, w, act_bits=16, group_size=-1)
    assert sum(saved) <= 2 * 64 * 256 + 128 * 256 / 4 + 64 * 4 + 128 * 4


# --- What 16 bits are for ------------------------------------------------------------------------


@pytest.mark.parametrize("outlier", [1, 1000])
def test_16_bits_lose_less_than_bf16(outlier):
    """Against a float64 product of the unquantised input, with an outlier of 1000 medians."""
    torch.manual_seed(0)
    x = torch.randn(32, 2048)
    x[:, 5] *= outlier
    layer = BitLinear(2048, 512, bias=False, quant_type="ai16pc_wpc").deploy()
    exact = x.double() @ layer.dequantize().double().T
    scale = exact.abs().mean()

    def error(y):
        return float((y.double() - exact).abs().mean() / scale)

    dense = nn.functional.linear(x.bfloat16(), layer.dequantize().bfloat16())
    ours = error(layer(x))
    eight = copy.deepcopy(layer)
    eight.quant_type = "ai8pc_wpc"
    assert ours < error(dense)
    assert ours < error(eight(x)) / 50
