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


# The peak so far may lie above what is in use now: fill the gap, so that any growth shows.
GROWTH = """
import resource
import torch
import bitlinear

def growth_of(run):
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    filling, start = [], peak()
    while peak() == start:
        filling.append(torch.ones(64 * 1024, dtype=torch.uint8))
    before = peak()
    run()
    return peak() - before
"""

FORWARD = """
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
    print(growth_of(lambda: layer(x)))
    assert layer(x).isfinite().all()
"""

DEPLOY = """
layer = bitlinear.BitLinear(8192, 8192, bias=False, dtype=torch.{dtype}, device="meta")
layer.to_empty(device="cpu")
layer.weight.data.fill_(0.01)
bitlinear.BitLinear(256, 1024).deploy()  # code, threads and their stacks
print(growth_of(lambda: bitlinear.deploy(layer) if {whole} else layer.deploy()))
"""

on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="ru_maxrss is in other units elsewhere"
)


def growth(script):
    """By how many bytes the memory of a process grows."""
    command = [sys.executable, "-c", GROWTH + script]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout)


@on_linux
def test_the_forward_pass_expands_no_weight():
    """64 million weights, 16 MB packed: one token may cost less than 1 MB more."""
    if not bitlinear.HAS_BITLINEAR:
        pytest.skip("the reference implementation expands a few rows at a time")
    assert growth(FORWARD) < 2**20


@on_linux
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("whole", [True, False])
def test_deploying_takes_the_packed_weight_and_a_few_megabytes(dtype, whole):
    """64 million weights, 128 MB in bf16, 16 MB packed."""
    assert growth(DEPLOY.format(dtype=dtype, whole=whole)) < 2**24 + 2**22


@on_linux
def test_deploying_by_the_reference_implementation(monkeypatch, tmp_path):
    monkeypatch.setenv("BITLINEAR_BUILD", "off")
    assert growth(DEPLOY.format(dtype="bfloat16", whole=False)) < 2**24 + 2**24
