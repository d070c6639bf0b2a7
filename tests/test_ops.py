"""``torch.ops.bitlinear.linear``: the registered implementation, and the reference."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import torch

import bitlinear
from bitlinear import ops, packing
from tests import oracle

OP = torch.ops.bitlinear.linear
IMPLEMENTATIONS = (OP, ops.reference_linear)


def operands(n, k, per_row=False, seed=0):
    """``(t, w_packed, w_scale)``; packed by the oracle."""
    t = oracle.ternary(n, k, seed)
    rng = np.random.default_rng(seed)
    w_scale = rng.uniform(0.01, 1, (n, 1) if per_row else 1).astype(np.float32)
    return t, torch.from_numpy(oracle.pack(t)), torch.from_numpy(w_scale)


def test_the_schema_is_what_saved_graphs_rely_on():
    for schema in ops.SCHEMAS:
        name = schema.partition("(")[0]
        registered = getattr(torch.ops.bitlinear, name).default._schema
        assert registered == torch._C.parse_schema(f"bitlinear::{schema}")
    assert torch.Tag.pt2_compliant_tag in OP.default.tags


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 5, 3), (3, 2, 4), (2, 7, 5), (33, 17, 130), (5, 300, 257), (300, 31, 64)],
)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("per_row", [False, True])
def test_results_equal_the_oracle_to_the_bit(m, n, k, dtype, with_bias, per_row):
    t, w_packed, w_scale = operands(n, k, per_row)
    x = (torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]).to(dtype)
    bias = torch.randn(n) if with_bias else None
    for linear in IMPLEMENTATIONS:
        oracle.assert_same_bits(
            linear(x, w_packed, w_scale, bias, k), oracle.expected(x, t, w_scale, bias)
        )


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("k", [1, 6, 63, 260])
def test_adversarial_rows_equal_the_oracle_to_the_bit(k, dtype):
    t, w_packed, w_scale = operands(9, k)
    x = torch.from_numpy(oracle.adversarial_rows(k)).to(dtype)
    for eps in (2e-36, 1e-6, 0.1):
        for linear in IMPLEMENTATIONS:
            actual = linear(x, w_packed, w_scale, None, k, eps)
            oracle.assert_same_bits(actual, oracle.expected(x, t, w_scale, None, eps))


@pytest.mark.parametrize("k", [65_537, 132_105, 500_000])
def test_long_sums_stay_exact(k):
    t = np.ones((2, k), np.int64)
    t[1, : k // 3] = -1
    x = torch.full((1, k), 3.0)
    x[0, ::7] = -2.9
    w_packed = packing.pack_ternary(torch.from_numpy(t.astype(np.int8)))
    w_scale = torch.tensor([0.5])
    for linear in IMPLEMENTATIONS:
        oracle.assert_same_bits(linear(x, w_packed, w_scale, None, k), oracle.expected(x, t, 0.5))


@pytest.mark.parametrize("shape", [(12,), (2, 12), (2, 3, 12), (0, 12), (2, 0, 12)])
def test_leading_dimensions(shape):
    t, w_packed, w_scale = operands(5, 12)
    x = torch.randn(shape)
    for linear in IMPLEMENTATIONS:
        oracle.assert_same_bits(
            linear(x, w_packed, w_scale, None, 12), oracle.expected(x, t, w_scale)
        )


def test_non_contiguous_operands():
    t, w_packed, w_scale = operands(6, 12, per_row=True)
    x, bias = torch.randn(12, 8).T, torch.randn(12)[::2]
    wide = torch.zeros(6, 6, dtype=torch.uint8)
    wide[:, ::2] = w_packed
    for linear in IMPLEMENTATIONS:
        y = linear(x, wide[:, ::2], w_scale.expand(6, 2)[:, :1], bias, 12)
        oracle.assert_same_bits(y, oracle.expected(x, t, w_scale, bias))
        assert y.is_contiguous()


@pytest.mark.parametrize("out_dtype", [None, *oracle.DTYPES])
@pytest.mark.parametrize("bias_dtype", [*oracle.DTYPES, torch.float64])
def test_output_and_bias_dtypes(out_dtype, bias_dtype):
    t, w_packed, w_scale = operands(5, 12)
    x, bias = torch.randn(3, 12).half(), torch.randn(5).to(bias_dtype)
    for linear in IMPLEMENTATIONS:
        y = linear(x, w_packed, w_scale, bias, 12, out_dtype=out_dtype)
        oracle.assert_same_bits(y, oracle.expected(x, t, w_scale, bias, dtype=out_dtype))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_token_gives_a_row_of_nan_and_touches_no_other(bad, dtype):
    _, w_packed, w_scale = operands(5, 70)
    x, bias = torch.randn(40, 70).to(dtype), torch.randn(5)
    for linear in IMPLEMENTATIONS:
        clean = linear(x, w_packed, w_scale, bias, 70)
        for column in (0, 37, 69):
            dirty = x.clone()
            dirty[11, column] = bad
            y = linear(dirty, w_packed, w_scale, bias, 70)
            assert y[11].isnan().all()
            others = torch.arange(40) != 11
            assert torch.equal(y[others], clean[others])


def test_an_all_zero_token_gives_the_bias():
    _, w_packed, w_scale = operands(5, 70)
    bias = torch.randn(5)
    for linear in IMPLEMENTATIONS:
        y = linear(torch.zeros(2, 70), w_packed, w_scale, bias, 70)
        assert torch.equal(y, bias.expand(2, 5))


def test_one_row_is_the_same_alone_and_in_a_batch():
    _, w_packed, w_scale = operands(37, 130)
    x = torch.randn(300, 130)
    y = OP(x, w_packed, w_scale, None, 130)
    for row in (0, 1, 150, 299):
        assert torch.equal(OP(x[row], w_packed, w_scale, None, 130), y[row])


def test_the_reference_expands_few_weights_at_a_time():
    _, w_packed, w_scale = operands(700, 1024)  # More than one chunk.
    x = torch.randn(2, 1024)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel() * result.element_size())
            return result

    with Watch():
        y = ops.reference_linear(x, w_packed, w_scale, None, 1024)
    assert largest <= 2**20
    assert torch.equal(y, OP(x, w_packed, w_scale, None, 1024))


# --- What torch asks of an operator ---


def arguments(requires_grad=False, **changes):
    _, w_packed, w_scale = operands(5, 12)
    x = torch.randn(3, 12, requires_grad=requires_grad)
    named = {
        "x": x,
        "w_packed": w_packed,
        "w_scale": w_scale,
        "bias": torch.randn(5),
        "in_features": 12,
        "eps": 1e-6,
        "group_size": 0,
        "act_bits": 8,
        "out_dtype": None,
        **changes,
    }
    return tuple(named.values())


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
def test_opcheck(out_dtype):
    torch.library.opcheck(OP.default, arguments(out_dtype=out_dtype))


def test_opcheck_with_gradients():
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OP.default, arguments(requires_grad=True), test_utils=tests)


def test_meta_tensors():
    x, *rest = arguments(out_dtype=torch.float16)
    rest = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in rest]
    y = OP(x.to("meta").reshape(1, 3, 12), *rest)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (1, 3, 5), torch.float16)


def test_backward_raises():
    y = OP(*arguments(requires_grad=True))
    with pytest.raises(RuntimeError, match="derivative for bitlinear::linear is not implemented"):
        y.sum().backward()


def test_inference_mode():
    wanted = OP(*arguments())
    torch.manual_seed(0)
    with torch.inference_mode():
        assert OP(*arguments()).shape == wanted.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", oracle.DTYPES)
def test_autocast_rounds_only_the_output(x_dtype, dtype):
    t, w_packed, w_scale = operands(5, 12)
    x = torch.randn(3, 12).to(x_dtype)
    with torch.autocast("cpu", dtype):
        y = OP(x, w_packed, w_scale, None, 12)
        explicit = OP(x, w_packed, w_scale, None, 12, out_dtype=torch.float32)
    oracle.assert_same_bits(y, oracle.expected(x, t, w_scale, dtype=dtype))
    oracle.assert_same_bits(explicit, oracle.expected(x, t, w_scale, dtype=torch.float32))


def test_vmap():
    x, *rest = arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap loops over the operator, and warns.
        y = torch.func.vmap(lambda row: OP(row, *rest))(x)
    assert torch.equal(y, OP(x, *rest))


# --- Wrong arguments: the same exception and message from Python and from C++ ---

X = torch.ones(3, 12)
on_meta = functools.partial(torch.ones, device="meta")
WRONG = [
    (ValueError, "group_size must be 0 .* 32 up to 500000, but it is 48", {"group_size": 48}),
    (ValueError, r"w_scale must have shape \(5, 1\) for .* 64, but", {"group_size": 64}),
    (ValueError, "act_bits must be 8 or 16, but it is 4", {"act_bits": 4}),
    (ValueError, "between 1 and 500000 .* it is 0: split the layer", {"in_features": 0}),
    (ValueError, "between 1 and 500000 .* it is 500001", {"in_features": 500_001}),
    (ValueError, "eps must be between 2e-36 .* it is 0$", {"eps": 0.0}),
    (ValueError, "eps must be between 2e-36 .* it is 1e-40$", {"eps": 1e-40}),
    (ValueError, "eps must be between 2e-36 .* it is 1e.300$", {"eps": 1e300}),
    (ValueError, "eps must be between 2e-36 .* it is nan$", {"eps": float("nan")}),
    (TypeError, "x must be float32, .* float64: convert it, .* a model", {"x": X.double()}),
    (TypeError, "x must be float32, .* it is int64: convert it", {"x": X.long()}),
    (ValueError, r"in_features = 12, but x has shape \[3, 13\]$", {"x": torch.ones(3, 13)}),
    (ValueError, r"in_features = 12, but x has shape \[\]$", {"x": torch.ones(())}),
    (ValueError, r"in_features = 11, but x has shape \[3, 12\]$", {"in_features": 11}),
    (TypeError, "out_dtype must be .* it is float64: leave it out", {"out_dtype": torch.float64}),
    (TypeError, "w_packed must be uint8, but it is int8", {"w_packed": torch.ones(5, 3).char()}),
    (TypeError, "w_scale must be float32, but it is float16", {"w_scale": torch.ones(1).half()}),
    (TypeError, "bias must be floating point, but it is int64", {"bias": torch.ones(5).long()}),
    (ValueError, r"\(N, 3\) .* shape \[5, 4\]$", {"w_packed": torch.ones(5, 4).byte()}),
    (ValueError, r"\(N, 3\) .* shape \[3\]$", {"w_packed": torch.ones(3).byte()}),
    (ValueError, r"\(1,\) or \(5, 1\) .* \[5\]", {"w_scale": torch.ones(5)}),
    (ValueError, r"\(1,\) or \(5, 1\) .* \[\]", {"w_scale": torch.ones(())}),
    (ValueError, r"\(1,\) or \(5, 1\) .* \[5, 3\]", {"w_scale": torch.ones(5, 3)}),
    (ValueError, r"shape \(5,\), one .* of the rows .* \[6\]$", {"bias": torch.ones(6)}),
    (ValueError, r"shape \(5,\), one .* of the rows .* \[5, 1\]$", {"bias": torch.ones(5, 1)}),
    (ValueError, "x is on cpu and w_packed is on meta", {"w_packed": on_meta(5, 3).byte()}),
    (ValueError, "x is on cpu and w_scale is on meta", {"w_scale": on_meta(1)}),
    (ValueError, "x is on cpu and bias is on meta", {"bias": on_meta(5)}),
    (ValueError, "x is on meta and w_packed is on cpu: move", {"x": on_meta(3, 12)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), WRONG)
def test_wrong_arguments(error, message, changes):
    texts = []
    for linear in IMPLEMENTATIONS:
        with pytest.raises(error) as caught:
            linear(*arguments(**changes))
        texts.append(str(caught.value).splitlines()[0])
    assert texts[0] == texts[1]
    with pytest.raises(error, match="^bitlinear: .*" + message):
        raise error(texts[0])


@pytest.mark.skipif(not bitlinear.HAS_BITLINEAR, reason="about the compiled operator")
@pytest.mark.parametrize("name", ["x", "w_packed", "w_scale", "bias"])
@pytest.mark.parametrize("rows", [5, 50_000])  # on one thread and on all
def test_memory_that_was_freed_is_an_error(rows, name):
    tensors = {"x": torch.ones(12, 3).T, "w_packed": torch.full((rows, 3), 85, dtype=torch.uint8)}
    tensors |= {"w_scale": torch.ones(1), "bias": torch.ones(rows, dtype=torch.float64)}
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name} has .* but its storage was freed"):
        OP(*tensors.values(), 12)


# --- Packed bytes are checked before they are used ---


def spoil(w_packed):
    w_packed[2, 1] |= 0b00_11_00_00


def changes_of_bytes():
    def average(w_packed):  # as an exponential average over buffers does
        w_packed.copy_((0.9 * w_packed.float() + 0.1 * w_packed.flip(0).float()).to(torch.uint8))

    return [spoil, average, lambda w: w.fill_(255), lambda w: w.view(-1)[3:4].fill_(3)]


@pytest.mark.parametrize("change", changes_of_bytes())
@pytest.mark.parametrize("call", IMPLEMENTATIONS)
def test_bytes_that_have_changed_are_checked_again(call, change):
    _, w_packed, w_scale = operands(40, 70)
    x = torch.randn(3, 70)
    wanted = call(x, w_packed, w_scale, None, 70)
    good = w_packed.clone()
    for _ in range(2):
        change(w_packed)
        for _ in range(2):  # and stay refused
            with pytest.raises(ValueError, match=r"invalid code 3, first in byte \d+ of row \d+"):
                call(x, w_packed, w_scale, None, 70)
        w_packed.copy_(good)
        assert torch.equal(call(x, w_packed, w_scale, None, 70), wanted)


@pytest.mark.parametrize("call", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 31, 33, 70, 131])
def test_the_first_invalid_code_is_found_anywhere(call, k):
    _, good, w_scale = operands(7, k)
    for n in (0, 3, 6):
        for column in {0, k // 2, k - 1}:
            w_packed = good.clone()
            w_packed[n, column // 4] |= 3 << (6 - 2 * (column % 4))
            w_packed[n + 1 :] = 255
            message = f"invalid code 3, first in byte {column // 4} of row {n} "
            with pytest.raises(ValueError, match=message):
                call(torch.randn(2, k), w_packed, w_scale, None, k)


@pytest.mark.parametrize("call", IMPLEMENTATIONS)
def test_weights_past_the_last_input_are_rejected(call):
    _, w_packed, w_scale = operands(4, 8)
    call(torch.randn(2, 8), w_packed, w_scale, None, 8)  # these bytes are valid, and checked
    with pytest.raises(ValueError, match=r"weights beyond in_features = 7"):
        call(torch.randn(2, 7), w_packed, w_scale, None, 7)


@pytest.mark.skipif(not bitlinear.HAS_BITLINEAR, reason="about the compiled operator")
def test_slices_and_shapes_are_checked_each_on_its_own():
    _, w_packed, w_scale = operands(40, 64)
    x = torch.randn(3, 64)
    OP(x, w_packed, w_scale, None, 64)
    spaced = torch.full((4, 8), 0x55, dtype=torch.uint8)
    spaced[:, 4] = 255
    for _ in range(2):  # the same address, rows and distance of rows
        OP(x[:, :8], spaced[:, :2], w_scale, None, 8)
        with pytest.raises(ValueError, match="code 3"):
            OP(x[:, :8], spaced[:, ::4], w_scale, None, 8)
    spoil(w_packed[20:])
    OP(x, w_packed[:20], w_scale, None, 64)
    for bad, k in ((w_packed, 64), (w_packed[20:], 64), (w_packed[:, :8], 32)):
        with pytest.raises(ValueError, match="code 3"):
            OP(x[:, :k], bad, w_scale, None, k)


@pytest.mark.skipif(not bitlinear.HAS_BITLINEAR, reason="about the compiled operator")
def test_an_address_that_is_used_again_is_checked():
    x = torch.randn(3, 64)
    for _ in range(200):
        _, w_packed, w_scale = operands(40, 64)
        w_packed = w_packed.clone()  # into memory of torch, not of NumPy
        OP(x, w_packed, w_scale, None, 64)
        address = w_packed.data_ptr()
        del w_packed
        other = torch.full((40, 16), 255, dtype=torch.uint8)
        with pytest.raises(ValueError, match="code 3"):
            OP(x, other, w_scale, None, 64)
        if other.data_ptr() == address:
            return
    pytest.skip("the allocator never gave the same address again")


@pytest.mark.skipif(not bitlinear.HAS_BITLINEAR, reason="about the compiled operator")
def test_an_alias_with_a_version_counter_of_its_own_is_checked():
    """Each `.data` counts from 0, so two of them have the same version and other bytes."""
    _, w_packed, w_scale = operands(40, 64)
    x = torch.randn(3, 64)
    for _ in range(2):
        OP(x, w_packed.data, w_scale, None, 64)
    w_packed.fill_(255)  # counted by w_packed alone
    with pytest.raises(ValueError, match="code 3"):
        OP(x, w_packed.data, w_scale, None, 64)


@pytest.mark.skipif(not bitlinear.HAS_BITLINEAR, reason="about the compiled operator")
def test_slices_share_the_counter_of_their_tensor():
    """Stacked experts: what is known of `w[e]` holds for the next `w[e]`, until w changes."""
    _, w_packed, w_scale = operands(40, 64)
    experts, x = torch.stack([w_packed, w_packed]), torch.randn(3, 64)
    for inference in (False, True):
        with torch.inference_mode(inference):
            OP(x, experts[1], w_scale, None, 64)
            experts.numpy()[1, 0, 0] = 255  # past the counter, so that a check would be seen
            OP(x, experts[1], w_scale, None, 64)
        experts[1, 0, 0] = 0x55
        experts[0].fill_(255)
        OP(x, experts[1], w_scale, None, 64)
        experts[1, 0, 0] = 255
        with pytest.raises(ValueError, match="code 3"):
            OP(x, experts[1], w_scale, None, 64)
        experts.copy_(torch.stack([w_packed, w_packed]))


def test_inference_tensors_are_checked_in_every_call():
    """They have no version counter."""
    with torch.inference_mode():
        _, w_packed, w_scale = operands(40, 64)
        w_packed, x = w_packed.clone(), torch.randn(3, 64)
        OP(x, w_packed, w_scale, None, 64)
        spoil(w_packed)
        with pytest.raises(ValueError, match="code 3"):
            OP(x, w_packed, w_scale, None, 64)


def test_a_sum_of_zero_has_no_sign():
    packed = torch.tensor([[0b01010101], [0b10010101]], dtype=torch.uint8)
    for linear in IMPLEMENTATIONS:
        y = linear(torch.tensor([[-1.0]]), packed, torch.ones(1), None, 1)
        assert not y.signbit()[0, 0]
    weight = torch.tensor([[0.0], [1.0]])
    y = bitlinear.training.straight_through_linear(torch.tensor([[-1.0]]), weight)
    assert not y.signbit()[0, 0]


def test_wrong_arguments_are_found_while_tracing():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        args = arguments(x=torch.ones(3, 13))
        with pytest.raises(ValueError, match=r"in_features = 12, but x has shape \[3, 13\]"):
            OP(*args)


def test_registering_again_takes_the_place_of_the_first():
    args = arguments()
    expected = OP(*args)
    ops.unregister()
    ops.register(compiled=bitlinear.HAS_BITLINEAR)
    assert torch.equal(torch.ops.bitlinear.linear(*args), expected)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert torch.ops.bitlinear.linear(*args).shape == expected.shape
