"""From the scales of blocks to scales of a tensor, of its rows or of groups of its weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ...conversion.ternary import one_or_each
from ...groups import (
    LARGE_ROUNDING,
    describe_rounding,
    fill_unused,
    relative_rounding,
    round_scales,
)
from ...messages import warn

_logger = logging.getLogger("bitlinear")


class BlockScales:
    """The scales of the blocks of a tensor.

    Only blocks with a weight other than 0 count: the scale of the others means nothing, and
    encoders write 0 for it. But every scale must be finite.

    Args:
        name: The name of the tensor, for errors.
        rows: The number of its rows.
        block: The number of weights in a block.
    """

    def __init__(self, name: str, rows: int, block: int) -> None:
        self._name, self._rows, self._block = name, rows, block
        self._used: list[tuple[int, Tensor]] = []  # 0 for a block that does not count

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
            cause = "the file is damaged"
            if scales[row, block] == 0:
                cause += ", or the scale was too small for its type"
            raise ValueError(
                f"{self._name}: the scale of block {block} in row {first + row} must be finite and "
                f"positive, but it is {scales[row, block].item():g}: {cause}"
            )
        self._used.append((first, scales.masked_fill(~used, 0)))

    def collapse(self, factor: float = 1.0) -> tuple[Tensor, int | None]:
        """Find the scales.

        Args:
            factor: A factor of all scales. Each product is rounded once, to fp32.

        Returns:
            ``w_scale``, fp32: ``(1,)`` if all blocks have one scale, which is 1 if all weights are
            0; ``(N, 1)`` if all blocks of each row have; otherwise ``(N, blocks)``, as
            :func:`bitlinear.groups.round_scales` rounds them. Zeros get the largest scale of their
            row, or of all. And the number of weights in a group, or None without groups.

        Raises:
            ValueError: A product is not a positive finite number in fp32.
        """
        options: Any = {"dtype": torch.float32, "device": "cpu"}
        columns = max((part.shape[1] for _, part in self._used), default=1)
        scales = torch.zeros(self._rows, columns, **options)
        for first, part in self._used:
            scales[first : first + len(part)] = part
        used = scales > 0
        if not bool(used.any()):
            return torch.ones(1, **options), None
        highest = scales.amax(dim=1)
        group_size = None
        if bool((used & (scales != highest[:, None])).any()):
            found = fill_unused(scales) * factor
            group_size = self._block
        else:
            found = one_or_each(highest, highest > 0) * factor
        if not bool((found.isfinite() & (found > 0)).all()):
            raise ValueError(
                f"{self._name}: scales times {factor:g} must be finite and positive in fp32, but "
                f"they span {found.min().item():g} to {found.max().item():g}: the file is damaged"
            )
        if group_size is None:
            return found, None
        rounded = round_scales(found)
        if not torch.equal(rounded, found):
            rounding = relative_rounding(found, rounded)
            changed = f"{int((rounded != found).sum())} of {found.numel()}"
            _logger.info("%s: %s %s", self._name, changed, describe_rounding(rounding))
            if rounding > LARGE_ROUNDING:
                warn(
                    f"{self._name}: {changed} {describe_rounding(rounding)}, because they are far "
                    f"below the largest of their row"
                )
        return rounded, group_size
