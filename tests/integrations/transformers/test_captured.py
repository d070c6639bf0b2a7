"""``generate`` with captured steps, against ``model.generate`` of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitlinear
from tests.integrations.transformers.checkpoints import convert, load, save_checkpoint, transformers
from tests.integrations.transformers.models import (
    SIZES,
    make_encoder_decoder,
    make_gpt2,
    make_llama,
)

from bitlinear.integrations.transformers import decode_step, fuse, generate  # isort: skip
from bitlinear.integrations.transformers.decoding import speed_up_decoding  # isort: skip

generation = transformers.generation

IDS = torch.tensor([[5, 9, 71, 33, 8, 60, 17], [81, 80, 3, 12, 4, 9, 44], [7, 5, 30, 2, 11, 90, 6]])
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
EOS = [7, 13, 21, 34, 55, 89]
SETTINGS = {"max_new_tokens": 14, "eos_token_id": EOS, "pad_token_id": 0}
SAMPLE = {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.9}


def make_ours():
    model = bitlinear.deploy(bitlinear.convert(make_llama().eval()))
    speed_up_decoding(fuse(model))
    return model


def make_qwen3():  # Its masks are by the type of the layer; its keys have norms.
    config = transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)
    model = transformers.Qwen3ForCausalLM(config).eval()
    return fuse(bitlinear.deploy(bitlinear.convert(model)))


def make_mistral(window=40):
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=window)
    return transformers.MistralForCausalLM(config).eval()


MAKERS = {
    "ours": make_ours,
    "qwen3": make_qwen3,
    "llama": make_llama,
    "gpt2": make_gpt2,  # It has learned positions.
    "window": make_mistral,  # It holds all tokens of the calls, but not the room of the cache.
    "eager": lambda: make_llama(attn_implementation="eager"),
}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: make().eval() for name, make in MAKERS.items()}


@pytest.fixture
def model(models):
    return models["ours"]


@pytest.fixture(params=[False, True], ids=["in time", "a step late"])
def late(request, monkeypatch):
    """Read each token after the next step was queued, as with a GPU, or at once."""
    monkeypatch.setattr(decode_step.DecodeStep, "is_captured", request.param)
    return request.param


class Recorder(generation.BaseStreamer):
    def __init__(self):
        self.values, self.ends = [], 0

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.ends += 1


class StopAt(generation.StoppingCriteria):
    """Finishes sequences whose last two tokens have an even sum."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -2:].sum(1) % 2 == 0) & (input_ids.shape[1] > 10)


class Tokenizer:
    """As much of a tokenizer as stop strings need."""

    def get_vocab(self):
        return {chr(i): i for i in range(99)}

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(c) for c in text]}

    def _convert_id_to_token(self, token):
        return chr(token)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def theirs(model, *args, seed=3, **kwargs):
    torch.manual_seed(seed)
    if "cache" not in kwargs:
        kwargs["cache_implementation"] = "static"
    return model.generate(*args, **kwargs)


def ours(model, *args, seed=3, **kwargs):
    torch.manual_seed(seed)
    return generate(model, *args, **kwargs)


CALLS = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "padded": {"attention_mask": MASK},
    "no end": {"eos_token_id": None},
    "all end": {"eos_token_id": list(range(98))},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "max_length": {"max_new_tokens": None, "max_length": 11},
    "sample": {**SAMPLE, "attention_mask": MASK},
    "min_p": {"do_sample": True, "min_p": 0.01, "renormalize_logits": True},
    "returns": {"do_sample": True, "num_return_sequences": 2},
    "repetition": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "minimum": {"min_new_tokens": 9, **SAMPLE},
    "most end": {**SAMPLE, "eos_token_id": list(range(60))},
    "criteria": {**SAMPLE, "stopping_criteria": generation.StoppingCriteriaList([StopAt()])},
    "shorter": {
        "stopping_criteria": generation.StoppingCriteriaList([generation.MaxLengthCriteria(12)])
    },
    "time": {"max_time": 1e4},
    "chunks": {"prefill_chunk_size": 3, "attention_mask": MASK},
}


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("call", CALLS)
def test_the_tokens_are_those_of_transformers(model, call):
    settings = {**SETTINGS, **CALLS[call]}
    wanted = theirs(model, IDS, **settings)
    after = torch.rand(3)
    torch.testing.assert_close(ours(model, IDS, **settings), wanted, atol=0, rtol=0)
    assert torch.equal(torch.rand(3), after)  # An undone step draws no random numbers.


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("settings", [{}, SAMPLE], ids=["greedy", "sample"])
def test_other_models(models, name, settings):
    settings = {**SETTINGS, **settings, "attention_mask": MASK}
    assert torch.equal(ours(models[name], IDS, **settings), theirs(models[name], IDS, **settings))


