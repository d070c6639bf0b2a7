"""``load``: models of every architecture, from files that the tests write."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear, packing
from tests import oracle
from tests.integrations.gguf.files import GROUPS, Writer, gguf, integration, layout_of
from tests.integrations.gguf.models import (
    CONFIGS,
    IDS,
    SCALE,
    make,
    ternary_model,
    transformers,
    write_model,
)

ARCHITECTURES = {
    **{kind: kind for kind in CONFIGS},
    "bitnet-b1.58": "bitnet",
    "bitnet-25": "bitnet",
}


def deployed(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}


def assert_loaded(loaded, model, scale=SCALE):
    """The layers have the weights of ``model``, and its other parameters are the same."""
    linears = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "lm_head" not in name
    }
    assert deployed(loaded).keys() == linears.keys()
    for name, layer in deployed(loaded).items():
        t = (linears[name].weight.detach().float() / scale).round().long().numpy()
        assert layer.is_deployed
        assert layer.w_packed.tolist() == oracle.pack(t).tolist()
        oracle.assert_same_bits(layer.w_scale, torch.tensor([scale]))
        if linears[name].bias is not None:
            oracle.assert_same_bits(layer.bias, linears[name].bias.detach().float())
    wanted = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        oracle.assert_same_bits(parameter, wanted[name])
    ties = [m.lm_head.weight is m.model.embed_tokens.weight for m in (loaded, model)]
    assert ties[0] == ties[1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, device, tmp_path):
    kind = ARCHITECTURES[architecture]
    model = ternary_model(kind)
    path = write_model(tmp_path / "x.gguf", kind, model, architecture=architecture).write()
    empty = make(kind, device=device)
    loaded = integration.load(path, empty)
    assert loaded is empty
    assert_loaded(loaded, model)
    assert all(layer.eps == 1e-5 for layer in deployed(loaded).values())
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    # The same layers in the same model, made in another way.
    twin = bitlinear.pack(copy.deepcopy(model), exclude=["lm_head"])
    for layer in deployed(twin).values():
        layer.eps = 1e-5
    with torch.no_grad():
        oracle.assert_same_bits(loaded(IDS).logits, twin(IDS).logits)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", *GROUPS, "x86", "arm"])
def test_every_type_with_rows_in_another_order(kind, tmp_path):
    model = ternary_model("llama")
    path = write_model(tmp_path / "x.gguf", "llama", model, kind).write()
    loaded = integration.load(path, make("llama"), i2_s_layout=layout_of(kind))
    assert_loaded(loaded, model)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", *GROUPS, "x86", "arm"])
def test_the_number_of_chunks_changes_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK_BYTES", 1700)  # six rows of 256, three of 512
    model = ternary_model("llama")
    path = write_model(tmp_path / "x.gguf", "llama", model, kind, floats="Q8_0").write()
    loaded = integration.load(path, make("llama"), i2_s_layout=layout_of(kind))
    number = gguf.GGMLQuantizationType.Q8_0
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        values = gguf.quantize(weight.detach().numpy(), number)
        weight.data = torch.from_numpy(gguf.dequantize(values, number))
    assert_loaded(loaded, model)


def test_scales_of_rows_follow_their_rows(tmp_path):
    model = ternary_model("llama", scale=1.0)
    weight = model.model.layers[1].self_attn.q_proj.weight.data
    rows = (torch.arange(256) + 1.0)[:, None]
    writer = write_model(tmp_path / "x.gguf", "llama", model, skip=["blk.1.attn_q.weight"])
    order = torch.tensor([h * 32 + i + p * 16 for h in range(8) for i in range(16) for p in (0, 1)])
    values = (weight * rows)[order].numpy()
    data = gguf.quantize(values, gguf.GGMLQuantizationType.TQ2_0)
    loaded = integration.load(
        writer.add("blk.1.attn_q.weight", data, "TQ2_0").write(), make("llama")
    )
    layer = loaded.model.layers[1].self_attn.q_proj
    assert layer.quant_type == "ai8pc_wpc"
    oracle.assert_same_bits(layer.w_scale, rows)
    assert layer.w_packed.tolist() == oracle.pack(weight.long().numpy()).tolist()


@pytest.mark.parametrize("floats", ["F16", "BF16", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_embedding_and_head_of_other_types(floats, dtype, device, tmp_path):
    model = ternary_model("qwen3")
    if floats == "Q6_K":  # The library only reads it.
        names = ["token_embd.weight", "output.weight"]
        writer = write_model(tmp_path / "x.gguf", "qwen3", model, skip=names)
        data = np.random.default_rng(0).integers(0, 256, (96, 210)).astype(np.uint8)
        data[:, -2:] = np.array([2.0**-9], np.float16).view(np.uint8)
        for name in names:
            writer.add(name, data, "Q6_K")
        wanted = [torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q6_K))] * 2
    else:
        writer = write_model(tmp_path / "x.gguf", "qwen3", model, floats=floats)
        number = gguf.GGMLQuantizationType[floats]
        weights = [model.model.embed_tokens.weight, model.lm_head.weight]
        wanted = [
            torch.from_numpy(gguf.dequantize(gguf.quantize(w.detach().numpy(), number), number))
            for w in weights
        ]
    loaded = integration.load(writer.write(), make("qwen3", dtype, device))
    oracle.assert_same_bits(loaded.model.embed_tokens.weight, wanted[0].to(dtype))
    oracle.assert_same_bits(loaded.lm_head.weight, wanted[1].to(dtype))
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == dtype


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_without_a_head_has_that_of_the_embedding(device, tmp_path):
    model = ternary_model("llama")
    path = write_model(tmp_path / "x.gguf", "llama", model, skip=["output.weight"]).write()
    loaded = integration.load(path, make("llama", device=device))
    oracle.assert_same_bits(loaded.lm_head.weight, model.model.embed_tokens.weight.detach())
    oracle.assert_same_bits(loaded.model.embed_tokens.weight, loaded.lm_head.weight)


def test_a_ternary_head_becomes_a_layer(tmp_path):
    model, t = ternary_model("llama"), oracle.ternary(96, 256)
    writer = write_model(tmp_path / "x.gguf", "llama", model, skip=["output.weight"])
    loaded = integration.load(
        writer.add_ternary("output.weight", t, 37.0, "TQ1_0").write(), make("llama")
    )
    assert loaded.lm_head.w_packed.tolist() == oracle.pack(t).tolist()


def test_linear_layers_can_stay_in_floating_point(tmp_path):
    model = ternary_model("llama")
    name = "blk.0.ffn_up.weight"
    writer = write_model(tmp_path / "x.gguf", "llama", model, skip=[name])
    up = model.model.layers[0].mlp.up_proj
    writer.add(name, up.weight.detach().numpy() / 2)
    writer.add("blk.0.ffn_up.scale", np.array([2.0], np.float32))
    loaded = integration.load(writer.write(), make("llama"))
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    oracle.assert_same_bits(loaded.model.layers[0].mlp.up_proj.weight, up.weight.detach())
    assert len(deployed(loaded)) == 13


def test_activations_of_16_bits_and_another_eps(tmp_path):
    path = write_model(tmp_path / "x.gguf", "qwen2", ternary_model("qwen2")).write()
    loaded = integration.load(path, make("qwen2"), act_bits=16, eps=1e-3)
    assert {(m.quant_type, m.eps) for m in deployed(loaded).values()} == {("ai16pc_wpt", 1e-3)}
    with pytest.raises(ValueError, match="act_bits must be 8 or 16, but it is 4"):
        integration.load(path, make("qwen2"), act_bits=4)


def test_a_loaded_model_is_saved_by_transformers(tmp_path):
    path = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama")).write()
    loaded = integration.load(path, make("llama", device="meta"))
    loaded.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for name, tensor in loaded.state_dict().items():
        oracle.assert_same_bits(again.state_dict()[name], tensor)


def test_hooks_modes_and_requires_grad_stay(tmp_path):
    path = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama")).write()
    model, calls = make("llama"), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    model.model.norm.weight.requires_grad = False
    loaded = integration.load(path, model.train())
    assert not loaded.model.norm.weight.requires_grad
    assert loaded.model.embed_tokens.weight.requires_grad
    assert loaded.model.layers[0].mlp.up_proj.training
    loaded(IDS)
    assert calls


def test_a_model_made_in_inference_mode(tmp_path):
    model = ternary_model("llama")
    path = write_model(tmp_path / "x.gguf", "llama", model).write()
    with torch.inference_mode():
        loaded = integration.load(path, make("llama"))
    assert_loaded(loaded, model)
    assert not any(parameter.is_inference() for parameter in loaded.parameters())


def test_derived_factors_of_rotations_need_the_config(tmp_path):
    writer = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama"))
    path = writer.add("rope_freqs.weight", np.ones(16, np.float32)).write()
    with pytest.raises(ValueError, match=r"scaled by .llama3., but"):
        integration.load(path, make("llama"))
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    integration.load(path, make("llama", rope_parameters=scaled))


# --- What is refused, and leaves the model as it was ---


def assert_refused(path, model, message, **kwargs):
    """``load`` raises ValueError and changes nothing."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        integration.load(path, model, **kwargs)
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        oracle.assert_same_bits(tensor, before[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 512}, "embedding_length is 256, but the config of the model has 512"),
        ({"num_hidden_layers": 3}, "block_count is 2, but the config of the model has 3"),
        ({"num_key_value_heads": 8}, "head_count_kv is 4, but the config of the model has 8"),
        ({"intermediate_size": 768}, "feed_forward_length is 512, but"),
        ({"rms_norm_eps": 1e-3}, "layer_norm_rms_epsilon is"),
        ({"hidden_act": "gelu"}, "compute silu, but the config of the model has hidden_act='gelu'"),
        ({"vocab_size": 99}, r"token_embd.weight has shape \[96, 256\], but .* shape \[99, 256\]"),
        ({"attention_bias": False}, "the model has no parameter for blk.0.attn_q.bias"),
        ({"tie_word_embeddings": True}, "output.weight, but the model ties its head"),
    ],
)
def test_another_config_is_refused(change, message, tmp_path):
    path = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama")).write()
    assert_refused(path, make("llama", **change), message)


