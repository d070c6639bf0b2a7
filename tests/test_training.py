"""The straight-through estimator: outputs, gradients, saved tensors."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from bitlinear import BitLinear, quantize, training
from bitlinear.ops import has_cpu_kernels
from bitlinear.training import straight_through_linear
from scripts.bench.train_step import saved_bytes
from tests import oracle
from tests.layers import detached_linear


@pytest.fixture(autouse=True, params=["C++", "Python"])
def _language(request, monkeypatch):
    """The function is written in C++, and in Python for transforms and compilers."""
    if request.param == "Python":
        monkeypatch.setattr(training, "_is_plain", lambda x, weight: False)
    elif not has_cpu_kernels():
        pytest.skip("needs the compiled operators")


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 33), (33,), (0, 33), (2, 0, 33)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_equals_the_oracle_to_the_bit(shape, dtype, with_bias):
    x, w = torch.randn(shape).to(dtype), torch.randn(5, 33)
    bias = torch.randn(5) if with_bias else None
    t, s_w = quantize.quantize_weights(w)
    y = straight_through_linear(x, w, bias)
    oracle.assert_same_bits(y, oracle.expected(x, t.numpy(), s_w.numpy(), bias))


def ste_gradients(x, w, bias, grad, eps=1e-6):
    """The formula, in float64: each operand's gradient sees the other operand quantised."""
    x, w, grad = (np.asarray(v.detach().double()) for v in (x, w, grad))
    q, s_x = oracle.quantize_activations(x.reshape(-1, x.shape[-1]), eps)
    s_w = np.float64(oracle.weight_scale(w, eps))
    t = oracle.ternarize(w, s_w)
    g = grad.reshape(-1, grad.shape[-1])
    grad_x = (g @ (s_w * t)).reshape(x.shape)
    return grad_x, g.T @ (s_x.astype(np.float64) * q), g.sum(0)


@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 33), (33,), (0, 33)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_gradients_equal_the_formula_in_float64(shape, eps):
    x = torch.randn(shape, requires_grad=True)
    w = torch.randn(5, 33, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    y = straight_through_linear(x, w, bias, eps)
    grad = torch.randn_like(y)
    y.backward(grad)
    for actual, wanted in zip((x.grad, w.grad, bias.grad), ste_gradients(x, w, bias, grad, eps)):
        np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x_dtype", oracle.DTYPES)
@pytest.mark.parametrize("w_dtype", [*oracle.DTYPES, torch.float64])
def test_mixed_dtypes_and_the_dtypes_of_gradients(x_dtype, w_dtype):
    x = torch.randn(4, 20).to(x_dtype).requires_grad_()
    w = torch.randn(3, 20).to(w_dtype).requires_grad_()
    bias = torch.randn(3).to(w_dtype).requires_grad_()
    y = straight_through_linear(x, w, bias)
    assert y.dtype == x_dtype
    grad = torch.randn_like(y)
    y.backward(grad)
    for leaf, wanted in zip((x, w, bias), ste_gradients(x, w, bias, grad)):
        assert leaf.grad.dtype == leaf.dtype
        # One rounding to the leaf's dtype; fp32 arithmetic before it.
        tolerance = max(torch.finfo(leaf.dtype).eps, 1e-6) * 2
        np.testing.assert_allclose(leaf.grad.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("needed", ["x", "w", "bias"])
def test_gradients_of_one_operand_alone(needed):
    leaves = {"x": torch.randn(4, 20), "w": torch.randn(3, 20), "bias": torch.randn(3)}
    leaves[needed].requires_grad_()
    y = straight_through_linear(*leaves.values())
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted = dict(zip(leaves, ste_gradients(*leaves.values(), grad)))[needed]
    np.testing.assert_allclose(leaves[needed].grad.numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != needed)


def test_saved_tensors_are_int8_and_packed():
    """Hooks that move saved tensors (offloading) copy these alone."""
    x, w = torch.randn(64, 256, requires_grad=True), torch.randn(128, 256, requires_grad=True)
    moved = []

    def pack(tensor):
        moved.append(tensor.numel() * tensor.element_size())
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = straight_through_linear(x, w)
    assert sum(moved) <= 64 * 256 + 128 * 256 / 4 + 64 * 4 + 4
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert w.grad.any()


@pytest.mark.parametrize("features", [1024, 4096])
def test_little_is_saved_for_the_backward_pass(features):
    x = torch.randn(512, features, requires_grad=True)
    ours, linears = (saved_bytes(kind(features, features), x) for kind in (BitLinear, nn.Linear))
    assert ours <= 0.15 * linears


# --- Gradients of gradients ---


def penalty(net, x):
    """The gradient penalty of a critic (WGAN-GP), which trains gradients to the length 1."""
    (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return (grad.norm(dim=-1) - 1).square().mean()


def force(net, x):
    """A loss of the gradient of an energy, as for force fields."""
    (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return (grad + 1).square().mean()


def inner_step(net, x):
    """A loss after a step of gradient descent, as in MAML."""
    parameters = dict(net.named_parameters())
    loss = torch.func.functional_call(net, parameters, x).square().mean()
    grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), grads)}
    return torch.func.functional_call(net, moved, x).square().mean()


def third(net, x):
    """A third derivative."""
    y = torch.tanh(net(x)).sum()
    (once,) = torch.autograd.grad(y, x, create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), x, create_graph=True)
    return twice.square().sum()


class Linear(torch.nn.Linear):
    """A layer of :func:`straight_through_linear` or :func:`detached_linear`."""

    function = staticmethod(straight_through_linear)

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


