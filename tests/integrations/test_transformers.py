"""BitNet models of Hugging Face transformers, beside transformers' own results.

The checkpoints are small and random, but they go through transformers' own files and classes. Its
``torch.compile`` is off here, which saves a minute and changes roundings only.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bitlinear
from bitlinear import BitLinear, packing
from tests import oracle

transformers = pytest.importorskip("transformers")

from transformers.integrations import bitnet  # noqa: E402

from bitlinear.integrations.transformers import NormedBitLinear, convert, repack  # noqa: E402

KINDS = {
    "bitlinear": {"linear_class": "bitlinear", "quantization_mode": "offline"},
    "autobitlinear": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
}
IDS = torch.arange(18).reshape(2, 9) * 5


@pytest.fixture(autouse=True)
def _eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def save_checkpoint(folder, kind, norm=False, bias=False, dtype=torch.float32, llama=True):
    """A random BitNet checkpoint, as it lies on the Hub."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.1,
        "dtype": dtype,
    }
    if llama:
        config = transformers.LlamaConfig(**sizes, attention_bias=bias, mlp_bias=bias)
        model = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**sizes))
    with torch.no_grad():
        # Each token resembles the head of the next one, so that one logit stands out: greedy
        # decoding must not depend on roundings.
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, dims=0))
        model.model.embed_tokens.weight.mul_(10)
    state = dict(model.to(dtype).state_dict())
    for name, linear in model.model.named_modules(prefix="model"):
        if isinstance(linear, nn.Linear):
            if bias:
                state[f"{name}.bias"] = (0.05 * torch.randn(linear.out_features)).to(dtype)
            if norm:
                state[f"{name}.rms_norm.weight"] = (torch.rand(linear.in_features) + 0.5).to(dtype)
            if kind != "online":
                weight = linear.weight.detach().float()
                scale = weight.abs().mean()
                ternary = (weight / scale).round().clamp(-1, 1)
                factor = 1 / scale if kind == "bitlinear" else scale
                state[f"{name}.weight"] = bitnet.pack_weights(ternary)
                state[f"{name}.weight_scale"] = factor.reshape(1).to(dtype)
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = transformers.BitNetQuantConfig(
        **KINDS[kind], use_rms_norm=norm
    )
    model.config.save_pretrained(folder)
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def generate(model):
    """The tokens that greedy decoding adds, and by how much each won."""
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


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}


# --- Models ---


def in_fp32(model):
    """A model with BitNet layers of transformers, computing in fp32."""
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
    assert type(model.lm_head) is nn.Linear
    # The product is exact in both. The float operations around it round differently, by 1e-7; but
    # where that moves an activation across a half, its int8 value differs by 1, which is 0.4 % of
    # what one of 64 typical inputs contributes to a token.
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
    theirs, (tokens, margin) = logits(model), generate(model)
    convert(model)
    ours = logits(model)
    reference = logits(in_fp32(load(tmp_path)))
    # Both are rounded to 8 bits between the layers; inside them, theirs is as well.
    assert distance(ours, reference) < 1.25 * distance(theirs, reference) < 0.05
    assert margin > 2 * (ours - theirs).abs().max()
    assert torch.equal(generate(model)[0], tokens)


def test_a_bitnet_model(tmp_path):
    save_checkpoint(tmp_path, "bitlinear", llama=False)
    model = load(tmp_path)
    assert isinstance(model, transformers.BitNetForCausalLM)
    wanted = logits(model)
    assert distance(logits(convert(model)), wanted) < 0.01
    assert len(layers(model)) == 14


@pytest.mark.parametrize(("kind", "bits"), [("bitlinear", 2), ("autobitlinear", 16)])
def test_memory(kind, bits, tmp_path):
    save_checkpoint(tmp_path, kind, dtype=torch.bfloat16)
    model = load(tmp_path)
    before = state_bytes(model)
    convert(model)
    weights = sum(layer.in_features * layer.out_features for layer in layers(model).values())
    # A scale takes 2 bytes before and 4 after.
    assert state_bytes(model) == before - weights * bits // 8 + weights // 4 + 2 * 14


