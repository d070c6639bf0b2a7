"""Fused decoder layers: the same function, in every state of the model."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear
from bitlinear.integrations.transformers import decoder_layers as module
from bitlinear.integrations.transformers import fuse, unfuse
from bitlinear.integrations.transformers.fusion import fused_layers
from tests import oracle
from tests.calls import Calls
from tests.integrations.transformers.checkpoints import (
    IDS,
    convert,
    load,
    logits,
    save_checkpoint,
    transformers,
)
from tests.integrations.transformers.models import make_falcon, make_llama

linear = torch.ops.bitlinear.linear.default
fused = torch.ops.bitlinear.fused_linear.default

FAMILIES = ["BitNet", "Llama", "Mistral", "Qwen2", "Qwen3"]


def make(family="Llama", **kwargs):
    """A deployed model, not fused."""
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
    }
    if family == "Qwen3":
        sizes["head_dim"] = 32
    config = getattr(transformers, f"{family}Config")(**{**sizes, **kwargs})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        # The next token is clear, so that greedy decoding does not depend on roundings.
        embedding = model.get_input_embeddings().weight
        model.lm_head.weight = nn.Parameter(embedding.roll(1, dims=0))
        embedding.mul_(10)
    bitlinear.deploy(bitlinear.convert(model.eval()))
    for layer in model.modules():
        if isinstance(layer, BitLinear) and layer.bias is not None:
            layer.bias.normal_()
    return model


def decoder_layers(model):
    return list(model.base_model.layers)


def generate(model, **kwargs):
    sizes = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model.generate(IDS, **sizes, **kwargs)


def assert_close(actual, wanted):
    """The same up to the order of sums, which can move some activations to the next integer."""
    assert (actual - wanted).norm() <= 1e-2 * wanted.norm()
    assert (actual - wanted).abs().median() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_is_the_same_function(family):
    model = make(family)
    names, kinds = [*model.state_dict()], [type(m) for m in model.modules()]
    wanted, tokens = logits(model), generate(model)
    assert fuse(model) is fuse(model) is model
    with Calls(fused) as fused_calls, Calls(linear) as calls:
        actual = logits(model)
    assert (fused_calls.count, calls.count) == (8, 0)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(generate(model), tokens)
    assert [*model.state_dict()] == names
    for layer in decoder_layers(model):
        assert layer.why_not_fused() == []
        assert type(layer).__name__ == f"{family}DecoderLayer"
        assert repr(layer).startswith(f"Fused{family}DecoderLayer(")
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds))
    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == kinds
    oracle.assert_same_bits(logits(model), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["BitNet", "Llama", "Qwen3"])
def test_16_bits_are_as_close_to_fp32_as_before(family, dtype):
    model = make(family).to(dtype)
    exact = logits(copy.deepcopy(model).float())
    before = (logits(model) - exact).norm()
    assert model(IDS).logits.dtype == dtype
    assert (logits(fuse(model)) - exact).norm() <= 1.1 * before
    assert model(IDS).logits.dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_gets_the_arguments_of_transformers(family):
    """Of interest for flash attention, which reads the window from its arguments."""
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

    calls = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        calls.append((module.layer_idx, query, key, value, attention_mask, kwargs))
        return torch.repeat_interleave(value, 2, dim=1).transpose(1, 2).contiguous(), None

    AttentionInterface.register("recorded", attend)
    AttentionMaskInterface.register("recorded", masking_utils.sdpa_mask)
    windows = {"Qwen2": 4, "Qwen3": 4, "Mistral": 4}
    kwargs = {"attention_dropout": 0.25}
    if family in windows:
        kwargs["sliding_window"] = windows[family]
    if family.startswith("Qwen"):
        kwargs.update(use_sliding_window=True, max_window_layers=1)
    model = make(family, **kwargs).train()
    model.set_attn_implementation("recorded")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    results = []
    for function in (unfuse, fuse):
        function(model)(IDS, attention_mask=mask, output_hidden_states=True)
        results.append([*calls])
        calls.clear()
    for wanted, actual in zip(*results):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    last = results[1][-1][-1]
    assert last["dropout"] == 0.25
    assert last.get("sliding_window") == windows.get(family)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_caches_and_recorded_outputs(implementation):
    model = make("BitNet")
    model.set_attn_implementation(implementation)
    fused_model = fuse(copy.deepcopy(model))
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    for _ in range(2):
        outputs = [
            m(IDS, attention_mask=mask, output_hidden_states=True, output_attentions=True)
            for m in (model, fused_model)
        ]
        for wanted, actual in zip(*(o.hidden_states + o.attentions for o in outputs)):
            assert_close(actual, wanted)
        assert len(outputs[1].attentions) == (2 if implementation == "eager" else 0)
        assert [layer.why_not_fused() for layer in decoder_layers(fused_model)] == [[], []]
    tokens = generate(model, attention_mask=mask, num_beams=2)
    assert torch.equal(generate(fused_model, attention_mask=mask, num_beams=2), tokens)
    tokens = generate(model, attention_mask=mask, cache_implementation="static")
    assert torch.equal(
        generate(fused_model, attention_mask=mask, cache_implementation="static"), tokens
    )
    layer, plain = decoder_layers(fused_model)[0], decoder_layers(model)[0]
    x = torch.randn(2, 9, 64)
    position = model.model.rotary_emb(x, torch.arange(9)[None])
    name = "past_key_values"  # deprecated
    cache = transformers.DynamicCache()
    actual = layer(x, position_embeddings=position, **{name: cache})
    assert_close(actual, plain(x, position_embeddings=position))
    assert cache.get_seq_length() == 9


@pytest.mark.slow
def test_static_caches_compile_to_one_graph(fresh_compiler):
    model = fuse(make("Qwen3", num_hidden_layers=1))
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.compiler.set_stance("default"), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual = compiled(IDS, cache=cache).logits
        oracle.assert_same_bits(actual, logits(model))
        model.model.layers[0].self_attn.k_proj.register_forward_hook(hook_that_doubles)
        torch._dynamo.reset()
        oracle.assert_same_bits(compiled(IDS, use_cache=False).logits, logits(model))
    assert not torch.equal(actual, logits(model))


# --- What must be called, counts from the next call on ---


def hook_that_doubles(module, args, output):
    if isinstance(output, tuple):
        return 2 * output[0], *output[1:]
    return 2 * output


class Doubled(nn.Module):
    """What PEFT puts in place of a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return hook_that_doubles(None, None, self.module(*args, **kwargs))


