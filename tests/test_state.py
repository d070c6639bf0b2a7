"""Saving the state of a layer, and loading it into either form."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from bitlinear import BitLinear, packing
from tests import oracle
from tests.layers import deployed, unchanged


def through_torch(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


def through_mmap(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)


def through_safetensors(state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    return safetensors.torch.load_file(tmp_path / "state.safetensors")


@pytest.mark.parametrize("round_trip", [through_torch, through_mmap, through_safetensors])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("from_deployed", [True, False])
@pytest.mark.parametrize("into_deployed", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_either_state_loads_into_either_layer(
    round_trip, bias, from_deployed, into_deployed, assign, tmp_path
):
    def model(is_deployed):
        layer = BitLinear(20, 6, bias=bias)
        return nn.Sequential(nn.Identity(), layer.deploy() if is_deployed else layer)

    source, target, x = model(from_deployed), model(into_deployed), torch.randn(3, 20)
    state = round_trip(source.state_dict(), tmp_path)
    assert str(target.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert target[1].is_deployed == from_deployed
    assert target.state_dict().keys() == source.state_dict().keys()
    assert torch.equal(target(x), source(x))
    assert {p.requires_grad for p in target.parameters()} <= {True}
    if assign:  # Without a copy, as in any other module.
        for name, tensor in target.state_dict().items():
            assert tensor.data_ptr() == state[name].data_ptr()


@pytest.mark.parametrize("from_deployed", [True, False])
@pytest.mark.parametrize("into_deployed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_load_copies_the_state_and_keeps_the_dtype_of_the_layer(
    from_deployed, into_deployed, dtype
):
    source, target = BitLinear(20, 6), BitLinear(20, 6, dtype=dtype)
    if from_deployed:
        source.deploy()
    if into_deployed:
        target.deploy()
    state, x = source.state_dict(), torch.randn(3, 20)
    if from_deployed:
        state["w_scale"] = torch.rand(6, 1) + 0.1  # not the shape of the target's
    target.load_state_dict(state)
    assert target.weight.dtype == target.bias.dtype == dtype
    y = target(x)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(target(x), y)


def test_a_state_from_nn_linear_and_back():
    linear, layer = nn.Linear(20, 6), BitLinear(20, 6)
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)
    nn.Linear(20, 6).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("into_deployed", [True, False])
def test_a_meta_layer_takes_a_deployed_state_without_a_copy(into_deployed):
    source, x = deployed(), torch.randn(3, 20)
    target = BitLinear(20, 6, device="meta")
    if into_deployed:
        target.deploy()
    target.load_state_dict(source.state_dict(), assign=True)
    assert target.w_packed.data_ptr() == source.w_packed.data_ptr()
    assert torch.equal(target(x), source(x))


def test_a_float_state_in_a_deployed_layer_warns_that_it_is_no_longer_deployed():
    layer, dense = BitLinear(8, 4).deploy(), torch.nn.Linear(8, 4)
    with pytest.warns(UserWarning, match=r"trainable again, and slow: call deploy\(\)"):
        layer.load_state_dict(dense.state_dict())
    assert not layer.is_deployed
    assert torch.equal(layer.weight, dense.weight)


def test_a_meta_layer_takes_a_float_state_in_place_of_packed_weights():
    source, x = BitLinear(20, 6), torch.randn(3, 20)
    target = BitLinear(20, 6, device="meta").deploy()
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target(x), source(x))


def original_project_state():
    """A state from its deployed layers: a scalar scale, no metadata, K a multiple of four."""
    t = oracle.ternary(6, 20, seed=3)
    state = {
        "w_packed": torch.from_numpy(oracle.pack(t)),
        "w_scale": torch.tensor(0.037),
        "bias": torch.randn(6),
    }
    return t, state


@pytest.mark.parametrize("assign", [True, False])
def test_a_checkpoint_of_the_original_project_loads_and_gives_its_results(assign):
    t, state = original_project_state()
    layer = BitLinear(20, 6)
    layer.load_state_dict(state, assign=assign)
    assert layer.w_scale.shape == (1,)
    assert state["w_scale"].shape == ()  # The caller's dictionary is untouched.
    x = torch.randn(3, 20)
    oracle.assert_same_bits(layer(x), oracle.expected(x, t, 0.037, state["bias"]))


def test_a_scale_per_output_feature_loads_and_gives_its_results():
    t, state = original_project_state()
    state["w_scale"] = torch.rand(6, 1) + 0.1
    for layer in (BitLinear(20, 6), deployed()):
        layer.load_state_dict(state)
        x = torch.randn(3, 20)
        wanted = oracle.expected(x, t, state["w_scale"], state["bias"])
        oracle.assert_same_bits(layer(x), wanted)


def test_the_format_version_is_in_the_metadata():
    state = nn.Sequential(deployed()).state_dict()
    assert state._metadata["0"]["version"] == packing.FORMAT_VERSION == 1


# --- States that do not fit ---


def with_version(state, version):
    state._metadata[""]["version"] = version
    return state


def corrupt(name, change):
    def apply(state):
        state[name] = change(state[name])
        return state

    return apply


def set_byte(packed):
    packed = packed.clone()
    packed[2, 1] = 0b01_11_00_01
    return packed


def drop(name):
    def apply(state):
        del state[name]
        return state

    return apply


CORRUPT = [
    ("code 3, first in byte 1 of row 2", corrupt("w_packed", set_byte)),
    (
        r"size mismatch for w_packed: .*\[6, 4\], .* needs \[6, 5\]",
        corrupt("w_packed", lambda w: w[:, :4]),
    ),
    (
        r"size mismatch for w_packed: .*\[5, 5\], .* needs \[6, 5\]",
        corrupt("w_packed", lambda w: w[:5]),
    ),
    (
        "w_packed must be uint8, but it is int8",
        corrupt("w_packed", lambda w: w.to(torch.int8)),
    ),
    ("w_packed must be a tensor, but it is a list", corrupt("w_packed", lambda w: w.tolist())),
    (r"w_scale must be float32, but it is torch\.float16", corrupt("w_scale", lambda s: s.half())),
    (
        r"w_scale must have shape \[1\] or \[6, 1\].*\[6, 5\]: no groups .* 5 scales in a row",
        corrupt("w_scale", lambda s: s.expand(6, 5)),
    ),
    (r"w_scale must have shape .* it has \[2\]", corrupt("w_scale", lambda s: s.expand(2))),
    ("w_scale must be finite and positive", corrupt("w_scale", lambda s: -s)),
    ("w_scale must be finite and positive", corrupt("w_scale", lambda s: s * 0)),
    ("w_scale must be finite and positive", corrupt("w_scale", lambda s: s * float("nan"))),
    (r"size mismatch for bias: .*\[7\], .* needs \[6\]", corrupt("bias", lambda b: torch.ones(7))),
    ("bias must be floating point", corrupt("bias", lambda b: b.long())),
    ("w_scale is missing", drop("w_scale")),
    ("w_packed is missing", drop("w_packed")),
    ("both 'weight' and packed weights: remove one", lambda s: {**s, "weight": torch.ones(6, 20)}),
    (
        "format version 2, but this bitlinear reads up to version 1: upgrade",
        lambda s: with_version(s, 2),
    ),
]


@pytest.mark.parametrize(("message", "change"), CORRUPT)
@pytest.mark.parametrize("into_deployed", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_corrupt_state_is_rejected_and_changes_nothing(message, change, into_deployed, assign):
    state = change(deployed().state_dict())
    layer = BitLinear(20, 6)
    if into_deployed:
        layer.deploy()
    with unchanged(layer), pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, assign=assign)
    assert layer.is_deployed == into_deployed


def test_the_message_names_the_layer():
    model = nn.ModuleDict({"head": deployed()})
    state = model.state_dict()
    state["head.w_scale"] = state["head.w_scale"] * 0
    with pytest.raises(RuntimeError, match="While loading head: w_scale must be finite"):
        nn.ModuleDict({"head": BitLinear(20, 6)}).load_state_dict(state)


def test_a_bias_too_many_or_too_few():
    state = deployed().state_dict()
    for layer in (BitLinear(20, 6, bias=False), deployed(bias=False)):
        with unchanged(layer), pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
            layer.load_state_dict(state)
    del state["bias"]
    for layer in (BitLinear(20, 6), deployed()):
        with unchanged(layer), pytest.raises(RuntimeError, match=r"Missing key.*bias"):
            layer.load_state_dict(state)


BAD_FLOATS = [
    (r"size mismatch for weight: .*\[6, 21\]", lambda s: {**s, "weight": torch.ones(6, 21)}),
    (r"size mismatch for bias: .*\[7\]", lambda s: {**s, "bias": torch.ones(7)}),
    (r"weight must be floating point", lambda s: {**s, "weight": torch.ones(6, 20).to(torch.int8)}),
    (r"Missing key.*bias", drop("bias")),
    (r"Missing key.*w", drop("weight")),
    (r"Unexpected key.*other", lambda s: {**s, "other": torch.ones(1)}),
    (r"weight is on the meta device", lambda s: {**s, "weight": torch.ones(6, 20, device="meta")}),
    (r"reads up to version 1: upgrade", lambda s: with_version(s, 2)),
]


@pytest.mark.parametrize(("message", "change"), BAD_FLOATS)
@pytest.mark.parametrize("into_deployed", [True, False])
def test_a_bad_float_state_is_rejected_and_changes_nothing(message, change, into_deployed):
    state = change(BitLinear(20, 6).state_dict())
    layer = BitLinear(20, 6)
    if into_deployed:
        layer.deploy()
    with unchanged(layer), pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


class Extended(BitLinear):
    """A subclass that adds a tensor."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.extra = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize("deployed", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("extra", torch.ones(3), r"size mismatch for extra: .*\[3\], but this layer needs \[4\]"),
        ("bias", torch.ones(16).to_sparse(), "bias must be strided, but it is torch.sparse_coo"),
        ("weight", torch.ones(16, 16).to_sparse(), "weight must be strided"),
    ],
)
def test_a_tensor_that_does_not_fit_leaves_the_layer_as_it_was(deployed, name, value, message):
    layer, source, x = Extended(16, 16), Extended(16, 16), torch.randn(4, 16)
    for each in (layer, source) if deployed else (layer,):
        each.deploy()
    state = (Extended(16, 16) if name == "weight" else source.deploy()).state_dict()
    y, is_deployed = layer(x), layer.is_deployed
    state[name] = value
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert layer.is_deployed == is_deployed
    assert torch.equal(layer(x), y)


