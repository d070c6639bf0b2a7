"""One scale for a tensor or for each row, from the scales of its blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...conversion.ternary import one_or_each


class RowScales:
    """The scales of the blocks of a tensor, reduced to two numbers for each row.

    Only blocks with a weight other than 0 count: the scale of the others means nothing, and
    encoders write 0 for it. But every scale must be finite.

    Args:
        name: The name of the tensor, for errors.
        rows: The number of its rows.
    """

    def __init__(self, name: str, rows: int) -> None:
        self._name = name
        options: Any = {"dtype": torch.float32, "device": "cpu"}
        self._lowest = torch.full((rows,), torch.inf, **options)
        self._highest = torch.zeros(rows, **options)

    def add(self, first: int, scales: Tensor, used: Tensor) -> None:
        """Add rows.

        Args:
            first: The index of the first of them.
            scales: fp32, ``(rows, blocks)``.
            used: bool, of the same shape: whether the block has a weight other than 0.

        Raises:
            ValueError: A scale is not finite, or a scale that is used is not positive.
        """
        bad = ~scales.isfinite() | (used & (scales <= 0))
        if bool(bad.any()):
            row, block = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"{self._name}: the scale of block {block} in row {first + row} must be finite and "
                f"positive, but it is {scales[row, block].item():g}: the file is damaged, or the "
                f"scale was too small for its type"
            )
        rows = slice(first, first + len(scales))
        self._lowest[rows] = scales.masked_fill(~used, torch.inf).amin(dim=1)
        self._highest[rows] = scales.masked_fill(~used, 0).amax(dim=1)

    def collapse(self, factor: float = 1.0) -> Tensor:
        """Find the scales.

        Args:
            factor: A factor of all scales. Each product is rounded once, to fp32.

        Returns:
            fp32: ``(1,)`` if all blocks have one scale, which is 1 if all weights are 0; otherwise
            ``(N, 1)``, where a row of zeros has the largest scale of all.

        Raises:
            ValueError: Blocks of a row have different scales, or a product is not a positive
                finite number in fp32.
        """
        used = self._highest > 0
        if not bool(used.any()):
            return torch.ones(1, dtype=torch.float32, device="cpu")
        different = used & (self._lowest != self._highest)
        if bool(different.any()):
            row = int(different.nonzero()[0])
            raise ValueError(
                f"{self._name}: the blocks of row {row} have different scales, from "
                f"{self._lowest[row].item():g} to {self._highest[row].item():g}, as "
                f"{int(different.sum())} of {len(used)} rows have them; scales for groups of "
                f"inputs are not supported by this version"
            )
        scales = one_or_each(self._highest, used) * factor
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise ValueError(
                f"{self._name}: scales times {factor:g} must be finite and positive in fp32, but "
                f"they span {scales.min().item():g} to {scales.max().item():g}: the file is damaged"
            )
        return scales
