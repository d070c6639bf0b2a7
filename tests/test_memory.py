"""What a deployed layer holds, and what its forward pass allocates."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bitlinear


def test_a_deployed_layer_holds_a_sixteenth():
    layer = bitlinear.BitLinear(1024, 1024)
    before = sum(p.numel() * p.element_size() for p in layer.parameters())
    layer.deploy()
    assert not list(layer.parameters())
    after = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert after <= 0.064 * before


def test_the_state_dict_is_as_small(tmp_path):
    layer = bitlinear.BitLinear(1024, 1024).deploy()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    assert (tmp_path / "layer.pt").stat().st_size <= 0.065 * 4 * (1024 * 1024 + 1024)


PEAK = """
import resource
import torch
import bitlinear

n = k = 8192
layer = bitlinear.BitLinear(k, n, device="meta")
layer.load_state_dict(
    {
        "w_packed": torch.full((n, k // 4), 0b10010110, dtype=torch.uint8),
        "w_scale": torch.ones(1),
        "bias": torch.zeros(n),
    },
    assign=True,
)
x = torch.randn(1, k)
small = bitlinear.BitLinear(256, 1024).deploy()
with torch.inference_mode():
    small(x[:, :256])  # code, threads and their stacks

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # The peak so far may lie above what is in use now: fill the gap, so that any growth shows.
    filling, start = [], peak()
    while peak() == start:
        filling.append(torch.ones(64 * 1024, dtype=torch.uint8))
    before = peak()
    y = layer(x)
    grown = peak() - before
assert y.shape == (1, n) and y.isfinite().all()
print(grown)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_the_forward_pass_expands_no_weight():
    """64 million weights, 16 MB packed: one token may cost less than 1 MB more."""
    if not bitlinear.HAS_BITLINEAR:
        pytest.skip("the reference implementation expands a few rows at a time")
    result = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 2**20
