"""``quantization_strength``: from a plain linear layer to a quantised one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear, quantize
from tests import oracle


def test_strength_goes_from_a_plain_layer_to_a_quantised_one():
    layer, x = BitLinear(40, 30), torch.randn(8, 40)
    quantised, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    assert layer.quantization_strength == 1
    distances = []
    for strength in (0.0, 0.25, 0.75, 1.0):
        assert bitlinear.set_quantization_strength(layer, strength) is layer
        assert layer.quantization_strength == strength
        distances.append((layer(x) - plain).norm().item())
    assert distances[0] < 1e-5
    assert distances == sorted(set(distances))  # each larger than the one before
    assert torch.equal(layer(x), quantised)


def test_the_formula_of_a_blend():
    layer, x = BitLinear(40, 30), torch.randn(8, 40, requires_grad=True)
    bitlinear.set_quantization_strength(layer, 0.3)
    q, s_x = quantize.quantize_activations(x.detach())
    t, s_w = quantize.quantize_weights(layer.weight.detach())
    operand_x = x.detach().lerp(q * s_x, 0.3)
    operand_w = layer.weight.detach().lerp(t * s_w, 0.3)
    y = layer(x)
    torch.testing.assert_close(y, operand_x @ operand_w.T + layer.bias)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, torch.ones(8, 30) @ operand_w)
    torch.testing.assert_close(layer.weight.grad, torch.ones(30, 8) @ operand_x)
    torch.testing.assert_close(layer.bias.grad, torch.full((30,), 8.0))


def test_a_shallow_copy_has_a_strength_of_its_own():
    layer, x = BitLinear(40, 30), torch.randn(8, 40)
    layer.quantization_strength = 0.3
    y = layer(x)
    copy.copy(layer).quantization_strength = 0.6
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_dtypes_of_a_blend(dtype):
    layer = BitLinear(40, 30, dtype=dtype)
    layer.quantization_strength = 0.5
    assert layer(torch.randn(2, 40, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 40)).dtype == torch.bfloat16


def test_a_strength_reads_as_it_was_set():
    layer = BitLinear(40, 30)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        layer.quantization_strength = 0.3
        assert layer.quantization_strength == 0.3
        layer.quantization_strength = 0.7
        assert layer.quantization_strength == 0.7
    finally:
        torch.set_default_dtype(default)


def test_a_strength_that_was_set_in_a_fake_tensor_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = BitLinear(40, 30)
    with FakeTensorMode():
        layer.quantization_strength = 0.5
    assert "quantization_strength=0.5" in repr(layer)
    layer(torch.randn(2, 40))
    with pytest.raises(TypeError, match="must be a number, but it is 'x'"):
        bitlinear.set_quantization_strength(layer, "x")


def test_a_strength_that_was_set_in_inference_mode():
    layer = BitLinear(40, 30)
    with torch.inference_mode():
        layer.quantization_strength = 0.5
    layer.quantization_strength = 0.25
    layer(torch.randn(2, 40)).sum().backward()
    assert layer.quantization_strength == 0.25


def test_strength_and_deployment():
    model = nn.Sequential(BitLinear(8, 8), nn.Sequential(BitLinear(8, 8)))
    bitlinear.set_quantization_strength(model, 0.5)
    assert "quantization_strength" not in str(model.state_dict().keys())
    with pytest.raises(ValueError, match=r"quantization_strength is 0\.5"):
        bitlinear.deploy(model)
    bitlinear.set_quantization_strength(model, 1.0)
    bitlinear.deploy(model[1])
    with pytest.raises(ValueError, match=r"'1\.0' first"):
        bitlinear.set_quantization_strength(model, 0.5)
    assert model[0].quantization_strength == 1
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        bitlinear.set_quantization_strength(model, 2)
    with pytest.raises(ValueError, match="between 0 and 1, not nan"):
        model[0].quantization_strength = float("nan")
    with pytest.raises(ValueError, match="deployed"):
        model[1][0].quantization_strength = 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_schedule_is_compiled_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    layer, x = BitLinear(40, 30), torch.randn(4, 40)
    layer.quantization_strength = 0.0
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for strength in (0.0, 0.1, 0.5, 0.9):
        layer.quantization_strength = strength
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1
