"""Whole models of the benchmark: their weights, and the clocks of their tokens."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("gguf")

from bitlinear import BitLinear
from bitlinear.integrations.transformers import unfuse
from bitlinear.packing import check_packed
from scripts.bench.generation import breakdown, contestants, models, torch_engine
from tests.scripts.tiny_model import (
    HIDDEN,
    INNER,
    LAYERS,
    LINEARS,
    TINY,
    VOCABULARY,
    WEIGHTS,
)

NORMS = LAYERS * (3 * HIDDEN + INNER) + HIDDEN
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def materials(tmp_path, monkeypatch):
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)
    torch.manual_seed(0)
    return contestants.Materials("tiny", None, "cpu", 1, tmp_path)


@pytest.fixture
def engine(materials):
    return contestants.KINDS["bitlinear"].make(materials)


def test_the_shape_of_bitnet_2b():
    config = models.make_config("2b")
    linears = models._linears(models._meta_model(config))
    assert {tuple(layer.weight.shape) for layer in linears.values()} == {
        (2560, 2560), (640, 2560), (6912, 2560), (2560, 6912),
    }  # fmt: skip
    weights = sum(layer.weight.numel() for layer in linears.values())
    assert weights == 2_084_044_800
    assert models.weight_count(**models.SHAPES["2b"]) == weights + 128256 * 2560
    assert models.cache_bytes(config) == 76800


@pytest.mark.parametrize(
    ("name", "bits", "scales"),
    [
        ("bitlinear", 2, 4 * LINEARS),
        ("transformers_packed", 2, 2 * LINEARS),
        ("transformers_offline", 16, 2 * LINEARS),
        ("bf16", 16, 0),
    ],
)
def test_a_model_has_all_its_values_and_shares_the_embedding(materials, name, bits, scales):
    engine = contestants.KINDS[name].make(materials)
    tensors = [*engine.model.parameters(), *engine.model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert engine.model.get_input_embeddings().weight is materials.embedding
    assert engine.model.lm_head.weight is materials.embedding
    assert all(parameter.requires_grad for parameter in engine.model.parameters())
    rotation = sum(buffer.nbytes for buffer in engine.model.model.rotary_emb.buffers())
    head = 2 * VOCABULARY * HIDDEN
    assert engine.token_bytes == WEIGHTS * bits / 8 + head + 2 * NORMS + scales + rotation


def test_an_embedding_that_is_no_head_is_not_read(materials):
    model = models.floating(materials.embedding, materials.config, materials.weights)
    tied = models.token_bytes(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float32))
    assert models.token_bytes(model) - tied == 2 * VOCABULARY * HIDDEN


def test_every_packed_weight_is_ternary_and_all_values_occur(engine):
    layers = [module for module in engine.model.modules() if isinstance(module, BitLinear)]
    assert len(layers) == LINEARS
    for layer in layers:
        check_packed(layer.w_packed, layer.in_features)
        values, counts = (layer.dequantize() / layer.w_scale).unique(return_counts=True)
        assert values.tolist() == [-1, 0, 1]
        assert counts.min() > 0.3 * counts.sum()


@torch.inference_mode()
def test_ours_computes_what_the_layers_of_transformers_do(materials):
    packed = models.packed(materials.embedding, materials.config)
    with torch.compiler.set_stance("force_eager"):
        expected = packed(IDS).logits
    ours = models.ours(materials.embedding, materials.config)(IDS).logits
    difference = (ours - expected).float().std() / expected.float().std()
    assert expected.isfinite().all()
    assert difference < 0.1  # transformers rounds to 8 bits


def slow_down(module, clock, seconds):
    """Let a module's own time pass on a clock."""
    forward = module.forward

    def slower(*args, **kwargs):
        clock.now += seconds
        return forward(*args, **kwargs)

    module.forward = slower


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    for module in (torch_engine, breakdown):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_first_token_and_those_after_it(engine, clock):
    """The head runs once in each pass; here it alone takes time."""
    slow_down(engine.model.lm_head, clock, 1)
    first = engine.first_token(9, 2)
    assert [first(), first()] == [1, 1]
    after = engine.next_tokens(5, 2, 3)
    assert [after(), after()] == [3, 3]
    assert clock.now == 2 * 1 + 2 * 4


def test_each_pass_reads_one_token_at_its_position(engine):
    seen = []

    def note(module, args, kwargs):
        seen.append((tuple(args[0].shape), kwargs["cache"].get_seq_length()))

    layer = engine.model.model.layers[0]
    layer.register_forward_pre_hook(note, with_kwargs=True)
    for depth, batch in ((7, 3), (7, 3), (4, 1), (7, 3)):
        seen.clear()
        engine.next_tokens(depth, batch, 2)()
        expected = [((batch, 1, HIDDEN), length) for length in range(depth, depth + 3)]
        assert seen == expected


def hooks_of(model):
    return [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]


def test_each_part_gets_its_own_time(engine, clock):
    model = unfuse(engine.model)
    hooks = hooks_of(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            slow_down(module, clock, 1)
        elif type(module).__name__ == "BitNetRMSNorm":
            slow_down(module, clock, 100)
        elif type(module).__name__ == "BitNetAttention":
            slow_down(module, clock, 10_000)
    slow_down(model.lm_head, clock, 1e6)
    slow_down(model.model.rotary_emb, clock, 1e7)
    assert breakdown.measure(engine, 5, 1, 2) == {
        "head": 1e6,
        "linears": LINEARS,
        "attention": 10_000 * LAYERS,
        "norms": 100 * (4 * LAYERS + 1),
        "rest": 1e7,
    }
    before = clock.now
    engine.next_tokens(5, 1, 1)()
    assert clock.now > before
    assert hooks_of(model) == hooks


def test_the_parts_of_a_fused_model(engine, clock):
    """It stays fused, and its products are the linear layers."""
    model = engine.model
    slow_down(model.lm_head, clock, 1e6)
    for layer in model.model.layers:
        slow_down(layer, clock, 10_000)
    parts = breakdown.measure(engine, 5, 1, 2)
    assert parts["head"] == 1e6
    assert parts["attention"] == 10_000 * LAYERS
    calls = []
    wrapped = breakdown.fused_linear

    def slow_product(*args):
        calls.append(args)
        clock.now += 1
        return wrapped(*args)

    with mock.patch.object(breakdown, "fused_linear", slow_product):
        parts = breakdown.measure(engine, 5, 1, 2)
    assert calls
    assert parts["linears"] == 4 * LAYERS


def test_captured_tokens_come_after_those_of_the_capture(engine, clock):
    seen = []

    def note(module, args, kwargs):
        layer = kwargs["cache"].layers[0]
        length = int(layer.get_seq_length())
        assert layer.keys[:, :, :5].abs().amin() > 0
        seen.append((tuple(args[0].shape), length, layer.max_cache_len))

    slow_down(engine.model.lm_head, clock, 1)
    layer = engine.model.model.layers[0]
    layer.register_forward_pre_hook(note, with_kwargs=True)
    call = engine.captured_tokens(5, 2, 4)
    for _ in range(2):
        seen.clear()
        assert call() == 4
        assert seen == [((2, 1, HIDDEN), length, 12) for length in range(5, 12)]
