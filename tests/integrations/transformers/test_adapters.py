"""Adapters of PEFT on converted models of transformers: LoRA beside packed weights."""

from __future__ import annotations

import pytest
import torch

from bitlinear.autograd import CPU_MULTIPLIES_BF16
from bitlinear.integrations.transformers import fuse, unfuse
from tests import oracle
from tests.integrations.transformers.checkpoints import (
    IDS,
    convert,
    layers,
    load,
    logits,
    save_checkpoint,
)
from tests.memory import linux, output_of

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def converted(path, dtype=torch.float32):
    save_checkpoint(path / "theirs", "bitlinear", dtype=dtype)
    return convert(load(path / "theirs"))


def with_lora(model):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def train(model, steps=15):
    """The losses of some steps towards the tokens themselves."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_on_a_converted_model(dtype, tmp_path):
    base = converted(tmp_path, dtype)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain = logits(unfuse(base))
    fuse(base)
    model = with_lora(base)
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad == (parameter.grad is not None)

    model.save_pretrained(tmp_path / "adapter")
    trained = logits(model.eval())
    again = converted(tmp_path / "again", dtype)
    again.load_state_dict(before)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    oracle.assert_same_bits(logits(again), trained)
    with again.disable_adapter():
        oracle.assert_same_bits(logits(again), plain)
    assert all(layer.is_deployed for layer in layers(again).values())
    for name, layer in layers(again.base_model.model).items():
        key = name.replace(".base_layer", "")
        oracle.assert_same_bits(layer.w_packed, before[f"{key}.w_packed"])


OTHERS = {
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "ada": lambda: peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
}


@pytest.mark.filterwarnings("ignore:the weight of a deployed BitLinear was dequantised")
@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_train(name, tmp_path):
    base = converted(tmp_path)
    before = base.state_dict()["model.layers.0.self_attn.q_proj.w_packed"].clone()
    config = OTHERS[name]()
    config.task_type = "CAUSAL_LM"
    losses = train(peft.get_peft_model(base, config), steps=8)
    assert losses[-1] < losses[0]
    layer = base.model.layers[0].self_attn.q_proj.get_base_layer()
    oracle.assert_same_bits(layer.w_packed, before)


SCRIPT = """
import sys
import peft, torch
from torch import nn
import bitlinear
from tests.memory import growth_of

def make(kind, size):
    with torch.device("meta"):
        layers = [nn.Linear(size, size, bias=False, dtype=torch.bfloat16) for _ in range(8)]
        model = nn.Sequential(*layers)
        model.unused = nn.Parameter(torch.empty(1))  # PEFT asks for one in floating point
        if kind == "packed":
            bitlinear.deploy(bitlinear.convert(model, exclude=()))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0b01_10_00_01 if tensor.dtype == torch.uint8 else 0.01)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=r"\\d"))

def step(model, size):
    x = torch.randn(32, size, dtype=torch.bfloat16)
    model(x).float().square().mean().backward()

step(make(sys.argv[1], 64), 64)  # code, threads and their stacks
print(growth_of(lambda: step(make(sys.argv[1], 2048), 2048)))
"""


@pytest.mark.slow
@linux
def test_a_step_takes_less_memory_than_beside_float_weights():
    """The base weights are 64 MiB in bf16 and 8 MiB packed; one at a time is expanded.

    That takes 8 MiB; 16, in fp32, on a CPU that multiplies no bf16.
    """
    growth = {kind: int(output_of(SCRIPT, kind)) for kind in ("float", "packed")}
    expanded = 8 if CPU_MULTIPLIES_BF16 else 16
    assert growth["packed"] < growth["float"] - (48 - expanded) * 2**20, growth
