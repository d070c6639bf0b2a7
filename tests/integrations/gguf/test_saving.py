"""``save``: files that the package gguf and transformers read, and that ``load`` gives back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as prune_weights

import bitlinear
from bitlinear import BitLinear, packing
from bitlinear.integrations.transformers import fuse, quantize_head
from bitlinear.integrations.transformers.decoding import speed_up_decoding
from tests import oracle
from tests.integrations.gguf.files import gguf, integration
from tests.integrations.gguf.models import (
    CONFIGS,
    IDS,
    make,
    permuted,
    transformers,
)


def deploy(model):
    return bitlinear.deploy(bitlinear.convert(model)).eval()


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}


def with_scale(model, scale):
    for layer in layers_of(model).values():
        layer.w_scale = torch.tensor(scale)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def read(path):
    """The tensors and the metadata, by the reader of the package gguf."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return {tensor.name: tensor for tensor in reader.tensors}, fields


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_round_trip_keeps_every_bit(kind, dtype, tmp_path):
    if kind == "llama":
        model = deploy(make(kind, dtype))  # Its scales are no numbers in fp16.
    else:
        model = with_scale(deploy(make(kind, dtype)), [2.0**-7])
    integration.save(model, tmp_path / "x.gguf")
    loaded = integration.load(tmp_path / "x.gguf", make(kind, dtype, "meta"), eps=1e-6).eval()
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for name, tensor in loaded.state_dict().items():
        is_bias = name.endswith("bias")  # Biases of deployed layers are in fp32 then.
        oracle.assert_same_bits(tensor, wanted[name].float() if is_bias else wanted[name])
    oracle.assert_same_bits(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_values(kind, tmp_path):
    model = with_scale(deploy(make(kind, tie_word_embeddings=True)), [0.75])
    if kind == "llama":  # transformers does not take its biases from a file.
        model = with_scale(
            deploy(make(kind, tie_word_embeddings=True, attention_bias=False, mlp_bias=False)),
            [0.75],
        )
    integration.save(model, tmp_path / "x.gguf")
    config = copy.deepcopy(model.config)
    del config.quantization_config
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", config=config
    )
    for name, layer in layers_of(model).items():
        values = other.get_submodule(name).weight
        oracle.assert_same_bits(values.detach().float(), layer.dequantize())
    for name, parameter in model.named_parameters():
        oracle.assert_same_bits(other.get_parameter(name).detach().float(), parameter.detach())


def test_the_file_is_what_llama_cpp_reads(tmp_path):
    model = deploy(make("llama"))
    up = model.model.layers[0].mlp.up_proj
    up.w_scale = torch.tensor([37.0])
    q = model.model.layers[1].self_attn.q_proj
    integration.save(model, tmp_path / "x.gguf")
    tensors, fields = read(tmp_path / "x.gguf")
    kind = gguf.GGMLQuantizationType.TQ2_0

    found = tensors["blk.0.ffn_up.weight"]
    assert found.tensor_type == kind
    assert found.shape.tolist() == [256, 512]
    np.testing.assert_array_equal(gguf.dequantize(found.data, kind), up.dequantize())
    assert "blk.0.ffn_up.scale" not in tensors

    values = gguf.dequantize(tensors["blk.1.attn_q.weight"].data, kind)
    np.testing.assert_array_equal(values * q.w_scale.item(), permuted(q.dequantize().numpy(), 8))
    assert tensors["blk.1.attn_q.scale"].tensor_type == gguf.GGMLQuantizationType.F32
    assert tensors["blk.1.attn_q.scale"].data.tolist() == q.w_scale.tolist()
    np.testing.assert_array_equal(tensors["blk.1.attn_q.bias"].data, permuted(q.bias.numpy(), 8))
    norm = model.model.layers[1].post_attention_layernorm.weight
    np.testing.assert_array_equal(tensors["blk.1.ffn_norm.weight"].data, norm.detach().numpy())

    wanted = {
        "general.architecture": "llama",
        "general.file_type": 37,
        "tokenizer.ggml.model": "no_vocab",
        "llama.vocab_size": 96,
        "llama.context_length": 64,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.block_count": 2,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-6),
    }
    assert {key: fields[key] for key in wanted} == wanted


def test_bitnet_names_its_activation(tmp_path):
    integration.save(deploy(make("bitnet")), tmp_path / "x.gguf")
    tensors, fields = read(tmp_path / "x.gguf")
    assert fields["bitnet.hidden_activation"] == "relu2"
    assert {"blk.1.attn_sub_norm.weight", "blk.1.ffn_sub_norm.weight"} <= tensors.keys()
    assert "output.weight" not in tensors


