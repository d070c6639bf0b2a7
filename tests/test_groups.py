"""The integers that scales of groups are written in."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlinear import groups

finite = st.floats(0, 2.0**127, width=32)


@given(st.lists(finite, min_size=1, max_size=20))
def test_scales_are_integers_times_a_power_of_two(values):
    scales = torch.tensor([values])
    multipliers, unit = groups.split_scales(scales)
    assert multipliers.dtype == torch.int32
    assert 0 <= int(multipliers.min()) <= int(multipliers.max()) <= groups.LARGEST_MULTIPLIER
    assert np.frexp(unit.item())[0] == 0.5
    exact = np.asarray(scales, np.float64) / unit.item()
    wanted = np.minimum(np.rint(exact), groups.LARGEST_MULTIPLIER)
    np.testing.assert_array_equal(multipliers.numpy(), wanted)
    if max(values) >= 2.0**-111:
        assert int(multipliers.max()) >= 2**14


@given(st.lists(finite, min_size=1, max_size=20))
def test_rounding_scales_again_changes_nothing(values):
    rounded = groups.round_scales(torch.tensor([values]))
    assert torch.equal(groups.round_scales(rounded), rounded)


@given(
    largest=st.integers(1024, 2047),
    others=st.lists(st.integers(1024, 2047), max_size=8),
    steps=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    exponent=st.integers(-24, 5),
)
def test_scales_of_fp16_near_each_other_are_exact(largest, others, steps, exponent):
    values = [largest * 2.0**exponent]
    values += [other * 2.0 ** (exponent - 1 - step) for other, step in zip(others, steps)]
    scales = torch.tensor([values])
    assert torch.equal(groups.round_scales(scales), scales)


def test_a_row_whose_scale_is_not_finite_is_nan():
    scales = torch.tensor([[1.0, float("inf")], [float("nan"), 1.0], [1.0, 2.0]])
    multipliers, unit = groups.split_scales(scales)
    assert unit.isnan().flatten().tolist() == [True, True, False]
    assert not multipliers[:2].any()
    assert groups.round_scales(scales).isnan().all(dim=1).tolist() == [True, True, False]


@given(
    k=st.integers(1, 200),
    group_size=st.sampled_from([32, 64, 96, 128]),
    seed=st.integers(0, 2**16),
)
def test_products_are_exact(k, group_size, seed):
    rng = np.random.default_rng(seed)
    count = groups.count_groups(k, group_size)
    q, t = rng.integers(-32385, 32386, (3, k)), rng.integers(-1, 2, (5, k))
    multipliers = rng.integers(0, 2**15, (5, count))
    wanted = np.zeros((3, 5), object)
    for g in range(count):
        part = slice(g * group_size, (g + 1) * group_size)
        sums = q[:, part].astype(object) @ t[:, part].astype(object).T
        wanted += sums * multipliers[:, g].astype(object)
    found = groups.group_product(
        *(torch.from_numpy(a) for a in (q, t)), torch.from_numpy(multipliers), group_size
    )
    np.testing.assert_array_equal(found.numpy(), wanted.astype(np.int64))


def test_sums_of_groups():
    values = torch.arange(10.0).repeat(2, 1)
    assert groups.sum_groups(values, 4).tolist() == [[6.0, 22.0, 17.0]] * 2
    assert groups.repeat_scales(torch.tensor([[1.0, 2.0, 3.0]]), 4, 10).tolist() == [
        [1.0] * 4 + [2.0] * 4 + [3.0] * 2
    ]
