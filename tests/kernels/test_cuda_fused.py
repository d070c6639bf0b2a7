"""``torch.ops.bitlinear.fused_linear`` on an NVIDIA GPU: the CPU's bits, streams, graphs."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.fused import SOURCES, expected, operands
from tests.kernels.test_cuda import (
    DP4A,
    GEMV,
    MMA,
    SMALL_BATCH,
    WGMMA,
    compiled,
    force,
)

pytestmark = pytest.mark.cuda

__all__ = ["compiled", "force"]  # fixtures

OP = torch.ops.bitlinear.fused_linear
every_source = pytest.mark.parametrize(("activation", "with_norm"), SOURCES)


def to_gpu(value):
    if isinstance(value, (list, tuple)):
        return [to_gpu(element) for element in value]
    return value.cuda() if isinstance(value, torch.Tensor) else value


def on_gpu(arguments):
    return {name: to_gpu(value) for name, value in arguments.items()}


def check(t, arguments):
    y = OP(**on_gpu(arguments))
    assert y.is_cuda
    oracle.assert_same_bits(y.cpu(), expected(t, arguments))


@every_source
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 17, 33, 130])
def test_results_equal_the_oracle_to_the_bit(activation, with_norm, dtype, m):
    for seed, k in enumerate((1, 37, 64, 256, 1000, 1024, 4160)):
        widths = (70, 1, 33, 130)[: 1 + (m + seed) % 4]
        residual = (None, *oracle.DTYPES)[(m + seed) % 4]
        for act_bits in (8, 16):
            arguments = (m, widths, k, dtype, activation, with_norm, residual, seed)
            t, named = operands(*arguments, act_bits=act_bits)
            if with_norm:
                named["norm_weight"] = named["norm_weight"].to(dtype)
            check(t, named)


@every_source
@pytest.mark.parametrize("k", [8192, 8256, 16_384, 16_448, 40_000, 500_000])
def test_long_rows(activation, with_norm, k):
    """More values than the threads of a block keep."""
    for m in (1, 2, 6):
        check(*operands(m, (3, 2), k, torch.bfloat16, activation, with_norm, torch.float32))


@pytest.mark.parametrize("kernel", [DP4A, GEMV, SMALL_BATCH, MMA, WGMMA])
def test_every_kernel_and_tile(force, kernel):
    """Weights that end within the tiles of a kernel, and at their ends."""
    force(kernel)
    for widths in ((64, 64), (256, 128, 3), (1, 1, 1, 1), (130, 257), (5, 700, 1), (2560, 640)):
        for m in (1, 2, 4) if kernel == GEMV else (1, 8, 20, 32, 33, 100, 200):
            if m > 32 and kernel == SMALL_BATCH:
                continue
            check(*operands(m, widths, 256, torch.bfloat16, "relu2", True, torch.bfloat16))


def test_many_tokens():
    for dtype in oracle.DTYPES:
        check(*operands(1500, (40, 8), 320, dtype, "silu", True, dtype))


def test_adversarial_rows():
    rows = torch.from_numpy(oracle.adversarial_rows(384))
    for activation in (None, "silu", "relu2"):
        t, arguments = operands(len(rows), (9,), 192 if activation else 384, activation=activation)
        check(t, {**arguments, "x": rows})


def test_unaligned_operands():
    """Parts of other tensors, that start at any address."""
    t, arguments = operands(3, (33, 5), 64, torch.bfloat16, "silu", True, torch.bfloat16)
    shifted = {}
    for name, value in on_gpu(arguments).items():
        if isinstance(value, torch.Tensor):
            room = torch.empty(value.numel() + 1, dtype=value.dtype, device="cuda")
            shifted[name] = room[1:].view(value.shape).copy_(value)
        else:
            shifted[name] = value
    oracle.assert_same_bits(OP(**shifted).cpu(), expected(t, arguments))


def test_a_captured_graph_reads_new_values():
    _, arguments = operands(1, (64, 33), 256, torch.bfloat16, "silu", True, torch.bfloat16)
    gpu = on_gpu(arguments)
    for _ in range(2):
        OP(**gpu)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OP(**gpu)
    for seed in range(3):
        torch.manual_seed(seed)
        for name in ("x", "norm_weight", "residual"):
            gpu[name].normal_()
        graph.replay()
        assert torch.equal(y, OP(**gpu))


def test_products_follow_each_other():
    """Each reads the output of the one before, while the next one has started."""
    _, arguments = operands(1, (256,), 256, torch.bfloat16, None, True, torch.bfloat16)
    cpu, gpu = arguments, on_gpu(arguments)
    wanted, y = cpu["x"], gpu["x"]
    for _ in range(50):
        wanted = OP(**{**cpu, "x": wanted, "residual": wanted})
        y = OP(**{**gpu, "x": y, "residual": y})
    oracle.assert_same_bits(y.cpu(), wanted)


@pytest.mark.parametrize("name", ["x", "norm_weight", "residual", "w_packed", "w_scale", "bias"])
def test_memory_that_was_freed_is_an_error(name):
    _, arguments = operands(2, (5,), 64, torch.float32, None, True, torch.float32)
    gpu = on_gpu(arguments)
    value = gpu[name]
    tensor = value[0] if isinstance(value, list) else value
    if tensor is None:
        tensor = torch.ones(5, device="cuda")
        gpu[name] = [tensor]
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name} has .* but its storage was freed"):
        OP(**gpu)