def test_not_strict():
    source = deployed()
    state = source.state_dict()
    del state["bias"]
    state["other"] = torch.ones(1)
    layer = BitLinear(20, 6)
    bias = layer.bias.detach().clone()
    result = layer.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["bias"], ["other"])
    assert torch.equal(layer.w_packed, source.w_packed)
    assert torch.equal(layer.bias, bias)

    unbiased = BitLinear(20, 6, bias=False)
    assert unbiased.load_state_dict(source.state_dict(), strict=False).unexpected_keys == ["bias"]
    assert unbiased.is_deployed
    assert unbiased.bias is None

    before = layer.w_packed
    assert layer.load_state_dict({}, strict=False).missing_keys == ["w_packed", "w_scale", "bias"]
    assert layer.w_packed is before
    layer.load_state_dict({"bias": torch.ones(6)}, strict=False)
    assert torch.equal(layer.bias, torch.ones(6))


def test_a_state_with_parameters_in_it():
    state = deployed().state_dict()
    state["bias"] = nn.Parameter(state["bias"])
    layer = BitLinear(20, 6)
    layer.load_state_dict(state, assign=True)
    assert not list(layer.parameters())


def test_a_parametrised_layer_cannot_become_deployed():
    layer = nn.utils.parametrizations.weight_norm(BitLinear(20, 6))
    with pytest.raises(RuntimeError, match="cannot become a deployed one: it is parametrized"):
        layer.load_state_dict(deployed().state_dict(), strict=False)


