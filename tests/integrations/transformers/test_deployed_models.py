"""Models of every kind on disk, after ``bitlinear.convert`` and ``bitlinear.deploy``."""

from __future__ import annotations

import copy
import json
import logging
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear, Embedding
from tests import oracle
from tests.integrations.transformers.checkpoints import IDS, layers, logits, transformers
from tests.integrations.transformers.models import (
    make_bert,
    make_encoder_decoder,
    make_falcon,
    make_gpt2,
    make_llama,
    make_t5,
)


def outputs(model):
    ids = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**ids).logits


def assert_loads_alike(model, folder, **kwargs):
    loaded = type(model).from_pretrained(folder, **kwargs)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert loaded.state_dict().keys() == wanted.keys()
    for name, tensor in loaded.state_dict().items():
        oracle.assert_same_bits(tensor, wanted[name])
    for name, layer in layers(model).items():
        assert repr(loaded.get_submodule(name)) == repr(layer)
    # The BitLinear layers give the same bits. torch's float operations can take another path on
    # mapped memory, whose alignment differs, and an activation can then round to the next integer.
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=0, atol=0.02)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "count"),
    [
        (make_llama, 14),
        (make_bert, 14),
        (make_falcon, 8),
        (make_gpt2, 8),
        (make_t5, 2 * (6 + 10)),
        (make_encoder_decoder, 2 * 6 + 1 + 2 * 10 + 2),
    ],
)
def test_deployed_models_are_saved_and_loaded(make, count, dtype, tmp_path):
    model = bitlinear.deploy(bitlinear.convert(make().to(dtype))).eval()
    assert len(layers(model)) == count
    for layer in layers(model).values():
        if layer.bias is not None:  # as after training
            layer.bias.normal_()
    model.save_pretrained(tmp_path / "1", max_shard_size="8KB")
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 1
    loaded = assert_loads_alike(model, tmp_path / "1")
    loaded.save_pretrained(tmp_path / "2")
    assert_loads_alike(model, tmp_path / "2", device_map="cpu")


def test_layers_with_different_settings_are_described(tmp_path):
    model = bitlinear.convert(make_llama(mlp_bias=True))
    model.model.layers[0].mlp.up_proj.eps = 0.25
    bitlinear.deploy(model).eval()
    model.model.layers[1].mlp.up_proj.w_scale = torch.rand(48, 1) + 0.5
    down = model.model.layers[1].mlp.down_proj
    down.bias = down.bias.to(torch.float64) + 1e-9
    model.save_pretrained(tmp_path)
    assert_loads_alike(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["layers"] == {
        "model.layers.0.mlp.up_proj": {"eps": 0.25},
        "model.layers.1.mlp.up_proj": {"w_scale_shape": [48, 1]},
        "model.layers.1.mlp.down_proj": {"bias_dtype": "float64"},
    }


def test_layers_that_share_their_weight_are_saved(tmp_path):
    model = bitlinear.convert(make_llama())
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    bitlinear.deploy(model).eval()
    assert first.up_proj.w_packed is second.up_proj.w_packed
    model.save_pretrained(tmp_path)
    assert_loads_alike(model, tmp_path)


def test_a_model_with_some_layers_deployed(tmp_path):
    model = bitlinear.convert(make_llama(), exclude=["lm_head", "layers.0.*", "down_proj"])
    bitlinear.deploy(model).eval()
    model.save_pretrained(tmp_path)
    assert len(layers(assert_loads_alike(model, tmp_path))) == 6


def test_the_models_inside_a_model_are_saved_alone(tmp_path):
    model = bitlinear.deploy(bitlinear.convert(make_llama())).eval()
    model.model.save_pretrained(tmp_path / "body")
    model.save_pretrained(tmp_path / "whole")
    loaded = assert_loads_alike(model, tmp_path / "whole")
    loaded.model.save_pretrained(tmp_path / "loaded body")
    for folder in ("body", "loaded body"):
        body = transformers.AutoModel.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            wanted = model.model(IDS).last_hidden_state
            oracle.assert_same_bits(body(IDS).last_hidden_state, wanted)


def test_a_model_inside_a_module_is_saved(tmp_path):
    model = nn.ModuleDict({"inner": bitlinear.convert(make_llama()), "outer": nn.Linear(4, 4)})
    bitlinear.deploy(model).eval()
    model["inner"].save_pretrained(tmp_path)
    assert_loads_alike(model["inner"], tmp_path)


def test_deployed_embeddings_are_not_saved(tmp_path, caplog):
    """from_pretrained makes an nn.Embedding, whose weight the file would not have."""
    model = make_llama()
    model.model.embed_tokens = table = Embedding.from_embedding(model.model.embed_tokens)
    bitlinear.deploy(model)  # nothing else is deployed
    with pytest.raises(ValueError, match="embed_tokens is of the class Embedding"):
        model.save_pretrained(tmp_path)
    table.undeploy()
    model.save_pretrained(tmp_path)
    assert "1 of 1 BitLinear layers are not deployed (the first is model.embed" in caplog.text
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.model.embed_tokens.weight, table.weight)


