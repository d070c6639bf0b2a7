"""``bitlinear.deploy``: whole models."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from torch import nn

from bitlinear import BitLinear, convert, deploy
from tests.models import ALL, IDS, Block, Model, converted


def test_deploy_changes_no_result(log):
    model = convert(Model()).eval()
    before = model(IDS).detach()
    assert deploy(model) is model
    assert torch.equal(model(IDS), before)
    assert all(m.is_deployed for m in model.modules() if isinstance(m, BitLinear))
    assert log()[-1] == "deployed 4 BitLinear layers"
    deploy(model)
    assert log()[-1] == "deployed 0 BitLinear layers"


def test_deploy_names_the_layers_that_it_cannot_deploy():
    model = convert(Model())
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] = float("nan")
        model.blocks[1].down.weight[0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=r"(?s)blocks\.1\.up: .*NaN.*blocks\.1\.down: .*NaN"
    ) as error:
        deploy(model)
    assert "blocks.0" not in str(error.value)
    assert not any(m.is_deployed for m in model.modules() if isinstance(m, BitLinear))


def test_deploy_names_layers_that_were_never_called():
    model = convert(Model(), exclude=())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach())
    for name in ALL - {"blocks.1.up"}:
        vars(model.get_submodule(name))["_called"] = True
    with pytest.warns(
        UserWarning, match=r"1 of 5 BitLinear .* called, .*: blocks\.1\.up\."
    ) as caught:
        deploy(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert model.blocks[1].up.is_deployed


@pytest.mark.parametrize("called", [True, False])
def test_deploy_does_not_warn_if_all_layers_were_called_or_none(called):
    model = convert(Model())
    for name in converted(model):
        vars(model.get_submodule(name))["_called"] = called
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deploy(model)


def test_a_deployed_model_loads_into_a_fresh_one(tmp_path):
    source = deploy(convert(Model()))
    torch.save(source.state_dict(), tmp_path / "model.pt")
    target = convert(Model())
    target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(target(IDS), source(IDS))

    with torch.device("meta"):
        skeleton = deploy(convert(Model()))
    state = torch.load(tmp_path / "model.pt", weights_only=True, mmap=True)
    skeleton.load_state_dict(state, assign=True)
    assert torch.equal(skeleton(IDS), source(IDS))


def test_training_stays_possible_around_deployed_layers():
    # The deployed layer is a frozen feature extractor; the layer behind it trains.
    model = nn.Sequential(BitLinear(8, 8).deploy(), nn.Linear(8, 2))
    model(torch.randn(3, 8)).sum().backward()
    assert model[1].weight.grad is not None


# --- Weights that accelerate offloads ---


def offload(layer, *wrappers, **attributes):
    """Offload as accelerate does: the weight is on meta; a hook loads it in each call."""
    hook = types.SimpleNamespace(**attributes)
    for _ in wrappers:
        hook = types.SimpleNamespace(hooks=(types.SimpleNamespace(), hook))
    layer._hf_hook = hook
    return layer.to("meta")


@pytest.mark.parametrize(
    "make",
    [
        lambda model: offload(model[0].up, offload=True),
        lambda model: offload(model[0].up, "SequentialHook", offload=True),
        lambda model: offload(model[0], offload=True, place_submodules=True),
        lambda model: offload(model, offload=True, place_submodules=True),
    ],
)
def test_deploy_of_offloaded_weights_raises(make):
    model = convert(nn.Sequential(Block(), Block()))
    make(model)
    with pytest.raises(ValueError, match=r"0\.up: its weight is offloaded by accelerate"):
        deploy(model)
    assert not any(m.is_deployed for m in model.modules() if isinstance(m, BitLinear))


@pytest.mark.parametrize("attributes", [{}, {"offload": False}, {"offload": True}])
def test_deploy_of_a_meta_model_without_offloading_hooks(attributes):
    model = convert(nn.Sequential(Block()))
    offload(model, **attributes)
    deploy(model)


def test_deploy_of_an_offloaded_model_of_accelerate_raises():
    accelerate = pytest.importorskip("accelerate")
    model = convert(nn.Sequential(Block()))
    x = torch.randn(3, 8)
    wanted = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"0\.up: .*remove_hook_from_submodules"):
        deploy(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    with torch.no_grad():
        assert torch.equal(deploy(model)(x), wanted)
