"""Converted BitNet models on disk: ``save_pretrained`` and ``from_pretrained``."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from tests import oracle
from tests.integrations.transformers.checkpoints import (
    IDS,
    KINDS,
    convert,
    layers,
    load,
    logits,
    save_checkpoint,
    transformers,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("norm", "bias"), [(False, False), (True, True)])
def test_saving_and_loading_keeps_every_bit(kind, norm, bias, tmp_path):
    save_checkpoint(tmp_path / "theirs", kind, norm, bias, torch.bfloat16)
    first = convert(load(tmp_path / "theirs"))
    first.save_pretrained(tmp_path / "1")
    second = load(tmp_path / "1")
    second.save_pretrained(tmp_path / "2")
    third = load(tmp_path / "2")
    for model in (second, third):
        assert repr(model) == repr(first)
        assert model.state_dict().keys() == first.state_dict().keys()
        for name, tensor in model.state_dict().items():
            oracle.assert_same_bits(tensor, first.state_dict()[name])
        oracle.assert_same_bits(logits(model), logits(first))
    config = json.loads((tmp_path / "2" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "bitlinear",
        "modules_to_not_convert": ["lm_head"],
        "eps": 1e-5,
        "use_rms_norm": norm,
        "rms_norm_eps": 1e-6,
        "quant_type": "ai8pc_wpt",
        "bias_dtype": "float32",
        "fuse": True,
        "int8_head": False,
        "int8_embedding": False,
        "layers": {},
    }


def test_a_norm_of_another_library_cannot_be_saved(tmp_path):
    save_checkpoint(tmp_path / "theirs", "bitlinear", norm=True)
    model = convert(load(tmp_path / "theirs"))
    model.model.layers[1].mlp.up_proj.rms_norm = nn.RMSNorm(64)
    with pytest.raises(
        ValueError, match=r"norm of .*layers\.1\.mlp\.up_proj is of the class RMSNorm"
    ):
        model.save_pretrained(tmp_path / "ours")


def test_another_architecture_loads_the_same_layers(tmp_path):
    save_checkpoint(tmp_path / "theirs", "bitlinear")
    model = convert(load(tmp_path / "theirs"))
    model.save_pretrained(tmp_path / "ours")
    body = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert len(layers(body)) == 14
    with torch.no_grad():
        wanted = model.model(IDS).last_hidden_state
        oracle.assert_same_bits(body(IDS).last_hidden_state, wanted)
    body.save_pretrained(tmp_path / "body")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "body", num_labels=3
    )
    assert len(layers(classifier)) == 14
    assert type(classifier.score) is nn.Linear


def test_loading_in_another_dtype_leaves_packed_weights_and_scales(tmp_path):
    save_checkpoint(tmp_path / "theirs", "bitlinear", bias=True)
    model = convert(load(tmp_path / "theirs"))
    model.save_pretrained(tmp_path / "ours")
    other = load(tmp_path / "ours", dtype=torch.bfloat16)
    assert other.dtype == logits_dtype(other) == torch.bfloat16
    for name, layer in layers(other).items():
        for key, tensor in layer.state_dict().items():
            oracle.assert_same_bits(tensor, model.state_dict()[f"{name}.{key}"])


def logits_dtype(model):
    with torch.no_grad():
        return model(IDS).logits.dtype


def test_a_damaged_file_raises(tmp_path):
    save_checkpoint(tmp_path / "theirs", "bitlinear")
    convert(load(tmp_path / "theirs")).save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    state = safetensors.torch.load_file(file)

    damaged = {name: tensor.clone() for name, tensor in state.items()}
    damaged["model.layers.1.mlp.up_proj.w_packed"][2, 1] = 0b01_11_00_01
    safetensors.torch.save_file(damaged, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: .*code 3, first in byte 1"):
        load(tmp_path / "ours")

    del state["model.layers.0.mlp.up_proj.w_scale"]
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: the checkpoint has no w_scale"):
        load(tmp_path / "ours")
