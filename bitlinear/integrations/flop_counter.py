"""``torch.utils.flop_counter``: the operator counts as many operations as ``nn.Linear``.

``import bitlinear`` arranges that :func:`register` is called as soon as the counter is imported.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def register() -> None:
    """Register the formula of the operator for ``FlopCounterMode``."""
    from torch.utils import flop_counter

    flop_counter.flop_registry.pop(torch.ops.bitlinear.linear, None)  # of an earlier import
    flop_counter.register_flop_formula(torch.ops.bitlinear.linear)(_count)


def _count(x_shape: Any, w_shape: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(x_shape) * w_shape[0])
