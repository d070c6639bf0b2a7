"""A model like Ternary-Bonsai: qwen3, all matrices ternary with scales of groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear
from tests import oracle

from .files import GROUPS, integration
from .models import IDS, make, name_in_file, transformers, write_model


def dense_twin(group_size):
    """In fp32, with scales that fp16 holds."""
    model = make("qwen3")
    matrices = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    for matrix in matrices:
        rows, columns = matrix.weight.shape
        scales = (torch.rand(rows, columns // group_size) + 0.5).half().float() / 16
        t = torch.randint(-1, 2, (rows, columns))
        matrix.weight.data = t * scales.repeat_interleave(group_size, dim=1)
    return model


def tokens(model):
    return model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("kind", GROUPS)
def test_a_gguf_file_generates_the_tokens_of_its_dense_twin(kind, tmp_path):
    model = dense_twin(GROUPS[kind][1])
    matrices = {name_in_file(n, "qwen3"): p for n, p in model.named_parameters() if p.dim() == 2}
    writer = write_model(tmp_path / "x.gguf", "qwen3", model, skip=list(matrices))
    for name, weight in matrices.items():
        values = weight.detach()
        writer.add_ternary(name, values.sign().long().numpy(), values.abs().numpy(), kind)
    loaded = integration.load(writer.write(), make("qwen3", device="meta"), act_bits=16, eps=1e-6)
    layers = [m for m in loaded.modules() if isinstance(m, BitLinear)]
    assert {layer.quant_type for layer in layers} == {f"ai16pc_wpg{GROUPS[kind][1]}"}
    assert isinstance(loaded.lm_head, BitLinear)
    oracle.assert_same_bits(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert tokens(loaded.eval()).tolist() == tokens(model).tolist()


def test_safetensors_generate_the_tokens_of_their_dense_twin(tmp_path):
    model = dense_twin(128)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    bitlinear.pack(loaded, act_bits=16)
    assert loaded.model.layers[1].mlp.down_proj.quant_type == "ai16pc_wpg128"
    assert tokens(loaded).tolist() == tokens(model).tolist()
