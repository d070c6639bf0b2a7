"""undeploy(): back to a layer that trains, and gives the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitlinear import BitLinear, packing
from tests import oracle
from tests.layers import deployed, unchanged


def magnitudes(t, w_scale):
    """``w_scale / mean|t|``, of each scale."""
    dims = (1,) if w_scale.dim() == 2 else (0, 1)
    return w_scale.double() / t.double().abs().mean(dims, keepdim=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_undeploy_gives_back_parameters(bias, dtype):
    layer = BitLinear(70, 33, bias=bias, dtype=dtype)
    names = dict(layer.named_parameters()).keys()
    layer.deploy()
    t, w_scale = packing.unpack_ternary(layer.w_packed, 70), layer.w_scale
    assert layer.undeploy() is layer
    assert layer.undeploy() is layer  # Idempotent.
    assert not layer.is_deployed
    assert not list(layer.buffers())
    assert dict(layer.named_parameters()).keys() == names
    assert all(p.requires_grad and p.dtype == dtype for p in layer.parameters())
    wanted = t * magnitudes(t, w_scale)
    # One unit in the last place more or less if the mean would not round to the scale.
    torch.testing.assert_close(
        layer.weight.double(), wanted, rtol=torch.finfo(dtype).eps, atol=0, check_dtype=False
    )
    layer(torch.randn(2, 70)).sum().backward()
    assert layer.weight.grad is not None
    layer.deploy()
    assert torch.equal(packing.unpack_ternary(layer.w_packed, 70), t)


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("seed", range(20))
def test_undeploy_keeps_the_function(seed, zeros):
    generator = torch.Generator().manual_seed(seed)
    layer = BitLinear(64, 33)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.weight[torch.rand(33, 64, generator=generator) < zeros] = 0
    layer.deploy()
    x, packed, scale = torch.randn(5, 64), layer.w_packed, layer.w_scale
    y = layer(x)
    oracle.assert_same_bits(layer.undeploy()(x), y)
    layer.deploy()
    assert torch.equal(layer.w_packed, packed)
    assert torch.equal(layer.w_scale, scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_undeploy_keeps_the_function_in_16_bits_where_the_weight_is_large(dtype):
    layer = BitLinear(512, 256, dtype=dtype).deploy()
    x = torch.randn(5, 512, dtype=dtype)
    y = layer(x)
    oracle.assert_same_bits(layer.undeploy()(x), y)


def test_undeploy_of_a_layer_of_zeros():
    layer = BitLinear(20, 6)
    nn.init.zeros_(layer.weight)
    x = torch.randn(3, 20)
    y = layer.deploy()(x)
    assert not layer.undeploy().weight.any()
    oracle.assert_same_bits(layer(x), y)


def test_undeploy_with_a_scale_per_output_feature():
    layer = deployed()
    state = layer.state_dict()
    state["w_scale"] = torch.rand(6, 1) + 0.1
    layer.load_state_dict(state)
    t = packing.unpack_ternary(layer.w_packed, 20)
    wanted = (t * magnitudes(t, state["w_scale"])).float()
    torch.testing.assert_close(layer.undeploy().weight.detach(), wanted, rtol=2**-23, atol=0)


def test_undeploy_rejects_a_scale_below_eps():
    """Training would raise it to eps, and the outputs would differ."""
    layer, x = deployed(), torch.randn(3, 20)
    layer.w_scale.fill_(5e-7)
    with unchanged(layer), pytest.raises(ValueError, match=r"w_scale is 5e-07, .* eps = 1e-06"):
        layer.undeploy()
    layer.eps = 1e-7
    y = layer(x)
    oracle.assert_same_bits(layer.undeploy()(x), y)


def test_undeploy_rejects_an_overflow():
    layer = BitLinear(300, 300, bias=False, dtype=torch.float16)
    nn.init.zeros_(layer.weight)
    layer.deploy()
    layer.w_packed[0, 0] |= 0b10_00_00_00  # one weight of 1: it alone would have to be 90,000
    layer.w_packed[0, 0] &= 0b10_11_11_11
    layer.w_scale.fill_(1.0)
    with pytest.raises(ValueError, match=r"overflow float16.*call float\(\)"):
        layer.undeploy()
    assert layer.is_deployed
    assert layer.float().undeploy().weight.max() == 9e4
