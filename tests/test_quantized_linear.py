"""quantized_linear and linear_with_activations: the same bits as linear, quantised once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import vmap

import bitlinear  # noqa: F401  (registers the operators)
from tests import oracle

OPS = torch.ops.bitlinear


def operands(shape, n, k, dtype, group_size=0, device="cpu"):
    """An input, and a weight of this many rows with a bias."""
    x = torch.randn(*shape, k).to(dtype)
    weight = OPS.quantize_weight(torch.randn(n, k), 1e-6, group_size)
    bias = torch.randn(n)
    return tuple(tensor.to(device) for tensor in (x, *weight, bias))


def quantize(x):
    q, s_x = OPS.quantize_activations(x)
    return q, s_x, q.sum(dim=-1, keepdim=True, dtype=torch.int32)


def check(x, w_packed, w_scale, bias, group_size=0):
    """Compare both operators with ``linear``; test_cuda_training.py does the same on a GPU."""
    tokens = quantize(x)
    for dtype in oracle.DTYPES:
        weight = (w_packed, w_scale, bias)
        wanted = OPS.linear(x, *weight, x.shape[-1], 1e-6, group_size, out_dtype=dtype)
        y = OPS.quantized_linear(*tokens, *weight, dtype, group_size)
        assert_same_bits(y, wanted)
        y, q, s_x = OPS.linear_with_activations(x, *weight, 1e-6, dtype, group_size)
        assert_same_bits(y, wanted)
        assert torch.equal(q, tokens[0])
        # Of a token that is not finite, it is NaN or infinite.
        assert_same_bits(*(torch.where(s.isfinite(), s, torch.nan) for s in (s_x, tokens[1])))


def assert_same_bits(y, wanted):
    oracle.assert_same_bits(y.cpu(), wanted.cpu())


@given(
    shape=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
    n=st.integers(0, 40),
    k=st.integers(1, 300),
    dtype=st.sampled_from(oracle.DTYPES),
    group_size=st.sampled_from([0, -1, 32, 96, 128]),
    has_bias=st.booleans(),
)
def test_the_bits_are_those_of_linear(shape, n, k, dtype, group_size, has_bias):
    x, w_packed, w_scale, bias = operands(shape, n, k, dtype, group_size)
    check(x, w_packed, w_scale, bias if has_bias else None, group_size)


def test_a_token_that_is_not_finite_touches_no_other():
    x, *weight = operands((4,), 5, 40, torch.float32)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    check(x, *weight)
    y = OPS.quantized_linear(*quantize(x), *weight, torch.float32)
    assert y.isnan().all(dim=-1).tolist() == [False, True, True, False]


def test_vmap_is_one_call_with_more_tokens():
    x, *weight = operands((3, 4), 5, 40, torch.float32)

    def multiply(*tokens):
        return OPS.quantized_linear(*tokens, *weight, torch.float32)

    tokens = quantize(x)
    assert torch.equal(vmap(multiply)(*tokens), multiply(*tokens))


def test_errors_name_what_is_wrong():
    x, *weight = operands((4,), 5, 40, torch.float32)
    q, s_x, q_sum = quantize(x)

    def multiply(*tokens, dtype=torch.float32):
        return OPS.quantized_linear(*tokens, *weight, dtype)

    for device in ("cpu", "meta"):
        weight = [tensor.to(device) for tensor in weight]
        for tokens, error, message in (
            ((q.float(), s_x, q_sum), ValueError, "q must be int8 or int16"),
            ((q.short(), s_x, q_sum), TypeError, "q must be int8, but it is int16"),
            ((q, s_x[:2], q_sum), ValueError, r"s_x float32, of shape \(\.\.\., 1\)"),
            ((q, s_x, q_sum.long()), ValueError, r"q_sum must be int32, of shape \[4, 1\].*int64"),
            ((q, s_x, q_sum[:1]), ValueError, r"q_sum must be .*of shape \[1, 1\]"),
            ((q[:, :30], s_x, q_sum), ValueError, r"w_packed must have shape \(N, 8\)"),
        ):
            with pytest.raises(error, match=message):
                multiply(*(tensor.to(device) for tensor in tokens))
        with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16"):
            multiply(*(tensor.to(device) for tensor in (q, s_x, q_sum)), dtype=torch.float64)
        tokens = [tensor.to(device) for tensor in (q, s_x, q_sum)]
        for group_size, message in ((33, "positive multiple of 32"), (32, r"\(5, 2\)")):
            with pytest.raises(ValueError, match=message):
                OPS.quantized_linear(*tokens, *weight, torch.float32, group_size)
    weight = [torch.full_like(weight[0], 0xFF, device="cpu"), torch.ones(1), None]
    with pytest.raises(ValueError, match="invalid code 3"):
        multiply(q, s_x, q_sum)


def check_operators(device):
    """Run opcheck on both; test_cuda_training.py does the same on a GPU."""
    for group_size in (0, 32):
        x, *weight = operands((2, 6), 5, 48, torch.float32, group_size, device)
        rest = (torch.bfloat16, group_size)
        torch.library.opcheck(OPS.quantized_linear.default, (*quantize(x), *weight, *rest))
        torch.library.opcheck(OPS.linear_with_activations.default, (x, *weight, 1e-6, *rest))


def test_the_operators_are_what_torch_expects():
    check_operators("cpu")
