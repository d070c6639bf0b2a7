"""The memory of a deployed layer, of deploying it and of its forward pass."""

from __future__ import annotations

import json

import pytest
import torch

import bitlinear
from tests.memory import linux, output_of


def test_a_deployed_layer_holds_a_sixteenth():
    layer = bitlinear.BitLinear(1024, 1024)
    before = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert before == 4 * 1024 * 1025
    layer.deploy()
    assert not list(layer.parameters())
    after = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert after <= 0.064 * before


def test_the_state_dict_is_as_small(tmp_path):
    layer = bitlinear.BitLinear(1024, 1024).deploy()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    assert (tmp_path / "layer.pt").stat().st_size <= 0.065 * 4 * (1024 * 1024 + 1024)


SCRIPT = """
import json
import torch
import bitlinear
from bitlinear import ops
from tests.memory import growth_of

def layer_of(dtype):
    layer = bitlinear.BitLinear(k, n, bias=False, dtype=dtype, device="meta").to_empty(device="cpu")
    layer.weight.data.fill_(0.01)
    return layer

n, k = 2048, 8192
growth = {}
small = bitlinear.BitLinear(256, 1024)
small(torch.randn(1, 256))
bitlinear.deploy(small)  # code, threads and their stacks
small(torch.randn(1, 256))
for dtype in (torch.float32, torch.bfloat16):
    layer = layer_of(dtype)
    growth[f"deploy() of {dtype}"] = growth_of(layer.deploy)
    layer = layer_of(dtype)
    growth[f"bitlinear.deploy() of {dtype}"] = growth_of(lambda: bitlinear.deploy(layer))
weight = layer_of(torch.bfloat16).weight.detach()
ops.reference_quantize_weight(weight[:64])
growth["the reference"] = growth_of(lambda: ops.reference_quantize_weight(weight))
x = torch.randn(1, k)
with torch.inference_mode():
    growth["forward"] = growth_of(lambda: layer(x))
print(json.dumps(growth))
"""


@pytest.fixture(scope="module")
def growth():
    """Growth of the memory of a process, in bytes; 17 million weights, 4 MB packed."""
    return json.loads(output_of(SCRIPT))


@linux
def test_the_forward_pass_expands_no_weight(growth):
    if not bitlinear.HAS_BITLINEAR:
        pytest.skip("the reference implementation expands a few rows at a time")
    assert growth["forward"] < 2**20


@linux
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", ["deploy()", "bitlinear.deploy()"])
def test_deploying_takes_the_packed_weight_and_a_few_megabytes(growth, dtype, function):
    assert 2**21 < growth[f"{function} of torch.{dtype}"] < 2**22 + 2**22


@linux
def test_the_reference_quantiser_takes_a_few_megabytes_more(growth):
    assert growth["the reference"] < 2**22 + 2**24
