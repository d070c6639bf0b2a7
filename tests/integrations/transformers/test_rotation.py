"""The rotation of queries and keys in one tensor."""

from __future__ import annotations

import importlib
import types

import pytest
import torch

pytest.importorskip("transformers")

from bitlinear.integrations.transformers import rotation
from tests import oracle

FAMILIES = ["bitnet", "llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_the_bits_of_transformers(family, dtype):
    model = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    x = torch.randn(2, 5, 3, 16).to(dtype)
    cos, sin = torch.randn(2, 2, 3, 16).to(dtype)
    rotate = model.apply_rotary_pos_emb
    together = rotation.rotate_together(rotate, x, cos, sin)
    oracle.assert_same_bits(together, torch.cat(rotate(x[:, :3], x[:, 3:], cos, sin), dim=1))


def with_globals(function, defaults=(1,), **names):
    """The function of Llama with other global names or defaults."""
    return types.FunctionType(function.__code__, {"torch": torch, **names}, None, defaults)


def other_half(x):
    """As in transformers, with the signs exchanged."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((x2, -x1), dim=-1)


llama, half = rotation._rotate_of_llama, rotation.rotate_half


@pytest.mark.parametrize(
    ("rotate", "is_known"),
    [
        (llama, True),
        (with_globals(llama, rotate_half=half), True),
        (with_globals(llama, (2,), rotate_half=half), False),
        (with_globals(llama, rotate_half=other_half), False),
        (with_globals(llama), False),
        (lambda q, k, cos, sin: (q, k), False),
        (torch.nn.Identity(), False),
    ],
)
def test_another_function_is_not_replaced(rotate, is_known):
    x = torch.randn(1, 2, 3, 4)
    together = rotation.rotate_together(rotate, x, torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
    assert (together is not None) == is_known
