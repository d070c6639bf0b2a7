"""``torch.func``: vmap, gradients, functional calls."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

from bitlinear import BitLinear, quantize
from tests.calls import Calls
from tests.layers import both_forms, deployed

LINEAR = torch.ops.bitlinear.linear


@both_forms
def test_functional_call(make):
    layer, x = make(20, 6), torch.randn(4, 20)
    other = make(20, 6)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(functional_call(layer, tensors, (x,)), other(x))


@both_forms
def test_vmap_is_one_call_with_more_tokens(make):
    layer, x = make(20, 6), torch.randn(5, 4, 20)
    y = layer(x)
    for function, operand, wanted in (
        (vmap(layer), x, y),
        (vmap(vmap(layer)), x, y),
        (vmap(layer, in_dims=1), x, y.transpose(0, 1)),
        (vmap(layer, out_dims=1), x, y.transpose(0, 1)),
        (vmap(layer), x[0], y[0]),
    ):
        with Calls(LINEAR.default) as calls:
            assert torch.equal(function(operand), wanted)
        assert calls.count == 1 or not hasattr(torch.library, "register_vmap")


def test_a_batch_of_no_weights_is_refused():
    if not hasattr(torch.library, "register_vmap"):
        pytest.skip("this torch has no rules for vmap")
    layer = BitLinear(20, 6, bias=False).deploy()
    x, state = torch.randn(4, 20), dict(layer.named_buffers())
    none = {name: tensor[None][:0] for name, tensor in state.items()}
    with pytest.raises(ValueError, match="vmap over weights needs a batch of at least 1"):
        vmap(lambda tensors: functional_call(layer, tensors, (x,)))(none)


def test_gradients_of_each_sample():
    layer, x, y = BitLinear(20, 6), torch.randn(4, 20), torch.randn(4, 6)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x, y):
        return F.mse_loss(functional_call(layer, parameters, (x,)), y)

    actual = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(4):
        wanted = torch.autograd.grad(F.mse_loss(layer(x[i]), y[i]), list(parameters.values()))
        for name, gradient in zip(parameters, wanted):
            torch.testing.assert_close(actual[name][i], gradient)


def test_jacobians():
    layer, x = BitLinear(20, 6), torch.randn(20)
    t, s_w = quantize.quantize_weights(layer.weight.detach())
    torch.testing.assert_close(jacrev(layer)(x), t * s_w)


@both_forms
def test_ensembles(make):
    models, x = [make(20, 6) for _ in range(3)], torch.randn(4, 20)
    skeleton = copy.deepcopy(models[0]).to("meta")
    parameters, buffers = stack_module_state(models)

    def outputs(parameters):
        def one(parameters, buffers):
            return functional_call(skeleton, (parameters, buffers), (x,))

        return vmap(one)(parameters, buffers)

    assert torch.equal(outputs(parameters), torch.stack([model(x) for model in models]))
    if parameters:
        actual = grad(lambda p: outputs(p).square().sum())(parameters)["weight"]
        for model, gradient in zip(models, actual):
            (wanted,) = torch.autograd.grad(model(x).square().sum(), model.weight)
            torch.testing.assert_close(gradient, wanted)


def test_a_missing_derivative_is_an_error():
    layer, x = BitLinear(20, 6), torch.randn(4, 20, requires_grad=True)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(layer, (x,), (x,))
    with pytest.raises(RuntimeError, match="derivative for bitlinear::linear is not implemented"):
        LINEAR(x, *layer.deploy().buffers(), 20).sum().backward()


def test_vmap_and_gradients_of_a_deployed_layer():
    layer, x = deployed(), torch.randn(4, 20, requires_grad=True)
    wanted = torch.ones(4, 6) @ layer.dequantize()
    (actual,) = torch.autograd.grad(vmap(layer)(x).sum(), x)
    torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(grad(lambda x: vmap(layer)(x).sum())(x.detach()), wanted)
    by_weight = vmap(lambda row: F.linear(row, layer.weight))
    torch.testing.assert_close(grad(lambda x: by_weight(x).sum())(x.detach()), wanted)


def test_hessians():
    layer, x = BitLinear(20, 6), torch.randn(20)
    t, s_w = quantize.quantize_weights(layer.weight.detach())
    weight = t * s_w

    def loss(x):
        return layer(x).square().sum()

    torch.testing.assert_close(jacrev(grad(loss))(x), 2 * weight.T @ weight)
    layer.deploy()
    torch.testing.assert_close(grad(loss)(x), 2 * layer(x) @ weight)
    torch.testing.assert_close(jacrev(grad(loss))(x), 2 * weight.T @ weight)
