"""Deployed states of other projects, loaded into models with plain linear layers."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bitlinear
from bitlinear import BitLinear
from bitlinear.integrations import checkpoints
from tests import oracle

N, K = 12, 20
SCALE = 37.0


class Model(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.up = nn.Linear(K, N, bias=bias)
        self.head = nn.Linear(N, 3)

    def forward(self, x):
        return self.head(torch.relu(self.up(self.norm(x))))


def pack_columns(t):
    """As TeTRA-VPR and the first BitLinear project: four weights of a row, in int8 arithmetic."""
    codes = (t + 1).astype(np.uint8).reshape(len(t), -1, 4)
    shifted = codes << np.array([6, 4, 2, 0], dtype=np.uint8)
    return torch.from_numpy(np.bitwise_or.reduce(shifted, axis=-1))


def pack_rows(t):
    """As transformers: row r of the bytes holds rows r, r + N/4, r + 2 N/4 and r + 3 N/4."""
    codes = (t + 1).astype(np.uint8).reshape(4, len(t) // 4, -1)
    return torch.from_numpy(sum(codes[i] << (2 * i) for i in range(4)).astype(np.uint8))


def float_weight(t):
    return torch.from_numpy(t).float()


# The format, how it packs, its names, and the factor and the bias that it computes with.
CASES = {
    "tetra-vpr": (lambda t: pack_columns(t).view(torch.int8), "weight", "scale", 1 / SCALE, 1),
    "bitlinear-original": (pack_columns, "w_packed", "w_scale", SCALE, 1),
    "transformers-bitlinear": (pack_rows, "weight", "weight_scale", 1 / SCALE, 1),
    "transformers-autobitlinear": (pack_rows, "weight", "weight_scale", SCALE, SCALE),
}


def make_state(format, per_row=False, bias=True, pack=None):
    """A state of this format, its ternary weights, and the factor and bias of the layer."""
    packer, weight, scale, factor, bias_factor = CASES[format]
    t = oracle.ternary(N, K, seed=5)
    state = Model(bias).state_dict()
    del state["up.weight"]
    state[f"up.{weight}"] = (pack or packer)(t)
    rows = 1 + torch.arange(N) / 8 if per_row else torch.tensor(1.0)
    state[f"up.{scale}"] = SCALE * rows
    wanted = np.float32(1) / state[f"up.{scale}"] if factor < 1 else state[f"up.{scale}"]
    added = state["up.bias"] * (wanted if bias_factor != 1 else 1) if bias else None
    return state, t, wanted.reshape(-1, 1) if per_row else wanted.reshape(1), added


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("format", CASES)
def test_layers_get_the_same_bytes_and_scales(format, per_row, bias):
    state, t, w_scale, added = make_state(format, per_row, bias)
    model = checkpoints.load(state, Model(bias), format)
    up = model.up
    assert up.quant_type == ("ai8pc_wpc" if per_row else "ai8pc_wpt")
    assert up.w_packed.numpy().tolist() == oracle.pack(t).tolist()
    oracle.assert_same_bits(up.w_scale, w_scale)
    x = torch.randn(3, K)
    eps = 1e-6 if format == "bitlinear-original" else 1e-5
    assert up.eps == eps
    oracle.assert_same_bits(up(x), oracle.expected(x, t, w_scale, added, eps=eps))
    assert type(model.head) is nn.Linear
    assert torch.equal(model.norm.weight, state["norm.weight"])


def save_safetensors(state, path):
    save_file(state, path / "model.safetensors")
    return path / "model.safetensors"


def save_torch(state, path):
    torch.save(state, path / "model.pth")
    return path / "model.pth"


def save_lightning(state, path):
    torch.save({"state_dict": state, "epoch": 3}, path / "model.ckpt")
    return path / "model.ckpt"


@pytest.mark.parametrize("save", [save_safetensors, save_torch, save_lightning])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_files(save, device, tmp_path):
    state, t, *_ = make_state("tetra-vpr")
    with torch.device(device):
        model = Model()
    checkpoints.load(save(state, tmp_path), model, "tetra-vpr")
    assert model.up.w_packed.numpy().tolist() == oracle.pack(t).tolist()
    assert model(torch.randn(2, K)).shape == (2, 3)


def test_a_model_of_bitlinear_layers_keeps_their_settings():
    state, t, *_ = make_state("tetra-vpr")
    model = Model()
    model.up = BitLinear(K, N, eps=1e-3, quant_type="ai16pc_wpt")
    up = model.up
    checkpoints.load(state, model, "tetra-vpr")
    assert model.up is up
    assert (up.eps, up.quant_type) == (1e-3, "ai16pc_wpt")
    assert up.w_packed.numpy().tolist() == oracle.pack(t).tolist()


def test_ternary_weights_in_floating_point_are_packed():
    state, t, *_ = make_state("bitlinear-original", pack=float_weight)
    model = checkpoints.load(state, Model(), "bitlinear-original")
    assert model.up.w_packed.numpy().tolist() == oracle.pack(t).tolist()


def test_a_format_of_ones_own():
    state, *_ = make_state("bitlinear-original")
    divides = dataclasses.replace(checkpoints.FORMATS["bitlinear-original"], divides=True)
    assert checkpoints.load(state, Model(), divides).up.w_scale == 1 / SCALE


def test_a_saved_model_loads_as_one_of_ours(tmp_path):
    state, *_ = make_state("tetra-vpr")
    model = checkpoints.load(state, Model(), "tetra-vpr")
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    again = bitlinear.load_deployed(
        tmp_path / "ours.safetensors", bitlinear.convert(Model(), exclude=("head",))
    )
    x = torch.randn(4, K)
    assert torch.equal(again(x), model(x))


def test_a_file_of_torch_can_be_overwritten(tmp_path):
    state, *_ = make_state("tetra-vpr")
    model = checkpoints.load(save_torch(state, tmp_path), Model(), "tetra-vpr")
    x = torch.randn(2, K)
    wanted = model(x)
    save_torch(model.state_dict(), tmp_path)
    assert torch.equal(model(x), wanted)


def test_a_model_that_is_deployed_already_gets_other_weights():
    model = checkpoints.load(make_state("tetra-vpr")[0], Model(), "tetra-vpr")
    state, t, *_ = make_state("transformers-bitlinear", per_row=True)
    checkpoints.load(state, model, "transformers-bitlinear")
    assert model.up.quant_type == "ai8pc_wpc"
    assert model.up.w_packed.numpy().tolist() == oracle.pack(t).tolist()


def test_bits_of_activations_and_eps():
    state, *_ = make_state("tetra-vpr")
    up = checkpoints.load(state, Model(), "tetra-vpr", act_bits=16, eps=1e-3).up
    assert (up.quant_type, up.eps) == ("ai16pc_wpt", 1e-3)


def test_a_layer_with_two_names():
    """The state has it under one of them; a module with a scale of its own stays."""
    state, t, *_ = make_state("tetra-vpr")
    model = Model()
    model.again = model.up
    model.norm.scale = nn.Parameter(torch.ones(3))
    checkpoints.load({**state, "norm.scale": torch.zeros(3)}, model, "tetra-vpr")
    assert model.again is model.up
    assert model.up.w_packed.numpy().tolist() == oracle.pack(t).tolist()
    assert torch.equal(model.norm.scale, torch.zeros(3))


def test_a_state_made_in_inference_mode():
    with torch.inference_mode():
        state, t, *_ = make_state("tetra-vpr")
    model = checkpoints.load(state, Model(), "tetra-vpr")
    assert model.up.w_packed.numpy().tolist() == oracle.pack(t).tolist()
    assert not any(t.is_inference() for t in model.state_dict().values())


# --- What is refused ---


def changed(change, format="tetra-vpr"):
    state = make_state(format)[0]
    change(state)
    return state


def assign(name, value):
    return lambda state: state.update({name: value(state[name]) if callable(value) else value})


INTEGERS = torch.ones(20, dtype=torch.int32)
WRONG = {
    "a truncated weight": (assign("up.weight", lambda w: w[:-1]), r"up: its weight is 12 x 20"),
    "truncated rows": (assign("up.weight", lambda w: w[:, :-1]), r"shape \(N, 5\) .* \[12, 4\]"),
    "an invalid code": (assign("up.weight", lambda w: w | 3), "up: .*invalid code 3"),
    "a scale of 0": (
        assign("up.scale", torch.tensor(0.0)),
        "must be positive, but it is 0",
    ),
    "a scale of NaN": (
        assign("up.scale", torch.tensor(torch.nan)),
        "positive, but it is nan",
    ),
    "scales of another shape": (assign("up.scale", torch.ones(5)), "one for each of 12 output"),
    "a missing weight": (lambda s: s.pop("up.weight"), "up: it has a scale, but no weight"),
    "a missing bias": (lambda s: s.pop("up.bias"), r"it has no values for up\.bias"),
    "a missing head": (lambda s: s.pop("head.weight"), r"it has no values for head\.weight"),
    "another tensor": (assign("down.weight", lambda w: w), r"the model has no down\.weight"),
    "another layer": (assign("down.scale", torch.ones(())), "down: .*no attribute `down`"),
    "a layer of another kind": (assign("norm.scale", torch.ones(())), "norm: .* is a LayerNorm"),
    "a bias of integers": (
        assign("up.bias", INTEGERS[:12]),
        r"up\.bias is tor",
    ),
    "a norm of integers": (
        assign("norm.weight", torch.ones(20, dtype=torch.int32)),
        "in the model",
    ),
    "a norm without values": (assign("norm.weight", torch.ones(20, device="meta")), "on the meta"),
    "a weight without values": (assign("up.weight", lambda w: w.to("meta")), "on the meta device"),
    "both kinds of weight": (assign("up.w_packed", torch.ones(1)), "beside packed weights"),
    "a norm of another size": (
        assign("norm.weight", torch.ones(4)),
        r"\[4\], but in the model \[20",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named_and_the_model_stays(case):
    change, message = WRONG[case]
    state = make_state("tetra-vpr")[0]
    state.setdefault("down.weight", torch.ones(1)) if "another tensor" in case else None
    change(state)
    model = Model()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match=message):
        checkpoints.load(state, model, "tetra-vpr")
    assert list(model.modules()) == modules
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(("format", "other"), [*itertools.permutations(CASES, 2)])
def test_another_format_is_refused_or_changes_the_scale(format, other):
    """No two formats agree on names, layout and use of the scale: a wrong one shows."""
    state, _, w_scale, bias = make_state(format)
    if {format, other} != {"transformers-bitlinear", "transformers-autobitlinear"}:
        with pytest.raises(ValueError, match=r"no packed layer|a scale, but no|must have shape"):
            checkpoints.load(state, Model(), other)
        return
    model = checkpoints.load(state, Model(), other)
    assert model.up.w_scale != w_scale
    assert not torch.allclose(model.up.bias, bias)


def test_an_exception_in_a_hook_leaves_the_model_as_it_was():
    def fail(*_):
        raise KeyError("in the hook")

    model = Model()
    model.head._register_load_state_dict_pre_hook(fail)
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(KeyError, match="in the hook"):
        checkpoints.load(make_state("tetra-vpr")[0], model, "tetra-vpr")
    assert list(model.modules()) == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_weights_that_are_not_ternary_are_refused():
    state = make_state("bitlinear-original", pack=lambda t: 0.5 * float_weight(t))[0]
    with pytest.raises(ValueError, match=r"w_packed\[0, 0\] is -?0\.5, but it must be"):
        checkpoints.load(state, Model(), "bitlinear-original")


def test_other_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one of .*'tetra-vpr'.* but it is 'tetra'"):
        checkpoints.load({}, Model(), "tetra")
    with pytest.raises(ValueError, match="no linear layer has a scale"):
        checkpoints.load(Model().state_dict(), Model(), "tetra-vpr")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(TypeError, match=r"must have a tensor .* for 'epoch' it has a int"):
        checkpoints.load(tmp_path / "other.pt", Model(), "tetra-vpr")
    torch.save(Model(), tmp_path / "module.pt")
    (tmp_path / "empty.pt").touch()
    for file in ("module.pt", "empty.pt"):
        with pytest.raises(ValueError, match=r"\.pt cannot be read as a state"):
            checkpoints.load(tmp_path / file, Model(), "tetra-vpr")
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "none.pt", Model(), "tetra-vpr")
