"""Gradients through a deployed layer, whose weights are constants."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitlinear.deployed import input_gradient
from tests import oracle
from tests.layers import deployed


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", [(5, 20), (2, 3, 20), (20,), (0, 20)])
@pytest.mark.parametrize("scale", [(1,), (6, 1)])
def test_the_gradient_of_the_input_of_a_deployed_layer(shape, dtype, scale):
    """``dx = (dy * s_w) @ t``, of which LoRA and the layers in front learn."""
    layer = deployed()
    layer.load_state_dict({**layer.state_dict(), "w_scale": torch.rand(scale) + 0.1})
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    with torch.no_grad():
        oracle.assert_same_bits(y, layer(x))
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted = (grad.double() @ layer.dequantize().double()).to(dtype)
    torch.testing.assert_close(x.grad, wanted)
    assert x.grad.dtype == dtype
    assert all(buffer.grad is None for buffer in layer.buffers())


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("scale", [(1,), (6, 1)])
@pytest.mark.parametrize("features", [1024, 1027])
def test_blocks_of_columns_give_the_same_gradient(features, scale, dtype, monkeypatch):
    """On a CPU, the weights of a large layer are expanded a block of columns at a time."""
    layer = deployed(features, 6).to(dtype)
    layer.load_state_dict({**layer.state_dict(), "w_scale": torch.rand(scale) + 0.1})
    grad = torch.randn(5, 6).to(dtype)
    arguments = (grad, layer.w_packed, layer.w_scale, features)
    whole = input_gradient(*arguments)
    monkeypatch.setattr("bitlinear.deployed._BLOCK_BYTES", 1)  # the smallest blocks: 64 columns
    torch.testing.assert_close(input_gradient(*arguments), whole)


def test_a_layer_without_rows_has_a_gradient_of_zeros():
    """Tensor parallelism leaves such a part to a process."""
    packed = torch.empty(0, 5, dtype=torch.uint8)
    grad = input_gradient(torch.empty(3, 0), packed, torch.ones(1), 20)
    assert torch.equal(grad, torch.zeros(3, 20))


def test_a_large_gradient_does_not_overflow():
    layer = deployed(4, 8, bias=False)
    layer.w_scale.fill_(0.02)
    layer.w_packed.fill_(0b10_10_10_10)
    x = torch.ones(1, 4, requires_grad=True)
    layer(x).backward(torch.full((1, 8), 1e38))
    torch.testing.assert_close(x.grad, torch.full((1, 4), 1.6e37))


def test_layers_in_front_of_a_deployed_one_are_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), deployed(32, 3))
    x = torch.randn(256, 16)
    target = (x @ torch.randn(16, 3)).argmax(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for _ in range(25):
        loss = nn.functional.cross_entropy(10 * model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x).argmax(1) == target).float().mean() > 0.9


def test_the_bias_of_a_deployed_layer_can_become_a_parameter():
    layer, x, grad = deployed(), torch.randn(5, 20), torch.randn(5, 6)
    y = layer(x)
    layer.bias = nn.Parameter(layer.bias.clone())
    assert torch.equal(layer(x), y)
    layer(x).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_the_bias_of_a_deployed_layer_can_require_a_gradient():
    layer, x, grad = deployed(), torch.randn(5, 20), torch.randn(5, 6)
    layer.bias.requires_grad_()
    layer(x).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))
    layer.w_scale.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"w_scale has no gradient.*undeploy"):
        layer(x).backward(grad)


def test_the_gradient_of_a_bias_is_summed_in_fp32():
    layer, x, grad = deployed(), torch.randn(300, 20), torch.randn(300, 6)
    layer.bias.requires_grad_()
    layer(x.bfloat16()).backward(grad.bfloat16())
    torch.testing.assert_close(layer.bias.grad, grad.bfloat16().float().sum(0))


def test_a_deployed_layer_in_training_mode_has_nothing_to_train():
    with pytest.raises(RuntimeError, match="does not require grad"):
        deployed().train()(torch.randn(2, 20)).sum().backward()