def test_a_converted_checkpoint(tmp_path):
    save_checkpoint(tmp_path, "online", family="bitnet")
    model = convert(load(tmp_path), head="int8")
    assert torch.equal(ours(model, IDS, **SETTINGS), theirs(model, IDS, **SETTINGS))


def test_the_sequences_end_at_different_steps(model):
    """What the other tests rely on."""
    lengths = set()
    for settings in (SETTINGS, {**SETTINGS, **SAMPLE}):
        new = ours(model, IDS, **settings)[:, IDS.shape[1] :]
        lengths |= {int((row != 0).sum()) for row in new}
    assert len(lengths) > 2


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("settings", [{}, SAMPLE, {"repetition_penalty": 1.2}])
@pytest.mark.parametrize("eos", [EOS, list(range(98))])
def test_what_a_dictionary_has(model, settings, eos):
    settings = {**SETTINGS, **settings, "eos_token_id": eos, "return_dict_in_generate": True}
    settings.update(output_scores=True, output_logits=True)
    wanted, got = theirs(model, IDS, **settings), ours(model, IDS, **settings)
    assert type(got) is type(wanted)
    for name in ("sequences", "scores", "logits"):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name), atol=1e-6, rtol=1e-6)
    assert got.cache.get_seq_length() == wanted.cache.get_seq_length()
    length = int(wanted.cache.get_seq_length())
    for mine, other in zip(got.cache.layers, wanted.cache.layers):
        assert type(mine) is transformers.cache_utils.StaticLayer
        torch.testing.assert_close(mine.keys[:, :, :length], other.keys[:, :, :length])
        torch.testing.assert_close(mine.values[:, :, :length], other.values[:, :, :length])
    assert ours(model, IDS, **{**settings, "output_scores": False}).scores is None


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("settings", [{}, {"eos_token_id": list(range(98))}, {"max_new_tokens": 2}])
def test_a_streamer_gets_each_token_once(model, settings):
    settings = {**SETTINGS, **settings}
    theirs(model, IDS[:1], streamer=(wanted := Recorder()), **settings)
    ours(model, IDS[:1], streamer=(got := Recorder()), **settings)
    assert [v.tolist() for v in got.values] == [v.tolist() for v in wanted.values]
    assert got.ends == 1


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("in_config", [False, True])
def test_stop_strings(model, in_config, monkeypatch):
    settings = {"max_new_tokens": 9, "pad_token_id": 0}
    tokens = ours(model, IDS[:1], **settings)[0, IDS.shape[1] :].tolist()
    stop = "".join(map(chr, tokens[3:5]))
    if in_config:
        config = transformers.GenerationConfig(stop_strings=[stop], **settings)
        settings = {"generation_config": config}
    else:
        settings["stop_strings"] = stop
    wanted = theirs(model, IDS[:1], tokenizer=Tokenizer(), **settings)
    assert wanted.shape[1] == IDS.shape[1] + 5
    assert torch.equal(ours(model, IDS[:1], tokenizer=Tokenizer(), **settings), wanted)
    with pytest.raises(ValueError, match="pass tokenizer"):
        generate(model, IDS[:1], **settings)
    monkeypatch.setattr(model.generation_config, "stop_strings", [stop])
    with pytest.raises(ValueError, match="set it to None, and pass stop_strings"):
        generate(model, IDS[:1], tokenizer=Tokenizer(), **settings)


def test_a_chat_goes_on_in_its_cache(model):
    """The second turn reads only what is new."""
    caches = [transformers.StaticCache(config=model.config, max_cache_len=40) for _ in range(2)]
    ids = [IDS, IDS]
    for turn in range(3):
        ids = [
            call(model, each, cache=cache, max_new_tokens=4, pad_token_id=0)
            for call, each, cache in zip((theirs, ours), ids, caches)
        ]
        assert torch.equal(*ids)
        assert caches[1].get_seq_length() == caches[0].get_seq_length() == 10 + 7 * turn
        ids = [torch.cat([each, IDS[:, :3] + turn], dim=1) for each in ids]


