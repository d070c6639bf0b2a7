"""More than 2^31 elements of each operand, where a 32-bit index overflows; only with ``-m huge``.

``python -m pytest -m huge tests/kernels/test_huge.py`` needs 5 GB of memory and takes a minute, and
on a GPU 7 GB of its memory. Rows that are not sampled are zeros, for which
the system allocates no memory.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bitlinear  # noqa: F401  (registers the operators)
from tests import oracle

pytestmark = [
    pytest.mark.huge,
    pytest.mark.skipif("'huge' not in config.option.markexpr", reason="asked for with -m huge"),
]

OPS = torch.ops.bitlinear
LIMIT = 2**31


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    yield request.param
    if request.param == "cuda":
        torch.cuda.empty_cache()


def sampled(count):
    """The indices of the first, the middle and the last of ``count`` rows."""
    return [0, count // 2, count - 1]


def zeros(rows, columns, device):
    """bf16 zeros. On the CPU NumPy allocates them, and the system maps no pages before a write."""
    if device == "cuda":
        return torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    return torch.from_numpy(np.zeros((rows, columns), np.int16)).view(torch.bfloat16)


def random_tokens(m, k):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def test_outputs(device):
    m, n, k = 2**16 + 1, 2**15 + 1, 8
    t = oracle.ternary(n, k)
    x = torch.zeros(m, k, dtype=torch.bfloat16)
    x[sampled(m)] = random_tokens(3, k)
    operands = (x, torch.from_numpy(oracle.pack(t)), torch.tensor([0.3]))
    y = OPS.linear(*(operand.to(device) for operand in operands), None, k)
    assert y.numel() > LIMIT
    oracle.assert_same_bits(y[sampled(m)].cpu(), oracle.expected(x[sampled(m)], t, 0.3))
    assert not y[m // 2 - 1000 : m // 2].any()
    assert not y[-1000:-1].any()


@pytest.mark.parametrize("m", [1, 3, 20, 40])
def test_packed_weights(device, m):
    """More than 2^31 bytes, and four times as many weights."""
    k = 2**16
    n = LIMIT // (k // 4) + 3
    t = oracle.ternary(3, k)
    w_packed = torch.full((n, k // 4), 0b01010101, dtype=torch.uint8)  # weights of 0
    w_packed[sampled(n)] = torch.from_numpy(oracle.pack(t))
    assert w_packed.numel() > LIMIT
    x, w_packed = random_tokens(m, k), w_packed.to(device)
    y = OPS.linear(x.to(device), w_packed, torch.tensor([0.3], device=device), None, k).cpu()
    oracle.assert_same_bits(y[:, sampled(n)], oracle.expected(x, t, 0.3))
    y[:, sampled(n)] = 0
    assert not y.any()


def test_activations(device):
    """Activations and quantised activations."""
    k, n = 4096, 3
    m = LIMIT // k + 3
    t = oracle.ternary(n, k)
    tokens = random_tokens(3, k)
    x = zeros(m, k, device)
    x[sampled(m)] = tokens.to(device)
    assert x.numel() > LIMIT
    operands = (torch.from_numpy(oracle.pack(t)), torch.tensor([0.3]))
    y = OPS.linear(x, *(operand.to(device) for operand in operands), None, k).cpu()
    oracle.assert_same_bits(y[sampled(m)], oracle.expected(tokens, t, 0.3))
    y[sampled(m)] = 0
    assert not y.any()

    q, s_x = OPS.quantize_activations(x)
    q_wanted, s_wanted = oracle.quantize_activations(tokens.float().numpy())
    assert (q[sampled(m)].cpu().numpy() == q_wanted).all()
    assert (s_x[sampled(m)].cpu().numpy() == s_wanted).all()


def test_weights(device):
    """Quantised and packed; on a GPU, whose memory is enough, also expanded."""
    k = 4096
    n = LIMIT // k + 3
    w = zeros(n, k, device)
    w[sampled(n)] = random_tokens(3, k).to(device)
    assert w.numel() > LIMIT
    w_packed, w_scale = OPS.quantize_weight(w)
    scale = w_scale.item()
    mean = random_tokens(3, k).double().abs().sum().item() / w.numel()
    assert scale == pytest.approx(mean, rel=3e-7)
    t = oracle.ternarize(random_tokens(3, k).float(), scale)
    assert (w_packed[sampled(n)].cpu().numpy() == oracle.pack(t)).all()
    assert (w_packed[1 : n // 2] == 0b01010101).all()
    if device == "cuda":
        del w
        expanded = OPS.expand_weight(w_packed, k, w_scale, torch.bfloat16)
        wanted = (torch.from_numpy(t).float() * scale).to(torch.bfloat16)
        oracle.assert_same_bits(expanded[sampled(n)].cpu(), wanted)