def test_another_type_of_model_is_refused(tmp_path):
    path = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama")).write()
    assert_refused(path, make("qwen2"), "architecture 'llama', but the model is of type 'qwen2'")
    path = Writer(tmp_path / "y.gguf", "gemma3").add("a", np.ones(3, np.float32)).write()
    assert_refused(path, make("qwen2"), r"architecture 'gemma3', but load\(\) knows only \['llama'")
    with pytest.raises(TypeError, match="needs a model of transformers, but got a Linear"):
        integration.load(path, nn.Linear(4, 4))


def test_bitnet_cpp_computes_relu2_only(tmp_path):
    model = ternary_model("bitnet", hidden_act="silu")
    path = write_model(tmp_path / "x.gguf", "bitnet", model, architecture="bitnet-b1.58").write()
    assert_refused(path, make("bitnet", hidden_act="silu"), "compute relu2, but")


def test_missing_tensors_are_refused(tmp_path):
    names = ["blk.1.ffn_down.weight", "blk.0.attn_norm.weight"]
    path = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama"), skip=names).write()
    message = r"(?s)no tensor for .*\(in the file: blk\.0\.attn_norm\.weight\).*blk\.1\.ffn_down"
    assert_refused(path, make("llama"), message)


def test_a_tensor_of_another_quantisation_is_refused(tmp_path):
    name = "blk.1.ffn_down.weight"
    writer = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama"), skip=[name])
    data = gguf.quantize(np.ones((256, 512), np.float32), gguf.GGMLQuantizationType.Q8_0)
    path = writer.add(name, data, "Q8_0").write()
    assert_refused(path, make("llama"), rf"{name} has type Q8_0, which is not ternary")


