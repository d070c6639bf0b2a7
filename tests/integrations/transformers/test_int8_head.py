"""Heads with int8 weights, and the embedding that shares them."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from torch import nn

import bitlinear
from tests import oracle
from tests.integrations.transformers.checkpoints import (
    IDS,
    convert,
    load,
    logits,
    save_checkpoint,
    transformers,
)
from tests.integrations.transformers.models import make_llama, make_t5

from bitlinear.integrations.transformers import int8, quantize_head  # isort: skip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
X_DTYPES = [*DTYPES, torch.float64]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def deployed(**kwargs):
    return bitlinear.deploy(bitlinear.convert(make_llama(**kwargs).eval()))


def table_of(weight):
    return int8.Int8Table.from_weight(weight)


def wanted(x, table):
    """The product in float64."""
    return x.double() @ (table.values.double() * table.scales.double()).T


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_table_is_the_nearest_one(dtype):
    weight = torch.randn(9000, 5).to(dtype) * torch.logspace(-4, 3, 9000)[:, None].to(dtype)
    weight[1] = 0
    weight[2] = torch.tensor([1.0, -1.0, 0.5, 0.0, 2**-8])
    table = table_of(weight)
    error = (table.values.double() * table.scales.double() - weight.double()).abs()
    assert (error <= table.scales.double() * 0.5000001).all()
    assert table.values.abs().amax() == 127
    assert table.values.dtype == torch.int8
    assert (table.values[1] == 0).all()
    oracle.assert_same_bits(table.scales, table.scales.bfloat16().float())
    least = weight.double().abs().amax(dim=1, keepdim=True) / 127
    used = least[:, 0] > 1e-38
    ratio = (table.scales.double() / least)[used]
    assert (ratio >= 1 - 1e-7).all()
    assert (ratio <= 1 + 2**-7).all()


@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize("way", ["as here", "ours", "int_mm", "expanded"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 33, 130])
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (37, 19), (96, 64), (5000, 24)])
def test_the_product_is_that_of_float64(dtype, way, tokens, shape, monkeypatch):
    if way == "int_mm" and not int8.cpu_product_is_exact():
        pytest.skip("this CPU has no exact int8 product")
    if way != "as here":
        monkeypatch.setattr(int8, "cpu_product_is_exact", lambda: way == "int_mm")
        monkeypatch.setattr(int8, "has_cpu_kernels", lambda: way == "ours")
    table = table_of(torch.randn(shape).to(dtype))
    x = torch.randn(tokens, shape[1]).to(dtype)
    y = table.multiply(x)
    assert y.dtype == dtype
    assert y.shape == (tokens, shape[0])
    size = wanted(x.abs(), int8_abs(table))
    # The unit in the last place of the result, and 16 bits of an activation.
    limit = size * torch.finfo(dtype).eps + x.double().abs().amax(1, True) * 4e-5 * row_sums(table)
    assert ((y.double() - wanted(x, table)).abs() <= limit).all()


def int8_abs(table):
    absolute = copy.deepcopy(table)
    absolute.values = table.values.abs()
    return absolute


def row_sums(table):
    return (table.values.double().abs() * table.scales.double()).sum(1)


def test_the_largest_sums_are_exact():
    if not int8.cpu_product_is_exact():
        pytest.skip("this CPU has no exact int8 product")
    table = table_of(torch.full((4, 4096), 127.0))
    for sign in (1, -1):
        y = table.multiply(sign * torch.ones(2, 4096))
        torch.testing.assert_close(y, torch.full((2, 4), sign * 4096 * 127.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_tokens_changes_no_bit(dtype):
    table = table_of(torch.randn(300, 1096))
    x = torch.randn(40, 1096).to(dtype)
    rows = torch.cat([table.multiply(token) for token in x.split([1, 3, 36])])
    oracle.assert_same_bits(table.multiply(x), rows)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("way", ["as here", "expanded"])
def test_compile(dynamic, way, monkeypatch):
    """Whichever number of tokens comes first."""
    if way == "expanded":
        monkeypatch.setattr(int8, "cpu_product_is_exact", lambda: False)
        monkeypatch.setattr(int8, "has_cpu_kernels", lambda: False)
    table = table_of(torch.randn(96, 64).bfloat16())
    for sizes in ([9, 1, 40], [1, 2, 17]):
        int8._try_cpu_product.cache_clear()
        torch.compiler.reset()
        compiled = torch.compile(
            table.multiply, fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        for tokens in sizes:
            x = torch.randn(tokens, 64).bfloat16()
            wanted = table.multiply(x)
            with torch.compiler.set_stance("default"):
                oracle.assert_same_bits(compiled(x), wanted)


def test_a_token_does_not_change_the_others():
    table = table_of(torch.randn(64, 32))
    x = torch.randn(5, 32)
    y = table.multiply(x)
    changed = x.clone()
    changed[2] *= 1000
    changed[4, 3] = float("nan")
    new = table.multiply(changed)
    oracle.assert_same_bits(new[[0, 1, 3]], y[[0, 1, 3]])
    assert new[4].isnan().all()
    oracle.assert_same_bits(table.multiply(x[1:2]), y[1:2])


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (0, 7)])
def test_shapes_of_inputs(shape):
    table = table_of(torch.randn(5, 7))
    assert table.multiply(torch.randn(shape)).shape == (*shape[:-1], 5)
    strided = torch.randn(7, 4).T
    oracle.assert_same_bits(table.multiply(strided), table.multiply(strided.contiguous()))
    with pytest.raises(ValueError, match=re.escape("must have 7 features")):
        table.multiply(torch.randn(3, 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_gradient_of_the_input_and_of_the_bias(dtype, tokens):
    model = make_llama()
    model.lm_head = nn.Linear(32, 99, bias=True)
    head = quantize_head(model.to(dtype)).lm_head
    x = torch.randn(tokens, 32, dtype=dtype, requires_grad=True)
    g = torch.randn(tokens, 99, dtype=dtype)
    head(x).backward(g)
    dequantised = head.table.values.double() * head.table.scales.double()
    torch.testing.assert_close(
        x.grad.double(), g.double() @ dequantised, atol=0.02 if dtype != torch.float32 else 1e-5,
        rtol=1e-2 if dtype != torch.float32 else 1e-5,
    )  # fmt: skip
    torch.testing.assert_close(head.bias.grad, g.sum(0), atol=0.02, rtol=0.01)
    plain = head.table.multiply(x.detach())
    oracle.assert_same_bits(head(x.detach()), plain + head.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transforms_of_torch_func(dtype):
    head = quantize_head(make_llama().to(dtype)).lm_head
    x = torch.randn(3, 32, dtype=dtype, requires_grad=True)
    wanted = torch.autograd.grad(head(x).square().sum(), x)[0]
    actual = torch.func.grad(lambda x: head(x).square().sum())(x.detach())
    oracle.assert_same_bits(actual, wanted)
    oracle.assert_same_bits(
        torch.vmap(head)(x[:, None]), torch.stack([head(t) for t in x[:, None]])
    )


@pytest.mark.parametrize("tied", [True, False])
def test_what_needs_a_weight_gets_an_explanation(tied):
    model = quantize_head(make_llama(tie_word_embeddings=tied))
    with pytest.raises(AttributeError, match=r"\(gguf.save, a resize of the embeddings\) has to"):
        model.resize_token_embeddings(5)
    assert not hasattr(model.lm_head, "weight")
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        _ = model.lm_head.wait


def test_autocast():
    table = table_of(torch.randn(6, 8))
    x = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        oracle.assert_same_bits(table.multiply(x), table.multiply(x.bfloat16()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_with_the_rounded_table(tied, dtype):
    model = deployed(tie_word_embeddings=tied).to(dtype)
    rounded = copy.deepcopy(model)
    table = table_of(model.lm_head.weight)
    with torch.no_grad():
        rounded.lm_head.weight.copy_(table.values * table.scales)
    assert quantize_head(model) is model
    torch.testing.assert_close(
        logits(model), logits(rounded), atol=0.02 if dtype == torch.bfloat16 else 1e-4, rtol=0.02
    )
    model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=3)
    model.tie_weights()
    assert model.get_output_embeddings().is_tied == tied


def test_a_tied_table_is_there_once():
    model = make_llama(tie_word_embeddings=True).bfloat16()
    before = sum(
        t.nbytes for t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.values()
    )
    quantize_head(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert sum(t.nbytes for t in tensors) == before - 99 * 32 * 2 + 99 * 32 + 99 * 4
    assert not any("lm_head" in name for name in model.state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_keeps_every_bit(tied, tmp_path):
    quantize_head(deployed(tie_word_embeddings=tied)).save_pretrained(tmp_path / "0")
    model = load(tmp_path / "0", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "1")
    again = load(tmp_path / "1")
    assert repr(again) == repr(model)
    for name, tensor in again.state_dict().items():
        oracle.assert_same_bits(tensor, model.state_dict()[name])
    oracle.assert_same_bits(logits(again), logits(model))
    half = load(tmp_path / "1", dtype=torch.float16)
    oracle.assert_same_bits(half.lm_head.table.scales, model.lm_head.table.scales)
    assert half.model.embed_tokens(IDS).dtype == torch.float16
    body = transformers.AutoModel.from_pretrained(tmp_path / "1")
    oracle.assert_same_bits(body(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "body")
    oracle.assert_same_bits(loaded(IDS).last_hidden_state, body(IDS).last_hidden_state)


def test_a_checkpoint_without_the_table_is_refused(tmp_path):
    import safetensors.torch

    model = quantize_head(deployed(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["model.embed_tokens.table.scales"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"embed_tokens: the checkpoint has no table\.scales"):
        load(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_copies_moves_and_casts(tied):
    model = quantize_head(deployed(tie_word_embeddings=tied))
    before, scales = logits(model), model.lm_head.table.scales.clone()
    new = copy.deepcopy(model)
    assert new.lm_head.table is not model.lm_head.table
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (new, torch.load(buffer, weights_only=False)):
        oracle.assert_same_bits(logits(other), before)
        if tied:
            assert other.lm_head.table is other.model.embed_tokens.table
    state = copy.deepcopy(model.state_dict())
    fresh = quantize_head(deployed(tie_word_embeddings=tied))
    fresh.load_state_dict(state)
    oracle.assert_same_bits(logits(fresh), before)
    for dtype in DTYPES[::-1]:
        model.to(dtype)
        oracle.assert_same_bits(model.lm_head.table.scales, scales)
        assert model.model.embed_tokens(IDS).dtype == dtype
        assert model(IDS).logits.dtype == dtype
    assert model.to("meta").lm_head.table.values.is_meta


def test_hooks_stay():
    model = make_llama(tie_word_embeddings=True)
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    model.model.embed_tokens.register_forward_hook(lambda *_: seen.append("embedding"))
    quantize_head(model)(IDS)
    assert seen == ["embedding", "head"]


def test_lookups_check_their_indices():
    model = quantize_head(make_llama(tie_word_embeddings=True))
    embed = model.model.embed_tokens
    table = embed.table
    oracle.assert_same_bits(embed(IDS), (table.values * table.scales)[IDS])
    for index in (-1, 99):
        with pytest.raises(IndexError):
            embed(torch.tensor([index]))


def test_convert_quantises_the_head_too(tmp_path):
    save_checkpoint(tmp_path, "online", dtype=torch.bfloat16)
    plain, model = convert(load(tmp_path)), convert(load(tmp_path), head="int8")
    oracle.assert_same_bits(model.lm_head.table.values, table_of(plain.lm_head.weight).values)
    error = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 1e-4 < error < 0.02


def sharing_twice():
    model = make_llama(tie_word_embeddings=True)
    model.model.other = nn.Linear(32, 99, bias=False)
    model.model.other.weight = model.lm_head.weight
    return model


def with_head(change):
    model = make_llama()
    change(model)
    return model


def fill_nan(model):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")


class Reader(transformers.LlamaForCausalLM):
    """As Mamba, whose code reads the dtype of self.lm_head.weight."""

    def forward(self, input_ids, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        return self.lm_head(hidden.to(self.lm_head.weight.dtype))


class ReaderInside(Reader):
    pass


def make_reader():
    return ReaderInside(make_llama().config)


REFUSED = {
    "unknown": (make_llama, {"head": "int4"}, "None or one of int8, but it is 'int4'"),
    "no model": (lambda: nn.Linear(2, 3), {}, "needs a PreTrainedModel"),
    "no head": (lambda: make_llama().model, {}, "LlamaModel has no head"),
    "twice": (lambda: quantize_head(make_llama()), {}, "int8 already: leave head=None"),
    "read": (make_reader, {}, "the code of ReaderInside calls it and also reads its weight"),
    "nan": (lambda: with_head(fill_nan), {}, "NaN or infinite"),
    "bitlinear": (
        lambda: with_head(lambda m: setattr(m, "lm_head", bitlinear.BitLinear(32, 99))),
        {},
        "it is a BitLinear",
    ),
    "not linear": (
        lambda: with_head(lambda m: setattr(m, "lm_head", nn.Sequential())),
        {},
        "it is a Sequential, not an nn.Linear",
    ),
    "meta": (lambda: make_llama().to("meta"), {}, "meta device"),
    "three": (sharing_twice, {}, "only one embedding can"),
    "t5": (make_t5, {}, "share its weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_model_is_unchanged(case):
    make, kwargs, message = REFUSED[case]
    model = make()
    modules, state = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        quantize_head(model, **kwargs)
    assert all(a is b for a, b in zip(modules, model.modules()))
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:
            oracle.assert_same_bits(tensor, state[name])


def test_convert_refuses_before_it_changes_anything(tmp_path):
    save_checkpoint(tmp_path, "online")
    model = load(tmp_path)
    modules = list(model.modules())
    fill_nan(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        convert(model, head="int8")
    assert all(a is b for a, b in zip(modules, model.modules()))