def test_a_chat_goes_on_with_new_tokens_alone(model):
    """Their mask has the length of the whole chat. The cache is just large enough."""
    results = []
    for call in (theirs, ours):
        cache = transformers.StaticCache(config=model.config, max_cache_len=7 + 3 + 3)
        call(model, IDS, cache=cache, max_new_tokens=1, pad_token_id=0)
        mask = torch.ones(3, 7 + 3, dtype=torch.long)
        settings = {"cache": cache, "attention_mask": mask, "pad_token_id": 0}
        results.append(call(model, IDS[:, :3], **settings, max_new_tokens=4))
    assert torch.equal(*results)
    cache.crop(-6)
    with pytest.raises(ValueError, match="holds 13 tokens, but the call can need 14"):
        generate(model, IDS[:, :3], **settings, max_new_tokens=5)


def test_embeddings_as_prompts(model):
    embeddings = model.get_input_embeddings()(IDS)
    settings = {**SETTINGS, "inputs_embeds": embeddings, "attention_mask": MASK}
    assert torch.equal(ours(model, **settings), theirs(model, **settings))


def test_each_call_takes_the_model_as_it_is():
    torch.manual_seed(1)
    model = make_ours()
    first = ours(model, IDS, **SETTINGS)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: -output)
    second = ours(model, IDS, **SETTINGS)
    assert not torch.equal(first, second)
    assert torch.equal(second, theirs(model, IDS, **SETTINGS))


def test_compile_config_compiles_the_step(model, monkeypatch):
    seen = []

    def compile_call(config):
        seen.append(config)
        return model.__call__

    monkeypatch.setattr(model, "get_compiled_call", compile_call)
    config = transformers.CompileConfig(fullgraph=True)
    generate(model, IDS, compile_config=config, **SETTINGS)
    assert not seen  # as in transformers, not on a CPU
    config._compile_all_devices = True
    generate(model, IDS, compile_config=config, **SETTINGS)
    (used,) = seen
    assert (used.mode, used.fullgraph, config.mode) == ("default", True, "reduce-overhead")
    generate(model, IDS, compile_config=config, disable_compile=True, **SETTINGS)
    assert len(seen) == 1


def small_cache(model):
    return transformers.StaticCache(config=model.config, max_cache_len=19)


REFUSED = {
    "beam_search": (lambda model: {"num_beams": 2}, "beam_search cannot be captured"),
    "lookup": (lambda model: {"prompt_lookup_num_tokens": 2}, "assisted_generation cannot be"),
    "assistant": (lambda model: {"assistant_model": model}, "assistant_model cannot be captured"),
    "custom": (lambda model: {"custom_generate": print}, "custom_generate cannot be captured"),
    "synced": (lambda model: {"synced_gpus": True}, "synced_gpus cannot be captured"),
    "states": (
        lambda model: {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states cannot be captured",
    ),
    "no cache": (
        lambda model: {"use_cache": False},
        r"without a cache \(use_cache is False\) cannot be captured",
    ),
    "offloaded": (lambda model: {"cache_implementation": "offloaded"}, "'offloaded' cannot be"),
    "dynamic": (lambda model: {"cache": transformers.DynamicCache()}, "a DynamicCache, but only"),
    "small": (
        lambda model: {"cache": small_cache(model)},
        r"holds 19 tokens, but the call can need (\d+): begin with .* max_cache_len is at least \1",
    ),
    "window": (
        lambda model: {"cache": sliding_cache(model)},
        "the window of the attention has 8 tokens, but the call can need 20",
    ),
    "layer": (
        lambda model: {"cache": other_cache(model)},
        "layer of the class LinearAttentionLayer",
    ),
    "batch": (
        lambda model: {"cache": used_cache(model)},
        "holds 2 sequences, but the inputs are 3",
    ),
}


def sliding_cache(model):
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    cache.layers[1] = transformers.cache_utils.StaticSlidingWindowLayer(64, 8)
    return cache


def other_cache(model):
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    cache.layers[1] = transformers.cache_utils.LinearAttentionLayer()
    return cache


def used_cache(model):
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    for layer in cache.layers:
        layer.update(*torch.zeros(2, 2, 2, 1, 8))
    return cache


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_computes_nothing(model, case):
    kwargs, message = REFUSED[case]
    raises = pytest.raises(ValueError, match=message)
    settings = kwargs(model)
    with model.register_forward_pre_hook(pytest.fail), raises as error:
        generate(model, IDS, **SETTINGS, **settings)
    assert case in ("small", "batch") or "call model.generate instead" in str(error.value)


def test_models_that_are_refused(model):
    for settings in ({}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match=r"has 16 tokens, but .* need 20: call model.generate"):
            generate(make_mistral(window=16), IDS, **SETTINGS, **settings)
    with pytest.raises(ValueError, match="only decoder-only models"):
        generate(make_encoder_decoder(), IDS, max_new_tokens=2)
    with pytest.raises(TypeError, match="a Sequential: call its own generate, or pass"):
        generate(nn.Sequential(model), IDS)
    with pytest.raises(TypeError, match=r"that can generate, but this is a LlamaModel"):
        generate(model.model, IDS)
    wanted = make_llama()
    wanted.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="inputs on cpu and a model on cpu, meta cannot"):
        generate(wanted, IDS)