@pytest.mark.parametrize(("number", "kind"), [(36, "I2_S"), (15, "Q8_K")])
def test_an_embedding_that_cannot_be_dequantised_is_refused(number, kind, tmp_path):
    name = "token_embd.weight"
    writer = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama"), skip=[name])
    path = writer.add(name, np.zeros(96 * 292, np.uint8), number, (96, 256)).write()
    message = f"{name}: the package gguf cannot dequantise type {kind}"
    assert_refused(path, make("llama"), message, i2_s_layout="x86")


def test_a_refused_type_is_named(tmp_path):
    name = "blk.1.ffn_down.weight"
    writer = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama"), skip=[name])
    path = writer.add(name, np.zeros(256 * 136, np.uint8), 135, (256, 512)).write()
    assert_refused(path, make("llama"), f"{name}: type IQ2_BN of ik_llama.cpp")


def test_i2_s_needs_its_layout(tmp_path):
    path = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama"), "x86").write()
    assert_refused(path, make("llama"), "blk.0.attn_q.weight has type I2_S")


def test_invalid_weights_change_nothing(tmp_path):
    name = "blk.1.ffn_down.weight"
    writer = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama"), skip=[name])
    data = np.full((256, 132), 0xFF, np.uint8)
    path = writer.add(name, data, "TQ2_0").write()
    assert_refused(path, make("llama"), f"{name}: the weight in row 0 and column 0 .*code 3")