@pytest.mark.parametrize("loss", [penalty, force, inner_step, third])
@pytest.mark.parametrize("shape", [(16, 8), (2, 3, 8)])
def test_higher_derivatives_are_those_of_the_formula(loss, shape):
    net = torch.nn.Sequential(Linear(8, 32), torch.nn.Tanh(), Linear(32, 4))
    x, gradients = torch.randn(shape, requires_grad=True), []
    for function in (straight_through_linear, detached_linear):
        net[0].function = net[2].function = function
        leaves = [x, *net.parameters()]
        gradients.append(torch.autograd.grad(loss(net, x), leaves, allow_unused=True))
    for ours, wanted in zip(*gradients):
        assert (ours is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert sum(wanted is not None for wanted in gradients[1]) >= 3


def test_an_output_without_a_gradient():
    """The gradient is undefined, not 0, if a function behind the layer returns None."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x, w = torch.randn(2, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    Nothing.apply(straight_through_linear(x, w)).sum().backward()
    assert x.grad is None
    assert w.grad is None


def test_a_deep_graph_is_freed():
    """Freeing it must not recurse: 4,000 levels would overflow this stack, and end the process."""
    layer = BitLinear(4, 4, bias=False)

    def build_and_free():
        x = torch.randn(1, 4)
        for _ in range(20_000):
            x = layer(x)
        return True

    before = threading.stack_size(512 * 1024)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(build_and_free).result()
    finally:
        threading.stack_size(before)


def test_calls_below_autograd():
    layer = BitLinear(8, 4)
    x = torch.randn(3, 8)
    wanted = layer(x).detach()

    @torch.library.custom_op("bitlinear_tests::apply", mutates_args=())
    def apply(x: torch.Tensor) -> torch.Tensor:
        return layer(x).detach().clone()

    assert torch.equal(apply(x), wanted)
    layer.requires_grad_(False)
    with torch.inference_mode(), torch.enable_grad():
        assert layer(torch.randn(3, 8)).isfinite().all()


def test_hooks_of_saved_tensors_run_with_autocast():
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
    seen = []

    def unpack(tensor):
        seen.append(torch.is_autocast_enabled("cpu"))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        y = straight_through_linear(x, w)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert seen
    assert all(seen)


def test_a_trace_before_dispatch_has_the_gradients():
    def gradients(x, w):
        return torch.autograd.grad(straight_through_linear(x, w).sum(), (x, w))

    def operands():
        return torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)

    traced, leaves = make_fx(gradients, pre_dispatch=True)(*operands()), operands()
    for one, other in zip(traced(*leaves), gradients(*leaves)):
        torch.testing.assert_close(one, other)


# --- Autocast, transforms, bad values and wrong arguments ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_only_the_output(dtype):
    x, w = torch.randn(4, 300, requires_grad=True), torch.randn(3, 300, requires_grad=True)
    wanted = straight_through_linear(x, w).to(dtype)
    grad = torch.randn(4, 3).to(dtype)
    with torch.autocast("cpu", dtype):
        y = straight_through_linear(x, w)
        assert y.dtype == torch.nn.functional.linear(x, w).dtype
        # Backward under autocast is discouraged, not forbidden: it must not lose precision.
        y.backward(grad)
    oracle.assert_same_bits(y, wanted)
    grad_x, grad_w, _ = ste_gradients(x, w, None, grad)
    np.testing.assert_allclose(x.grad.numpy(), grad_x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(w.grad.numpy(), grad_w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_gives_a_row_of_nan_and_touches_no_other(bad):
    x, w, bias = torch.randn(4, 20), torch.randn(3, 20), torch.randn(3)
    clean = straight_through_linear(x, w, bias)
    x[2, 7] = bad
    y = straight_through_linear(x, w, bias)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_bad_weights_show():
    w = torch.randn(3, 20)
    w[1, 1] = float("nan")
    assert straight_through_linear(torch.randn(2, 20), w).isnan().all()


def test_an_all_zero_token_gives_the_bias():
    bias = torch.randn(3)
    y = straight_through_linear(torch.zeros(2, 20), torch.randn(3, 20), bias)
    assert torch.equal(y, bias.expand(2, 3))


def test_function_transforms():
    x, w = torch.randn(6, 20), torch.randn(3, 20)

    def loss(w, x):
        return straight_through_linear(x, w).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, x)
    for row, actual in zip(x, per_sample):
        leaf = w.clone().requires_grad_()
        loss(leaf, row).backward()
        torch.testing.assert_close(actual, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.complex64])
def test_wrong_dtype(dtype):
    with pytest.raises(
        TypeError,
        match=rf"float32, float16 or bfloat16, but it is {dtype}".replace("torch.", "")
        + r": convert it, for example with x\.float\(\)",
    ):
        straight_through_linear(torch.ones(2, 4).to(dtype), torch.ones(3, 4))


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (4, 1)])
def test_wrong_last_dimension(shape):
    with pytest.raises(
        ValueError, match=rf"in_features = 4, but x has shape \[{str(list(shape))[1:-1]}\]"
    ):
        straight_through_linear(torch.ones(shape), torch.ones(3, 4))


def test_wrong_device():
    x, w, bias = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)
    with pytest.raises(ValueError, match="x is on meta and weight is on cpu"):
        straight_through_linear(x.to("meta"), w)
    with pytest.raises(ValueError, match="x is on cpu and bias is on meta"):
        straight_through_linear(x, w, bias.to("meta"))
