"""A model like Ternary-Bonsai: qwen3, all matrices ternary with scales of groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear
from tests import oracle

from .files import GROUPS, integration
from .models import IDS, make, name_in_file, ternary_model, transformers, write_model


def dense_twin(group_size, **kwargs):
    """In fp32, with scales that fp16 holds."""
    model = make("qwen3", **kwargs)
    matrices = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    for matrix in matrices:
        rows, columns = matrix.weight.shape
        scales = (torch.rand(rows, columns // group_size) + 0.5).half().float() / 16
        t = torch.randint(-1, 2, (rows, columns))
        matrix.weight.data = t * scales.repeat_interleave(group_size, dim=1)
    return model


def tokens(model):
    return model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)


def write_ternary(path, model, kind, skip=()):
    """Write a model whose matrices all are ternary."""
    matrices = {name_in_file(n, "qwen3"): p for n, p in model.named_parameters() if p.dim() == 2}
    writer = write_model(path, "qwen3", model, skip=list(matrices))
    for name, weight in matrices.items():
        if name not in skip:
            values = weight.detach()
            writer.add_ternary(name, values.sign().long().numpy(), values.abs().numpy(), kind)
    return writer.write()


@pytest.mark.parametrize("kind", GROUPS)
def test_a_gguf_file_generates_the_tokens_of_its_dense_twin(kind, tmp_path):
    model = dense_twin(GROUPS[kind][1])
    path = write_ternary(tmp_path / "x.gguf", model, kind)
    loaded = integration.load(path, make("qwen3", device="meta"), act_bits=16, eps=1e-6)
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


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", GROUPS)
def test_a_packed_embedding_generates_the_tokens_of_its_dense_twin(kind, device, tmp_path, caplog):
    model = dense_twin(GROUPS[kind][1])
    path = write_ternary(tmp_path / "x.gguf", model, kind)
    new = make("qwen3", device=device)
    with caplog.at_level("INFO", logger="bitlinear"):
        loaded = integration.load(path, new, act_bits=16, eps=1e-6, pack_embedding=True)
    embedding = loaded.get_input_embeddings()
    assert isinstance(embedding, bitlinear.Embedding)
    assert embedding.is_deployed
    assert embedding.quant_type == f"wpg{GROUPS[kind][1]}"
    oracle.assert_same_bits(embedding(IDS), model.model.embed_tokens(IDS).detach())
    assert tokens(loaded.eval()).tolist() == tokens(model).tolist()
    assert "loaded 16 deployed layers" in caplog.text


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_with_the_values_of_the_embedding_shares_its_packed_weight(
    is_tied, device, tmp_path
):
    model = dense_twin(128, tie_word_embeddings=True)
    path = write_ternary(tmp_path / "x.gguf", model, "PQ2_0", skip=["output.weight"])
    options = {"act_bits": 16, "eps": 1e-6, "pack_embedding": True}
    new = make("qwen3", device=device, tie_word_embeddings=is_tied)
    loaded = integration.load(path, new, **options).eval()
    assert isinstance(loaded.lm_head, BitLinear)
    assert loaded.lm_head.w_packed is loaded.model.embed_tokens.w_packed
    assert loaded.lm_head.w_scale is loaded.model.embed_tokens.w_scale
    assert tokens(loaded).tolist() == tokens(model).tolist()
    # The state goes through a file, into a model that was made in the same way.
    torch.save(loaded.state_dict(), tmp_path / "state.pt")
    again = integration.load(path, make("qwen3", tie_word_embeddings=is_tied), **options)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert tokens(again.eval()).tolist() == tokens(model).tolist()


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_packed_embedding_goes_through_a_safetensors_file(is_tied, tmp_path):
    """As the documents say: save_pretrained refuses it, and its message names this way."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = dense_twin(128, tie_word_embeddings=is_tied)
    skip = ["output.weight"] if is_tied else []
    path = write_ternary(tmp_path / "x.gguf", model, "PQ2_0", skip)
    new = make("qwen3", tie_word_embeddings=is_tied)
    loaded = integration.load(path, new, act_bits=16, eps=1e-6, pack_embedding=True)
    with pytest.raises(ValueError, match=r"load_deployed into .*\n  model\.embed_tokens is of"):
        loaded.save_pretrained(tmp_path / "refused")
    with pytest.raises(ValueError, match="embed_tokens is of the class Embedding") as caught:
        integration.save(loaded, tmp_path / "refused.gguf")
    assert str(caught.value).count("a scale for every 128") == 1
    safetensors.save_model(loaded, str(tmp_path / "x.safetensors"))

    again = make("qwen3", tie_word_embeddings=is_tied)
    embedding = bitlinear.Embedding.from_embedding(again.get_input_embeddings(), "wpg128")
    again.set_input_embeddings(embedding)
    again = bitlinear.convert(again, exclude=(), quant_type="ai16pc_wpg128")
    bitlinear.load_deployed(tmp_path / "x.safetensors", again)
    assert tokens(again.eval()).tolist() == tokens(model).tolist()
    if is_tied:
        assert again.lm_head.w_packed is again.model.embed_tokens.w_packed


def test_an_embedding_of_another_type_stays_dense(tmp_path):
    model = ternary_model("llama")
    path = write_model(tmp_path / "x.gguf", "llama", model).write()
    loaded = integration.load(path, make("llama"), pack_embedding=True)
    assert type(loaded.model.embed_tokens) is nn.Embedding
    assert type(loaded.lm_head) is nn.Linear


def test_a_refused_file_leaves_the_embedding(tmp_path):
    path = write_ternary(tmp_path / "x.gguf", dense_twin(128), "PQ2_0")
    model = make("qwen3")
    model.model.layers[1].mlp.up_proj.register_buffer("other", torch.ones(2))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"or modules that nn\.Linear does not have"):
        integration.load(path, model, pack_embedding=True)
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(after[name] is module for name, module in before.items())
