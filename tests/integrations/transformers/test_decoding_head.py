"""The head of a model on a CPU, for one token."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from bitlinear import foreign
from bitlinear.integrations.transformers import decoding_head as module
from bitlinear.integrations.transformers import quantize_head
from bitlinear.integrations.transformers.int8_head import Int8Head
from tests.integrations.transformers.models import make_llama


def make_pair(dtype, bias=False):
    torch.manual_seed(0)
    plain = nn.Linear(96, 300, bias=bias, dtype=dtype)
    head = copy.deepcopy(plain)
    head.__class__ = module.DecodingHead
    return head, plain


@pytest.mark.parametrize("shape", [(1, 1, 96), (1, 96), (96,), (2, 1, 96), (1, 3, 96), (0, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_linear_layer(shape, dtype, bias):
    head, plain = make_pair(dtype, bias)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y, wanted = head(x), plain(x)
    assert y.shape == wanted.shape
    assert y.dtype == dtype
    tolerance = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, [x, *head.parameters()], grad),
        torch.autograd.grad(wanted, [x, *plain.parameters()], grad),
    ):
        torch.testing.assert_close(ours, theirs, rtol=2 * tolerance, atol=2 * tolerance)


def uses_our_product(head, x):
    with torch.profiler.profile() as profile:
        head(x)
    return any(event.name == "bitlinear::bf16_product" for event in profile.events())


@pytest.mark.parametrize(
    ("shape", "dtype", "is_ours"),
    [
        ((1, 1, 96), torch.bfloat16, True),
        ((1, 2, 96), torch.bfloat16, False),
        ((1, 1, 96), torch.float16, False),
        ((1, 1, 96), torch.float32, False),
    ],
)
def test_one_token_in_bf16_is_our_product(shape, dtype, is_ours, monkeypatch):
    head, plain = make_pair(dtype)
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        assert uses_our_product(head, x) == is_ours
        torch.testing.assert_close(head(x), plain(x), rtol=2**-7, atol=1e-5)
    monkeypatch.setattr(module, "has_cpu_kernels", lambda: False)
    with torch.no_grad():
        assert not uses_our_product(head, x)


def test_derivatives_are_those_of_a_linear_layer():
    head, plain = make_pair(torch.bfloat16)
    x, direction = torch.randn(2, 1, 96).bfloat16()
    assert not uses_our_product(head, x)  # gradients are recorded
    with torch.no_grad():
        ours = torch.func.jvp(head, (x[None],), (direction[None],))
        theirs = torch.func.jvp(plain, (x[None],), (direction[None],))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_weight_is_not_copied(dtype):
    head, _ = make_pair(dtype)
    head.requires_grad_(False)
    x = torch.randn(2, 5, 96, dtype=dtype)[:, -1:]
    with torch.profiler.profile(record_shapes=True) as profile:
        head(x)
    assert not [
        event.name
        for event in profile.events()
        if event.name in ("aten::copy_", "aten::clone")
        and any(shape and max(shape) >= 300 for shape in event.input_shapes)
    ]


def test_autocast_and_compile():
    head, plain = make_pair(torch.float32)
    x = torch.randn(1, 1, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.bfloat16
        torch.testing.assert_close(head(x), plain(x))
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), plain(x))


def test_a_model_keeps_what_it_can_do_with_its_head():
    model = make_llama()
    assert type(model.lm_head) is nn.Linear
    module.select_head(model)
    module.select_head(model)
    assert type(model.lm_head) is module.DecodingHead
    assert repr(model.lm_head) == repr(nn.Linear(*model.lm_head.weight.shape[::-1], bias=False))
    assert foreign.why_not_linear(model.lm_head) == ""
    quantize_head(model)
    head = model.lm_head
    assert isinstance(head, Int8Head)
    module.select_head(model)
    assert model.lm_head is head
