"""``bitlinear.convert``: the layers that it replaces, shared layers, hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear, convert, deploy
from tests.models import ALL, IDS, Block, Model, converted

# --- Which layers ---


def test_convert_replaces_everything_but_the_head():
    model = Model()
    parameters = dict(model.named_parameters())
    assert convert(model) is model
    assert converted(model) == ALL - {"lm_head"}
    # The parameters are the same objects, so an existing optimizer keeps working.
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert len(parameters) == len(list(model.parameters()))
    model(IDS).sum().backward()


def test_filter_fn_sees_names_and_modules():
    seen = {}

    def wide_only(name, module):
        seen[name] = type(module)
        return module.out_features == 16

    model = convert(Model(), filter_fn=wide_only)
    assert converted(model) == {"blocks.0.up", "blocks.1.up"}
    assert seen == dict.fromkeys(ALL - {"lm_head"}, nn.Linear)


def test_a_model_that_is_one_linear_is_replaced():
    linear = nn.Linear(8, 4)
    layer = convert(linear)
    assert isinstance(layer, BitLinear)
    assert layer.weight is linear.weight
    assert deploy(layer) is layer
    assert layer.is_deployed
    assert convert(layer) is layer


def test_a_linear_that_filter_fn_excludes_is_returned():
    linear = nn.Linear(8, 4)
    assert convert(linear, filter_fn=lambda name, module: name != "") is linear


def test_converting_twice_changes_nothing():
    model = convert(Model())
    layers = list(model.modules())
    convert(model)
    assert all(a is b for a, b in zip(layers, model.modules()))


def test_wrong_quant_type_changes_nothing():
    model = Model()
    with pytest.raises(ValueError, match="ai8pc_wpt"):
        convert(model, quant_type="int4")
    assert not converted(model)


@pytest.mark.parametrize("value", [3, "model.pt", None, nn.Linear, [nn.Linear(2, 2)]])
@pytest.mark.parametrize("function", [convert, deploy])
def test_an_argument_that_is_not_a_module_raises(function, value):
    shown = "the class Linear" if value is nn.Linear else repr(value)[:20]
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, but got ") as error:
        function(value)
    assert shown in str(error.value)
    assert f"bitlinear.{function.__name__}(pipeline.model)" in str(error.value)


def test_every_layer_and_a_summary_are_logged(log):
    convert(Model(), filter_fn=lambda name, _: name != "blocks.1.up")
    lines = log()
    assert lines[-1] == "converted 3 of 5 linear layers to BitLinear"
    assert len(lines) == 6
    assert "blocks.1.up: not converted: filter_fn returned False" in lines
    assert "lm_head: not converted: excluded by 'lm_head'" in lines
    assert sum(": converted to BitLinear(in_features=" in line for line in lines) == 3


def test_the_package_exports_convert_and_deploy():
    assert (bitlinear.convert, bitlinear.deploy) == (convert, deploy)


@pytest.mark.parametrize(
    "function", [deploy, lambda m: bitlinear.set_quantization_strength(m, 0.5)]
)
def test_a_model_without_layers_warns(function):
    with pytest.warns(UserWarning, match="did nothing: this Sequential has no BitLinear of"):
        function(nn.Sequential(nn.Linear(4, 4)))


# --- Sharing ---


def test_a_shared_module_stays_one_module(log):
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(nn.ReLU(), shared)})
    convert(model)
    assert isinstance(model["a"][0], BitLinear)
    assert model["a"][0] is model["b"][1]
    assert any(line.startswith("a.0 = b.1: converted") for line in log())
    deploy(model)
    assert model["a"][0] is model["b"][1]
    assert model["a"][0].is_deployed


def test_a_shared_module_is_excluded_under_both_names():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"proj": shared, "lm_head": shared})
    convert(model)
    assert model["proj"] is model["lm_head"] is shared


def test_a_shared_block_is_converted_once():
    block = Block()
    model = nn.Sequential(block, block)
    convert(model)
    assert isinstance(model[0].up, BitLinear)
    assert model[0] is model[1] is block


def test_layers_that_share_a_weight_share_the_packed_weight():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    convert(model)
    assert model[0].weight is model[1].weight is not model[2].weight
    x = torch.randn(3, 8)
    before = model(x).detach()
    deploy(model)
    assert model[0].w_packed is model[1].w_packed
    assert model[0].w_scale is model[1].w_scale
    assert model[2].w_packed is not model[0].w_packed
    assert torch.equal(model(x), before)
    copied = copy.deepcopy(model)
    assert copied[0].w_packed is copied[1].w_packed


def test_layers_that_share_a_weight_but_not_eps_do_not_share_the_packed_weight():
    model = nn.Sequential(BitLinear(8, 8), BitLinear(8, 8, eps=0.5))
    model[1].weight = model[0].weight
    x = torch.randn(3, 8)
    before = model(x).detach()
    deploy(model)
    assert torch.equal(model(x), before)


def test_a_weight_shared_with_an_embedding_stays_there_in_floating_point(log):
    model = Model()
    model.lm_head.weight = model.embed.weight
    convert(model, exclude=())
    assert model.lm_head.weight is model.embed.weight
    before = model(IDS).detach()
    deploy(model)
    assert model.lm_head.is_deployed
    assert model.embed.weight.dtype == torch.float32
    assert torch.equal(model(IDS), before)
    wanted = "lm_head: deployed; embed.weight keeps the shared weight in floating point"
    assert wanted in log()


# --- Hooks and attributes ---


def test_hooks_and_attributes_move_along():
    model, calls = nn.Sequential(nn.Linear(8, 8)), []
    linear = model[0]
    handles = [
        linear.register_forward_hook(lambda m, *_: calls.append(("forward", type(m)))),
        linear.register_forward_pre_hook(
            lambda m, *_: calls.append(("pre", type(m))), with_kwargs=True
        ),
        linear.register_full_backward_pre_hook(lambda m, _: calls.append(("grad", type(m)))),
        linear.register_full_backward_hook(lambda m, *_: calls.append(("backward", type(m)))),
    ]
    linear.tag = "mine"
    convert(model)
    assert model[0].tag == "mine"
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == [(call, BitLinear) for call in ("pre", "forward", "grad", "backward")]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 8)).sum().backward()
    assert len(calls) == 4


def test_a_hook_for_failed_calls_moves_along():
    model, calls = nn.Sequential(nn.Linear(8, 8)), []
    model[0].register_forward_hook(
        lambda module, args, kwargs, output: calls.append(output),
        with_kwargs=True,
        always_call=True,
    )
    convert(model)
    with pytest.raises(ValueError, match="in_features"):
        model(torch.randn(2, 7))
    assert calls == [None]
