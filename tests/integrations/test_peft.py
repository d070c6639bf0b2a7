"""Adapters of PEFT over BitLinear layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear

peft = pytest.importorskip("peft", reason="needs PEFT, which needs a newer Python than bitlinear")


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embedding = nn.Embedding(50, 32, dtype=dtype)
        self.up = nn.Linear(32, 64, dtype=dtype)
        self.down = nn.Linear(64, 32, dtype=dtype)
        bitlinear.convert(self)

    def forward(self, tokens):
        h = self.embedding(tokens)
        return h + self.down(torch.relu(self.up(h)))


def adapted(model, **options):
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], **options)
    return peft.get_peft_model(model, config)


TOKENS = torch.arange(12).reshape(2, 6)


def train(model):
    """The loss before and after some steps."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(TOKENS).float() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.filterwarnings("ignore:the weight of a deployed BitLinear was dequantised")
def test_lora_over_deployed_layers(dtype, use_dora, tmp_path):
    base = bitlinear.deploy(Model(dtype))
    with torch.no_grad():
        before = base(TOKENS)
    packed = {name: b.clone() for name, b in base.named_buffers()}
    model = adapted(copy.deepcopy(base), use_dora=use_dora)
    with torch.no_grad():
        # A new adapter changes nothing, but DoRA rounds in the dtype of the model.
        tolerance = 1e-2 if use_dora else 0
        torch.testing.assert_close(model(TOKENS), before, rtol=tolerance, atol=tolerance)
    first, last = train(model)
    assert last < 0.9 * first
    layer = model.base_model.model.up.base_layer
    assert layer.is_deployed
    assert torch.equal(layer.w_packed, packed["up.w_packed"])

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(TOKENS), model.eval()(TOKENS))
        with model.disable_adapter():
            assert torch.equal(model(TOKENS), before)


@pytest.mark.filterwarnings("ignore:the weight of a deployed BitLinear was dequantised")
def test_merging_an_adapter_into_packed_weights_raises():
    model = adapted(bitlinear.deploy(Model()), init_lora_weights=False).eval()
    with torch.no_grad():
        before = model(TOKENS)
        with pytest.raises(RuntimeError, match=r"read-only: call undeploy\(\)"):
            model.merge_adapter()
        assert torch.equal(model(TOKENS), before)


def test_lora_over_layers_in_training():
    model = adapted(Model())
    first, last = train(model)
    assert last < 0.9 * first
    merged = model.eval().merge_and_unload()
    assert type(merged.up) is type(merged.down) is BitLinear
    with torch.no_grad():
        wanted = copy.deepcopy(merged)(TOKENS)
        assert torch.equal(merged(TOKENS), wanted)
        assert torch.equal(bitlinear.deploy(merged)(TOKENS), wanted)


@pytest.mark.parametrize("config", ["IA3Config", "LoHaConfig", "VeraConfig"])
def test_other_adapters_train(config):
    kinds = {
        "IA3Config": {"feedforward_modules": ["down"]},
        "LoHaConfig": {"r": 4},
        "VeraConfig": {"r": 4},
    }
    targets = ["up"] if config == "VeraConfig" else ["up", "down"]
    for base in (Model(), bitlinear.deploy(Model())):
        options = getattr(peft, config)(target_modules=targets, **kinds[config])
        model = peft.get_peft_model(base, options)
        model(TOKENS).square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert any(grad is not None and grad.any() for grad in gradients)