def test_undeployed_layers_are_saved_in_floating_point(tmp_path, caplog):
    model = bitlinear.deploy(bitlinear.convert(make_llama())).eval()
    some = model.model.layers[0].mlp.up_proj
    some.undeploy()
    model.save_pretrained(tmp_path / "some")
    assert "1 of 14 BitLinear layers are not deployed (the first is model.layers.0" in caplog.text
    loaded = type(model).from_pretrained(tmp_path / "some")
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, some.weight)
    assert len(layers(loaded)) == 13
    for layer in layers(model).values():
        layer.undeploy()
    caplog.clear()
    model.save_pretrained(tmp_path / "none")
    assert "14 of 14 BitLinear layers are not deployed" in caplog.text
    assert "quantization_config" not in json.loads((tmp_path / "none" / "config.json").read_text())
    loaded = type(model).from_pretrained(tmp_path / "none")
    assert not layers(loaded)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, some.weight)
    caplog.clear()
    bitlinear.deploy(model).save_pretrained(tmp_path / "all")
    assert "not deployed" not in caplog.text
    assert_loads_alike(model, tmp_path / "all")


def test_saving_layers_of_unknown_classes_raises(tmp_path):
    class Other(BitLinear):
        pass

    model = bitlinear.convert(make_llama())
    model.model.layers[1].mlp.up_proj = Other(32, 48)
    bitlinear.deploy(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is of the class Other"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_with_loaded_layers_is_saved(tmp_path):
    model = bitlinear.deploy(bitlinear.convert(make_llama())).eval()
    safetensors.torch.save_model(model, tmp_path / "deployed.safetensors")
    other = bitlinear.convert(make_llama()).eval()
    bitlinear.load_deployed(tmp_path / "deployed.safetensors", other)
    other.save_pretrained(tmp_path)
    assert_loads_alike(model, tmp_path)


def test_a_deployed_model_is_copied_and_cast_as_before():
    model = bitlinear.deploy(bitlinear.convert(make_llama()))
    model.half().float().to(torch.bfloat16)
    copied = copy.deepcopy(model.eval())
    oracle.assert_same_bits(logits(copied), logits(model))
    transformers.LlamaForCausalLM(model.config)


def test_deploying_a_model_of_another_quantiser_warns(caplog):
    model = bitlinear.convert(make_llama())
    model.hf_quantizer = object()
    bitlinear.deploy(model)
    assert "this LlamaForCausalLM is quantised by transformers, with object" in caplog.text


def test_an_error_of_the_integration_does_not_stop_deploy(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="bitlinear")
    monkeypatch.setitem(sys.modules, "bitlinear.integrations.transformers", None)
    model = bitlinear.deploy(bitlinear.convert(make_llama()))
    assert all(layer.is_deployed for layer in layers(model).values())
    assert "from_pretrained cannot load this model" in caplog.text
