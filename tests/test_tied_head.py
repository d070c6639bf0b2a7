"""A linear head that has the weight of an embedding."""

from __future__ import annotations

import copy
import pickle

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import bitlinear
from bitlinear import BitLinear, Embedding

IDS = torch.randint(0, 19, (4, 6), generator=torch.Generator().manual_seed(1))


class LM(nn.Module):
    """A small language model; ``first`` says whether torch visits the embedding or the head first.

    Its layer is ternary, but its norm is not.
    """

    def __init__(self, first="embed", weights="wpt", head=None):
        super().__init__()
        make = {
            "embed": lambda: Embedding(19, 10, padding_idx=0, quant_type=weights),
            "head": head or (lambda: BitLinear(10, 19, False, quant_type=f"ai8pc_{weights}")),
        }
        for name in ("embed", "head") if first == "embed" else ("head", "embed"):
            setattr(self, name, make[name]())
        self.layer, self.norm = BitLinear(10, 10), nn.LayerNorm(10)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + self.layer(x).relu()))


def are_tied(model):
    embed, head = model.embed, model.head
    assert embed.is_deployed == head.is_deployed
    if embed.is_deployed:
        return embed.w_packed is head.w_packed and embed.w_scale is head.w_scale
    return embed.weight is head.weight


def made(deployed, **kwargs):
    model = LM(**kwargs)
    return bitlinear.deploy(model) if deployed else model


orders = pytest.mark.parametrize("first", ["embed", "head"])
types = pytest.mark.parametrize("weights", ["wpt", "wpc"])
target_forms = pytest.mark.parametrize("deployed", [True, False])
source_forms = pytest.mark.parametrize("from_deployed", [True, False])


@orders
@types
def test_a_model_that_was_trained_gives_the_same_logits_when_deployed(first, weights, log):
    model = LM(first, weights)
    assert len(list(model.parameters())) == 5
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    logits = model(IDS)
    bitlinear.deploy(model)
    assert torch.equal(model(IDS), logits)
    assert are_tied(model)
    assert sum("keeps the shared weight" in line for line in log()) == 0
    model.head.undeploy()
    assert are_tied(model)
    assert torch.equal(model(IDS), logits)


def test_the_gradients_of_both_add_up():
    model = LM()
    weight, grads = model.embed.weight, []
    for embed, head in ((True, False), (False, True), (True, True)):
        # The other of the two gets a copy.
        model.embed.weight = weight if embed else nn.Parameter(weight.detach().clone())
        model.head.weight = weight if head else nn.Parameter(weight.detach().clone())
        model(IDS).square().sum().backward()
        grads.append(weight.grad)
        weight.grad = None
    torch.testing.assert_close(grads[0] + grads[1], grads[2])
    assert all(grad.any() for grad in grads[:2])


@target_forms
@source_forms
@orders
def test_states_keep_the_tie(deployed, from_deployed, first, tmp_path):
    source, target = made(from_deployed), made(deployed, first=first)
    for _ in range(2):  # the second time, both are of one kind
        target.load_state_dict(source.state_dict())
        assert torch.equal(target(IDS), source(IDS))
        assert are_tied(target)
        assert target.embed.is_deployed == from_deployed
    target = made(deployed, first=first)
    safetensors.torch.save_model(source, str(tmp_path / "model.safetensors"))
    assert safetensors.torch.load_model(target, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(target(IDS), source(IDS))
    assert are_tied(target)


@target_forms
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_deployed_keeps_the_tie(deployed, device, tmp_path):
    source = made(True)
    safetensors.torch.save_model(source, str(tmp_path / "model.safetensors"))
    with torch.device(device):
        target = made(deployed)
    bitlinear.load_deployed(tmp_path / "model.safetensors", target)
    assert torch.equal(target(IDS), source(IDS))
    assert are_tied(target)
    target.embed.undeploy()
    assert are_tied(target)


def test_load_deployed_names_layers_of_another_kind(tmp_path):
    table = nn.Sequential(Embedding(19, 10))
    path = str(tmp_path / "model.safetensors")
    safetensors.torch.save_model(table, path)
    with pytest.raises(ValueError, match=r"floating-point weights of .*0\.weight"):
        bitlinear.load_deployed(path, nn.Sequential(Embedding(19, 10)))
    safetensors.torch.save_model(bitlinear.deploy(table), path)
    with pytest.raises(ValueError, match=r"0\.w_packed.* nn\.Embedding a bitlinear\.Embedding"):
        bitlinear.load_deployed(path, nn.Sequential(nn.Embedding(19, 10)))


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.half(),
        lambda m: m.to("meta"),
        lambda m: m.to_empty(device="cpu"),
    ],
)
def test_copies_and_moves_keep_the_tie(change):
    assert are_tied(change(made(True)))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            lambda: BitLinear(10, 19, False, eps=1e-3),
            r"embed: head has the same weight, .*\(eps=0\.001 and .*, not 1e-06 and",
        ),
        (
            lambda: BitLinear(10, 19, False, quant_type="ai8pc_wpc"),
            r"embed: head .*quant_type='ai8pc_wpc', not 1e-06 and 'wpt'\): make eps",
        ),
    ],
)
def test_a_head_of_another_quantisation_is_refused(head, message):
    model = LM(head=head)
    logits = model(IDS)
    with pytest.raises(ValueError, match=message):
        bitlinear.deploy(model)
    assert not model.layer.is_deployed
    assert torch.equal(model(IDS), logits)
    assert are_tied(model)


def test_a_head_of_16_bits_shares_the_table():
    model = made(True, head=lambda: BitLinear(10, 19, False, quant_type="ai16pc_wpt"))
    assert are_tied(model)
    assert model.head.quant_type == "ai16pc_wpt"


def test_a_plain_head_keeps_the_weight(log):
    model = LM(head=lambda: nn.Linear(10, 19, bias=False))
    weight = model.head.weight
    bitlinear.deploy(model)
    assert model.embed.is_deployed
    assert model.head.weight is weight
    assert "embed: deployed; head.weight keeps the shared weight in floating point" in log()


def test_functions_on_the_weight_of_a_deployed_table():
    model, x = made(True), torch.randn(3, 10)
    assert torch.equal(F.linear(x, model.embed.weight), model.head(x))
    assert torch.equal(F.embedding(IDS, model.head.weight), model.embed(IDS))


def test_a_tied_layer_of_another_type_is_not_changed_by_a_load():
    model = LM(head=lambda: BitLinear(10, 19, False, quant_type="ai8pc_wpc"))
    packed = Embedding(19, 10).deploy()
    state = {f"embed.{name}": tensor for name, tensor in packed.state_dict().items()}
    with pytest.raises(RuntimeError, match="a layer with the same weight has another quantisation"):
        model.load_state_dict(state, strict=False)
    assert (model.head.quant_type, model.head.is_deployed) == ("ai8pc_wpc", False)
    assert model.head.weight is model.embed.weight