# --- Saving and loading ---


FRESH = """
import sys
import torch
{imports}
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
deployed = sum(isinstance(m, bitlinear.BitLinear) and m.is_deployed for m in model.modules())
assert deployed == 14, model
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits.float(), sys.argv[3])
"""


def load_in_a_fresh_process(imports, files):
    code = FRESH.replace("{imports}", imports)
    subprocess.run([sys.executable, "-c", code, *files], check=True)


def test_a_fresh_process_loads_what_was_saved(tmp_path):
    save_checkpoint(tmp_path / "theirs", "autobitlinear", True, True, torch.bfloat16)
    model = convert(load(tmp_path / "theirs"))
    model.save_pretrained(tmp_path / "ours", max_shard_size="30KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    torch.save(IDS, tmp_path / "ids.pt")
    files = [tmp_path / name for name in ("ours", "ids.pt", "logits.pt")]
    load_in_a_fresh_process("import bitlinear.integrations.transformers", files)
    oracle.assert_same_bits(torch.load(tmp_path / "logits.pt"), logits(model))


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
        "layers": {},
    }


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


def test_a_damaged_file_is_refused(tmp_path):
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


# --- Other models, deployed by bitlinear.deploy ---


SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def make_llama(**kwargs):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **kwargs)
    return transformers.LlamaForCausalLM(config)


def make_bert():  # its last layer has the weight of the embedding, and a bias of its owner
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def make_falcon():  # layers of a subclass of nn.Linear
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES, bias=True))


def make_gpt2():  # layers that are no nn.Linear
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def make_t5():  # tied embeddings, and parts that are kept in fp32
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, num_heads=4, decoder_start_token_id=0)
    )


def make_encoder_decoder():  # of two models of transformers
    encoder = transformers.BertConfig(**SIZES)
    decoder = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = config.pad_token_id = 0
    return transformers.EncoderDecoderModel(config)


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
    # All that is ours has the same bits. torch's float operations may read mapped memory, which is
    # aligned in another way, by another path; an activation may then round to the next integer.
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


IMPORTS = {
    "first": """
import bitlinear
assert "transformers" not in sys.modules
assert "bitlinear.integrations.transformers" not in sys.modules
""",
    "last": "from transformers import AutoModelForCausalLM\nimport bitlinear",
    "part": "import transformers\nimport bitlinear",
}


@pytest.mark.parametrize(
    "order", ["first", *(pytest.param(order, marks=pytest.mark.slow) for order in ("last", "part"))]
)
def test_a_fresh_process_loads_what_was_deployed(order, tmp_path):
    model = bitlinear.deploy(bitlinear.convert(make_llama(mlp_bias=True))).eval()
    model.save_pretrained(tmp_path / "ours")
    torch.save(IDS, tmp_path / "ids.pt")
    files = [tmp_path / name for name in ("ours", "ids.pt", "logits.pt")]
    load_in_a_fresh_process(IMPORTS[order], files)
    oracle.assert_same_bits(torch.load(tmp_path / "logits.pt"), logits(model))


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM

AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_without_bitlinear_is_warned(tmp_path):
    bitlinear.deploy(bitlinear.convert(make_llama())).save_pretrained(tmp_path)
    command = [sys.executable, "-c", WITHOUT, tmp_path]
    stderr = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "Unknown quantization type, got bitlinear" in stderr


def test_layers_that_differ_are_described(tmp_path):
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


def test_layers_that_share_their_weight(tmp_path):
    model = bitlinear.convert(make_llama())
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    bitlinear.deploy(model).eval()
    assert first.up_proj.w_packed is second.up_proj.w_packed
    model.save_pretrained(tmp_path)
    assert_loads_alike(model, tmp_path)


def test_some_layers_only(tmp_path):
    model = bitlinear.convert(make_llama(), exclude=["lm_head", "layers.0.*", "down_proj"])
    bitlinear.deploy(model).eval()
    model.save_pretrained(tmp_path)
    assert len(layers(assert_loads_alike(model, tmp_path))) == 6