def test_layers_of_other_classes_are_refused(tmp_path):
    path = write_model(tmp_path / "x.gguf", "qwen3", ternary_model("qwen3")).write()
    assert_refused(
        path,
        bitlinear.convert(make("qwen3")),
        "has layers of bitlinear already, such as .*: load into",
    )

    class Other(nn.Linear):
        pass

    model = make("qwen3")
    model.model.layers[0].mlp.up_proj = Other(256, 512, bias=False)
    assert_refused(path, model, "of a Other is ternary in the file")


def test_buffers_that_nothing_fills_are_refused(tmp_path):
    path = write_model(tmp_path / "x.gguf", "qwen3", ternary_model("qwen3")).write()
    model = make("qwen3", device="meta")
    model.model.norm.register_buffer("extra", torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match=r"model\.norm\.extra is on the meta device"):
        integration.load(path, model)
    assert model.model.norm.weight.is_meta


def test_the_number_of_layers_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="bitlinear")
    path = write_model(tmp_path / "x.gguf", "qwen3", ternary_model("qwen3")).write()
    integration.load(path, make("qwen3"))
    assert "x.gguf: loaded 14 deployed layers: 295 kB of packed weights and 0 kB" in caplog.text


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (LINEAR, ""),
        ({**LINEAR, "factor": 4.0}, "scaled by the factor 8.0, but the config .* has 4.0"),
        ({**LINEAR, "rope_type": "yarn"}, "scaled by 'linear', but the config"),
        (None, "scaled by 'linear', but the config"),
    ],
)
def test_scaled_rotations_must_be_those_of_the_config(parameters, message, tmp_path):
    writer = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama"))
    writer.writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.writer.add_rope_scaling_factor(8.0)
    path = writer.write()
    options = {} if parameters is None else {"rope_parameters": parameters}
    if message:
        assert_refused(path, make("llama", **options), message)
    else:
        integration.load(path, make("llama", **options))


def test_another_default_dtype(tmp_path):
    model = ternary_model("llama", scale=0.0159690)
    path = write_model(tmp_path / "x.gguf", "llama", model).write()
    wanted = {tensor.name: tensor.w_scale for tensor in integration.tensors(path)}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        for tensor in integration.tensors(path):
            oracle.assert_same_bits(tensor.w_scale, wanted[tensor.name])
        loaded = integration.load(path, make("llama", dtype=torch.bfloat16))
    finally:
        torch.set_default_dtype(before)
    for name, layer in loaded.named_modules():
        if isinstance(layer, bitlinear.BitLinear):
            assert layer.w_scale.dtype == torch.float32, name


def test_rotations_on_the_meta_device_keep_their_dtype(tmp_path):
    path = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama")).write()
    models = [make("llama", device=device).bfloat16() for device in ("cpu", "meta")]
    logits = [integration.load(path, model).eval()(IDS).logits for model in models]
    oracle.assert_same_bits(*logits)


def test_an_error_late_in_a_load_changes_nothing(tmp_path):
    """Buffers of rotations are computed before layers are replaced."""
    path = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama")).write()
    model = make("llama", device="meta")
    model.model.layers[0].mlp.up_proj.register_buffer("extra", torch.zeros(1), persistent=False)
    with pytest.raises(ValueError, match=r"that nn\.Linear does not have: extra"):
        integration.load(path, model)
    assert all(t.is_meta for name, t in model.named_buffers() if "extra" not in name)


def test_models_without_a_head_and_deployed_ones_are_refused(tmp_path):
    path = write_model(tmp_path / "x.gguf", "llama", ternary_model("llama")).write()
    with pytest.raises(ValueError, match="LlamaModel has no head: pass the model for causal"):
        integration.load(path, make("llama").model)
    loaded = integration.load(path, make("llama"))
    with pytest.raises(ValueError, match="the model has layers of bitlinear already"):
        integration.load(path, loaded)
    with pytest.raises(TypeError, match="needs a model of transformers, but got a Linear"):
        integration.load(path, nn.Linear(2, 2))
