"""The operators of a training step: quantisers and their inverses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitlinear
from bitlinear import ops
from tests import oracle

OPS = torch.ops.bitlinear
PACKED = torch.full((8, 16), 0x55, dtype=torch.uint8)
WEIGHT_DTYPES = [*oracle.DTYPES, torch.float64]


@given(
    n=st.integers(1, 40),
    k=st.one_of(st.integers(1, 40), st.integers(1000, 2100)),
    dtype=st.sampled_from(WEIGHT_DTYPES),
    spread=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_weights_are_quantised_as_by_the_oracle(n, k, dtype, spread, seed):
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)
    w_packed, w_scale = OPS.quantize_weight(w, 1e-6)
    assert (w_packed.dtype, w_scale.dtype, w_scale.shape) == (torch.uint8, torch.float32, (1,))
    scale = oracle.weight_scale(w.float(), 1e-6)
    np.testing.assert_allclose(w_scale.item(), scale, rtol=1.2e-7)
    t = oracle.ternarize(w.float(), w_scale)
    np.testing.assert_array_equal(w_packed.numpy(), oracle.pack(t))
    np.testing.assert_array_equal(OPS.expand_weight(w_packed, k).numpy(), t)
    reference = ops.reference_quantize_weight(w, 1e-6)
    if reference[1] == w_scale:  # they may differ in the last bit
        assert torch.equal(reference[0], w_packed)


@pytest.mark.parametrize("dtype", [None, *oracle.DTYPES])
def test_weights_expand_to_any_dtype(dtype):
    w_packed, w_scale = OPS.quantize_weight(torch.randn(5, 21))
    t = OPS.expand_weight(w_packed, 21, dtype=dtype)
    assert t.dtype == (dtype or torch.float32)
    assert torch.equal(t.float(), OPS.expand_weight(w_packed, 21))
    for scale in (None, w_scale):
        weight = OPS.expand_weight(w_packed, 21, scale, dtype)
        assert torch.equal(weight, ops.reference_expand_weight(w_packed, 21, scale, dtype))
    assert torch.equal(weight, (t.float() * w_scale).to(t.dtype))


def test_half_of_the_scale_rounds_to_zero():
    # Their mean is 1; 0.5 is halfway, and rounds to even.
    w = torch.tensor([[0.5, -0.5, 0.5000001, -0.5000001, 1.5, 0.0, 2.0, 2.5]])
    w[0, -1] += 8 - w.abs().sum()
    w_packed, w_scale = OPS.quantize_weight(w)
    assert w_scale.item() == 1.0
    assert OPS.expand_weight(w_packed, 8).tolist() == [[0, 0, 1, -1, 1, 0, 1, 1]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_give_zeros_and_a_scale_that_is_not_finite(value):
    w = torch.randn(3, 50)
    w[1, 20] = value
    w_packed, w_scale = OPS.quantize_weight(w)
    assert not w_scale.isfinite()
    assert not OPS.expand_weight(w_packed, 50).any()


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 70), (2, 0, 9), (0, 4), (2, 3, 2051)])
def test_activations_are_quantised_as_by_the_oracle(shape, dtype):
    x = torch.randn(shape).to(dtype)
    q, s_x = OPS.quantize_activations(x, 1e-6)
    assert (q.dtype, q.shape, s_x.shape) == (torch.int8, x.shape, (*shape[:-1], 1))
    if x.numel():
        wanted, scale = oracle.quantize_activations(x.float())
        np.testing.assert_array_equal(q.numpy(), wanted)
        np.testing.assert_array_equal(s_x.numpy(), scale)


@pytest.mark.parametrize("dtype", [None, *oracle.DTYPES])
def test_activations_expand_to_any_dtype(dtype):
    q, s_x = OPS.quantize_activations(torch.randn(2, 5, 21))
    x = OPS.expand_activations(q, s_x, dtype)
    assert (x.dtype, x.shape) == (dtype or torch.float32, q.shape)
    assert torch.equal(x, torch.from_numpy(q.numpy() * s_x.numpy()).to(x.dtype))


def test_views_and_threads():
    w, x = torch.randn(70, 300), torch.randn(300, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for weight, tokens in ((w, x.T), (w.T.contiguous().T, x.T.contiguous())):
                w_packed, w_scale = OPS.quantize_weight(weight)
                results.append((w_packed, w_scale, *OPS.quantize_activations(tokens)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"weight must be floating point.*int64"):
        OPS.quantize_weight(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(N, K\)"):
        OPS.quantize_weight(torch.ones(2))
    with pytest.raises(ValueError, match="eps must be between"):
        OPS.quantize_weight(torch.ones(2, 2), 0.0)
    with pytest.raises(ValueError, match=r"\(N, 2\) for in_features = 5"):
        OPS.expand_weight(torch.zeros(3, 3, dtype=torch.uint8), 5)
    with pytest.raises(TypeError, match=r"dtype must be float32.*float64"):
        OPS.expand_weight(torch.zeros(3, 2, dtype=torch.uint8), 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"w_scale must be float32, of shape \(1,\) or \(3, 1\)"):
        OPS.expand_weight(torch.zeros(3, 2, dtype=torch.uint8), 5, torch.ones(2, 1))
    with pytest.raises(TypeError, match=r"x must be float32.*float64"):
        OPS.quantize_activations(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="no dimension"):
        OPS.quantize_activations(torch.tensor(1.0))
    packed = torch.zeros(3, 2, dtype=torch.uint8)
    for device in ("cpu", "meta"):
        weight = (packed.to(device), torch.ones(1, device=device), None)
        with pytest.raises(ValueError, match=r"last dimension of x must be .* has shape \[\]"):
            OPS.linear_with_activations(
                torch.tensor(1.0, device=device), *weight, 1e-6, torch.float32
            )


def freed(tensor):
    """A tensor whose columns lie one behind the other, so that kernels get a copy."""
    tensor = tensor.t().contiguous().t()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.skipif(not bitlinear.HAS_BITLINEAR, reason="about the compiled operator")
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("weight", lambda: OPS.quantize_weight(freed(torch.randn(8, 64)))),
        ("weight", lambda: OPS.quantize_weight(freed(torch.randn(8, 64).double()))),
        ("x", lambda: OPS.quantize_activations(freed(torch.randn(8, 64)))),
        ("w_packed", lambda: OPS.expand_weight(freed(PACKED), 64)),
        ("w_scale", lambda: OPS.expand_weight(PACKED, 64, freed(torch.ones(8, 2)), None, 32)),
    ],
)
def test_memory_that_was_freed_is_an_error(name, call):
    """Before it is copied: a copy reads it."""
    with pytest.raises(ValueError, match=f"{name} has .* but its storage was freed"):
        call()


def check_operators(device):
    """Run opcheck on each operator; test_cuda_training.py does the same on a GPU."""
    x, weight = torch.randn(2, 6, 11, device=device), torch.randn(6, 11, device=device)
    w_packed, w_scale = OPS.quantize_weight(weight)
    for operator, arguments in (
        (OPS.quantize_weight, (weight,)),
        (OPS.expand_weight, (w_packed, 11, w_scale)),
        (OPS.quantize_activations, (x,)),
        (OPS.expand_activations, OPS.quantize_activations(x)),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_the_operators_are_what_torch_expects():
    check_operators("cpu")
