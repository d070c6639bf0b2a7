"""Converted BitNet models, compared with the results of transformers itself."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import bitlinear
from bitlinear.integrations import checkpoints
from bitlinear.integrations.transformers.decoding_head import DecodingHead
from tests import oracle
from tests.integrations.transformers.checkpoints import (
    FAMILIES,
    IDS,
    KINDS,
    NormedBitLinear,
    bitnet,
    convert,
    layers,
    load,
    logits,
    save_checkpoint,
    transformers,
)


def generate(model):
    """The tokens that greedy decoding adds, and the smallest margin of their logits."""
    out = model.generate(
        IDS,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    best, second = torch.stack(out.logits).float().topk(2).values.unbind(-1)
    return out.sequences[:, IDS.shape[1] :], (best - second).min()


def state_bytes(model):
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def in_fp32(model):
    """Make a model with BitNet layers of transformers compute in fp32."""
    for module in model.to(torch.float32).modules():
        if isinstance(module, bitnet.BitLinear):
            module.dtype = torch.float32
    return model


def distance(actual, wanted):
    return ((actual - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("norm", "bias"), [(False, False), (True, True)])
def test_fp32_models_agree(kind, norm, bias, tmp_path):
    save_checkpoint(tmp_path, kind, norm, bias)
    model = load(tmp_path)
    wanted, (tokens, margin) = logits(model), generate(model)
    assert convert(model) is model
    assert len(layers(model)) == 14
    assert type(model.lm_head) is DecodingHead
    # The product is exact in both. The float operations around it round differently, by 1e-7. If
    # this moves an activation across a half, its int8 value differs by 1, which is 0.4 % of the
    # contribution of one of 64 typical inputs to a token.
    actual = logits(model)
    assert distance(actual, wanted) < 0.01
    assert margin > 10 * (actual - wanted).abs().max()
    assert torch.equal(generate(model)[0], tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("norm", "bias"), [(False, False), (True, True)])
def test_bf16_models_are_as_close_to_fp32_as_transformers_is(kind, norm, bias, tmp_path):
    save_checkpoint(tmp_path, kind, norm, bias, torch.bfloat16)
    model = load(tmp_path)
    assert model.dtype == torch.bfloat16
    reference_bf16, (tokens, margin) = logits(model), generate(model)
    convert(model)
    actual = logits(model)
    reference_fp32 = logits(in_fp32(load(tmp_path)))
    # Both models round to 8 bits between the layers; transformers also rounds inside of them.
    assert distance(actual, reference_fp32) < 1.25 * distance(reference_bf16, reference_fp32) < 0.05
    assert margin > 2 * (actual - reference_bf16).abs().max()
    assert torch.equal(generate(model)[0], tokens)


@pytest.mark.parametrize("family", ["bitnet", "falcon", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_models_of_other_classes_agree(family, kind, tmp_path):
    save_checkpoint(tmp_path, kind, family=family)
    model = load(tmp_path)
    assert type(model) is FAMILIES[family][1]
    wanted = logits(model)
    assert distance(logits(convert(model)), wanted) < 0.01
    # Falcon computes q, k and v in one layer, and its MLP has two.
    assert len(layers(model)) == (8 if family == "falcon" else 14)


def test_norms_inside_projections_are_loaded_by_another_name(tmp_path):
    save_checkpoint(tmp_path / "theirs", "online", norm=True, family="qwen3")
    model = load(tmp_path / "theirs")
    state = {
        name.replace("rms_norm", "norm"): tensor for name, tensor in model.state_dict().items()
    }
    wanted = logits(convert(model))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "theirs")
    del config.quantization_config
    config.save_pretrained(tmp_path / "inside")
    file = tmp_path / "inside" / "model.safetensors"
    save_file(state, file, metadata={"format": "pt"})

    config = transformers.AutoConfig.from_pretrained(tmp_path / "inside")
    config.quantization_config = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "use_rms_norm": True,
    }
    names = {"_proj.norm.weight": "_proj.rms_norm.weight"}
    model = load(tmp_path / "inside", config=config, key_mapping=names)
    oracle.assert_same_bits(logits(convert(model)), wanted)
    assert all(isinstance(layer, NormedBitLinear) for layer in layers(model).values())


def test_a_checkpoint_with_scales_for_each_output_feature(tmp_path):
    save_checkpoint(tmp_path / "theirs", "bitlinear")
    model = load(tmp_path / "theirs")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, bitnet.BitLinear):
            layer.weight_scale = layer.weight_scale * (1 + torch.arange(layer.out_features) / 64)
            state[f"{name}.weight_scale"] = layer.weight_scale[:, None].clone()
    wanted = logits(convert(model, fuse=False))
    save_file(state, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch"):
        load(tmp_path / "theirs")

    config = transformers.AutoConfig.from_pretrained(tmp_path / "theirs")
    del config.quantization_config
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    checkpoints.load(tmp_path / "theirs", model, "transformers-bitlinear")
    oracle.assert_same_bits(logits(model), wanted)
    model.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert {layer.quant_type for layer in layers(again).values()} == {"ai8pc_wpc"}
    oracle.assert_same_bits(logits(again), wanted)


@pytest.mark.parametrize(("kind", "bits"), [("bitlinear", 2), ("autobitlinear", 16)])
def test_a_converted_model_takes_less_memory(kind, bits, tmp_path):
    save_checkpoint(tmp_path, kind, dtype=torch.bfloat16)
    model = load(tmp_path)
    before = state_bytes(model)
    convert(model)
    weights = sum(layer.in_features * layer.out_features for layer in layers(model).values())
    # A scale takes 2 bytes before and 4 after.
    assert state_bytes(model) == before - weights * bits // 8 + weights // 4 + 2 * 14


@pytest.mark.parametrize("kind", ["bitlinear", "online"])
def test_functions_for_other_models_name_the_right_one(kind, tmp_path):
    save_checkpoint(tmp_path, kind)
    model = load(tmp_path)
    remedy = r"bitlinear\.integrations\.transformers\.convert\(model\)"
    reason = "14 layers are BitNet layers" if kind == "bitlinear" else "the AutoBitLinear of"
    with pytest.warns(UserWarning, match=rf"(?s){reason}.*{remedy}"):
        bitlinear.convert(model)
    with pytest.warns(UserWarning, match=rf"no BitLinear of this package.*{remedy}"):
        bitlinear.deploy(model)
    convert(model)
