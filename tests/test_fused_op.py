"""``torch.ops.bitlinear.fused_linear``: the registered implementation, and the reference."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitlinear
from bitlinear import ops
from bitlinear.prologue import apply_prologue
from tests import oracle, test_ops
from tests.fused import SOURCES, expected, operands

OP = torch.ops.bitlinear.fused_linear
IMPLEMENTATIONS = (OP, ops.reference_fused_linear)
every_source = pytest.mark.parametrize(("activation", "with_norm"), SOURCES)


def check(t, arguments):
    wanted = expected(t, arguments)
    for fused_linear in IMPLEMENTATIONS:
        oracle.assert_same_bits(fused_linear(**arguments), wanted)


@every_source
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_results_equal_the_oracle_to_the_bit(activation, with_norm, dtype):
    """Any number of weights, kinds of scales, with and without bias, all dtypes, 8 and 16 bits."""
    dtypes = (None, *oracle.DTYPES)
    for seed, (out_dtype, residual_dtype) in enumerate(itertools.product(dtypes, dtypes)):
        for act_bits, count in ((8, seed % 4 + 1), (16, (seed + 2) % 4 + 1)):
            check(
                *operands(
                    *(4, (7, 1, 33, 4)[:count], 37, dtype, activation, with_norm),
                    *(residual_dtype, seed // 4),
                    act_bits=act_bits,
                    out_dtype=out_dtype,
                )
            )


@pytest.mark.parametrize("m", [1, 2, 9, 33])
@pytest.mark.parametrize(
    "widths", [(1,), (1, 1, 1, 1), (3, 1), (31, 33), (64, 65), (129, 5, 16), (300, 1, 2), (2, 257)]
)
def test_weights_of_any_number_of_rows(widths, m):
    for act_bits in (8, 16):
        for residual_dtype in (None, torch.bfloat16):
            check(*operands(m, widths, 67, residual_dtype=residual_dtype, act_bits=act_bits))


@every_source
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_adversarial_rows_equal_the_oracle_to_the_bit(activation, with_norm, dtype):
    for k in (1, 6, 63, 260):
        t, arguments = operands(1, (4, 5), k, dtype, activation, with_norm, None)
        rows = oracle.adversarial_rows(k)
        if activation is not None:
            rows = np.concatenate([rows, np.roll(rows, 5, axis=0)], axis=1)
        arguments["x"] = torch.from_numpy(rows).to(dtype)
        for eps, norm_eps in ((2e-36, 0.0), (1e-6, 1e-6), (0.1, 1e18)):
            check(t, {**arguments, "eps": eps, "norm_eps": norm_eps})


@pytest.mark.parametrize("k", [1023, 1024, 1025, 4097, 100_001])
def test_long_rows_equal_the_oracle_to_the_bit(k):
    check(*operands(2, (3, 2), k))


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (0,), (2, 0), (2, 1, 1)])
def test_leading_dimensions(shape):
    check(*operands(shape))


@pytest.mark.parametrize("widths", [(0,), (0, 0), (0, 3), (3, 0), (2, 0, 1)])
def test_weights_without_rows(widths):
    """Tensor parallelism leaves such a part to a process."""
    for seed in range(4):
        check(*operands(3, widths, seed=seed))


def test_a_subnormal_norm_eps_counts_whatever_torch_flushes():
    _, arguments = operands(2, activation=None)
    arguments |= {"x": torch.full_like(arguments["x"], 1e-30), "norm_eps": 1e-39}
    wanted = OP(**arguments)
    torch.set_flush_denormal(True)
    try:
        actual = OP(**arguments)
    finally:
        torch.set_flush_denormal(False)
    oracle.assert_same_bits(actual, wanted)
    assert wanted.isfinite().all()


def spaced(tensor):
    """The same values, at twice the distance in memory."""
    return torch.stack([tensor, tensor], dim=-1).flatten(-2)[..., ::2]


def test_non_contiguous_operands():
    for seed in range(4):
        t, arguments = operands((4, 3), dtype=torch.float16, seed=seed)
        wanted = expected(t, arguments)
        for name in ("x", "norm_weight", "residual"):
            arguments[name] = spaced(arguments[name])
        arguments["residual"] = arguments["residual"].transpose(0, 1).contiguous().transpose(0, 1)
        for name in ("w_packed", "w_scale", "bias"):
            arguments[name] = [None if v is None else spaced(v) for v in arguments[name]]
        for fused_linear in IMPLEMENTATIONS:
            y = fused_linear(**arguments)
            oracle.assert_same_bits(y, wanted)
            assert y.is_contiguous()


@pytest.mark.parametrize("dtype", [*oracle.DTYPES, torch.float64])
def test_bias_and_norm_weight_have_dtypes_of_their_own(dtype):
    t, arguments = operands(dtype=torch.bfloat16)
    arguments["bias"] = [torch.randn(5).to(dtype), torch.randn(3).to(dtype)]
    arguments["norm_weight"] = arguments["norm_weight"].to(dtype)
    check(t, arguments)


@every_source
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_fused_and_unfused_operators_give_the_same_bits(activation, with_norm, dtype):
    _, arguments = operands(5, (40, 3, 17), 130, dtype, activation, with_norm, dtype)
    named = {name: arguments[name] for name in ("activation", "norm_weight", "norm_eps")}
    values = apply_prologue(arguments["x"], **named)
    weights = zip(arguments["w_packed"], arguments["w_scale"], arguments["bias"])
    y = torch.cat([torch.ops.bitlinear.linear(values, *w, 130) for w in weights], dim=-1)
    oracle.assert_same_bits(OP(**arguments), (y + arguments["residual"].float()).to(dtype))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_a_plain_fused_product_of_one_weight_is_the_product(dtype):
    _, arguments = operands(9, (40,), 130, dtype, None, False, None, seed=3)
    operand = [arguments[name][0] for name in ("w_packed", "w_scale", "bias")]
    wanted = torch.ops.bitlinear.linear(arguments["x"], *operand, 130)
    oracle.assert_same_bits(OP(**arguments), wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@every_source
def test_a_bad_token_gives_a_row_of_nan_and_touches_no_other(activation, with_norm, bad):
    t, arguments = operands(12, (5, 4), 70, torch.float32, activation, with_norm)
    relu_removes_it = activation == "relu2" and bad < 0
    for fused_linear in IMPLEMENTATIONS:
        clean = fused_linear(**arguments)
        for column in (-1,) if relu_removes_it else (0, 37, 69, -1):
            dirty = arguments["x"].clone()
            dirty[7, column] = bad
            y = fused_linear(**{**arguments, "x": dirty})
            assert y[7].isnan().all()
            others = torch.arange(12) != 7
            oracle.assert_same_bits(y[others], clean[others])
            oracle.assert_same_bits(y, expected(t, {**arguments, "x": dirty}))


def test_an_infinity_that_the_gate_removes_does_not_count():
    t, arguments = operands(2, activation="relu2")
    arguments["x"][0, 3] = -float("inf")
    check(t, arguments)
    assert OP(**arguments).isfinite().all()


def test_an_all_zero_token_gives_bias_plus_residual():
    _, arguments = operands(seed=2)  # the first weight has a bias, the second has none
    arguments["x"].zero_()
    bias = torch.cat([arguments["bias"][0], torch.zeros(3)])
    for fused_linear in IMPLEMENTATIONS:
        assert torch.equal(fused_linear(**arguments), bias + arguments["residual"])


@pytest.mark.parametrize("act_bits", [8, 16])
@every_source
def test_results_do_not_depend_on_batch_or_threads(threads, activation, with_norm, act_bits):
    t, arguments = operands(
        *(300, (300, 1, 214), 1030, torch.bfloat16, activation, with_norm), act_bits=act_bits
    )

    def part(rows):
        tokens = {name: arguments[name][rows] for name in ("x", "residual")}
        return OP(**{**arguments, **tokens})

    threads(1)
    whole = part(slice(None))
    oracle.assert_same_bits(whole, expected(t, arguments))
    for count in (1, 2, 3):
        threads(count)
        for rows in (slice(None), slice(40, 57), 0, 150, 299):
            oracle.assert_same_bits(part(rows), whole[rows])


@given(
    m=st.integers(0, 20),
    widths=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    k=st.integers(1, 400),
    dtype=st.sampled_from(oracle.DTYPES),
    source=st.sampled_from(SOURCES),
    residual_dtype=st.sampled_from((None, *oracle.DTYPES)),
    seed=st.integers(0, 2**16),
    act_bits=st.sampled_from((8, 16)),
    out_dtype=st.sampled_from((None, *oracle.DTYPES)),
    eps=st.sampled_from((1e-6, 4e-34, 0.1)),
)
def test_any_combination(m, widths, k, dtype, source, residual_dtype, seed, **options):
    check(*operands(m, tuple(widths), k, dtype, *source, residual_dtype, seed, **options))


# --- Packed bytes are checked before they are used ---


@pytest.mark.parametrize("change", test_ops.changes_of_bytes())
@pytest.mark.parametrize("position", [0, 1])
def test_bytes_that_have_changed_are_checked_again(position, change):
    _, arguments = operands(3, (40, 40), 70)
    w_packed = arguments["w_packed"][position]
    wanted, good = OP(**arguments), w_packed.clone()
    for fused_linear in IMPLEMENTATIONS:
        change(w_packed)
        for _ in range(2):  # and stay refused
            with pytest.raises(ValueError, match=r"invalid code 3, first in byte \d+ of row \d+"):
                fused_linear(**arguments)
        w_packed.copy_(good)
        assert torch.equal(fused_linear(**arguments), wanted)


def test_weights_past_the_last_input_are_rejected():
    _, arguments = operands(2, (4, 3), 8, activation=None)
    OP(**arguments)  # these bytes are valid, and checked
    arguments |= {"x": torch.randn(2, 7), "in_features": 7, "norm_weight": torch.randn(7)}
    for fused_linear in IMPLEMENTATIONS:
        with pytest.raises(ValueError, match=r"weights beyond in_features = 7"):
            fused_linear(**arguments)


# --- Wrong arguments: the same exception and message from Python and from C++ ---

on_meta = functools.partial(torch.ones, device="meta")
W = torch.full((5, 3), 0x55, dtype=torch.uint8)
COUNT = "must be lists of one length, from 1 to 4, but they have "
WEIGHTS = {"w_packed": W, "w_scale": torch.ones(1), "bias": None}
WRONG = [
    (ValueError, "None or one of silu, relu2, but it is gelu$", {"activation": "gelu"}),
    (ValueError, "activation must be .*, but it is $", {"activation": ""}),
    (ValueError, r"2 \* in_features = 24, .* shape \[3, 12\]$", {"activation": "silu"}),
    (ValueError, r"2 \* in_features = 24, .* \[\]$", {"activation": "silu", "x": torch.ones(())}),
    (ValueError, COUNT + "0, 0 and 0", {name: [v] * 0 for name, v in WEIGHTS.items()}),
    (ValueError, COUNT + "5, 5 and 5", {name: [v] * 5 for name, v in WEIGHTS.items()}),
    (ValueError, COUNT + "1, 2 and 2", {"w_packed": [W]}),
    (ValueError, COUNT + "2, 3 and 2", {"w_scale": [torch.ones(1)] * 3}),
    (ValueError, COUNT + "2, 2 and 1", {"bias": [None]}),
    (ValueError, COUNT + "2, 2 and 3", {"bias": [None] * 3}),
    (TypeError, "norm_weight must be floating .* is int64", {"norm_weight": torch.ones(12).long()}),
    (ValueError, r"norm_weight .* \(12,\), .* \[24\]$", {"norm_weight": torch.ones(24)}),
    (ValueError, r"norm_weight .* \(12,\), .* \[1, 12\]$", {"norm_weight": torch.ones(1, 12)}),
    (ValueError, "x is on cpu and norm_weight is on meta", {"norm_weight": on_meta(12)}),
    (ValueError, "norm_eps must be between 0 and .* it is -1e-06$", {"norm_eps": -1e-6}),
    (ValueError, "norm_eps must be between 0 and .* it is nan$", {"norm_eps": float("nan")}),
    (ValueError, "norm_eps must be between 0 and .* it is inf$", {"norm_eps": float("inf")}),
    (ValueError, r"norm_eps must be between 0 and .* it is 2e\+18$", {"norm_eps": 2e18}),
    (TypeError, "residual must be .* is float64", {"residual": torch.ones(3, 10).double()}),
    (TypeError, "residual must be .* is int32: convert", {"residual": torch.ones(3, 10).int()}),
    (ValueError, r"output, \[3, 10\], .* \[3, 5\]$", {"residual": torch.ones(3, 5)}),
    (ValueError, r"output, \[3, 10\], .* \[10\]$", {"residual": torch.ones(10)}),
    (ValueError, r"output, \[3, 10\], .* \[1, 10\]$", {"residual": torch.ones(1, 10)}),
    (ValueError, "x is on cpu and residual is on meta", {"residual": on_meta(3, 10)}),
]  # fmt: skip


def fused_changes(changes):
    """Changes of the arguments of ``linear``, made to the second of two weights."""
    return {name: [WEIGHTS[name], v] if name in WEIGHTS else v for name, v in changes.items()}


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [*WRONG, *((*case[:2], fused_changes(case[2])) for case in test_ops.WRONG)],
)
def test_wrong_arguments(error, message, changes):
    arguments = {
        "x": torch.ones(3, 12),
        "w_packed": [W, W],
        "w_scale": [torch.ones(1), torch.ones(5, 1)],
        "bias": [None, torch.ones(5)],
        "in_features": 12,
        "norm_weight": torch.ones(12),
        "norm_eps": 1e-6,
        "residual": torch.ones(3, 10),
    }
    texts = []
    for fused_linear in IMPLEMENTATIONS:
        fused_linear(**arguments)
        with pytest.raises(error) as caught:
            fused_linear(**{**arguments, **changes})
        texts.append(str(caught.value).splitlines()[0])
    assert texts[0] == texts[1]
    with pytest.raises(error, match="^bitlinear: .*" + message):
        raise error(texts[0])


@pytest.mark.skipif(not bitlinear.HAS_BITLINEAR, reason="about the compiled operator")
@pytest.mark.parametrize("name", ["x", "w_packed", "w_scale", "bias", "norm_weight", "residual"])
@pytest.mark.parametrize("rows", [5, 50_000])  # on one thread and on all
def test_memory_that_was_freed_is_an_error(rows, name):
    _, arguments = operands(3, (4, rows))
    for changed in ("bias", "norm_weight"):  # the kernels get a copy
        value = arguments[changed]
        arguments[changed] = [None, value[1].double()] if changed == "bias" else value.double()
    value = arguments[name]
    (value[1] if isinstance(value, list) else value).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name} has .* but its storage was freed"):
        OP(**arguments)
