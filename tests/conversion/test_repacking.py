"""``repack``: packed weights of transformers in bitlinear's format."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.integrations.transformers.checkpoints import bitnet, repack


@given(n=st.integers(1, 40), k=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_repack_equals_the_oracle_and_drops_rows_past_n(n, k, seed):
    t = oracle.ternary(n, k, seed)
    source = bitnet.pack_weights(torch.from_numpy(t).to(torch.int8))
    for row in range(n, 4 * len(source)):
        source[row % len(source)] |= 3 << (2 * (row // len(source)))
    packed = repack(source, n, k)
    assert packed.is_contiguous()
    assert packed.numpy().tolist() == oracle.pack(t).tolist()


def test_repack_computes_on_bytes_in_small_temporaries():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                assert result.dtype in (torch.uint8, torch.int8, torch.bool, torch.int64)
                self.largest = max(self.largest, result.numel())
            return result

    source = torch.full((1000, 4096), 0b10_01_00_01, dtype=torch.uint8)
    with Watch() as watch:
        packed = repack(source, 4000, 4096)
    assert watch.largest == packed.numel() > 2**20
    with Watch() as watch:
        repack(source[:256], 1024, 4096)
    assert watch.largest == 2**20