def test_the_models_inside_a_model(tmp_path):
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


def test_a_model_inside_a_module(tmp_path):
    model = nn.ModuleDict({"inner": bitlinear.convert(make_llama()), "outer": nn.Linear(4, 4)})
    bitlinear.deploy(model).eval()
    model["inner"].save_pretrained(tmp_path)
    assert_loads_alike(model["inner"], tmp_path)


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


def test_layers_of_unknown_classes_are_not_saved(tmp_path):
    class Other(BitLinear):
        pass

    model = bitlinear.convert(make_llama())
    model.model.layers[1].mlp.up_proj = Other(32, 48)
    bitlinear.deploy(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: it is a Other"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_with_loaded_layers(tmp_path):
    model = bitlinear.deploy(bitlinear.convert(make_llama())).eval()
    safetensors.torch.save_model(model, tmp_path / "deployed.safetensors")
    other = bitlinear.convert(make_llama()).eval()
    bitlinear.load_deployed(tmp_path / "deployed.safetensors", other)
    other.save_pretrained(tmp_path)
    assert_loads_alike(model, tmp_path)


def test_an_old_version_is_refused(monkeypatch):
    # Another module object than the first one: transformers has replaced it meanwhile.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    monkeypatch.delitem(sys.modules, "bitlinear.integrations.transformers")
    with pytest.raises(ImportError, match=r"transformers 5\.23 or later, but this is 4\.57\.1"):
        importlib.import_module("bitlinear.integrations.transformers")


def test_a_deployed_model_is_used_as_before():
    model = bitlinear.deploy(bitlinear.convert(make_llama()))
    model.half().float().to(torch.bfloat16)
    copied = copy.deepcopy(model.eval())
    oracle.assert_same_bits(logits(copied), logits(model))
    transformers.LlamaForCausalLM(model.config)


def test_a_model_of_another_quantiser_is_warned_of(caplog):
    model = bitlinear.convert(make_llama())
    model.hf_quantizer = object()
    bitlinear.deploy(model)
    assert "this LlamaForCausalLM is quantised by transformers, with object" in caplog.text


def test_deploying_survives_what_is_wrong_with_transformers(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="bitlinear")
    monkeypatch.setitem(sys.modules, "bitlinear.integrations.transformers", None)
    model = bitlinear.deploy(bitlinear.convert(make_llama()))
    assert all(layer.is_deployed for layer in layers(model).values())
    assert "from_pretrained cannot load this model" in caplog.text


# --- Layers ---


def packed_layer(t, bias=None, scale=3.0, dtype=torch.float32, norm=False):
    """transformers' layer with packed weights ``t``."""
    n, k = t.shape
    layer = bitnet.BitLinear(k, n, bias=bias is not None, dtype=dtype, use_rms_norm=norm)
    layer.weight = bitnet.pack_weights(torch.from_numpy(t).to(torch.int8))
    layer.weight_scale.fill_(scale)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def float_layer(weight, bias=None, scale=None, dtype=torch.float32):
    """transformers' AutoBitLinear; online without a scale."""
    n, k = weight.shape
    layer = bitnet.AutoBitLinear(k, n, bias is not None, dtype=dtype, online_quant=scale is None)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        if bias is not None:
            layer.bias.copy_(bias)
        if scale is not None:
            layer.weight_scale.fill_(scale)
    return layer


def converted(layer):
    (new,) = convert(nn.Sequential(layer))
    return new


@given(n=st.integers(1, 40), k=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_repack_equals_the_oracle_and_drops_rows_past_n(n, k, seed):
    t = oracle.ternary(n, k, seed)
    theirs = bitnet.pack_weights(torch.from_numpy(t).to(torch.int8))
    for row in range(n, 4 * len(theirs)):
        theirs[row % len(theirs)] |= 3 << (2 * (row // len(theirs)))
    packed = repack(theirs, n, k)
    assert packed.is_contiguous()
    assert packed.numpy().tolist() == oracle.pack(t).tolist()


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 70),
    seed=st.integers(0, 2**16),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_packed_layers_give_the_results_of_the_oracle_and_of_transformers(n, k, seed, bias, dtype):
    t = oracle.ternary(n, k, seed)
    addend = torch.randn(n).to(dtype) if bias else None
    layer = packed_layer(t, None, dtype=dtype)
    x = torch.randn(3, k).to(dtype)
    theirs = layer(x)[:, :n] + (0 if addend is None else addend)
    ours = converted(packed_layer(t, addend, dtype=dtype))
    w_scale = oracle.F32(1) / oracle.F32(3)
    assert ours.w_scale.item() == w_scale
    oracle.assert_same_bits(ours(x), oracle.expected(x, t, w_scale, addend, eps=1e-5))
    assert_close_to_theirs(ours(x), theirs, x, w_scale)


def assert_close_to_theirs(ours, theirs, x, w_scale):
    """Within what an error of the int8 activations by 1 does.

    In fp32 none or one of up to 70 may differ, where it was a tie. In bf16 their scale is rounded
    to 8 bits and so is the product with it, so that many of them differ: by a half, in the root of
    the mean square, and at most by 1; and the result is rounded to 8 bits three or four times.
    """
    step = x.float().abs().amax(-1, keepdim=True) / 127 * float(w_scale)
    if x.dtype == torch.float32:
        steps, roundings = 1.001, 1e-6
    else:
        steps, roundings = 4 * 0.5 * x.shape[-1] ** 0.5 + 1, 4 * 2**-8
    limit = steps * step + roundings * (theirs.float().abs() + 1)
    assert ((ours.float() - theirs.float()).abs() <= limit).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_offline_layers_scale_their_bias_too(bias, dtype):
    t = oracle.ternary(33, 70)
    addend = torch.randn(33).to(dtype) if bias else None
    layer = float_layer(t, addend, 0.3, dtype)
    scale = layer.weight_scale.float()
    x = torch.randn(3, 70).to(dtype)
    theirs = layer(x)
    ours = converted(layer)
    scaled = None if addend is None else addend.float() * scale
    oracle.assert_same_bits(ours(x), oracle.expected(x, t, scale, scaled, eps=1e-5))
    assert_close_to_theirs(ours(x), theirs, x, scale)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("spread", [0.02, 1e-6, 0.0])
def test_online_layers_have_the_weights_of_every_forward_pass(spread, dtype):
    weight = spread * torch.randn(300, 4096)  # more than one step
    layer = float_layer(weight, torch.randn(300), dtype=dtype)
    theirs = bitnet.WeightQuant.apply(layer.weight.detach()).float()
    x = torch.randn(3, 4096).to(dtype)
    wanted = layer(x).detach()
    ours = converted(layer)
    t = packing.unpack_ternary(ours.w_packed, 4096)
    assert torch.equal(t * ours.w_scale, theirs)
    assert (t.count_nonzero() > 0) == (spread == 0.02)
    assert_close_to_theirs(ours(x), wanted, x, ours.w_scale)


@pytest.mark.parametrize("online", [True, False])
def test_a_norm_is_kept(online):
    layer = bitnet.AutoBitLinear(20, 6, online_quant=online, use_rms_norm=True, rms_norm_eps=0.5)
    if not online:
        layer.weight = nn.Parameter(torch.from_numpy(oracle.ternary(6, 20)).float())
    norm, x = layer.rms_norm, torch.randn(2, 3, 20)
    norm.weight.data.uniform_(0.5, 1.5)
    theirs = layer(x)
    ours = converted(layer)
    assert isinstance(ours, NormedBitLinear)
    assert ours.rms_norm is norm
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs, rtol=1e-5, atol=1e-5)


def test_bytes_are_made_of_bytes():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                assert result.dtype in (torch.uint8, torch.int8, torch.bool, torch.int64)
                self.largest = max(self.largest, result.numel())
            return result

    theirs = torch.full((1000, 4096), 0b10_01_00_01, dtype=torch.uint8)
    with Watch() as watch:
        packed = repack(theirs, 4000, 4096)
    assert watch.largest == packed.numel() > 2**20
    with Watch() as watch:
        repack(theirs[:256], 1024, 4096)
    assert watch.largest == 2**20


# --- Which modules, and what else is on them ---


def test_other_modules_hooks_and_modes_stay(caplog):
    caplog.set_level(logging.INFO, logger="bitlinear")
    layer, calls = packed_layer(oracle.ternary(8, 8)).eval(), []
    handle = layer.register_forward_hook(lambda module, *_: calls.append(type(module)))
    plain = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "plain": plain})
    convert(model)
    assert model["a"] is model["b"][0]
    assert model["plain"] is plain
    assert (model["a"].training, model["plain"].training) == (False, True)
    model["a"](torch.randn(2, 8))
    handle.remove()
    model["a"](torch.randn(2, 8))
    assert calls == [BitLinear]
    assert caplog.messages[-1] == "converted 1 BitNet layers"


