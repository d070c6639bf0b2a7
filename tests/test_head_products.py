"""The operators for the head of a model: int8_product and bf16_product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitlinear
from bitlinear import head_products
from tests import oracle

OPS = torch.ops.bitlinear
compiled = pytest.mark.skipif(not bitlinear.HAS_BITLINEAR, reason="about the compiled operator")
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1100]))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def int8_operands(shape, n, k):
    q = torch.randint(-32385, 32386, (*shape, k), dtype=torch.int16)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return q, torch.rand(*shape, 1) + 0.01, w, torch.rand(n, 1) + 0.01


@given(
    shape=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
    n=st.integers(0, 140),
    k=SIZES,
    dtype=st.sampled_from(oracle.DTYPES),
)
def test_int8_sums_are_exact(shape, n, k, dtype):
    q, s_x, w, w_scale = int8_operands(shape, n, k)
    y = OPS.int8_product(q, s_x, w, w_scale, dtype)
    assert (y.dtype, y.shape) == (dtype, (*shape, n))
    sums = q.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T
    scales = s_x.numpy() * w_scale.numpy().T.reshape(*[1] * len(shape), n)
    wanted = torch.from_numpy(np.asarray(sums.astype(np.float32) * scales)).to(dtype)
    oracle.assert_same_bits(y, wanted.reshape(y.shape))
    reference = head_products.reference_int8_product(q, s_x, w, w_scale, dtype)
    oracle.assert_same_bits(reference, y)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_int8_sums(sign):
    k = 131072
    q = torch.full((1, k), 32385, dtype=torch.int16)
    w = torch.full((2, k), sign * 127, dtype=torch.int8)
    y = OPS.int8_product(q, torch.ones(1, 1), w, torch.ones(2, 1), torch.float32)
    assert (y == torch.tensor(sign * 127 * 32385 * k, dtype=torch.float64).float()).all()


@pytest.mark.parametrize(("a", "b"), [(-32768, -128), (32767, -128), (-32768, 127)])
def test_the_extremes_of_the_types(a, b):
    q, w = torch.full((1, 1025), a, dtype=torch.int16), torch.full((1, 1025), b, dtype=torch.int8)
    y = OPS.int8_product(q, torch.ones(1, 1), w, torch.ones(1, 1), torch.float32)
    assert y.item() == torch.tensor(1025.0 * a * b, dtype=torch.float64).float()


@given(shape=st.sampled_from([(), (1,), (2, 3), (0,)]), n=st.integers(0, 140), k=st.just(0) | SIZES)
def test_bf16_is_added_in_the_specified_order(shape, n, k):
    x, w = torch.randn(*shape, k).bfloat16(), torch.randn(n, k).bfloat16()
    y = OPS.bf16_product(x, w)
    assert (y.dtype, y.shape) == (torch.bfloat16, (*shape, n))
    oracle.assert_same_bits(y, head_products.reference_bf16_product(x, w))
    exact = x.double() @ w.double().T
    limit = 2**-8 * exact.abs() + 1e-5 * (x.double().abs() @ w.double().T.abs())
    assert ((y.double() - exact).abs() <= limit).all()


def test_values_that_are_not_finite():
    q, s_x, w, w_scale = int8_operands((3,), 5, 40)
    s_x[1] = float("nan")
    y = OPS.int8_product(q, s_x, w, w_scale, torch.bfloat16)
    assert y.isnan().any(dim=1).tolist() == [False, True, False]
    x, w = torch.randn(3, 100).bfloat16(), torch.randn(5, 100).bfloat16()
    x[0, 99], x[1, 3] = float("nan"), float("inf")
    y = OPS.bf16_product(x, w)
    oracle.assert_same_bits(y, head_products.reference_bf16_product(x, w))
    assert y[0].isnan().all()
    assert y[1].isinf().all()
    assert y[2].isfinite().all()


def test_views_and_threads():
    q, s_x, w, w_scale = int8_operands((4,), 1000, 300)
    x, weight = torch.randn(4, 300).bfloat16(), torch.randn(1000, 300).bfloat16()
    strided = [t.T.contiguous().T for t in (q, s_x, w, w_scale, x, weight)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for a in ((q, s_x, w, w_scale, x, weight), strided):
                results.append((OPS.int8_product(*a[:4], torch.float32), OPS.bf16_product(*a[4:])))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@compiled
@pytest.mark.parametrize("name", ["q", "s_x", "w", "w_scale"])
def test_freed_memory_is_an_error(name):
    arguments = dict(zip(("q", "s_x", "w", "w_scale"), int8_operands((3,), 4, 32)))
    for values in (arguments[name], arguments[name].t().contiguous().t()):
        freed = values.clone(memory_format=torch.preserve_format)
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"{name} has .* but its storage was freed"):
            OPS.int8_product(**{**arguments, name: freed}, dtype=torch.float32)


@compiled
@pytest.mark.parametrize("name", ["x", "w"])
def test_freed_memory_of_bf16_is_an_error(name):
    arguments = {"x": torch.randn(3, 32).bfloat16(), "w": torch.randn(4, 32).bfloat16()}
    arguments[name] = arguments[name].t().contiguous().t()
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name} has .* but its storage was freed"):
        OPS.bf16_product(**arguments)


def test_the_operators_are_what_torch_expects():
    for shape in ((2, 3), ()):
        operands = int8_operands(shape, 6, 11)
        torch.library.opcheck(OPS.int8_product.default, (*operands, torch.float16))
        x, w = torch.randn(*shape, 11).bfloat16(), torch.randn(6, 11).bfloat16()
        torch.library.opcheck(OPS.bf16_product.default, (x, w))
    stack = torch.vmap(OPS.bf16_product, in_dims=(0, None))
    x = torch.randn(3, 2, 11).bfloat16()
    oracle.assert_same_bits(stack(x, w), OPS.bf16_product(x, w))


Q, S_X, W, W_SCALE = int8_operands((2,), 3, 5)
X, HALVES = torch.ones(2, 5).bfloat16(), torch.ones(3, 5).bfloat16()
WRONG = [
    ("int8_product", (Q.int(), S_X, W, W_SCALE, X.dtype), ValueError, "q must be int8 or int16"),
    ("int8_product", (Q, S_X[:1], W, W_SCALE, X.dtype), ValueError, r"shape \[1, 1\]"),
    ("int8_product", (Q, S_X.double(), W, W_SCALE, X.dtype), ValueError, "float64 of shape"),
    ("int8_product", (Q.to(torch.int8), S_X, W, W_SCALE, X.dtype), TypeError, "q must be int16"),
    ("int8_product", (Q, S_X, W[:, :4], W_SCALE, X.dtype), ValueError, r"w must be int8.*\(N, 5\)"),
    ("int8_product", (Q, S_X, W.float(), W_SCALE, X.dtype), ValueError, "is float32 of shape"),
    ("int8_product", (Q, S_X, W, W_SCALE[:2], X.dtype), ValueError, r"w_scale must be.*\(3, 1\)"),
    ("int8_product", (Q, S_X, W, W_SCALE.half(), X.dtype), ValueError, "w_scale.*is float16"),
    ("int8_product", (Q, S_X, W, W_SCALE, torch.int8), TypeError, "dtype must be float32"),
    ("bf16_product", (X.float(), HALVES), ValueError, "x must be bfloat16.*float32 of shape"),
    ("bf16_product", (X, HALVES.half()), ValueError, "w bfloat16.*float16 of shape"),
    ("bf16_product", (X, HALVES[:, :4]), ValueError, r"shape \[2, 5\].*shape \[3, 4\]"),
    ("bf16_product", (X, HALVES[0]), ValueError, r"shape \[5\] on cpu"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "message"), WRONG)
def test_errors_are_the_same_everywhere(name, arguments, error, message):
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    texts = []
    for function, given_arguments in (
        (getattr(OPS, name), arguments),
        (getattr(head_products, f"reference_{name}"), arguments),
        (getattr(OPS, name), on_meta),
    ):
        with pytest.raises(error, match=message.replace("on cpu", "on (cpu|meta)")) as caught:
            function(*given_arguments)
        texts.append(str(caught.value).split("\n")[0].replace("on meta", "on cpu"))
    assert len(set(texts)) == 1


def test_tensors_on_two_devices():
    with pytest.raises(ValueError, match=r"on cpu, but it is int8 of shape .* on meta"):
        head_products.reference_int8_product(Q, S_X, W.to("meta"), W_SCALE, X.dtype)
    with pytest.raises(ValueError, match=r"on cpu and bfloat16 of shape .* on meta"):
        head_products.reference_bf16_product(X, HALVES.to("meta"))
