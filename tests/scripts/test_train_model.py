"""The benchmark of training whole decoders, without a compiler and in small."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitlinear import BitLinear
from scripts.bench import train_model
from scripts.bench.devices import DEVICES
from scripts.bench.train_step import Expression

KINDS = {"nn.Linear": nn.Linear, "BitLinear": BitLinear, "expression": Expression}


@pytest.fixture
def _eager(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)


def build(name):
    torch.manual_seed(0)
    return train_model.CONTESTANTS[name](train_model.Decoder(1, 128, 8))


@pytest.mark.parametrize("name", train_model.CONTESTANTS)
def test_a_contestant_has_its_layers_in_the_blocks_alone(name):
    model = build(name)
    kinds = [type(layer) for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    assert kinds == [KINDS[name]] * 7
    assert type(model.lm_head) is nn.Linear


def test_both_ways_to_quantise_compute_the_same_loss():
    tokens, targets = torch.randint(train_model.VOCABULARY, (2, 2, 8))
    losses = {name: build(name)(tokens, targets).item() for name in train_model.CONTESTANTS}
    assert losses["BitLinear"] == pytest.approx(losses["expression"], rel=1e-4)
    assert losses["BitLinear"] != pytest.approx(losses["nn.Linear"], rel=1e-4)


@pytest.mark.usefixtures("_eager")
def test_every_step_trains():
    model = build("BitLinear")
    before = model.blocks[0].q.weight.detach().clone()
    step = train_model.training_step(model, 2, 8, "cpu")
    step()
    assert not torch.equal(model.blocks[0].q.weight, before)


@pytest.mark.usefixtures("_eager")
def test_a_row_for_each_contestant():
    names = ["nn.Linear", "BitLinear"]
    rows = train_model.measure((1, 128), 1, 8, names, 0.1, DEVICES["cpu"])
    assert [row["layers"] for row in rows] == names
    assert rows[0]["of nn.Linear"].lstrip("~") == "1.000"
