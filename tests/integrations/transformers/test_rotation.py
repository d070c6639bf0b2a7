"""The rotation of queries and keys in one tensor."""

from __future__ import annotations

import importlib

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
    together = rotation.rotate_together(rotate, model.rotate_half, x, cos, sin)
    oracle.assert_same_bits(together, torch.cat(rotate(x[:, :3], x[:, 3:], cos, sin), dim=1))


def other_default(q, k, cos, sin, unsqueeze_dim=2):
    """As in transformers."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotation.rotate_half(q) * sin)
    k_embed = (k * cos) + (rotation.rotate_half(k) * sin)
    return q_embed, k_embed


def other_half(x):
    """As in transformers, with the signs exchanged."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((x2, -x1), dim=-1)


@pytest.mark.parametrize(
    ("rotate", "rotate_half"),
    [
        (other_default, rotation.rotate_half),
        (rotation._rotate_of_llama, other_half),
        (lambda q, k, cos, sin: (q, k), rotation.rotate_half),
        (torch.nn.Identity(), rotation.rotate_half),
    ],
)
def test_another_function_is_not_replaced(rotate, rotate_half):
    x = torch.randn(1, 2, 3, 4)
    angles = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)
    known = rotation.rotate_together(rotation._rotate_of_llama, rotation.rotate_half, x, *angles)
    assert known is not None
    assert rotation.rotate_together(rotate, rotate_half, x, *angles) is None
