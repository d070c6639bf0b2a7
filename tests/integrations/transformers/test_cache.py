"""The cache that grows in place, against the one of transformers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlinear.integrations.transformers.cache import GrowingLayer, grow_in_place
from tests import oracle
from tests.integrations.transformers.checkpoints import convert, load, save_checkpoint, transformers

DynamicCache = transformers.DynamicCache
DynamicLayer = transformers.cache_utils.DynamicLayer


def states(batch, tokens, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, 2, tokens, 4, generator=generator).to(dtype)
    return keys, torch.randn(batch, 2, tokens, 3, generator=generator).to(dtype)


UPDATES = st.tuples(st.just("update"), st.sampled_from([1, 2, 0, 7, 130]))
OTHERS = st.tuples(
    st.sampled_from(
        [
            "crop",
            "branch",
            "reorder",
            "repeat",
            "select",
            "reset",
            "offload",
            "deepcopy",
            "pickle",
            "inference",
        ]
    ),
    st.integers(1, 5),
)
# Between two other operations there are updates, as in a model.
OPERATIONS = st.lists(st.tuples(UPDATES, OTHERS, UPDATES), min_size=1, max_size=8)


def apply(layer, operation, number, step):
    """Apply an operation; return the layer to go on with, and the views that it returned."""
    batch = 2 if layer.keys is None or not layer.keys.numel() else len(layer.keys)
    if operation == "update":
        return layer, layer.update(*states(batch, number, step))
    if operation == "inference":
        with torch.inference_mode():
            return layer, layer.update(*states(batch, 1, step))
    if operation == "crop":
        layer.crop(-min(number, layer.get_seq_length()))
    elif operation == "reorder":
        layer.reorder_cache(torch.arange(batch).roll(number))
    elif operation == "repeat" and batch < 8:
        layer.batch_repeat_interleave(2)
    elif operation == "select":
        layer.batch_select_indices(torch.tensor([number % batch, 0]))
    elif operation == "reset":
        layer.reset()
    elif operation == "offload":
        layer.offload()
        layer.prefetch()
    elif operation == "branch":  # Both go on; neither may see the tokens of the other.
        other = copy.copy(layer)
        return layer, other.update(*states(batch, 3, 1000 + step))
    elif operation == "deepcopy":
        return copy.deepcopy(layer), ()
    elif operation == "pickle":
        return pickle.loads(pickle.dumps(layer)), ()
    return layer, ()


@torch.no_grad()
@given(OPERATIONS)
def test_any_sequence_of_operations_gives_the_tokens_of_transformers(groups):
    theirs, ours = DynamicLayer(), GrowingLayer()
    kept = []
    operations = [operation for group in groups for operation in group]
    for step, (operation, number) in enumerate(operations):
        theirs, wanted = apply(theirs, operation, number, step)
        ours, views = apply(ours, operation, number, step)
        kept += zip(views, (tensor.clone() for tensor in wanted))
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.keys is not None:
            oracle.assert_same_bits(ours.keys, theirs.keys)
            oracle.assert_same_bits(ours.values, theirs.values)
    for view, value in kept:  # No view has changed.
        oracle.assert_same_bits(view, value)


@torch.no_grad()
@pytest.mark.parametrize("operation", ["crop", "branch", "reorder", "inference", "reset"])
def test_a_view_keeps_its_values_after(operation):
    theirs, ours = DynamicLayer(), GrowingLayer()
    for layer in (theirs, ours):
        layer.update(*states(2, 6, 1))
    view, value = ours.keys, ours.keys.clone()
    for layer in (theirs, ours):
        apply(layer, operation, 2, 2)
        layer.update(*states(2, 3, 3))
    oracle.assert_same_bits(view, value)
    oracle.assert_same_bits(ours.keys, theirs.keys)


@torch.no_grad()
def test_assigned_keys_are_continued():
    theirs, ours, other = DynamicLayer(), GrowingLayer(), GrowingLayer()
    theirs.update(*states(2, 6, 1))
    other.update(*states(2, 6, 1))
    ours.update(*states(2, 6, 2))
    ours.keys, ours.values = other.keys, other.values
    for layer in (theirs, ours):
        layer.update(*states(2, 1, 3))
    oracle.assert_same_bits(ours.keys, theirs.keys)
    oracle.assert_same_bits(ours.values, theirs.values)


@torch.no_grad()
def test_tokens_are_written_in_place():
    layer = GrowingLayer()
    layer.update(*states(2, 9))
    address = layer.keys.data_ptr()
    for _ in range(100):
        layer.update(*states(2, 1))
    assert layer.keys.data_ptr() == address
    assert layer.keys.shape == (2, 2, 109, 4)


@pytest.mark.parametrize("requires", [True, False])
def test_gradients_flow_as_in_transformers(requires):
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(*states(2, 3))
    old = layer.keys
    query = torch.randn(2, 2, 4, 1, requires_grad=True)
    scores = old @ query  # Saves old for the backward pass.
    new = [tensor.requires_grad_(requires) for tensor in states(2, 1, 1)]
    keys, _ = layer.update(*new)
    assert keys.requires_grad == requires
    with torch.no_grad():
        layer.update(*states(2, 1, 2))
    (scores.sum() + (keys @ query).sum()).backward()
    torch.testing.assert_close(query.grad, (2 * old.sum(2) + new[0].detach().sum(2))[..., None])
    if requires:
        assert new[0].grad is not None


@torch.no_grad()
def test_an_older_view_can_be_used_in_a_backward_pass_later():
    layer = GrowingLayer()
    keys, _ = layer.update(*states(2, 3))
    with torch.enable_grad():
        query = torch.randn(2, 2, 4, 1, requires_grad=True)
        scores = (keys @ query).sum()
    layer.update(*states(2, 1))
    scores.backward()
    torch.testing.assert_close(query.grad, keys.sum(2)[..., None])


@torch.no_grad()
def test_other_dtypes_are_promoted_as_in_transformers():
    theirs, ours = DynamicLayer(), GrowingLayer()
    for layer in (theirs, ours):
        layer.update(*states(2, 3, dtype=torch.bfloat16))
        layer.update(*states(2, 1))
        layer.update(*states(2, 1))
    oracle.assert_same_bits(ours.keys, theirs.keys)


def test_only_plain_layers_of_a_cache_are_replaced():
    config = transformers.Gemma2Config(num_hidden_layers=2, sliding_window=4)
    cache = DynamicCache(config=config)
    kinds = [type(layer).__name__ for layer in cache.layers]
    grow_in_place(cache)
    replaced = [type(layer).__name__ for layer in cache.layers]
    assert replaced == [name.replace("DynamicLayer", "GrowingLayer") for name in kinds]
    assert "DynamicSlidingWindowLayer" in replaced
    lazy = DynamicCache()
    grow_in_place(lazy)
    lazy.update(*states(1, 1), 1)
    assert [type(layer) for layer in lazy.layers] == [GrowingLayer] * 2
    both = transformers.EncoderDecoderCache(DynamicCache(), DynamicCache())
    grow_in_place(both)
    assert both.self_attention_cache.layer_class_to_replicate is GrowingLayer
    assert both.cross_attention_cache.layer_class_to_replicate is DynamicLayer


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A converted model, and the same with nothing but the layers changed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, "online")
    ours, plain = convert(load(folder)), convert(load(folder))
    plain.set_attn_implementation("sdpa")
    plain._forward_pre_hooks.clear()
    plain._forward_pre_hooks_with_kwargs.clear()
    return ours, plain


@pytest.mark.parametrize("way", ["greedy", "beams", "sample", "prompt lookup", "assistant"])
def test_generate(way, models):
    ids = torch.tensor([[5, 7, 9, 5, 7, 9, 5, 7], [0, 0, 3, 4, 1, 2, 3, 4]])
    mask = (ids > 0).long()
    if way in ("prompt lookup", "assistant"):
        ids, mask = ids[:1], mask[:1]
    outputs = []
    for model in models:
        torch.manual_seed(1)
        kwargs = dict(WAYS.get(way, {}))
        if way == "assistant":
            kwargs["assistant_model"] = models[1]
        outputs.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=12,
                pad_token_id=0,
                return_dict_in_generate=True,
                **kwargs,
            )
        )
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    kinds = [{type(layer) for layer in output.past_key_values.layers} for output in outputs]
    assert kinds == [{GrowingLayer}, {DynamicLayer}]


def test_a_copied_model_still_grows_its_caches(models):
    model = pickle.loads(pickle.dumps(models[0]))
    output = model.generate(torch.tensor([[5, 7]]), max_new_tokens=2, return_dict_in_generate=True)
    assert {type(layer) for layer in output.past_key_values.layers} == {GrowingLayer}
