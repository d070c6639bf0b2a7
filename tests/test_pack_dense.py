"""bitlinear.pack: dense weights that are ternary already."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear
from bitlinear.conversion.ternary import NotTernary, Scales, find_scales
from tests import oracle

HALF = (torch.bfloat16, torch.float16)
STORAGE = (torch.float32, *HALF, torch.float64)


def ternary(n=8, k=64, seed=0):
    return torch.from_numpy(oracle.ternary(n, k, seed)).double()


def linear_of(weight, bias=False):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def neighbour(value, dtype):
    """The next larger number of a 16-bit dtype."""
    return (torch.tensor(value).to(dtype).view(torch.int16) + 1).view(dtype).item()


# --- Granularity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.037, 812.5, 3e-5])
def test_one_scale(dtype, scale):
    t = ternary()
    weight = (t * scale).to(dtype)
    layer = bitlinear.pack(linear_of(weight))
    assert isinstance(layer, BitLinear)
    assert layer.is_deployed
    assert layer.quant_type == "ai8pc_wpt"
    np.testing.assert_array_equal(layer.w_packed, oracle.pack(t.long().numpy()))
    assert layer.w_scale.tolist() == [torch.tensor(scale).to(dtype).float().item()]
    if dtype != torch.float64:
        assert torch.equal(layer.dequantize(), weight.float())


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_scale_per_row_and_per_shard_of_rows(dtype, rows):
    t = ternary()
    scales = torch.logspace(-2, 1, 8 // rows, dtype=torch.float64).repeat_interleave(rows)[:, None]
    weight = (t * scales).to(dtype)
    layer = bitlinear.pack(linear_of(weight), act_bits=16)
    assert layer.quant_type == "ai16pc_wpc"
    assert torch.equal(layer.w_scale, scales.to(dtype).float())
    if dtype != torch.float64:
        assert torch.equal(layer.dequantize(), weight.float())
    assert str(find_scales(weight)).startswith(
        f"a scale per output feature ({8 // rows} different ones, 0.01"
    )


@pytest.mark.parametrize("columns", [384, 400, 1001])
@pytest.mark.parametrize("width", [32, 64, 128, 96, 160, 288])
def test_blocks_of_columns_become_groups(width, columns):
    scales = torch.linspace(0.5, 2, -(-columns // width)).half().float()
    weight = ternary(8, columns) * scales.repeat_interleave(width)[:columns]
    model = nn.Sequential(linear_of(ternary(8, columns)), linear_of(weight))
    bitlinear.pack(model)
    assert model[0].quant_type == "ai8pc_wpt"
    assert model[1].quant_type == f"ai8pc_wpg{width}"
    assert torch.equal(model[1].w_scale, scales.expand(8, -1))
    assert torch.equal(model[1].dequantize(), weight)


def test_blocks_that_are_no_groups_are_refused():
    scales = torch.linspace(0.5, 2, 4).repeat_interleave(24)
    model = nn.Sequential(linear_of(ternary(8, 96)), linear_of(ternary(8, 96) * scales))
    message = "1: each of its blocks of 24 columns has scales of its own, but groups must be"
    with pytest.raises(ValueError, match=message):
        bitlinear.pack(model)
    assert type(model[0]) is type(model[1]) is nn.Linear
    bitlinear.pack(model, exclude=("1",))
    assert model[0].is_deployed
    assert type(model[1]) is nn.Linear


def test_groups_of_100_inputs_are_not_found():
    scales = torch.linspace(0.5, 2, 5).repeat_interleave(100)
    found = find_scales(ternary(8, 500) * scales)
    assert found.reason.startswith("8 of 8 rows have several magnitudes (row 0 from 0.5 to 2)")
    assert found.reason.endswith("or the size of its groups is no multiple of 32")
    assert not found.is_refused


def test_groups_with_scales_of_their_own_in_every_row():
    """As Ternary-Bonsai stores them."""
    scales = (torch.rand(8, 3) + 0.1).half().float()
    weight = ternary(8, 384)
    weight[2, 128:256] = 0
    found = find_scales(weight * scales.repeat_interleave(128, dim=1))
    assert found.group_size == 128
    scales[2, 1] = scales[2, [0, 2]].max()  # of zeros: the largest of the row
    assert torch.equal(found.values, scales)
    assert found.deviation == 0
    assert "a scale for each group of 128 inputs" in str(found)


def test_a_group_of_zeros_rounds_no_scale_of_its_row():
    weight = torch.ones(3, 256)
    weight[0] *= 2**-20
    weight[0, 128:] = 0
    weight[1, :128] *= 3
    weight[2] = 0
    layer = bitlinear.pack(linear_of(weight))
    assert layer.quant_type == "ai8pc_wpg128"
    assert torch.equal(layer.dequantize(), weight)
    assert layer.w_scale.tolist() == [[2**-20, 2**-20], [3, 1], [3, 3]]


@pytest.mark.parametrize(
    ("small", "rounding"), [(1e-7, 1), (1.4 * 2**-14, 0.286), (100.3 * 2**-14, 0.003), (1.0, 0)]
)
def test_scales_that_groups_round_are_reported(small, rounding, caplog):
    scales = torch.tensor([[1.0, 0.5, small]]).expand(8, 3)
    weight = ternary(8, 384) * scales.repeat_interleave(128, dim=1)
    found = find_scales(weight)
    assert found.values[0].tolist() == pytest.approx([1.0, 0.5, small], abs=2**-15)
    assert found.rounding == pytest.approx(rounding, rel=0.2)
    assert found.deviation < 2**-15
    assert (found.deviation > 0) == (rounding > 0)
    model = nn.Sequential(nn.ReLU(), linear_of(weight))
    with (
        caplog.at_level("INFO", logger="bitlinear"),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        bitlinear.pack(model)
    assert ("scales are rounded by up to" in caplog.text) == (rounding > 0)
    assert ("to 0 with their weights" in caplog.text) == (rounding == 1)
    warned = [str(warning.message) for warning in caught]
    assert len(warned) == (rounding > 2**-7)
    assert all(text.startswith("pack(): 1: scales are rounded by up to") for text in warned)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_neighbours_in_groups(dtype):
    scales = torch.logspace(-1, 1, 4).to(dtype).repeat_interleave(128)
    weight = ternary(8, 512).to(dtype) * scales
    low = scales[300].item()
    high = neighbour(low, dtype)
    weight[3, 256:384:3] = weight[3, 256:384:3].sign() * high
    found = find_scales(weight)
    assert found.group_size == 128
    assert found.values[3, 2] == (low + high) / 2
    assert found.deviation == (high - low) / 2
    weight[3, 256:260] = 2 * high
    assert "have several magnitudes" in find_scales(weight).reason


# --- The rounding of 16-bit storage --------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_two_neighbours_in_one_row_share_the_scale_between_them(dtype):
    low = torch.tensor(0.37).to(dtype).item()
    high = neighbour(low, dtype)
    weight = ternary(8, 64).to(dtype) * low
    weight[0, :40] = weight[0, :40].sign() * high
    found = find_scales(weight)
    assert found.values.tolist() == [(low + high) / 2]
    assert found.deviation == (high - low) / 2
    layer = bitlinear.pack(linear_of(weight))
    assert torch.equal(layer.dequantize().to(dtype).sign(), weight.sign())
    error = (layer.dequantize().double() - weight.double()).abs().max()
    assert error == found.deviation


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rows_of_two_neighbouring_scales_keep_both(dtype):
    """Equal magnitudes in each row are exact; one scale for both would not be."""
    low = torch.tensor(0.37).to(dtype).item()
    scales = torch.tensor([low, neighbour(low, dtype)], dtype=dtype).repeat(4)[:, None]
    weight = ternary().to(dtype) * scales
    found = find_scales(weight)
    assert found.deviation == 0
    assert torch.equal(found.values, scales.float())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_neighbours_in_rows_of_different_scales(dtype):
    weight = ternary().to(dtype) * torch.logspace(-1, 1, 8).to(dtype)[:, None]
    weight[2, 7] = neighbour(weight[2].abs().max().item(), dtype)
    found = find_scales(weight)
    assert found.values.shape == (8, 1)
    assert 0 < found.deviation < 0.01 * found.values[2]


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_two_steps_apart_are_not_ternary(dtype):
    weight = ternary().to(dtype) * 0.37
    step = torch.finfo(dtype).eps * 0.25
    weight[3, 5] = 0.37 + 2 * step
    assert isinstance(find_scales(weight), NotTernary)
    if dtype not in HALF:  # full precision has no allowance at all
        weight[3, 5] = torch.nextafter(weight.abs().max(), torch.tensor(1.0, dtype=dtype))
        assert isinstance(find_scales(weight), NotTernary)


# --- What is not ternary, or cannot be told ------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_one_weight_off(dtype, caplog):
    weight = (ternary() * 0.5).to(dtype)
    weight[3, 5] = 0.75
    model = nn.Sequential(linear_of(weight), linear_of((ternary() * 0.5).to(dtype)))
    with caplog.at_level(logging.INFO, "bitlinear"):
        bitlinear.pack(model)
    assert type(model[0]) is nn.Linear
    assert model[1].is_deployed
    assert "0: not packed: 1 of 8 rows have several magnitudes (row " in caplog.text
    assert "from 0.5 to 0.75" in caplog.text
    assert "1: packed as ai8pc_wpt: one scale (0.5), " in caplog.text
    assert "zeros, largest deviation 0" in caplog.text
    assert "packed 1 of 2 linear layers: 0 kB of packed weights and 0 kB of scales" in caplog.text


def test_the_memory_is_logged(caplog):
    weight = oracle.ternary(4096, 2048) * np.logspace(-1, 0, 16).repeat(128).astype(np.float32)
    shared = nn.Parameter(torch.from_numpy(weight))
    layers = nn.Linear(2048, 4096, bias=False), nn.Linear(2048, 4096, bias=False)
    for layer in layers:
        layer.weight = shared
    with caplog.at_level(logging.INFO, "bitlinear"):
        model = bitlinear.pack(nn.Sequential(*layers))
    assert model[0].quant_type == "ai8pc_wpg128"
    assert "packed 2 of 2 linear layers: 2,097 kB of packed weights and 262 kB" in caplog.text


def test_a_model_that_is_not_ternary():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match=r"packed none of 2 linear layers: 0: 8 of 8 rows have"):
        assert bitlinear.pack(model) is model
    assert not any(isinstance(module, BitLinear) for module in model.modules())
    with pytest.warns(UserWarning, match="packed none of 0"):
        bitlinear.pack(nn.ReLU())


def test_rows_of_zeros():
    weight = ternary() * torch.logspace(-1, 1, 8)[:, None]
    weight[2] = weight[5] = 0
    layer = bitlinear.pack(linear_of(weight.float(), bias=True))
    assert torch.equal(layer.dequantize(), weight.float())
    y = layer(torch.randn(3, 64))
    assert torch.equal(y[:, 2], layer.bias[2].expand(3))
    zeros = bitlinear.pack(linear_of(torch.zeros(4, 9), bias=True))
    assert not zeros.dequantize().any()
    assert torch.equal(zeros(torch.randn(2, 9)), zeros.bias.expand(2, -1))


@pytest.mark.parametrize("shape", [(50, 1), (1, 1)])
def test_fewer_than_two_weights_for_each_scale_are_ambiguous(shape):
    weight = torch.rand(shape) + 0.1
    count = shape[0]
    message = f"{count} weights other than 0 and {count} scales, as any weight of this shape would"
    with pytest.raises(ValueError, match=message):
        bitlinear.pack(nn.Sequential(linear_of(weight)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    weight = ternary().float()
    weight[3, 5] = value
    assert find_scales(weight) == NotTernary("a weight is NaN or infinite")


def test_weights_without_values():
    with pytest.raises(ValueError, match="it is on the meta device, without values"):
        bitlinear.pack(nn.Sequential(nn.Linear(4, 4, device="meta")))


def test_scales_beyond_fp32_are_refused():
    assert "does not fit float32" in find_scales(ternary() * 1e300).reason
    found = find_scales(ternary() * 0.1)
    assert isinstance(found, Scales)
    assert 0 < found.deviation < 1e-8


# --- Models --------------------------------------------------------------------------------------


def test_results_are_those_of_the_dense_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        linear_of((ternary(32, 64) * 0.1).float(), bias=True),
        nn.ReLU(),
        linear_of((ternary(4, 32) * torch.rand(4, 1, dtype=torch.float64)).float()),
    )
    x = torch.randn(16, 64)
    dense = model(x)
    packed = bitlinear.pack(model, act_bits=16)
    assert packed is model
    error = (packed(x) - dense).norm() / dense.norm()
    assert error < 1e-3
    assert not list(packed.parameters())


def test_layers_with_one_weight_share_the_packed_one():
    model = nn.ModuleDict({"a": linear_of(ternary().float()), "b": linear_of(ternary().float())})
    model["b"].weight = model["a"].weight
    embedding = nn.Embedding(8, 64)
    embedding.weight = model["a"].weight
    model["embedding"] = embedding
    bitlinear.pack(model)
    assert model["a"].w_packed is model["b"].w_packed
    assert model["embedding"].weight.shape == (8, 64)
    model["a"].undeploy()
    assert model["a"].weight is model["b"].weight


def test_filters():
    model = nn.Sequential(linear_of(ternary().float()), linear_of(ternary(3, 8).float()))
    bitlinear.pack(model, filter_fn=lambda name, layer: layer.out_features == 3)
    assert type(model[0]) is nn.Linear
    assert model[1].is_deployed
    with pytest.warns(UserWarning, match="nothing"):
        bitlinear.pack(model, exclude=("nothing",))
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module"):
        bitlinear.pack("model")
    with pytest.raises(ValueError, match="act_bits must be 8 or 16"):
        bitlinear.pack(model, act_bits=4)


def test_a_layer_that_is_a_bitlinear_stays_as_it_is():
    model = nn.Sequential(BitLinear(64, 8), linear_of(ternary().float()))
    bitlinear.pack(model)
    assert not model[0].is_deployed
    assert model[1].is_deployed


def test_large_layers_are_examined_in_chunks():
    weight = torch.ones(3000, 1000, dtype=torch.bfloat16)
    weight[::2] *= 2
    weight[:, ::3] *= -1
    weight[7, 5:] = 0
    layer = bitlinear.pack(linear_of(weight))
    assert torch.equal(layer.dequantize().bfloat16(), weight)


def test_layers_that_share_a_weight_but_not_their_type_are_deployed_apart():
    model = nn.ModuleDict({"a": BitLinear(16, 4), "b": BitLinear(16, 4, quant_type="ai8pc_wpc")})
    model["b"].weight = model["a"].weight
    x = torch.randn(3, 16)
    wanted = {name: layer(x) for name, layer in model.items()}
    bitlinear.deploy(model)
    for name, layer in model.items():
        assert torch.equal(layer(x), wanted[name])


def test_subnormal_weights_are_not_taken_for_zeros():
    layer = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(1e-39 * torch.ones(4, 8))
    torch.set_flush_denormal(True)
    try:
        with pytest.warns(UserWarning, match="below the smallest normal number"):
            bitlinear.pack(layer)
    finally:
        torch.set_flush_denormal(False)


def test_another_default_dtype():
    layer = nn.Linear(8, 4, bias=False)
    nn.init.zeros_(layer.weight)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        packed = bitlinear.pack(layer)
    finally:
        torch.set_default_dtype(before)
    assert packed.w_scale.dtype == torch.float32


def test_warnings_point_to_the_call():
    with pytest.warns(UserWarning, match="packed none") as caught:
        bitlinear.pack(nn.Linear(8, 4))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_that_is_tied_to_a_dense_embedding_is_named(is_tied):
    model = nn.ModuleDict({"embed": nn.Embedding(8, 64), "head": nn.Linear(64, 8, bias=False)})
    model["head"].weight.data = ternary()
    if is_tied:
        model["embed"].weight = model["head"].weight
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bitlinear.pack(model)
    assert model["head"].is_deployed
    messages = [str(warning.message) for warning in caught]
    assert [m.partition(":")[2].partition(":")[0] for m in messages] == (
        [" head shares its weight with embed"] if is_tied else []
    )
