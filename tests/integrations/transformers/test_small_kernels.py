"""The small computations of a step, against plain torch."""

from __future__ import annotations

import pytest
import torch

from bitlinear.integrations.transformers.small_kernels import largest, rotate_and_store


@pytest.mark.parametrize("length", [1, 7, 64, 97, 1024, 32000, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_is_the_first_of_the_largest(length, dtype):
    generator = torch.Generator().manual_seed(length)
    scores = torch.randn(5, length, generator=generator).to(dtype)
    scores[1, length // 2 :] = 9
    scores[2] = -torch.inf
    scores[3, -1] = torch.inf
    scores[4] = 0
    assert torch.equal(largest(scores), scores.argmax(-1))
    assert largest(scores)[1] == length // 2


def test_a_token_is_rotated_and_stored():
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    keys, values = torch.zeros(2, 2, 2, 5, 8)
    cos, sin = torch.randn(2, 2, 1, 8)

    def rotate(q, k, cos, sin):
        return q * cos[:, None], k * sin[:, None]

    rotated = rotate_and_store(rotate, q, k, v, cos, sin, keys, values, torch.tensor([3]))
    assert torch.equal(rotated, q * cos[:, None])
    assert torch.equal(keys[:, :, 3:4], k * sin[:, None])
    assert torch.equal(values[:, :, 3:4], v)
    for cache in (keys, values):
        assert cache[:, :, [0, 1, 2, 4]].count_nonzero() == 0
