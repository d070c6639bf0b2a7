"""``torch.compile``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import bitlinear
from bitlinear import BitLinear
from tests.layers import both_forms, deployed


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_training():
    layer = BitLinear(20, 6)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (4, 7):
        x = torch.randn(batch, 20, requires_grad=True)
        grad = torch.randn(batch, 6)
        wanted = torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)
        actual = torch.autograd.grad(compiled(x), (x, *layer.parameters()), grad)
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(actual, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_deployed():
    model = nn.Sequential(deployed(), nn.ReLU(), deployed(6, 3))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (4, 7):
        x = torch.randn(batch, 20)
        assert torch.equal(compiled(x), model(x))
    x.requires_grad_()
    y = compiled(x)
    assert torch.equal(y, model(x))
    torch.testing.assert_close(
        *(torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, model))
    )
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert compiled(x).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_training_step_is_one_graph(strength):
    from torch._dynamo.testing import CompileCounterWithBackend

    # The layers are side by side. In a row, the second would quantise the output of the first,
    # whose last bit depends on the CPU's order of additions for a strength of 0.5. Here outputs and
    # gradients are sums of at most 20 products, a few units of fp32 apart on every CPU.
    model = nn.ModuleList([BitLinear(20, 6), BitLinear(13, 6)])
    bitlinear.set_quantization_strength(model, strength)
    inputs = [torch.randn(4, layer.in_features, requires_grad=True) for layer in model]
    target = torch.randn(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    operands = [*model.parameters(), *inputs]

    def loss():
        return F.mse_loss(sum(layer(x.relu()) for layer, x in zip(model, inputs)), target)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for _ in range(3):
        with torch.no_grad():
            value = loss()  # must leave nothing behind that the graph would miss
        for operand in operands:
            operand.grad = None
        torch.testing.assert_close(compiled(), value)
        compiled().backward()
        gradients = [operand.grad for operand in operands]
        torch.testing.assert_close(gradients, list(torch.autograd.grad(loss(), operands)))
        optimizer.step()
    assert counter.frame_count == 1


@both_forms
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compile_autocast(make, dtype):
    layer, x = make(20, 6), torch.randn(4, 20)

    def function(x):
        with torch.autocast("cpu", dtype):
            rounded = layer(x)
            with torch.autocast("cpu", enabled=False):
                return rounded, layer(x)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert [y.dtype for y in compiled(x)] == [dtype, torch.float32]
    assert all(map(torch.equal, compiled(x), function(x)))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_checkpointed():
    layer, x = BitLinear(20, 6), torch.randn(4, 20, requires_grad=True)
    compiled = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    operands = (x, *layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).square().sum(), operands),
        torch.autograd.grad(layer(x).square().sum(), operands),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="older versions do not tell of transforms")
def test_compile_gradients_of_torch_func():
    layer, x = BitLinear(20, 6), torch.randn(4, 20)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    for function in (grad(loss, (0, 1)), vmap(grad(loss, (0, 1)), in_dims=(None, 0))):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(parameters, x), function(parameters, x))

    closure = grad(lambda x: layer(x).square().sum())
    compiled = torch.compile(closure, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), closure(x))
