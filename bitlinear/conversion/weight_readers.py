"""Modules of torch that read the weights of their linear layers instead of calling the layers."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..linear import BitLinear

_logger = logging.getLogger("bitlinear")

READ_BY_ATTENTION = (
    "its owner (nn.MultiheadAttention) reads its weight and never calls it: it must be an nn.Linear"
)


def read_by_attention(model: nn.Module) -> set[int]:
    """The layers, by ``id``, whose weight ``nn.MultiheadAttention`` reads without a call."""
    return {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        # A subclass with a forward pass of its own can call the layer.
        and type(module).forward is nn.MultiheadAttention.forward
    }


def disable_fast_paths(model: nn.Module) -> None:
    """Make ``nn.TransformerEncoder`` call its linear layers.

    In evaluation its fast path reads ``linear1.weight`` and ``linear2.weight`` and never calls the
    layers. The two attributes that this function sets only select that path.
    """
    for name, module in model.named_modules():
        if _bypasses_a_bitlinear(module) and module.activation_relu_or_gelu:
            module.activation_relu_or_gelu = 0
            _logger.info("%s: disabled its fast path, which does not call its layers", name)
        elif isinstance(module, nn.TransformerEncoder) and any(
            map(_bypasses_a_bitlinear, module.layers)
        ):
            module.use_nested_tensor = False


def _bypasses_a_bitlinear(module: Any) -> bool:
    return isinstance(module, nn.TransformerEncoderLayer) and (
        isinstance(module.linear1, BitLinear) or isinstance(module.linear2, BitLinear)
    )
