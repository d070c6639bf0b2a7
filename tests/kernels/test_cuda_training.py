"""Training on an NVIDIA GPU: the operators give the CPU's bits; gradients; saved memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitlinear import BitLinear, ops
from bitlinear.arguments import QUANT_TYPES
from scripts.bench.train_step import saved_bytes
from tests import oracle, test_quantized_linear
from tests.test_training_ops import check_operators

pytestmark = pytest.mark.cuda

OPS = torch.ops.bitlinear
TYPES = [*QUANT_TYPES, "ai8pc_wpg32", "ai16pc_wpg64"]
DTYPES = [*oracle.DTYPES, torch.float64]


def check_weight(w):
    for group_size in (0, -1, 32, 96):
        check_weight_in_groups(w, group_size)


def check_weight_in_groups(w, group_size):
    w_packed, w_scale = OPS.quantize_weight(w.cuda(), 1e-6, group_size)
    wanted, scale = OPS.quantize_weight(w, 1e-6, group_size)
    # A bit: another order of sums. Scales of groups are rounded to a part of their row's largest.
    atol = 2.0**-14 * float(scale.amax()) if group_size > 0 else 0.0
    torch.testing.assert_close(w_scale.cpu(), scale, rtol=1.2e-7, atol=atol)
    same = (w_scale.cpu() == scale).reshape(-1, scale.shape[-1]).all(1).expand(len(w))
    assert torch.equal(w_packed.cpu()[same], wanted[same])
    again = OPS.quantize_weight(w.cuda(), 1e-6, group_size)
    assert torch.equal(again[0], w_packed)
    assert torch.equal(again[1], w_scale)
    for dtype in (None, *oracle.DTYPES):
        for scale_or_none in (None, w_scale):
            scales = None if scale_or_none is None else scale_or_none.cpu()
            rest = (dtype, group_size)
            expanded = OPS.expand_weight(w_packed, w.shape[1], scale_or_none, *rest)
            reference = ops.reference_expand_weight(w_packed.cpu(), w.shape[1], scales, *rest)
            assert torch.equal(expanded.cpu(), reference)


def check_tokens(x, eps=1e-6):
    for act_bits in (8, 16):
        q, s_x = OPS.quantize_activations(x.cuda(), eps, act_bits)
        wanted, scale = OPS.quantize_activations(x, eps, act_bits)
        oracle.assert_same_bits(s_x.cpu(), scale)
        assert torch.equal(q.cpu(), wanted)
        for dtype in (None, *oracle.DTYPES):
            reference = ops.reference_expand_activations(wanted, scale, dtype)
            oracle.assert_same_bits(OPS.expand_activations(q, s_x, dtype).cpu(), reference)


@settings(max_examples=200)
@given(
    n=st.integers(1, 300),
    k=st.one_of(st.integers(1, 140), st.integers(1000, 2100), st.sampled_from([1024, 4096])),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_weights_of_any_shape(n, k, dtype, spread, seed):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * spread
    check_weight(w.to(dtype))


@settings(max_examples=200)
@given(
    m=st.one_of(st.integers(1, 40), st.integers(1000, 1400)),
    k=st.one_of(st.integers(1, 140), st.integers(500, 2100)),
    dtype=st.sampled_from(oracle.DTYPES),
    seed=st.integers(0, 2**16),
)
def test_tokens_of_any_shape(m, k, dtype, seed):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    check_tokens((x * torch.logspace(-3, 3, m)[:, None]).to(dtype))


def test_large_and_empty_operands():
    check_weight(torch.randn(4096, 4096).bfloat16())
    check_tokens(torch.randn(9, 40_000))
    for shape in [(0, 5), (3, 0), (2, 0, 9)]:
        q, s_x = OPS.quantize_activations(torch.empty(shape, device="cuda"))
        assert (q.shape, s_x.shape) == (shape, (*shape[:-1], 1))
        assert OPS.expand_activations(q, s_x).shape == shape
    assert OPS.expand_weight(torch.empty(0, 2, dtype=torch.uint8, device="cuda"), 8).shape == (0, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(value):
    w, x = torch.randn(3, 50), torch.randn(6, 100)
    w[1, 20] = x[2, 50] = value
    w_packed, w_scale = OPS.quantize_weight(w.cuda())
    assert not w_scale.isfinite()
    assert not OPS.expand_weight(w_packed, 50).any()
    check_tokens(x)


def test_views():
    w, x = torch.randn(70, 300), torch.randn(300, 64)
    shifted = torch.empty(70 * 300 + 1, device="cuda")[1:].view(70, 300).copy_(w)
    wanted = OPS.quantize_weight(w.cuda())
    for view in (shifted, w.T.contiguous().cuda().T):
        assert all(map(torch.equal, OPS.quantize_weight(view), wanted))
    tokens = OPS.quantize_activations(x.cuda())
    shifted = torch.empty(300 * 64 + 1, device="cuda")[1:].view(300, 64).copy_(x)
    for view in (shifted, x.T.contiguous().cuda().T):
        assert all(map(torch.equal, OPS.quantize_activations(view), tokens))
    shifted = torch.empty(300 * 64 + 1, dtype=torch.int8, device="cuda")[1:].view(300, 64)
    expanded = OPS.expand_activations(*tokens)
    assert torch.equal(OPS.expand_activations(shifted.copy_(tokens[0]), tokens[1]), expanded)
    packed = wanted[0]
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8, device="cuda")[1:]
    shifted = shifted.view_as(packed).copy_(packed)
    for view in (shifted, packed.T.contiguous().T):
        assert torch.equal(OPS.expand_weight(view, 300), OPS.expand_weight(packed, 300))


def test_the_operators_are_what_torch_expects():
    check_operators("cuda")
    test_quantized_linear.check_operators("cuda")


@settings(max_examples=200)
@given(
    m=st.one_of(st.integers(1, 40), st.integers(60, 300)),
    n=st.one_of(st.integers(1, 300), st.sampled_from([1024])),
    k=st.one_of(st.integers(1, 300), st.sampled_from([16, 48, 1040, 2048])),
    dtype=st.sampled_from(oracle.DTYPES),
    group_size=st.sampled_from([0, -1, 32, 64, 128]),
    is_finite=st.booleans(),
)
def test_products_of_quantised_tokens(m, n, k, dtype, group_size, is_finite):
    x, *weight = test_quantized_linear.operands((m,), n, k, dtype, group_size, "cuda")
    if not is_finite:
        x[m // 2, k // 2] = float("inf")
    test_quantized_linear.check(x, *weight, group_size)


def test_views_of_quantised_tokens():
    x, w_packed, w_scale, bias = test_quantized_linear.operands((70,), 40, 96, torch.float32)
    x, w_packed, w_scale, bias = (t.cuda() for t in (x, w_packed, w_scale, bias))
    q, s_x, q_sum = test_quantized_linear.quantize(x)
    wanted = OPS.linear(x, w_packed, w_scale, bias, 96)
    shifted_q = torch.empty(q.numel() + 1, dtype=torch.int8, device="cuda")[1:].view_as(q)
    shifted_w = torch.empty(w_packed.numel() + 1, dtype=torch.uint8, device="cuda")[1:]
    shifted_w = shifted_w.view_as(w_packed)
    for tokens in (q, shifted_q.copy_(q), q.T.contiguous().T):
        for packed in (w_packed, shifted_w.copy_(w_packed), w_packed.T.contiguous().T):
            y = OPS.quantized_linear(tokens, s_x, q_sum, packed, w_scale, bias, torch.float32)
            assert torch.equal(y, wanted)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("features", [300, 320])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_a_compiled_step_has_the_same_bits(dtype, features, quant_type):
    layer = BitLinear(features, 200, quant_type=quant_type).to("cuda", dtype)
    x = (torch.randn(70, features) * torch.logspace(-30, 4, 70)[:, None]).to(dtype)
    x[3, 5], x[4] = float("inf"), 0.0
    x = x.cuda().requires_grad_()
    grad = torch.randn(70, 200, device="cuda", dtype=dtype)

    def step():
        return layer(x), *torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)

    wanted = step()
    layer.compile(fullgraph=True)
    y, *gradients = step()
    test_quantized_linear.assert_same_bits(y, wanted[0])
    for one, other in zip(gradients, wanted[1:]):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_gradients_are_those_of_the_cpu(dtype, quant_type):
    # Of a weight that has been ternary, no element lies near the middle between two ternary values.
    # It quantises to the same ones on every CPU and GPU, whatever the last bit of their scale.
    layer = BitLinear(300, 200, quant_type=quant_type).deploy().undeploy().to(dtype)
    x, grad = torch.randn(40, 300).to(dtype), torch.randn(40, 200).to(dtype)

    def gradients(layer, x, grad):
        x = x.requires_grad_()
        return torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)

    wanted = gradients(layer, x, grad)
    found = gradients(layer.cuda(), x.detach().cuda(), grad.cuda())
    assert [gradient.dtype for gradient in found] == [dtype] * 3
    # The products of 16-bit gradients are rounded, as those of nn.Linear are.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(found, wanted):
        error = (one.cpu().float() - other.float()).norm() / other.float().norm()
        assert error < tolerance


def test_sums_beyond_fp16_on_the_way_to_a_gradient():
    layer = BitLinear(64, 4096, bias=False).half().cuda()
    with torch.no_grad():
        layer.weight.fill_(0.02)
    x = torch.full((8, 64), 0.01, device="cuda", dtype=torch.half, requires_grad=True)
    layer(x).backward(torch.full((8, 4096), 100.0, device="cuda", dtype=torch.half))
    torch.testing.assert_close(x.grad, torch.full_like(x, 4096 * 100 * 0.02), rtol=2e-3, atol=0)
    torch.testing.assert_close(
        layer.weight.grad, torch.full_like(layer.weight, 8.0), rtol=2e-3, atol=0
    )


def test_errors_name_what_is_wrong():
    q, s_x = OPS.quantize_activations(torch.randn(3, 8, device="cuda"))
    for tokens, scale in ((q.float(), s_x), (q, s_x[:2]), (q, s_x.cpu()), (q, s_x.half())):
        with pytest.raises(ValueError, match=r"q must be int8 or int16, of shape \(\.\.\., K\)"):
            OPS.expand_activations(tokens, scale)
    with pytest.raises(
        ValueError, match=r"w_scale must be float32, of shape \(1,\) or \(3, 1\), on cuda"
    ):
        OPS.expand_weight(torch.zeros(3, 2, dtype=torch.uint8, device="cuda"), 8, torch.ones(1))


def test_gradients_of_16_bits_are_multiplied_in_16_bits():
    layer, x = BitLinear(64, 64).cuda(), torch.randn(8, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    with torch.profiler.profile(record_shapes=True) as profile:
        y.sum().backward()
    names = [event.name for event in profile.events() if "gemm" in event.name.lower()]
    assert not any("sgemm" in name or "f32f32" in name for name in names), names
    assert (layer.weight.grad.dtype, x.grad.dtype) == (torch.float32, torch.float32)


def test_little_is_saved_for_the_backward_pass():
    with torch.device("cuda"):
        x = torch.randn(512, 1024, requires_grad=True)
        assert saved_bytes(BitLinear(1024, 1024), x) <= 0.15 * saved_bytes(nn.Linear(1024, 1024), x)


def test_a_graph_of_a_step():
    """Quantised weights are in the graph's own memory, and every replay recomputes them."""
    layer = BitLinear(128, 64).cuda()
    x = torch.randn(32, 128, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    layer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x).square().sum().backward()
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    graph.replay()
    found = layer.weight.grad.clone()
    layer.zero_grad(set_to_none=True)
    layer(x).square().sum().backward()
    # Both are sums of 32 products, of the same operands to the bit, in any order: each is off by
    # less than 32 units of 2**-24 of the sum of the magnitudes.
    magnitudes = 2 * layer(x).detach().abs().T @ x.abs()
    assert ((found - layer.weight.grad).abs() <= 2 * 32 * 2**-24 * magnitudes).all()


@pytest.mark.parametrize("quant_type", ["ai8pc_wpt", "ai8pc_wpc"])
@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_a_small_gradient_in_fp16_is_as_exact_as_that_of_nn_linear(size, quant_type):
    """A loss scaler keeps gradients from vanishing, and they must not be multiplied by a scale."""
    layer = BitLinear(512, 4096, bias=False, quant_type=quant_type, device="cuda")
    nn.init.normal_(layer.weight, std=0.02)
    weight = layer.deploy().dequantize().half()
    x = torch.randn(64, 512, device="cuda", dtype=torch.half, requires_grad=True)
    grad = (size * torch.randn(64, 4096, device="cuda")).half()
    layer(x).backward(grad)
    wanted = grad.double() @ weight.double()
    error, linear = ((g.double() - wanted).norm() for g in (x.grad, grad @ weight))
    assert error <= 1.5 * linear
