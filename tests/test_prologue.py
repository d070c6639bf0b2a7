"""What a fused product does before it quantises: the gate, the norm, ``exp``, sums in pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bitlinear import prologue
from tests import oracle

SOURCES = [("silu", False), ("relu2", False), (None, True), ("silu", True), ("relu2", True)]


def hard_rows(k):
    """float32 (M, k): rows that are hard to quantise, to gate, and to square."""
    rng = np.random.default_rng(k)
    rows = [*oracle.adversarial_rows(k), *rng.uniform(-100, 100, (2, k))]
    for special in (np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -1e-38, 1.8e19, -0.0):
        row = rng.standard_normal(k)
        row[rng.integers(k)] = special
        rows += [row, np.full(k, special)]
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize(("activation", "with_norm"), SOURCES)
@pytest.mark.parametrize(
    "widths",
    [range(1, 66), range(66, 131), (1023, 1024, 1025), (4095, 4096, 4097)],
    ids=lambda widths: f"{widths[0]}-{widths[-1]}",
)
def test_every_value_is_that_of_the_oracle(widths, activation, with_norm):
    check(widths, activation, with_norm)


def test_a_long_row():
    check([100_001], "silu", True)


def check(widths, activation, with_norm):
    for k in widths:
        rows = hard_rows(k)
        if activation is not None:  # each row gates another one
            rows = np.concatenate([rows, np.roll(rows, k % len(rows), axis=0)], axis=1)
        weight = torch.randn(k) if with_norm else None
        for norm_eps in (0.0, 1e-5) if with_norm else (0.0,):
            actual = prologue.apply_prologue(torch.from_numpy(rows), activation, weight, norm_eps)
            wanted = oracle.prologue(rows, activation, weight, norm_eps)
            oracle.assert_same_bits(actual, torch.from_numpy(wanted))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("weight_dtype", [*oracle.DTYPES, torch.float64])
def test_dtypes_and_leading_dimensions(dtype, weight_dtype):
    x, weight = torch.randn(2, 3, 24).to(dtype), torch.randn(12).to(weight_dtype)
    actual = prologue.apply_prologue(x, "silu", weight, 1e-6)
    wanted = oracle.prologue(x.reshape(6, 24).float(), "silu", weight.float(), 1e-6)
    oracle.assert_same_bits(actual, torch.from_numpy(wanted).reshape(2, 3, 12))
    oracle.assert_same_bits(prologue.apply_prologue(x), x.float())


def test_the_formulas_are_those_of_torch():
    x, weight = torch.randn(40, 600), torch.randn(300)
    a, b = x.double().chunk(2, dim=-1)
    for activation, gated in (("silu", F.silu(a) * b), ("relu2", F.relu(a).square() * b)):
        wanted = F.rms_norm(gated, (300,), weight.double(), 1e-5).float()
        actual = prologue.apply_prologue(x, activation, weight, 1e-5)
        torch.testing.assert_close(actual, wanted, rtol=2e-6, atol=1e-30)


# --- exp ---


def ulps(actual, wanted):
    """The distance from float64 values, in units in the last place of float32."""
    return np.abs(actual - wanted) / np.spacing(np.abs(wanted).astype(np.float32))


def test_exp_is_within_two_ulp_and_never_falls():
    seams = ((np.arange(-124, 127) + 0.5) * np.log(2)).astype(np.float32)  # n changes here
    seams = [seams, *(np.nextafter(seams, np.float32(limit)) for limit in (-np.inf, np.inf))]
    small = np.logspace(-45, 0, 1000)
    z = np.concatenate([np.linspace(-86, 88, 500_001), *seams, small, -small, [0.0]])
    z = np.unique(z.astype(np.float32))
    assert (z[0], z[-1]) == (-86, 88)
    actual = prologue.exp(torch.from_numpy(z)).numpy()
    assert ulps(actual, np.exp(z.astype(np.float64))).max() < 2
    assert (np.diff(actual) >= 0).all()


def test_the_limits_of_exp():
    inf = float("inf")
    z = torch.tensor([-inf, -3e38, -86.1, -86.0, 0.0, -0.0, 1e-45, 88.0, 88.1, 3e38, inf])
    y = prologue.exp(z)
    assert (y[:4] == y[0]).all()
    assert (y[4:7] == 1).all()
    assert (y[7:] == y[-1]).all()
    assert torch.isfinite(y).all()
    assert (y >= torch.finfo(torch.float32).tiny).all()
    assert prologue.exp(torch.tensor(float("nan"))).isnan()


def silu(a):
    return prologue.gate(torch.stack([a, torch.ones_like(a)], dim=1), "silu").squeeze(1).numpy()


def test_silu_is_within_three_ulp():
    a = torch.cat([torch.linspace(-88, 200, 100_001), torch.logspace(-36, 38, 1000)])
    assert ulps(silu(a), F.silu(a.double()).numpy()).max() < 3


def test_silu_of_very_negative_values_is_nearly_zero():
    a = -torch.logspace(2, 38, 1000)
    assert (np.abs(silu(a)) <= 6.1e-39 * a.abs().numpy()).all()


# --- Sums in pairs ---


@given(
    k=st.integers(1, 3000), size=st.sampled_from([2**n for n in range(13)]), seed=st.integers(0, 99)
)
def test_a_sum_does_not_depend_on_how_a_row_is_cut(k, size, seed):
    """Into parts of a power of two, from its beginning on: as threads and blocks cut it."""
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(seed)) * 1e3
    parts = [prologue.sum_in_pairs(part) for part in x.split(size, dim=-1)]
    whole = prologue.sum_in_pairs(x)
    assert torch.equal(prologue.sum_in_pairs(torch.cat(parts, dim=-1)), whole)
    assert torch.equal(whole.squeeze(-1), torch.from_numpy(oracle.sum_in_pairs(x.numpy())))


def test_a_sum_in_pairs_is_accurate():
    x = torch.rand(4, 100_001)
    torch.testing.assert_close(
        prologue.sum_in_pairs(x).double(), x.double().sum(-1, keepdim=True), rtol=2e-7, atol=0
    )
