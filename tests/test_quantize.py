"""The quantisers and the integer product, in plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlinear import quantize
from tests import oracle


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 64, 131])
def test_activations_equal_the_oracle_to_the_bit(k, dtype):
    with np.errstate(over="ignore"):
        x = torch.from_numpy(oracle.adversarial_rows(k)).to(dtype)
    q, s_x = quantize.quantize_activations(x)
    q_wanted, s_wanted = oracle.quantize_activations(x.float().numpy())
    finite = x.isfinite().all(dim=1)
    assert q.dtype == torch.int8
    np.testing.assert_array_equal(q.numpy(), q_wanted)
    assert s_x.dtype == torch.float32
    np.testing.assert_array_equal(s_x[finite].numpy(), s_wanted[finite.numpy()])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_subnormal_activations_count_even_if_torch_flushes_them(dtype):
    """tests/kernels/test_variants.py has the same test for every kernel."""
    x = (torch.rand(5, 300) * 2 - 1) * torch.finfo(dtype).tiny
    x[:, ::4] *= 100  # normal numbers between them
    x = x.to(dtype)
    q_wanted, s_wanted = oracle.quantize_activations(x.float().numpy(), 2e-36)
    try:
        torch.set_flush_denormal(True)
        q, s_x = quantize.quantize_activations(x, 2e-36)
        q_kernel, s_kernel = torch.ops.bitlinear.quantize_activations(x, 2e-36)
    finally:
        torch.set_flush_denormal(False)
    assert np.abs(q_wanted).max() > (100 if dtype == torch.float16 else 0)
    for q_actual, s_actual in ((q, s_x), (q_kernel, s_kernel)):
        np.testing.assert_array_equal(q_actual.numpy(), q_wanted)
        np.testing.assert_array_equal(s_actual.numpy(), s_wanted)


# No subnormals: code that torch 2.4 compiles turns them off for the whole process, and hypothesis
# raises an error. oracle.adversarial_rows has subnormals.
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@given(
    st.lists(FLOATS, min_size=1, max_size=20),
    st.sampled_from([2e-36, 1e-6, 1e-2, 5.0]),
)
def test_activations_equal_the_oracle_for_any_floats(values, eps):
    x = np.array([values], np.float32)
    q, s_x = quantize.quantize_activations(torch.from_numpy(x), eps)
    q_wanted, s_wanted = oracle.quantize_activations(x, eps)
    np.testing.assert_array_equal(q.numpy(), q_wanted)
    np.testing.assert_array_equal(s_x.numpy(), s_wanted)


def test_activations_round_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize.quantize_activations(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_token_quantises_to_zeros_and_a_scale_that_makes_nan(bad):
    x = torch.randn(3, 8)
    x[1, 5] = bad
    q, s_x = quantize.quantize_activations(x)
    assert not q[1].any()
    assert (0 * s_x[1]).isnan()
    good = [0, 2]
    assert torch.equal(q[good], quantize.quantize_activations(x[good])[0])


@pytest.mark.parametrize("dtype", [*oracle.DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 300), (1, 70001), (513, 511)])
def test_weights_equal_the_oracle(shape, dtype):
    w = torch.randn(shape).to(dtype)
    t, s_w = quantize.quantize_weights(w)
    assert (t.dtype, s_w.dtype, s_w.shape) == (torch.int8, torch.float32, (1,))
    np.testing.assert_allclose(s_w.item(), oracle.weight_scale(w.double()), rtol=3e-7)
    np.testing.assert_array_equal(t.numpy(), oracle.ternarize(w.float(), s_w))


def test_weights_below_eps_and_all_zero():
    t, s_w = quantize.quantize_weights(torch.full((2, 3), 1e-9))
    assert not t.any()
    assert s_w.item() == np.float32(1e-6)
    t, s_w = quantize.quantize_weights(torch.zeros(2, 3), eps=0.25)
    assert not t.any()
    assert s_w.item() == 0.25


@pytest.mark.parametrize("shape", [(1, 300000), (2, 100000), (70000, 16), (300, 301)])
def test_the_scale_does_not_depend_on_the_thread_count(shape):
    w = torch.randn(shape)
    threads = torch.get_num_threads()
    try:
        scales = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            scales.add(quantize.quantize_weights(w)[1].item())
    finally:
        torch.set_num_threads(threads)
    assert len(scales) == 1


@pytest.mark.parametrize("k", [1, 130, 132_104, 132_105, 400_003])
def test_the_integer_product_is_exact(k):
    rng = np.random.default_rng(k)
    # All of one sign, for the largest sums; odd, so that rounding shows.
    q = rng.choice([125, 127], (2, k))
    t = np.ones((3, k), np.int64)
    t[1] = rng.integers(-1, 2, k)
    product = quantize.integer_product(
        torch.from_numpy(q.astype(np.float32)), torch.from_numpy(t.astype(np.float32))
    )
    np.testing.assert_array_equal(product.numpy(), (q @ t.T).astype(np.float32))