def damaged(change):
    layer = packed_layer(oracle.ternary(10, 8))
    change(layer)
    return layer


def damaged_float(change):
    layer = float_layer(torch.ones(4, 8), scale=1.0)
    change(layer)
    return layer


class Subclass(bitnet.BitLinear):
    pass


def code_3(layer):
    layer.weight[1, 5] |= 0b11_00_00


WRONG = [
    (lambda: damaged(code_3), r"invalid code 3, first in row 7 and column 5"),
    (
        lambda: damaged(lambda layer: setattr(layer, "weight", layer.weight[:2])),
        r"weight must have shape \[3, 8\] for out_features=10 .* it has \[2, 8\]",
    ),
    (
        lambda: damaged(lambda layer: setattr(layer, "weight", layer.weight.float())),
        r"must be uint8, but it is torch\.float32",
    ),
    (lambda: damaged(lambda layer: layer.weight_scale.fill_(0)), "positive, but it is 0"),
    (lambda: damaged(lambda layer: layer.weight_scale.fill_(float("nan"))), "but it is nan"),
    (
        lambda: damaged(lambda layer: setattr(layer, "weight_scale", torch.ones(2))),
        r"one number, but it has shape \[2\]",
    ),
    (lambda: damaged(lambda layer: layer.to("meta")), "on the meta device: load its weights"),
    (lambda: damaged(lambda layer: setattr(layer, "forward", layer.forward)), "without offload"),
    (lambda: Subclass(8, 8, bias=False), "it is a Subclass"),
    (
        lambda: damaged_float(
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(2, 8)))
        ),
        r"weight must have shape \[4, 8\], but it has \[2, 8\]",
    ),
    (lambda: float_layer(torch.full((4, 8), 0.5), scale=1.0), r"weight\[0, 0\] is 0\.5, but"),
    (lambda: float_layer(torch.full((4, 8), float("nan")), scale=1.0), "is nan, but weights of"),
    (lambda: float_layer(torch.full((4, 8), float("inf"))), "NaN, infinite"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_what_cannot_be_taken_is_named_and_nothing_is_changed(make, message):
    model = nn.Sequential(packed_layer(oracle.ternary(8, 8)), make())
    before = list(model)
    with pytest.raises(ValueError, match=message) as error:
        convert(model)
    assert "\n  1: " in str(error.value)
    assert "\n  0: " not in str(error.value)
    assert all(a is b for a, b in zip(model, before))


def test_models_that_are_none():
    with pytest.raises(ValueError, match=r"Linear has no BitNet layer.*use bitlinear\.convert"):
        convert(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="pass the model that holds this layer"):
        convert(packed_layer(oracle.ternary(8, 8)))


def test_bitlinear_leaves_the_layers_of_transformers_alone():
    model = nn.Sequential(float_layer(torch.randn(8, 8)), packed_layer(oracle.ternary(8, 8)))
    before = list(model)
    bitlinear.convert(model)
    assert all(a is b for a, b in zip(model, before))
