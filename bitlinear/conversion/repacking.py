"""The packed format of transformers, and its conversion to the format of bitlinear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import packing


def repack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Rearrange the weights of a packed checkpoint of transformers into bitlinear's packed format.

    The bytes are computed from bytes, on their device, in temporaries of about 1 MB each.

    Args:
        packed: uint8, shape ``(ceil(N/4), K)``: bits ``2i`` and ``2i + 1`` of ``packed[r, k]``
            hold the weight ``[i * ceil(N/4) + r, k]``, plus 1. Bits for rows past N are ignored.
        out_features: ``N``.
        in_features: ``K``.

    Returns:
        uint8, shape ``(N, ceil(K/4))``; see :mod:`bitlinear.packing`.

    Raises:
        TypeError: ``packed`` is not uint8.
        ValueError: The shape does not fit, or a weight has the invalid code 3.
    """
    check_codes(packed, out_features, in_features)
    packed_rows, columns = len(packed), packing.packed_shape(0, in_features)[1]
    shape = packing.packed_shape(out_features, in_features)
    result = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    for first, chunk in packing.enumerate_chunks(packed):
        # Slots past K hold weight 0, code 1, in each of the four rows.
        padded = F.pad(chunk, (0, 4 * columns - in_features), value=0b01010101)
        # Columns with the same k mod 4 have the same position in a byte, so they form one plane.
        planes = padded.reshape(-1, columns, 4).permute(2, 0, 1).contiguous()
        for i in range(4):
            start = i * packed_rows + first
            c0, c1, c2, c3 = (planes[:, : max(0, out_features - start)] >> (2 * i)) & 3
            result[start : start + len(c0)] = (c0 << 6) | (c1 << 4) | (c2 << 2) | c3
    return result


def check_codes(packed: Tensor, out_features: int, in_features: int) -> None:
    """Check packed weights of transformers.

    Args, raises:
        As for :func:`repack`.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"weight must be uint8, but it is {packed.dtype}")
    shape = [(out_features + 3) // 4, in_features]
    if list(packed.shape) != shape:
        raise ValueError(
            f"weight must have shape {shape} for out_features={out_features} and "
            f"in_features={in_features}, four rows in one, but it has {list(packed.shape)}"
        )
    for first, chunk in packing.enumerate_chunks(packed):
        # A pair of bits is code 3 if both of its bits are set.
        if bool((chunk & (chunk >> 1) & 0b01010101).any()):
            for i in range(4):
                start = i * len(packed) + first
                codes = (chunk[: max(0, out_features - start)] >> (2 * i)) & 3
                for row, column in (codes == 3).nonzero().tolist()[:1]:
                    raise ValueError(
                        f"weight holds the invalid code 3, first in row {start + row} and column "
                        f"{column} of the unpacked weight: the file is damaged, or is not a packed "
                        f"checkpoint of transformers; download or save it again"
                    )
