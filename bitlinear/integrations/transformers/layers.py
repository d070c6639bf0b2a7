"""The layers that models of transformers get, and how to find them there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from ...linear import BitLinear
from ...ternary_layer import TernaryLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The lower bound that transformers has for the absmax of a token and the absmean of a weight.
BITNET_EPS = 1e-5


class NormedBitLinear(BitLinear):
    """A :class:`BitLinear` with an RMSNorm in front, for ``use_rms_norm`` of transformers.

    Attributes:
        rms_norm: The norm, over the last dimension of the input, in the input's dtype.
    """

    rms_norm: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Apply the norm, then the layer, to ``input`` of shape ``(..., K)``."""
        if isinstance(input, fx.Proxy):
            return super().forward(input)  # The trace has one call for the norm and the layer.
        return super().forward(self.rms_norm(input))


def empty_layer(
    in_features: int,
    out_features: int,
    *,
    bias_dtype: torch.dtype | None,
    use_rms_norm: bool,
    eps: float,
    dtype: torch.dtype,
    quant_type: str = "ai8pc_wpt",
) -> BitLinear:
    """Make a layer on the meta device; the caller sets its norm.

    Args:
        in_features: ``K``.
        out_features: ``N``.
        bias_dtype: The dtype of the bias; None for a layer without one.
        use_rms_norm: Whether the layer is a :class:`NormedBitLinear`.
        eps: As for :class:`BitLinear`.
        dtype: As for :class:`BitLinear`.
        quant_type: As for :class:`BitLinear`.
    """
    kind = NormedBitLinear if use_rms_norm else BitLinear
    layer = kind(
        in_features,
        out_features,
        bias_dtype is not None,
        eps,
        quant_type=quant_type,
        device="meta",
        dtype=dtype,
    )
    if bias_dtype is not None:
        layer.bias = nn.Parameter(layer.bias.to(bias_dtype))
    return layer


def pretrained_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The models of transformers inside ``model``, outer ones first, ``model`` itself included."""
    from transformers import PreTrainedModel

    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def ternary_layers(model: nn.Module) -> dict[str, TernaryLayer]:
    """The BitLinear layers and ternary embeddings inside ``model``, by their first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TernaryLayer)}


def bitlinear_layers(model: nn.Module) -> dict[str, BitLinear]:
    """The BitLinear layers inside ``model``, by their first qualified name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}
