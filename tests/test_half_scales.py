"""Scales of groups in fp16: a state that is smaller, and loads with the same bits."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bitlinear
from bitlinear.groups import round_scales
from bitlinear.half_scales import restore_scales


def build():
    types = {"groups": "ai8pc_wpg32", "tensor": "ai8pc_wpt"}
    layers = {name: bitlinear.BitLinear(96, 40, quant_type=t) for name, t in types.items()}
    return nn.ModuleDict(layers)


def deployed():
    """A deployed model whose groups have scales of 11 bits."""
    model = bitlinear.deploy(build())
    scales = torch.empty(40, 3).uniform_(0.001, 0.016).half().float()
    model["groups"].w_scale.copy_(round_scales(scales))
    return model


def assert_same_state(model, wanted):
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_loads_with_the_same_bits(assign):
    state = deployed().state_dict()
    before = dict(state)
    half = bitlinear.halve_scales(state)
    assert state == before
    assert half._metadata is state._metadata
    assert half["groups.w_scale_fp16"].dtype == torch.float16
    assert "groups.w_scale" not in half
    assert half["tensor.w_scale"] is state["tensor.w_scale"]
    file = io.BytesIO()
    torch.save(half, file)
    for model in (build(), bitlinear.deploy(build())):
        file.seek(0)
        model.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert_same_state(model, state)


def test_a_file_is_mapped_and_tied_scales_stay_tied(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = deployed().state_dict()
    safetensors.save_file(bitlinear.halve_scales(state), tmp_path / "model.safetensors")
    assert_same_state(bitlinear.load_deployed(tmp_path, build()), state)

    state["tied.w_packed"] = state["groups.w_packed"].detach()
    state["tied.w_scale"] = state["groups.w_scale"].detach()  # as state_dict() does
    half = bitlinear.halve_scales(state)
    assert half["tied.w_scale_fp16"] is half["groups.w_scale_fp16"]
    restore_scales(half)
    assert half["tied.w_scale"] is half["groups.w_scale"]


class Loading(Mapping):
    """A state that reads a tensor when it is asked for, and keeps none."""

    def __init__(self, state):
        self.state = state

    def __getitem__(self, name):
        return self.state[name].clone()

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)


def test_layers_whose_tensors_follow_each_other_in_memory_are_not_tied():
    models = {f"{i}.": deployed() for i in range(6)}
    state = {prefix + n: t for prefix, m in models.items() for n, t in m.state_dict().items()}
    half = bitlinear.halve_scales(Loading(state))
    for prefix in models:
        scales = half[f"{prefix}groups.w_scale_fp16"].float()
        assert torch.equal(scales, state[f"{prefix}groups.w_scale"])


@given(
    values=st.lists(st.floats(2**-14, 1, width=16), min_size=3, max_size=3),
    third=st.sampled_from([0.0, 1 / 3, 1e-6, 1e5]),
)
def test_scales_that_fp16_would_change_stay(values, third):
    model = deployed()
    scales = torch.tensor([values] * 39 + [[*values[:2], third]])
    model["groups"].w_scale.copy_(round_scales(scales))
    state = model.state_dict()
    half = bitlinear.halve_scales(state)
    exact = torch.equal(state["groups.w_scale"].half().float(), state["groups.w_scale"])
    assert ("groups.w_scale_fp16" in half) == exact
    restored = build()
    restored.load_state_dict(half)
    assert_same_state(restored, state)


def test_a_model_is_no_state():
    with pytest.raises(TypeError, match=r"got ModuleDict: pass model\.state_dict\(\)"):
        bitlinear.halve_scales(build())


def test_other_tensors_stay():
    tensors = {
        "w_scale": torch.ones(4, 3),  # of no deployed layer
        "rows.w_packed": torch.zeros(4, 8, dtype=torch.uint8),
        "rows.w_scale": torch.ones(4, 1),
        "meta.w_packed": torch.zeros(4, 8, dtype=torch.uint8, device="meta"),
        "meta.w_scale": torch.ones(4, 2, device="meta"),
        "double.w_packed": torch.zeros(4, 8, dtype=torch.uint8),
        "double.w_scale": torch.ones(4, 2, dtype=torch.float64),
        "sparse.w_packed": torch.zeros(4, 8, dtype=torch.uint8),
        "sparse.w_scale": torch.ones(4, 2).to_sparse(),
        "other.w_packed": torch.zeros(4, 8),  # a layer of another package
        "other.w_scale": torch.ones(4, 2),
        "extra": "no tensor",
    }
    assert bitlinear.halve_scales(tensors) == tensors


def test_scales_that_a_tool_has_converted_are_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    half = bitlinear.halve_scales(deployed().state_dict())
    scales = half["groups.w_scale_fp16"]
    for value, message in (
        (scales.bfloat16(), "float16, but it is torch.bfloat16: a tool has converted"),
        (scales.float(), "float16, but it is torch.float32"),
        ([1.0], "float16, but it is list"),
    ):
        state = {**half, "groups.w_scale_fp16": value}
        model = build()
        before = copy.deepcopy(model["groups"].state_dict())
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)
        assert_same_state(model["groups"], before)
        if isinstance(value, torch.Tensor):
            safetensors.save_file(state, tmp_path / "model.safetensors")
            with pytest.raises(TypeError, match=message):
                bitlinear.load_deployed(tmp_path, model)
    foreign = {"other.w_scale_fp16": torch.ones(2)}
    restored = dict(foreign)
    restore_scales(restored)
    assert restored == foreign
    both = {**half, "groups.w_scale": torch.ones(40, 3)}
    with pytest.raises(RuntimeError, match=r"both 'groups\.w_scale' and"):
        build().load_state_dict(both)
