"""The operator and the layer on an NVIDIA GPU: the CPU's bits, streams, graphs, moves."""

from __future__ import annotations

import copy
import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bitlinear
from bitlinear import BitLinear, packing, runtime
from bitlinear.arguments import QUANT_TYPES
from tests import oracle
from tests.test_ops import IMPLEMENTATIONS, OP, X, arguments, operands

pytestmark = pytest.mark.cuda

TYPES = [*QUANT_TYPES, "ai8pc_wpg32", "ai16pc_wpg64"]

AUTO, DP4A, GEMV, SMALL_BATCH, MMA, WGMMA, SMALL_LAYER = range(7)  # as in kernels/cuda/task.h


@pytest.fixture(autouse=True)
def compiled():
    """Require the compiled kernels: without them the reference implementation would be tested."""
    verdict = next(v for v in bitlinear.available_kernels() if v.variant == "cuda")
    assert verdict.ok, verdict


@pytest.fixture
def force():
    """``force(kernel)`` makes the operator run only this kernel."""
    library = ctypes.CDLL(str(runtime.current().artifacts["cuda"].path))
    yield library.bitlinear_cuda_force
    library.bitlinear_cuda_force(AUTO)


def on_gpu(*tensors):
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


def check(x, t, w_packed, w_scale, bias, k, group_size=0):
    for act_bits in (8, 16):
        rest = (k, 1e-6, group_size, act_bits)
        y = OP(*on_gpu(x, w_packed, w_scale, bias), *rest)
        assert y.is_cuda
        wanted = oracle.expected(x, t, w_scale, bias, act_bits=act_bits, group_size=group_size)
        oracle.assert_same_bits(y.cpu(), wanted)
        if x.dtype == torch.float32:
            oracle.assert_same_bits(y.cpu(), OP(x, w_packed, w_scale, bias, *rest))


def scales_of_groups(n, k, group_size, seed=0):
    scales = np.random.default_rng(seed).normal(size=(n, -(-k // group_size)))
    return torch.from_numpy(scales.astype(np.float32))


# --- Results ---


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 129, 300])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 70), (130, 256), (257, 1000), (64, 4100)])
def test_results_equal_those_of_the_cpu_to_the_bit(m, n, k, dtype):
    t, w_packed, w_scale = operands(n, k, per_row=m % 2 == 0)
    x = (torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]).to(dtype)
    check(x, t, w_packed, w_scale, torch.randn(n) if m % 3 else None, k)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(2113, 3000, 320), (1030, 4104, 832), (2000, 2050, 64)])
def test_many_tokens(m, n, k, dtype):
    """Blocks that go from tile to tile."""
    t, w_packed, w_scale = operands(n, k, per_row=True)
    x = (torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]).to(dtype)
    check(x, t, w_packed, w_scale, torch.randn(n), k)


@pytest.mark.parametrize("k", range(1, 71))
def test_every_short_row(k):
    t, w_packed, w_scale = operands(9, k)
    for m in (1, 6, 20):
        check(torch.randn(m, k), t, w_packed, w_scale, None, k)