def test_scales_of_rows_follow_their_rows(tmp_path):
    model = with_scale(deploy(make("llama")), [1.0])
    q = model.model.layers[0].self_attn.q_proj
    state = {**q.state_dict(), "w_scale": (torch.arange(256) + 1.0)[:, None] / 8}
    q.load_state_dict(state)
    integration.save(model, tmp_path / "x.gguf")
    tensors, _ = read(tmp_path / "x.gguf")
    values = gguf.dequantize(tensors["blk.0.attn_q.weight"].data, gguf.GGMLQuantizationType.TQ2_0)
    np.testing.assert_array_equal(values, permuted(q.dequantize().numpy(), 8))
    loaded = integration.load(tmp_path / "x.gguf", make("llama"))
    oracle.assert_same_bits(loaded.model.layers[0].self_attn.q_proj.w_scale, q.w_scale)


def with_groups(group_size):
    model = bitlinear.convert(make("llama"), quant_type=f"ai8pc_wpg{group_size}")
    for layer in layers_of(bitlinear.deploy(model)).values():
        layer.w_scale = torch.randint(1, 9, layer.w_scale.shape) / 8
    return model.eval()


def test_scales_of_groups_of_whole_blocks_are_saved(tmp_path):
    model = with_groups(256)
    integration.save(model, tmp_path / "x.gguf")
    loaded = integration.load(tmp_path / "x.gguf", make("llama"), eps=1e-6)
    assert loaded.model.layers[0].mlp.down_proj.quant_type == "ai8pc_wpg256"
    for name, layer in layers_of(model).items():
        oracle.assert_same_bits(loaded.get_submodule(name).dequantize(), layer.dequantize())


def test_scales_of_groups_that_fp16_cannot_hold_are_refused(tmp_path):
    model = with_groups(256)
    model.model.layers[1].mlp.down_proj.w_scale[3, 1] = 0.1
    message = r"down_proj: the scale of row 3, 0\.1\d*, is not .* in fp16.* save the state_dict of"
    assert_refused(model, tmp_path, message)


def test_scales_of_smaller_groups_are_refused(tmp_path):
    assert_refused(with_groups(128), tmp_path, "a scale for every 128 in_features, but TQ2_0 has")


def test_a_deployed_head_and_plain_linear_layers(tmp_path):
    model = make("llama", torch.bfloat16)
    bitlinear.deploy(bitlinear.convert(model, exclude=["q_proj"])).eval()
    with_scale(model, [0.5])
    integration.save(model, tmp_path / "x.gguf")
    loaded = integration.load(tmp_path / "x.gguf", make("llama", torch.bfloat16), eps=1e-6).eval()
    assert loaded.lm_head.is_deployed
    assert type(loaded.model.layers[0].self_attn.q_proj) is nn.Linear
    oracle.assert_same_bits(logits(loaded), logits(model))


def test_the_number_of_chunks_changes_nothing(tmp_path, monkeypatch):
    model = deploy(make("llama"))
    integration.save(model, tmp_path / "1.gguf")
    monkeypatch.setattr(packing, "_CHUNK_BYTES", 300)
    integration.save(model, tmp_path / "2.gguf")
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_what_was_loaded_is_saved_as_the_same_bytes(tmp_path):
    integration.save(deploy(make("llama")), tmp_path / "1.gguf")
    integration.save(integration.load(tmp_path / "1.gguf", make("llama")), tmp_path / "2.gguf")
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_a_model_that_generates_faster_is_saved_as_the_same_bytes(tmp_path):
    model = deploy(make("llama"))
    integration.save(model, tmp_path / "1.gguf")
    speed_up_decoding(fuse(model))
    assert "Fused" in type(model.model.layers[0]).__qualname__
    assert type(model.lm_head) is not nn.Linear
    integration.save(model, tmp_path / "2.gguf")
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


# --- What is refused, and writes no file ---


def assert_refused(model, folder, message):
    with pytest.raises(ValueError, match=message):
        integration.save(model, folder / "x.gguf")
    assert not list(folder.iterdir())


def change_scale(model, name, scale):
    model.get_submodule(name).load_state_dict(
        {**model.get_submodule(name).state_dict(), "w_scale": torch.tensor(scale)}
    )
    return model


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but llama.cpp computes silu"),
        ("bitnet", {"attention_bias": True}, r"q_proj\.bias, .*: llama\.cpp reads no such bias"),
        ("bitnet", {"tie_word_embeddings": False}, "lm_head is not tied to the embedding"),
        (
            "llama",
            {"hidden_size": 192},
            r"q_proj, .* and 9 more: in_features must be a multiple of 256",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8},
            "sliding_window is 8: it is not supported",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "only the default type is supported",
        ),
    ],
)
def test_models_that_llama_cpp_does_not_compute_are_refused(kind, change, message, tmp_path):
    assert_refused(deploy(make(kind, **change)), tmp_path, message)


