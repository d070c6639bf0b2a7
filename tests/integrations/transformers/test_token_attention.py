"""Fused models whose new tokens take one operator for their attention."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from bitlinear.integrations.transformers import attention, captured, decoder_layers, fuse, unfuse
from bitlinear.integrations.transformers.decoding import speed_up_decoding
from tests import oracle
from tests.calls import Calls
from tests.integrations.transformers.checkpoints import IDS, transformers
from tests.integrations.transformers.test_fusion import generate, make

operator = torch.ops.bitlinear.attend.default
LAYERS = 2


def make_fused(family="Llama", **kwargs):
    torch.manual_seed(0)
    model = fuse(make(family, **kwargs).bfloat16())
    speed_up_decoding(model)
    return model


def decode(model, steps=4, mask=None):
    """The logits of new tokens after a prompt, and the cache."""
    cache = transformers.DynamicCache(config=model.config)
    logits = [model(IDS, attention_mask=mask, cache=cache).logits[:, -1:]]
    for step in range(steps):
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        ids = IDS[:, step : step + 1]
        logits.append(model(ids, attention_mask=mask, cache=cache).logits)
    return torch.cat(logits, dim=1), cache


def in_steps(monkeypatch, *args, **kwargs):
    """As ``decode``, without the operator."""
    with monkeypatch.context() as patch, Calls(operator) as calls:
        patch.setattr(attention, "has_cpu_kernels", lambda: False)
        result = decode(*args, **kwargs)
    assert calls.count == 0
    return result


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["BitNet", "Llama", "Mistral", "Qwen2", "Qwen3"])
def test_new_tokens_take_the_operator(family, padded, mode, monkeypatch):
    model = make_fused(family, **({"sliding_window": None} if family == "Mistral" else {}))
    mask = torch.ones_like(IDS)
    mask[1, :4] = not padded
    with mode():
        with Calls(operator) as calls:
            ours, cache = decode(model, 5, mask)
        theirs, other = in_steps(monkeypatch, model, 5, mask)
    assert calls.count == 5 * LAYERS
    exact = copy.deepcopy(model).float()
    with torch.no_grad():
        wanted, _ = decode(exact, 5, mask)
    # Both round to bf16 elsewhere; which of the two is nearer to fp32 is chance.
    assert (ours - wanted).norm() <= 1.4 * (theirs - wanted).norm()
    first = cache.layers[0], other.layers[0]  # of later layers the input differs
    oracle.assert_same_bits(first[0].values, first[1].values)
    oracle.assert_same_bits(first[0].keys, first[1].keys)
    assert cache.get_seq_length() == other.get_seq_length() == IDS.shape[1] + 5


def test_fused_layers_rotate_and_store_in_the_same_step(monkeypatch):
    model = make_fused()
    rotate, calls = decoder_layers.rotate_heads, []
    monkeypatch.setattr(
        decoder_layers, "rotate_heads", lambda *args: calls.append(args) or rotate(*args)
    )
    with torch.no_grad():
        decode(model, 3)
    assert len(calls) == LAYERS  # of the prompt


def test_it_generates_the_same_tokens(monkeypatch):
    model = make_fused("BitNet")
    with Calls(operator) as calls:
        tokens = generate(model)
    assert calls.count > 0
    monkeypatch.setattr(attention, "has_cpu_kernels", lambda: False)
    assert torch.equal(generate(model), tokens)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["BitNet", "Mistral"])
def test_so_do_the_steps_of_our_generate(family, padded):
    model = make_fused(family, **({"sliding_window": None} if family == "Mistral" else {}))
    mask = torch.ones_like(IDS)
    mask[1, :4] = not padded
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with Calls(operator) as calls:
        tokens = captured.generate(model, IDS, **settings, pad_token_id=0)
    assert calls.count == 5 * LAYERS
    wanted = model.generate(
        IDS, **settings, pad_token_id=0, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(tokens, wanted)


def test_the_cache_grows_when_it_is_full():
    model = make_fused()
    with torch.no_grad(), Calls(operator) as calls:
        cache = decode(model, 2)[1]
        room = cache.layers[0]._rooms[0].tensor.shape[2]
        for _ in range(room - cache.get_seq_length() + 3):
            model(IDS[:, :1], cache=cache)
    assert cache.layers[0]._rooms[0].tensor.shape[2] > room
    assert cache.get_seq_length() == room + 3
    assert calls.count == (room + 3 - IDS.shape[1]) * LAYERS


def test_a_copy_of_the_cache_and_an_older_view_keep_their_tokens():
    model = make_fused()
    with torch.no_grad():
        cache = decode(model, 2)[1]
        branch = copy.copy(cache)
        branch.layers = [copy.copy(layer) for layer in cache.layers]
        view, before = cache.layers[1].keys, cache.layers[1].keys.clone()
        one = model(IDS[:, :1], cache=cache).logits
        model(IDS[:, 5:6], cache=branch)
        oracle.assert_same_bits(view, before)
        again = decode(model, 2)[1]
        oracle.assert_same_bits(model(IDS[:, :1], cache=again).logits, one)
        for layer, other in zip(cache.layers, again.layers):
            oracle.assert_same_bits(layer.keys, other.keys)
        assert not torch.equal(branch.layers[0].keys[:, :, -1], cache.layers[0].keys[:, :, -1])


def use(name):
    return lambda model: model.set_attn_implementation(name)


OTHERS = {
    "sdpa": use("sdpa"),
    "eager": use("eager"),
    "fp32": nn.Module.float,
    "fp16": nn.Module.half,
}


@pytest.mark.parametrize("case", OTHERS)
def test_everything_else_goes_in_steps(case):
    change = OTHERS[case]
    model = make_fused()
    change(model)
    with torch.no_grad(), Calls(operator) as calls:
        output = model(IDS[:, :1], cache=decode(model, 2)[1])
    assert output.logits.isfinite().all()
    assert calls.count == 0


@pytest.mark.parametrize(
    "kwargs",
    [{"head_dim": 24}, {"head_dim": 272, "num_attention_heads": 2, "num_key_value_heads": 1}],
)
def test_heads_that_it_cannot_compute_go_in_steps(kwargs):
    model = make_fused(**kwargs)
    with torch.no_grad(), Calls(operator) as calls:
        assert decode(model)[0].isfinite().all()
    assert calls.count == 0


def hook_attention(model):
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("family", "kwargs", "change"),
    [
        ("Mistral", {"sliding_window": 4}, lambda model: None),
        ("Llama", {}, hook_attention),
        ("Llama", {}, unfuse),
    ],
)
def test_attention_alone_where_the_rest_goes_in_steps(family, kwargs, change, monkeypatch):
    model = make_fused(family, **kwargs)
    change(model)
    with torch.no_grad(), Calls(operator) as calls:
        ours, _ = decode(model)
        theirs, _ = in_steps(monkeypatch, model)
    assert calls.count == 4 * LAYERS
    assert (ours - theirs).norm() <= 0.03 * theirs.norm()


def test_a_replaced_update_of_the_cache_is_called():
    model = make_fused()
    cache = transformers.DynamicCache(config=model.config)
    update, seen = cache.update, []
    cache.update = lambda *args, **kwargs: seen.append(args) or update(*args, **kwargs)
    with torch.no_grad():
        for step in range(3):
            model(IDS[:, step : step + 1], cache=cache)
    assert len(seen) == 3 * LAYERS


def test_gradients_and_several_tokens_go_in_steps():
    model = make_fused()
    with torch.no_grad(), Calls(operator) as calls:
        cache = decode(model, 1)[1]
        assert calls.count == LAYERS
        model(IDS[:, :2], cache=cache)
    model(IDS[:, :1], cache=cache).logits.sum().backward()
    assert calls.count == LAYERS