def hook(name):
    return lambda layer: layer.get_submodule(name).register_forward_hook(hook_that_doubles)


def wrap(name):
    return lambda layer: layer.set_submodule(name, Doubled(layer.get_submodule(name)))


def undeploy(layer):
    layer.mlp.up_proj.undeploy().weight.data.neg_()


def replace_forward(layer):
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: 2 * forward(x)


def replace_layer(layer):
    torch.manual_seed(1)
    layer.self_attn.v_proj = nn.Linear(64, 32)


def other_norm(layer):
    layer.input_layernorm = nn.LayerNorm(64)


def other_activation(layer):
    layer.mlp.act_fn = nn.GELU()


CHANGES = {  # the change, and the fused products that are left of 8
    "hook of a layer": (hook("self_attn.k_proj"), 7),
    "hook of attention": (hook("self_attn"), 6),
    "hook of an MLP": (hook("mlp"), 6),
    "hook of the first norm": (hook("input_layernorm"), 7),
    "hook of the norm inside": (hook("mlp.ffn_sub_norm"), 7),
    "hook of the activation": (hook("mlp.act_fn"), 8),
    "adapter of q": (wrap("self_attn.q_proj"), 7),
    "adapter of o": (wrap("self_attn.o_proj"), 7),
    "adapter of gate": (wrap("mlp.gate_proj"), 7),
    "adapter of down": (wrap("mlp.down_proj"), 7),
    "adapter of a norm": (wrap("self_attn.attn_sub_norm"), 7),
    "adapter of attention": (wrap("self_attn"), 6),
    "adapter of an MLP": (wrap("mlp"), 6),
    "undeployed layer": (undeploy, 7),
    "other forward": (replace_forward, 6),
    "other layer": (replace_layer, 7),
    "other norm": (other_norm, 7),
    "other activation": (other_activation, 8),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_counts_from_the_next_call_on(kind):
    change, left = CHANGES[kind]
    model = make("BitNet", hidden_act="relu2")
    fused_model = fuse(copy.deepcopy(model))
    before = logits(fused_model)
    change(decoder_layers(model)[0])
    change(decoder_layers(fused_model)[0])
    with Calls(fused) as calls:
        actual = logits(fused_model)
    assert calls.count == left
    assert (actual - before).norm() > 1e-3 * before.norm()
    assert_close(actual, logits(model))
    assert decoder_layers(fused_model)[0].why_not_fused()
    assert not decoder_layers(fused_model)[1].why_not_fused()


@pytest.mark.parametrize("kind", ["Attention", "MLP", "DecoderLayer", "RMSNorm", "SiLU"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_forward_replaced_on_a_class_counts(kind, is_first, monkeypatch):
    model = make()
    owners = {
        "Attention": model.model.layers[0].self_attn,
        "MLP": model.model.layers[0].mlp,
        "DecoderLayer": model.model.layers[0],
        "RMSNorm": model.model.norm,
        "SiLU": model.model.layers[0].mlp.act_fn,
    }
    cls = type(owners[kind])
    forward, calls = cls.forward, []

    def changed(self, *args, **kwargs):
        calls.append(self)
        output = forward(self, *args, **kwargs)
        return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2

    fused_model = copy.deepcopy(model)
    module._make_class.cache_clear()
    if not is_first:
        logits(fuse(fused_model))
    monkeypatch.setattr(cls, "forward", changed)
    try:
        wanted = logits(model)
        count = len(calls)
        assert count
        assert_close(logits(fuse(fused_model) if is_first else fused_model), wanted)
        assert len(calls) == 2 * count
    finally:
        module._make_class.cache_clear()


def test_a_hook_of_all_modules_sees_every_layer():
    model, seen = fuse(make()), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m))
    try:
        logits(model)
    finally:
        handle.remove()
    assert seen == {m for m in model.modules() if not isinstance(m, nn.ModuleList)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_on_a_fused_model(checkpointing):
    peft = pytest.importorskip("peft")
    gradients = []
    for function in (unfuse, fuse):
        torch.manual_seed(0)
        model = function(make())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        config = peft.LoraConfig(
            r=4,
            target_modules=["v_proj", "down_proj"],
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        adapted = peft.get_peft_model(model, config).train()
        with Calls(fused) as calls:
            adapted(IDS, labels=IDS).loss.backward()
        assert calls.count == (0 if function is unfuse else 4 * (1 + checkpointing))
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert len(gradients[0]) == 8
    for wanted, actual in zip(*gradients):
        assert (actual - wanted).norm() <= 0.02 * wanted.norm()


# --- Whole models: conversion, saving, copies, reports ---


@pytest.mark.parametrize("is_fused", [True, False])
def test_convert_and_from_pretrained_keep_it(is_fused, tmp_path):
    save_checkpoint(tmp_path / "theirs", "bitlinear", family="bitnet")
    model = load(tmp_path / "theirs")
    wanted = logits(model)
    convert(model, **({} if is_fused else {"fuse": False}))
    assert len(fused_layers(model)) == (2 if is_fused else 0)
    assert (logits(model) - wanted).norm() < 0.01 * wanted.norm()
    model.save_pretrained(tmp_path / "ours")
    loaded = load(tmp_path / "ours")
    assert repr(loaded) == repr(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    oracle.assert_same_bits(logits(loaded), logits(model))
    (unfuse if is_fused else fuse)(loaded).save_pretrained(tmp_path / "other")
    assert len(fused_layers(load(tmp_path / "other"))) == (0 if is_fused else 2)


def test_fused_models_are_copied_and_pickled():
    model = fuse(make("Mistral"))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
        oracle.assert_same_bits(logits(copied), logits(model))


def test_a_process_that_has_fused_nothing_unpickles():
    kind = type(decoder_layers(fuse(make("Llama")))[0])
    module._make_class.cache_clear()
    again = getattr(module, kind.__qualname__)
    assert again is not kind
    assert again.unfused_class is kind.unfused_class
    with pytest.raises(AttributeError, match="FusedOtherDecoderLayer"):
        module.FusedOtherDecoderLayer  # noqa: B018


def test_blocks_that_are_not_known_are_reported(caplog):
    caplog.set_level(logging.INFO, logger="bitlinear")
    model = nn.ModuleDict({"a": make_falcon(), "b": make_llama()})
    bitlinear.deploy(bitlinear.convert(model))
    wanted = logits(model["a"])
    caplog.clear()
    fuse(model)
    reports = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert reports[0] == ("INFO", "fused 2 decoder layers")
    assert len(reports) == 2
    assert reports[1][0] == "WARNING"
    assert reports[1][1].startswith(
        "2 x FalconDecoderLayer (the first is a.transformer.h.0) not fused: only BitNetDecoderLayer"
    )
    oracle.assert_same_bits(logits(model["a"]), wanted)
    assert list(fused_layers(model)) == ["b.model.layers.0", "b.model.layers.1"]


def test_what_stays_unfused_in_a_known_block_is_reported(caplog):
    model = make()
    decoder_layers(model)[1].mlp.act_fn = nn.GELU()
    decoder_layers(model)[1].self_attn.o_proj.register_forward_hook(hook_that_doubles)
    decoder_layers(model)[0].forward = decoder_layers(model)[0].forward
    fuse(model)
    assert caplog.messages == [
        "1 x LlamaDecoderLayer (the first is model.layers.0) not fused: its forward was replaced "
        "on the instance, for example by accelerate",
        "1 x LlamaDecoderLayer (the first is model.layers.1) not fused: o_proj has hooks",
        "1 x LlamaDecoderLayer (the first is model.layers.1) not fused: act_fn is not one of silu, "
        "relu2, or has hooks",
    ]
    assert list(fused_layers(model)) == ["model.layers.1"]


def test_a_model_without_deployed_layers_is_refused():
    for model, remedy in (
        (make_llama(), "convert the model"),
        (bitlinear.convert(make_llama()), r"bitlinear\.deploy"),
    ):
        with pytest.raises(ValueError, match=f"Llama.* has no deployed BitLinear.* first {remedy}"):
            fuse(model)
        assert not fused_layers(model)


def test_a_layer_of_another_class_cannot_be_unfused():
    model = fuse(make())
    layer = decoder_layers(model)[1]
    layer.__class__ = type("FSDPLayer", (type(layer),), {})
    with pytest.raises(ValueError, match=r"model\.layers\.1 was fused and then became a FSDPLayer"):
        unfuse(model)
    assert len(fused_layers(model)) == 2