def test_scales_that_are_not_exact_are_refused(tmp_path):
    model = with_scale(deploy(make("qwen2")), [0.5])
    name = "model.layers.1.mlp.up_proj"
    assert_refused(change_scale(model, name, [0.1]), tmp_path, f"{name}: the scale 0.1.* reads no")
    for scale in (2.0**-30, 2.0**30):
        model = change_scale(model, name, [scale])
        assert_refused(model, tmp_path, f"{name}: the scale .*is not a number in fp16")
    rows = [[0.5]] * 511 + [[0.1]]
    model = with_scale(deploy(make("llama")), [0.5])
    message = f"{name}: the scale of row 511, 0.1.* is not a number in fp16"
    assert_refused(change_scale(model, name, rows), tmp_path, message)
    model = bitlinear.deploy(bitlinear.convert(make("llama"), exclude=()))
    assert_refused(model, tmp_path, "lm_head: the scale .* reads no scale")


def test_layers_that_are_not_deployed_are_refused(tmp_path):
    model = deploy(make("qwen3"))
    model.model.layers[0].mlp.up_proj.undeploy()
    assert_refused(model, tmp_path, r"layers\.0\.mlp\.up_proj: not deployed: call")
    assert_refused(make("qwen3"), tmp_path, "has no deployed layer")


def test_layers_and_tensors_of_other_kinds_are_refused(tmp_path):
    class Other(BitLinear):
        pass

    model = deploy(make("qwen3"))
    model.model.layers[0].mlp.up_proj = Other(256, 512, bias=False).deploy()
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    model.model.norm.double()
    message = (
        r"up_proj: its class Other .*mlp\.extra\.weight, .*: llama.cpp has no.*: its dtype .*64"
    )
    assert_refused(model, tmp_path, f"(?s){message}")


@pytest.mark.parametrize("tied", [True, False])
def test_int8_heads_are_refused(tied, tmp_path):
    model = quantize_head(deploy(make("qwen3", tie_word_embeddings=tied)))
    assert_refused(model, tmp_path, "int8 weights.*: save the model before quantize_head")


def test_models_without_values_are_refused(tmp_path):
    model = deploy(make("qwen3"))
    model.model.norm.to("meta")
    assert_refused(model, tmp_path, r"model\.norm\.weight: on the meta device")


def test_other_models_are_refused(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=9)
    assert_refused(transformers.GPT2LMHeadModel(config), tmp_path, "'gpt2' cannot be saved as GGUF")
    with pytest.raises(TypeError, match="needs a model of transformers, but got a Linear"):
        integration.save(nn.Linear(4, 4), tmp_path / "x.gguf")


def test_an_error_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        integration.save(deploy(make("qwen3")), path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]
    assert path.read_bytes() == b"old"


def share_a_layer(model):
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj


def share_a_norm(model):
    first, second = (layer.input_layernorm for layer in model.model.layers)
    second.weight = first.weight


@pytest.mark.parametrize("share", [share_a_layer, share_a_norm])
def test_shared_tensors_are_written_for_each_name(share, tmp_path):
    model = deploy(make("llama"))
    share(model)
    integration.save(model, tmp_path / "x.gguf")
    loaded = integration.load(tmp_path / "x.gguf", make("llama"), eps=1e-6).eval()
    oracle.assert_same_bits(logits(loaded), logits(model))


def embed_ternary(model, deploys):
    embedding = bitlinear.Embedding.from_embedding(model.model.embed_tokens)
    model.model.embed_tokens = embedding.deploy() if deploys else embedding


def prune(model):
    prune_weights.l1_unstructured(model.lm_head, "weight", 0.5)


def damage(model):
    model.model.layers[1].mlp.up_proj.w_packed[0, 0] = 0xFF


def use_bitnet_layer(model):
    layer = transformers.integrations.bitnet.AutoBitLinear(512, 256, online_quant=True)
    model.model.layers[0].mlp.down_proj = layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: embed_ternary(model, True),
            "embed_tokens is of the class Embedding, with w",
        ),
        (
            lambda model: embed_ternary(model, False),
            "embed_tokens is of the class Embedding, with w",
        ),
        (prune, "lm_head is of the class Linear, with .*weight_orig"),
        (damage, r"layers\.1\.mlp\.up_proj: .*invalid code 3"),
        (use_bitnet_layer, r"layers\.0\.mlp\.down_proj is of the class AutoBitLinear"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(change, message, tmp_path):
    model = deploy(make("llama"))
    change(model)
    with pytest.raises(ValueError, match=message):
        integration.save(model, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="give the path of a file"):
        integration.save(deploy(make("llama")), tmp_path)