def test_a_window_is_never_exceeded():
    """The cache of a call ends with the window, so that no later call attends to more."""
    model = make_mistral(window=40)
    settings = {"return_dict_in_generate": True, "pad_token_id": 0}
    for kind in (None, "static"):
        out = generate(model, IDS, cache_implementation=kind, max_new_tokens=14, **settings)
        more = generate(model, out.sequences, cache=out.cache, max_new_tokens=19, **settings)
        wanted = theirs(model, IDS, pad_token_id=0, max_new_tokens=33)
        assert torch.equal(more.sequences, wanted)
        with pytest.raises(ValueError, match="holds 40 tokens, but the call can need"):
            generate(model, more.sequences, cache=more.cache, max_new_tokens=2, **settings)
    slides = transformers.StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="a window that slides: pass no cache"):
        generate(model, IDS, cache=slides, max_new_tokens=14, **settings)


def test_a_mask_of_another_kind_is_refused(model, monkeypatch):
    prepare = model.prepare_inputs_for_generation

    def shift(*args, is_first_iteration=False, **kwargs):
        inputs = prepare(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration:
            inputs["attention_mask"][:, :, :, 0] = False
        return inputs

    monkeypatch.setattr(model, "prepare_inputs_for_generation", shift)
    with pytest.raises(ValueError, match="mask of this model is not one of all tokens so far"):
        generate(model, IDS, max_new_tokens=3)

    def add(*args, **kwargs):
        return {**prepare(*args, **kwargs), "token_type_ids": torch.zeros(3, 1)}

    monkeypatch.setattr(model, "forward", lambda token_type_ids=None, **kw: forward(**kw))
    forward = type(model).forward.__get__(model)
    monkeypatch.setattr(model, "prepare_inputs_for_generation", add)
    with pytest.raises(ValueError, match="reads token_type_ids in each step"):
        generate(model, IDS, max_new_tokens=3)


def test_a_cache_is_whole_after_an_error(model):
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)

    class Broken(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.values) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, IDS[:1], cache=cache, streamer=Broken(), max_new_tokens=9)
    assert {type(layer) for layer in cache.layers} == {transformers.cache_utils.StaticLayer}
    assert cache.get_seq_length() == 7 + 2
    assert set(vars(cache.layers[0])) == set(vars(small_cache(model).layers[0])) | INITIALIZED


INITIALIZED = {"device", "batch_size", "num_heads", "v_head_dim", "k_head_dim"}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"cache_implementation": "paged"},
        {"token_healing": True},
    ],
)
def test_a_streamer_gets_nothing_of_a_refused_call(model, settings):
    recorder = Recorder()
    with pytest.raises(ValueError, match=r"call model\.generate instead"):
        generate(model, IDS[:1], streamer=recorder, max_new_tokens=2, **settings)
    assert vars(recorder) == vars(Recorder())


def test_a_criterion_that_the_prompt_fulfils_ends_after_one_token(model):
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(3)])
    settings = {"max_new_tokens": 70, "stopping_criteria": criteria}
    assert torch.equal(
        generate(model, IDS, **settings), model.generate(IDS, do_sample=False, **settings)
    )