# --- The metadata of a state ---


@pytest.mark.parametrize("from_deployed", [True, False])
@pytest.mark.parametrize("round_trip", [through_torch, lambda state, _: copy.deepcopy(state)])
def test_the_metadata_names_the_layer(round_trip, from_deployed, tmp_path):
    source = BitLinear(20, 6, eps=0.5)
    state = round_trip(
        nn.Sequential(source.deploy() if from_deployed else source).state_dict(), tmp_path
    )
    wanted = {"version": 1, "in_features": 20, "eps": 0.5, "quant_type": "ai8pc_wpt"}
    assert state._metadata["0"] == wanted
    target = nn.Sequential(BitLinear(20, 6))
    message = r"While loading 0: .* eps=0\.5, but this one has eps=1e-06"
    with unchanged(target[0]), pytest.raises(RuntimeError, match=message):
        target.load_state_dict(state)
    target[0].eps = 0.5
    target.load_state_dict(state)
    x = torch.randn(3, 20)
    assert torch.equal(target(x), source(x))


def test_a_row_of_six_weights_is_not_one_of_seven():
    """Both have two bytes, and the slot between them is a weight of 0 of the longer one."""
    layer = BitLinear(7, 3)
    message = "in_features=6, but this one has in_features=7"
    with unchanged(layer), pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(BitLinear(6, 3).deploy().state_dict())


def test_a_state_of_another_quantisation_is_rejected():
    state = deployed().state_dict()
    state._metadata[""]["quant_type"] = "ai16pc_wpt"
    with pytest.raises(RuntimeError, match="quant_type='ai16pc_wpt', but this one has"):
        deployed().load_state_dict(state)


def test_a_deployed_state_ends_a_blend():
    layer = BitLinear(20, 6)
    layer.quantization_strength = 0.5
    source = deployed()
    layer.load_state_dict(source.state_dict())
    assert layer.quantization_strength == 1
    x = torch.randn(3, 20)
    assert torch.equal(layer.undeploy()(x), source(x))
