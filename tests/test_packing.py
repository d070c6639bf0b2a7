"""The packed format: round trips, rejected bytes, the layout of a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlinear import packing
from tests import oracle


@given(n=st.integers(1, 9), k=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_round_trip_equals_the_oracle(n, k, seed):
    t = oracle.ternary(n, k, seed)
    packed = packing.pack_ternary(torch.from_numpy(t.astype(np.int8)))
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), oracle.pack(t))
    unpacked = packing.unpack_ternary(packed, k)
    assert unpacked.dtype == torch.int8
    np.testing.assert_array_equal(unpacked.numpy(), t)


def test_the_bytes_of_an_example():
    # Codes 0 1 2 1 | 2, then three slots past K, which hold 1.
    t = torch.tensor([[-1, 0, 1, 0, 1]], dtype=torch.int8)
    packed = packing.pack_ternary(t)
    assert packed.tolist() == [[0b00_01_10_01, 0b10_01_01_01]]


def test_non_contiguous_input():
    t = torch.from_numpy(oracle.ternary(6, 9).astype(np.int8))
    packed = packing.pack_ternary(t.T)
    np.testing.assert_array_equal(packed.numpy(), oracle.pack(t.T.numpy()))
    wide = torch.zeros(9, 4, dtype=torch.uint8)
    wide[:, ::2] = packed
    assert torch.equal(packing.unpack_ternary(wide[:, ::2], 6), t.T)


@pytest.mark.parametrize("value", [-128, -2, 2, 127])
def test_pack_rejects_values_that_are_not_ternary(value):
    t = torch.zeros(3, 5, dtype=torch.int8)
    t[1, 2] = value
    with pytest.raises(ValueError, match=f"only -1, 0 and 1, but its values span .*{value}"):
        packing.pack_ternary(t)


def test_pack_rejects_other_dtypes_and_shapes():
    with pytest.raises(TypeError, match=r"torch\.float32: use t\.to\(torch\.int8\)"):
        packing.pack_ternary(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"\(N, K\), but it has \[4\]"):
        packing.pack_ternary(torch.zeros(4, dtype=torch.int8))


def test_unpack_rejects_code_3_anywhere():
    packed = packing.pack_ternary(torch.zeros(3000, 4000, dtype=torch.int8))
    for row, byte, slot in ((0, 0, 0), (1234, 567, 1), (2999, 999, 3)):
        damaged = packed.clone()
        damaged[row, byte] |= 3 << (2 * slot)
        with pytest.raises(ValueError, match=f"code 3, first in byte {byte} of row {row} "):
            packing.unpack_ternary(damaged, 4000)
    packing.check_packed(packed, 4000)


def test_unpack_rejects_other_dtypes_and_shapes():
    packed = torch.zeros(2, 3, dtype=torch.uint8)
    for k in (8, 13):
        with pytest.raises(ValueError, match=rf"in_features = {k}.*\[2, 3\]"):
            packing.unpack_ternary(packed, k)
    with pytest.raises(TypeError, match="uint8, but it is int8"):
        packing.unpack_ternary(packed.to(torch.int8), 12)


def test_unpack_unchecked_reads_code_3_as_the_kernels_do():
    packed = torch.tensor([[0b11_00_01_10]], dtype=torch.uint8)
    assert packing.unpack_unchecked(packed, 4).tolist() == [[2, -1, 0, 1]]


def test_weights_beyond_in_features_are_an_error():
    packed = packing.pack_ternary(torch.ones(2, 8, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"weights beyond in_features = 7: .* up to 8"):
        packing.check_packed(packed, 7)
    packing.check_packed(packed, 8)
