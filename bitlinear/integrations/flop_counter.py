"""``torch.utils.flop_counter``: the products count as many operations as ``nn.Linear``.

``import bitlinear`` arranges that :func:`register` is called as soon as the counter is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def register() -> None:
    """Register the formulas of the operators for ``FlopCounterMode``."""
    from torch.utils import flop_counter

    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.bitlinear.linear: _count,
        torch.ops.bitlinear.fused_linear: _count_fused,
        torch.ops.bitlinear.linear_with_activations: _count,
        torch.ops.bitlinear.quantized_linear: _count_quantized,
    }
    for operator, formula in formulas.items():
        flop_counter.flop_registry.pop(operator, None)  # of an earlier import
        flop_counter.register_flop_formula(operator)(formula)


def _count(x_shape: Any, w_shape: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(x_shape) * w_shape[0])


def _count_quantized(q: Any, s_x: Any, q_sum: Any, w_shape: Any, *_: Any, **__: Any) -> int:
    return _count(q, w_shape)


def _count_fused(
    x_shape: Any, w_shapes: Any, s_shapes: Any, b_shapes: Any, in_features: int, *_: Any, **__: Any
) -> int:
    """The products alone: ``nn.functional.rms_norm`` and ``silu`` do not count either."""
    rows = sum(shape[0] for shape in w_shapes)
    return int(2 * math.prod(x_shape[:-1]) * in_features * rows)
