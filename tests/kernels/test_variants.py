"""Every kernel variant that this machine can run, through the operator, against the oracle."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlinear import runtime
from bitlinear.kernels import VARIANTS
from tests import fused, oracle
from tests.kernels.native import require_usable

EPS = 1e-6


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.name, scope="module")
def kernel(request):
    """Activate one variant; afterwards activate the chosen one again."""
    require_usable(request.param)
    if runtime.current().kernel is None:
        pytest.skip(runtime.current().problem)
    runtime.activate(request.param.name)
    yield request.param.name
    runtime.activate(None)


@pytest.fixture
def flush():
    """``flush(True)`` makes this thread flush subnormal numbers to zero, until ``flush(False)``."""
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


def run(x, t, w_scale, bias=None, eps=EPS, act_bits=8):
    scale = torch.as_tensor(w_scale, dtype=torch.float32)
    packed = torch.from_numpy(oracle.pack(t))
    return torch.ops.bitlinear.linear(x, packed, scale, bias, t.shape[1], eps, 0, act_bits)


def check(x, t, w_scale=(0.37,), bias=None):
    for act_bits in (8, 16):
        actual = run(x, t, w_scale, bias, EPS, act_bits)
        wanted = oracle.expected(x, t, w_scale, bias, EPS, act_bits=act_bits)
        oracle.assert_same_bits(actual, wanted)


def random_x(m, k, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator).to(dtype)


def random_bias(n, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_no_kernel_fails_to_compile_or_its_self_test():
    """A fault in all kernels leaves none to test: the others of this file would only be skipped."""
    failures = {"compile-failed", "self-test-failed"}
    assert [v.reason for v in runtime.current().verdicts if v.code in failures] == []


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_small_k(kernel, dtype):
    for k in range(1, 131):
        for m in (1, 2, 3):
            bias = random_bias(5, dtype) if k % 2 else None
            check(random_x(m, k, dtype, seed=k), oracle.ternary(5, k, seed=k), bias=bias)


@pytest.mark.parametrize("k", [4093, 4095, 4096, 4097, 4099, 65535, 65536, 65539])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_long_rows(kernel, k, dtype):
    for m in (1, 9):
        check(random_x(m, k, dtype), oracle.ternary(3, k), bias=random_bias(3, dtype))


@pytest.mark.parametrize("m", [*range(1, 20), 33])
def test_every_tile_of_tokens(kernel, m):
    for n in (1, 2, 3, 4, 5, 31, 33, 63, 64, 65, 129):
        check(random_x(m, 67, seed=m), oracle.ternary(n, 67, seed=n), bias=random_bias(n))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [64, 255, 1024, 4096, 65536, 500_000])
def test_the_integer_product_is_exact_at_the_limits(kernel, k, sign):
    """The largest against all +-1 and random weights; scales of 1 show the product itself."""
    t = np.stack([np.ones(k), -np.ones(k), oracle.ternary(1, k)[0]]).astype(np.int64)
    for act_bits, qmax in oracle.QMAX.items():
        for m in (1, 2, 9):
            y = run(torch.full((m, k), float(qmax * sign)), t, (1.0,), act_bits=act_bits)
            wanted = (qmax * sign * t.sum(axis=1)).astype(np.float32)
            np.testing.assert_array_equal(y.numpy(), np.tile(wanted, (m, 1)))


@pytest.mark.parametrize("k", [65_535, 66_000, 132_098, 500_000])
def test_a_product_that_needs_more_than_32_bits_is_rounded_once(kernel, k):
    """Sums around 2^31 and beyond, whose last bits decide the rounding."""
    rng = np.random.default_rng(k)
    t = np.ones((4, k), np.int64)
    t[:, : k // 3] = rng.integers(-1, 2, (4, k // 3))
    q = rng.integers(30_000, 32_386, (3, k))
    q[:, 0] = 32_385  # a scale of 1
    y = run(torch.from_numpy(q.astype(np.float32)), t, (1.0,), act_bits=16)
    exact = q @ t.T
    assert abs(exact).max() > 2**30
    np.testing.assert_array_equal(y.numpy(), exact.astype(np.float32))


def test_adversarial_activations(kernel):
    for k in (1, 64, 257, 1000):
        for act_bits in (8, 16):
            x = torch.from_numpy(oracle.adversarial_rows(k, act_bits=act_bits))
            for rows in (x, *x.split(1)):
                check(rows, oracle.ternary(7, k), bias=random_bias(7))


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_gives_nan_and_touches_no_other(kernel, dtype, value, act_bits):
    x = random_x(12, 300, dtype)
    t = oracle.ternary(9, 300)
    clean = run(x, t, (0.5,), act_bits=act_bits)
    for row in range(12):
        broken = x.clone()
        broken[row, 7 * row] = value
        y = run(broken, t, (0.5,), random_bias(9, dtype), act_bits=act_bits)
        assert y[row].isnan().all()
        y = run(broken, t, (0.5,), act_bits=act_bits)
        rest = torch.arange(12) != row
        oracle.assert_same_bits(y[rest], clean[rest])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_a_row_of_zeros_gives_the_bias(kernel, dtype):
    bias, t = random_bias(70, dtype), oracle.ternary(70, 100)
    for m in (1, 3):
        for act_bits in (8, 16):
            y = run(torch.zeros(m, 100, dtype=dtype), t, (0.5,), bias, act_bits=act_bits)
            oracle.assert_same_bits(y, bias.expand(m, -1))


def test_every_value_of_the_16_bit_types(kernel):
    """The conversions, in and out: all finite fp16 and bf16 numbers, one token each."""
    t = np.ones((1, 1), np.int64)
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        x = bits.view(dtype).unsqueeze(1)
        check(x, t, (1.0,))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize(("act_bits", "eps"), [(8, 2e-36), (16, 4e-34)])
def test_subnormal_inputs_count_whatever_torch_flushes(kernel, dtype, flush, act_bits, eps):
    tiny = torch.finfo(dtype).tiny
    for m, k in ((1, 64), (3, 300), (40, 1100)):
        x = (torch.rand(m, k) * 2 - 1) * tiny
        x[:, ::4] *= 100  # normal ones beside them
        x = x.to(dtype)
        t, bias = oracle.ternary(9, k), (random_bias(9) * tiny).to(dtype)
        wanted = oracle.expected(x, t, 0.37, bias, eps, act_bits=act_bits)
        flush(True)
        y = run(x, t, (0.37,), bias, eps, act_bits)
        flush(False)
        oracle.assert_same_bits(y, wanted)


def test_a_scale_per_output_channel(kernel):
    scales = np.linspace(0.01, 2, 37, dtype=np.float32).reshape(-1, 1)
    for m in (1, 5):
        check(random_x(m, 130), oracle.ternary(37, 130), scales, random_bias(37))


def test_the_bias_has_a_dtype_of_its_own(kernel):
    x, t = random_x(3, 50), oracle.ternary(6, 50)
    for dtype in (*oracle.DTYPES, torch.float64):
        check(x, t, bias=random_bias(6, dtype))


def test_other_output_dtypes(kernel):
    x, t = random_x(4, 90), oracle.ternary(70, 90)
    packed, scale = torch.from_numpy(oracle.pack(t)), torch.tensor([0.3])
    for dtype in oracle.DTYPES:
        y = torch.ops.bitlinear.linear(x, packed, scale, None, 90, out_dtype=dtype)
        oracle.assert_same_bits(y, oracle.expected(x, t, 0.3, None, EPS, dtype))


@pytest.mark.parametrize("act_bits", [8, 16])
def test_results_do_not_depend_on_batch_or_threads(kernel, threads, act_bits):
    """One row alone, inside a batch of 300, with one thread or several: the same bits."""
    x, t, bias = random_x(300, 1030), oracle.ternary(700, 1030), random_bias(700)

    def part(rows):
        return run(x[rows], t, (0.2,), bias, EPS, act_bits)

    threads(1)
    whole = part(slice(None))
    oracle.assert_same_bits(whole, oracle.expected(x, t, 0.2, bias, EPS, act_bits=act_bits))
    for count in (2, 3, 7):
        threads(count)
        for rows in (
            slice(None),
            slice(40, 57),
            *(slice(row, row + 1) for row in (0, 1, 150, 299)),
        ):
            oracle.assert_same_bits(part(rows), whole[rows])


@pytest.mark.parametrize("m", [5, 7, 17, 18])
def test_parts_of_any_size_have_room_for_long_rows(kernel, threads, m):
    """Of a call whose parts have different numbers of tokens, some multiply in another form."""
    k, group_size = 400_000, 128
    t = torch.randint(-1, 2, (5, k), generator=torch.Generator().manual_seed(3))
    packed = torch.from_numpy(oracle.pack(t.numpy()))
    w_scale = torch.rand(5, k // group_size) + 0.5
    arguments = (random_x(m, k), packed, w_scale, None, k, EPS, group_size)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(torch.ops.bitlinear.linear(*arguments))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_tall_product_is_divided_among_tokens(kernel, threads):
    x, t = random_x(700, 260), oracle.ternary(5, 260)
    for count in (1, 2, 5):
        threads(count)
        check(x, t)


def test_inputs_of_any_layout(kernel):
    t = oracle.ternary(20, 64)
    base = torch.randn(6, 5, 128)
    for x in (base[..., ::2], base[:, 1:4, :64].transpose(0, 1), base[0, 0, :64], base[:0, :, :64]):
        y = run(x, t, (0.5,))
        assert y.shape == (*x.shape[:-1], 20)
        oracle.assert_same_bits(y, oracle.expected(x.contiguous(), t, 0.5, None, EPS))
    packed = torch.from_numpy(oracle.pack(t))
    strided = torch.stack([packed, packed], dim=2)[:, :, 0]
    x = torch.randn(3, 64)
    y = torch.ops.bitlinear.linear(x, strided, torch.tensor([0.5]), None, 64)
    oracle.assert_same_bits(y, oracle.expected(x, t, 0.5, None, EPS))


@given(
    m=st.integers(0, 20),
    n=st.integers(1, 140),
    k=st.integers(1, 700),
    dtype=st.sampled_from(oracle.DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(kernel, m, n, k, dtype, with_bias, seed):
    x = random_x(m, k, dtype, seed)
    check(x, oracle.ternary(n, k, seed), bias=random_bias(n, dtype) if with_bias else None)


# --- The fused product ---


@functools.cache
def fused_case(m, widths, k, dtype, act_bits):
    """Arguments and output; the same for all variants. All sources and residuals take turns."""
    source = fused.SOURCES[(k + m + act_bits // 8) % len(fused.SOURCES)]
    residual_dtype = (None, *oracle.DTYPES)[(k // 2 + m) % 4]
    t, arguments = fused.operands(
        *(m, widths, k, dtype, *source, residual_dtype), seed=k // 3, act_bits=act_bits
    )
    return arguments, fused.expected(t, arguments)


def check_fused(m, widths, k, dtype=torch.float32):
    for act_bits in (8, 16):
        arguments, wanted = fused_case(m, widths, k, dtype, act_bits)
        oracle.assert_same_bits(torch.ops.bitlinear.fused_linear(**arguments), wanted)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_fused_products_of_every_small_k(kernel, dtype):
    for k in range(1, 131):
        for m in (k % 3 + 1, k % 2 + 4):
            check_fused(m, (5, 1, 2), k, dtype)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_fused_products_of_long_rows(kernel, dtype):
    for k in (1023, 1024, 1025, 2049, 4095, 4096, 4097, 65_539):
        for m in (1, 2, 3):
            check_fused(m, (3, 2), k, dtype)


@pytest.mark.parametrize("widths", [(1,), (3, 1), (31, 33), (64, 65), (129, 5, 16), (2, 300, 7, 1)])
def test_every_tile_of_fused_products(kernel, widths):
    for m in (*range(1, 20), 33):
        for dtype in oracle.DTYPES:
            check_fused(m, widths, 67, dtype)


@pytest.mark.parametrize("act_bits", [8, 16])
def test_fused_results_do_not_depend_on_batch_or_threads(kernel, threads, act_bits):
    for m in (60, 61, 62):  # three sources
        arguments, wanted = fused_case(m, (300, 1, 214), 1030, torch.bfloat16, act_bits)
        for count in (1, 2, 3, 7):
            threads(count)
            for rows in (slice(None), slice(40, 57), 0, m - 1):
                tokens = {
                    name: arguments[name][rows]
                    for name in ("x", "residual")
                    if arguments[name] is not None
                }
                y = torch.ops.bitlinear.fused_linear(**{**arguments, **tokens})
                oracle.assert_same_bits(y, wanted[rows])


@pytest.mark.parametrize("m", [1, 3, 24])
def test_more_threads_than_pieces(kernel, threads, m):
    """Each thread that multiplies has memory of its own; the others must not touch any."""
    arguments, wanted = fused_case(m, (200, 312), 4096, torch.bfloat16, 8)
    threads(16)
    for _ in range(5):
        oracle.assert_same_bits(torch.ops.bitlinear.fused_linear(**arguments), wanted)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "with_norm"), fused.SOURCES)
def test_subnormal_values_in_a_prologue_count_whatever_torch_flushes(
    kernel, dtype, flush, activation, with_norm
):
    """Inputs, gated values, squares, weights of the norm, residuals and outputs."""
    tiny = torch.finfo(dtype).tiny
    for m, k in ((1, 64), (3, 300), (40, 1100)):
        t, arguments = fused.operands(m, (9, 2), k, dtype, activation, with_norm, dtype, eps=4e-34)
        x, half = arguments["x"], k // 2
        x[:, :half] *= tiny
        x[:, half:k] *= tiny**0.5
        arguments["norm_eps"] = 0.0
        arguments["residual"] *= tiny
        arguments["w_scale"] = [s * tiny for s in arguments["w_scale"]]
        arguments["bias"] = [None, None]
        if with_norm:
            arguments["norm_weight"][::3] *= 1e-39
        wanted = fused.expected(t, arguments)
        flush(True)
        y = torch.ops.bitlinear.fused_linear(**arguments)
        flush(False)
        oracle.assert_same_bits(y, wanted)