@settings(max_examples=300)
@given(
    m=st.integers(1, 140),
    n=st.integers(1, 300),
    k=st.one_of(st.integers(1, 1500), st.integers(1, 60).map(lambda slices: 64 * slices)),
    kernel=st.sampled_from([AUTO, DP4A, GEMV, SMALL_BATCH, MMA, WGMMA, SMALL_LAYER]),
    group_size=st.sampled_from([0, 0, 128, 64, 32, 96, 8192]),
    dtype=st.sampled_from(oracle.DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape_by_any_kernel(m, n, k, kernel, group_size, dtype, seed):
    m = 1 + m % {GEMV: 4, SMALL_BATCH: 32}.get(kernel, 140)
    library = ctypes.CDLL(str(runtime.current().artifacts["cuda"].path))
    t, w_packed, w_scale = operands(n, k, seed=seed)
    if group_size > 0:
        w_scale = scales_of_groups(n, k, group_size, seed)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    library.bitlinear_cuda_force(kernel)
    try:
        check(x, t, w_packed, w_scale, None, k, group_size)
    except RuntimeError as error:
        # The kernel does not support this GPU or rows that are not aligned, and reports it.
        if kernel in (AUTO, DP4A) or "does not serve this shape" not in str(error):
            raise
    finally:
        library.bitlinear_cuda_force(AUTO)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("k", [6, 63, 256, 260, 132_105])
def test_adversarial_rows(k, dtype):
    t, w_packed, w_scale = operands(9, k, per_row=True)
    bias = torch.randn(9)
    x = torch.from_numpy(oracle.adversarial_rows(k, act_bits=16)).to(dtype)
    check(x, t, w_packed, w_scale, bias, k)
    x = torch.from_numpy(oracle.adversarial_rows(k)).to(dtype)
    tensors = on_gpu(x, w_packed, w_scale, bias)
    for linear in IMPLEMENTATIONS:
        oracle.assert_same_bits(linear(*tensors, k).cpu(), oracle.expected(x, t, w_scale, bias))
    with torch.autocast("cuda", torch.bfloat16):
        y = OP(*tensors, k)
    wanted = oracle.expected(x, t, w_scale, bias, dtype=torch.bfloat16)
    oracle.assert_same_bits(y.cpu(), wanted)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 33, 512), (3, 33, 6), (16, 300, 2048), (70, 33, 512)]
)
def test_subnormal_inputs_count(m, n, k, dtype):
    t, w_packed, w_scale = operands(n, k)
    tiny = torch.finfo(dtype).tiny
    x, bias = (torch.rand(m, k) * 2 - 1) * tiny, ((torch.rand(n) * 2 - 1) * tiny).to(dtype)
    x[:, ::4] *= 100  # normal ones beside them
    x = x.to(dtype)
    wanted = oracle.expected(x, t, w_scale, bias, 2e-36)
    for linear in IMPLEMENTATIONS:
        y = linear(*on_gpu(x, w_packed, w_scale, bias), k, 2e-36)
        oracle.assert_same_bits(y.cpu(), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("m", [2, 40])
def test_a_row_that_is_not_finite_touches_no_other(value, m):
    t, w_packed, w_scale = operands(33, 512)
    x = torch.randn(m, 512)
    x[1, 300] = value
    check(x, t, w_packed, w_scale, None, 512)


@pytest.mark.parametrize("m", [1, 30])
def test_the_longest_sums_stay_exact(m):
    k = 500_000
    t = torch.ones(2, k, dtype=torch.int8)
    t[1, : k // 3] = -1
    w_packed = packing.pack_ternary(t)
    check(torch.full((m, k), 3.0), t.numpy(), w_packed, torch.tensor([0.5]), None, k)


@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
def test_leading_dimensions(shape):
    t, w_packed, w_scale = operands(5, 64)
    check(torch.randn(shape), t, w_packed, w_scale, None, 64)


@pytest.mark.parametrize("m", [1, 3, 40])
def test_tensors_that_are_not_contiguous_or_not_aligned(m):
    k = 256
    t, w_packed, w_scale = operands(70, k)
    x = torch.randn(m, k)
    wanted = oracle.expected(x, t, w_scale)
    wide = torch.randn(m, 2 * k).cuda()
    wide[:, ::2] = x.cuda()
    shifted_x = torch.empty(m * k + 1).cuda()[1:].view(m, k).copy_(x)
    shifted_w = torch.empty(w_packed.numel() + 1, dtype=torch.uint8).cuda()[1:]
    shifted_w = shifted_w.view_as(w_packed).copy_(w_packed)
    weights = w_packed.cuda()
    for x_gpu in (wide[:, ::2], shifted_x, x.t().contiguous().cuda().t()):
        for w_gpu in (weights, shifted_w, weights.t().contiguous().t()):
            oracle.assert_same_bits(OP(x_gpu, w_gpu, w_scale.cuda(), None, k).cpu(), wanted)


@pytest.mark.parametrize("bias_dtype", [torch.float64, *oracle.DTYPES])
def test_dtypes_of_the_bias_and_of_the_output(bias_dtype):
    t, w_packed, w_scale = operands(20, 128)
    x, bias = torch.randn(3, 128), torch.randn(20).to(bias_dtype)
    for dtype in oracle.DTYPES:
        y = OP(*on_gpu(x, w_packed, w_scale, bias), 128, out_dtype=dtype)
        wanted = oracle.expected(x, t, w_scale, bias.float(), dtype=dtype)
        oracle.assert_same_bits(y.cpu(), wanted)


def test_a_kernel_that_cannot_serve_a_shape_says_so(force):
    force(GEMV)
    _, w_packed, w_scale = operands(5, 6)
    with pytest.raises(RuntimeError, match="does not serve this shape"):
        OP(*on_gpu(torch.randn(1, 6), w_packed, w_scale, None), 6)


def test_cuda_and_cpu_do_not_mix():
    for linear in IMPLEMENTATIONS:
        with pytest.raises(ValueError, match="x is on cuda:0 and w_packed is on cpu"):
            linear(*arguments(x=X.cuda()))
        with pytest.raises(ValueError, match="x is on cpu and w_packed is on cuda:0"):
            linear(*arguments(w_packed=torch.ones(5, 3).byte().cuda()))


# --- Streams, graphs, compilers ---


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("between", ["nothing", "copy", "event"])
def test_weights_that_change_between_calls(m, between):
    """Kernels read weights before the previous work ends, but never before a change of them."""
    k = n = 2560
    x = torch.randn(m, k)
    variants = [operands(n, k, seed=seed) for seed in range(4)]
    wanted = [oracle.expected(x, t, w_scale) for t, _, w_scale in variants]
    sources = [w_packed.cuda() for _, w_packed, _ in variants]
    scales = [w_scale.cuda() for _, _, w_scale in variants]
    x = x.cuda()
    zeros = torch.zeros_like(sources[0])
    weights = sources[0].clone()
    outputs = []
    for number in range(40):
        torch.bitwise_or(sources[number % 4], zeros, out=weights)  # a kernel writes it
        for _ in range(number % 3 + 1):
            if between == "copy":
                x = x.clone()
            elif between == "event":
                torch.cuda.current_stream().wait_event(torch.cuda.Event())
            outputs.append((number % 4, OP(x, weights, scales[number % 4], None, k)))
    for variant, y in outputs:
        oracle.assert_same_bits(y.cpu(), wanted[variant])


def test_scales_of_groups_that_change_between_calls():
    """The GEMV reads them as early as weights."""
    k = n = 2560
    x = torch.randn(1, k)
    t, w_packed, _ = operands(n, k)
    variants = [scales_of_groups(n, k, 128, seed) for seed in range(4)]
    wanted = [oracle.expected(x, t, w_scale, group_size=128) for w_scale in variants]
    sources = [w_scale.cuda() for w_scale in variants]
    x, w_packed, scales = x.cuda(), w_packed.cuda(), sources[0].clone()
    outputs = []
    for number in range(40):
        torch.add(sources[number % 4], 0, out=scales)  # a kernel writes it
        for _ in range(number % 3 + 1):
            outputs.append((number % 4, OP(x, w_packed, scales, None, k, 1e-6, 128)))
    for variant, y in outputs:
        oracle.assert_same_bits(y.cpu(), wanted[variant])


def test_threads_with_different_sizes():
    """One thread raises a kernel's shared memory limit while another one launches the kernel."""
    layers = [BitLinear(k, 64).deploy() for k in (256, 4096, 8192)]
    inputs = [torch.randn(1, layer.in_features) for layer in layers]
    wanted = [layer(x) for layer, x in zip(layers, inputs)]

    def run(number):
        layer, x = layers[number].cuda(), inputs[number].cuda()
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs = [layer(x) for _ in range(500)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(y.cpu(), wanted[number]) for y in outputs)

    with ThreadPoolExecutor(len(layers)) as pool:
        assert all(pool.map(run, range(len(layers))))


@pytest.mark.parametrize("m", [1, 8, 100])
def test_a_chain_of_layers(m):
    """Each layer reads the output of the previous one, and can start before that one has ended."""
    layers = bitlinear.deploy(nn.Sequential(*(BitLinear(1024, 1024) for _ in range(8))))
    x = torch.randn(m, 1024)
    on_cpu = layers(x)
    layers.cuda()
    for _ in range(20):
        assert torch.equal(layers(x.cuda()).cpu(), on_cpu)


@pytest.mark.parametrize("m", [1, 4, 64])
def test_a_captured_graph(m):
    layers = bitlinear.deploy(nn.Sequential(BitLinear(256, 512), BitLinear(512, 64)))
    samples = [torch.randn(m, 256) for _ in range(3)]
    wanted = [layers(sample) for sample in samples]
    layers.cuda()
    x = samples[0].cuda()
    layers(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers(x)
    for sample, expected in zip(samples, wanted):
        x.copy_(sample)
        graph.replay()
        assert torch.equal(y.cpu(), expected)


# A process of its own: no kernel is loaded, and no device property is cached.
CAPTURE = """
import torch
from torch import nn
import bitlinear
from bitlinear import BitLinear

assert next(v for v in bitlinear.available_kernels() if v.variant == "cuda").ok
layers = bitlinear.deploy(nn.Sequential(*(BitLinear(k, n) for k, n in {sizes})))
samples = [torch.randn({m}, layers[0].in_features) for _ in range(3)]
wanted = [layers(sample) for sample in samples]
layers.cuda()
x = torch.zeros_like(samples[0], device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = layers(x)
for sample, expected in zip(samples, wanted):
    x.copy_(sample)
    graph.replay()
    assert torch.equal(y.cpu(), expected)
"""


# The kernels of few tokens, of small layers, and of many with clusters of blocks.
@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("sizes", [[(256, 512), (512, 64)], [(4096, 4096)]], ids=str)
def test_a_graph_captured_without_a_warm_up(m, sizes):
    script = CAPTURE.format(sizes=sizes, m=m)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("m", [1, 64])
def test_torch_compile_with_graphs(m):
    layers = bitlinear.deploy(nn.Sequential(BitLinear(256, 512), nn.ReLU(), BitLinear(512, 64)))
    layers.cuda()
    compiled = torch.compile(layers, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(m, 256, device="cuda")
            assert torch.equal(compiled(x).clone(), layers(x))


def test_streams():
    layer = BitLinear(1024, 1024).deploy()
    x = torch.randn(4, 1024)
    wanted = layer(x)
    layer.cuda()
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = x.cuda()
    torch.cuda.synchronize()
    outputs = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(layer(inputs))
    torch.cuda.synchronize()
    assert all(torch.equal(output.cpu(), wanted) for output in outputs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    layer = BitLinear(1024, 1024).deploy()
    for m in (1, 64):
        x = torch.randn(m, 1024)
        wanted = layer(x)
        on_second = copy.deepcopy(layer).to("cuda:1")
        assert torch.cuda.current_device() == 0
        y = on_second(x.to("cuda:1"))
        assert y.device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
        assert torch.equal(y.cpu(), wanted)


# --- The layer ---


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_training_and_deployment(dtype, quant_type):
    layer = BitLinear(70, 33, quant_type=quant_type).cuda()
    x = torch.randn(5, 70, device="cuda").to(dtype)
    before = layer(x)
    before.float().square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    with torch.autocast("cuda", torch.float16):
        assert layer(x).dtype == torch.float16
    layer.deploy()
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.cpu()(x.cpu()), before.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_nothing_but_the_output(dtype):
    layer, x = BitLinear(70, 33).cuda(), torch.randn(5, 70, device="cuda", requires_grad=True)
    y = layer(x)
    with torch.autocast("cuda", dtype):
        rounded = layer(x)
        with torch.autocast("cuda", enabled=False):
            assert torch.equal(layer(x), y)
    assert torch.equal(rounded, y.to(dtype))
    operands, ones = (x, *layer.parameters()), torch.ones_like(y)
    wanted = torch.autograd.grad(y, operands, ones)
    actual = torch.autograd.grad(rounded, operands, ones.to(dtype))
    torch.testing.assert_close(actual, wanted, rtol=0.02, atol=0.02)  # 16-bit products
    layer.deploy()
    with torch.autocast("cuda", dtype), torch.no_grad():
        assert torch.equal(layer(x), rounded)


def test_a_step_with_a_scaled_loss():
    model = nn.Sequential(BitLinear(70, 33), nn.ReLU(), BitLinear(33, 6)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler, x = torch.amp.GradScaler("cuda"), torch.randn(5, 70, device="cuda")
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cuda", torch.float16):
            loss = model(x).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(map(torch.equal, before, model.parameters()))


def test_deploying_packs_on_the_device():
    layer = BitLinear(1000, 300)
    on_cuda = copy.deepcopy(layer).cuda().deploy()
    layer.deploy()
    assert on_cuda.w_packed.is_cuda
    assert torch.equal(on_cuda.w_packed.cpu(), layer.w_packed)
    assert torch.equal(on_cuda.w_scale.cpu(), layer.w_scale)


def test_moves_and_state_dicts_carry_the_same_bytes():
    layer = BitLinear(100, 30).deploy()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    for moved in (layer.to("cuda"), layer.to("cpu"), layer.cuda()):
        for name, value in moved.state_dict().items():
            assert torch.equal(value.cpu(), state[name])
    rounded = (
        copy.deepcopy(layer).half().float()
    )  # rounds the bias; packed weights keep their bytes
    assert torch.equal(rounded.w_packed.cpu(), state["w_packed"])
    assert torch.equal(rounded.w_scale.cpu(), state["w_scale"])
    for source in ("cpu", "cuda"):
        for target in ("cpu", "cuda"):
            fresh = BitLinear(100, 30, device=target)
            fresh.load_state_dict({name: value.to(source) for name, value in state.items()})
            assert fresh.w_packed.device.type == target
            assert torch.equal(fresh.w_packed.cpu(), state["w_packed"])
            y = fresh(torch.ones(2, 100, device=target))
            assert torch.equal(y.cpu(), layer.cpu()(torch.ones(2, 100)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deploying_takes_the_packed_weight_and_a_few_megabytes(dtype):
    layer = BitLinear(8192, 8192, bias=False, dtype=dtype, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer.deploy()
    assert torch.cuda.max_memory_allocated() - before <= 8192 * 8192 / 4 + 2**22


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_the_gradient_of_the_input_of_a_deployed_layer(dtype):
    layer = BitLinear(70, 33).cuda().deploy()
    x = torch.randn(5, 70, device="cuda").to(dtype).requires_grad_()
    grad = torch.randn(5, 33, device="cuda").to(dtype)
    layer(x).backward(grad)
    wanted = grad.float() @ layer.dequantize()
    torch.testing.assert_close(x.grad.float(), wanted, rtol=0.02, atol=0.02)  # 16-bit products


def test_higher_derivatives():
    """In fp32, where the products equal those of the CPU up to the order of their sums."""
    torch.backends.cuda.matmul.allow_tf32 = False
    layer, x = BitLinear(70, 33), torch.randn(5, 70)
    gradients = []
    for device in ("cpu", "cuda"):
        twin = copy.deepcopy(layer).to(device)
        operand = x.detach().to(device).requires_grad_()
        y = torch.tanh(twin(operand)).sum()
        (grad,) = torch.autograd.grad(y, operand, create_graph=True)
        leaves = [operand, *twin.parameters()]
        gradients.append([g.cpu() for g in torch.autograd.grad(grad.square().sum(), leaves)])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_undeploying_keeps_the_function():
    layer, x = BitLinear(512, 256).cuda().deploy(), torch.randn(5, 512, device="cuda")
    y = layer(x)
    assert torch.equal(layer.undeploy()(x), y)


# --- Packed bytes are checked before they are used ---


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 70), (64, 1024), (4099, 515)])
def test_bytes_that_have_changed_are_checked_again(n, k):
    _, w_packed, w_scale = operands(n, k)
    w_packed, w_scale, x = on_gpu(w_packed, w_scale, torch.randn(3, k))
    wanted = OP(x, w_packed, w_scale, None, k)
    good = w_packed.clone()
    for row, column in {(0, 0), (n - 1, k - 1), (n // 2, k // 2)}:
        w_packed[row, column // 4] |= 3 << (6 - 2 * (column % 4))
        w_packed[row + 1 :] = 255
        message = f"invalid code 3, first in byte {column // 4} of row {row} "
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                OP(x, w_packed, w_scale, None, k)
        w_packed.copy_(good)
        assert torch.equal(OP(x, w_packed, w_scale, None, k), wanted)


def test_weights_past_the_last_input_are_rejected():
    _, w_packed, w_scale = operands(4, 8)
    with pytest.raises(ValueError, match="weights beyond in_features = 7"):
        OP(*on_gpu(torch.randn(2, 7), w_packed, w_scale), None, 7)


def test_an_average_over_buffers_is_noticed():
    model = nn.Sequential(BitLinear(64, 128), nn.BatchNorm1d(128)).cuda()
    bitlinear.deploy(model)
    x = torch.randn(8, 64, device="cuda")
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    model(x)
    for _ in range(2):
        average.update_parameters(model)
    with pytest.raises(ValueError, match="code 3"):
        average(x)
