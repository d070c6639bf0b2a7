"""One new token in bf16 on a CPU: all of its attention by one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ...decode_attention import MAX_HEAD
from ...ops import has_cpu_kernels
from .attention import ATTENTION
from .cache import GrowingLayer
from .rotation import is_llamas


def attend_one_token(
    attention: Any,
    qkv: Tensor,
    rotate: Callable[..., Any],
    angles: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Rotate, append to the cache and attend, if this is a token that the operator can compute.

    :func:`bitlinear.decode_attention.reference_decode_attention` specifies it. The rotation and the
    cache are those of transformers to the bit; the attention rounds less than ``sdpa``.

    Args:
        attention: The attention module.
        qkv: The output of its three products, ``(batch, tokens, heads * head_dim)``.
        rotate: ``apply_rotary_pos_emb`` of the model.
        angles: The cosines and the sines, ``(batch, tokens, head_dim)``.
        mask: As for ``sdpa``.
        cache: Of the model, or None.
        kwargs: Further arguments of the attention function.

    Returns:
        The input of the output projection, ``(batch, 1, heads * head_dim)``; None if the operator
        cannot compute it, and then nothing has changed.
    """
    layer = _layer(attention, cache)
    if (
        layer is None
        or (qkv.shape[1] != 1 or qkv.dtype != torch.bfloat16 or qkv.device.type != "cpu")
        or attention.config._attn_implementation != ATTENTION
        or not _is_plain(attention, qkv, kwargs)
        or not _fits(attention, angles[0], mask, layer.keys.shape[-2] + 1)
        or not (is_llamas(rotate) and has_cpu_kernels())
    ):
        return None
    cos, sin = (angle.flatten(0, 1) for angle in angles)
    visible = None if mask is None else mask.flatten(0, 2)

    def write(keys: Tensor, values: Tensor, position: int) -> Tensor:
        output: Tensor = torch.ops.bitlinear.decode_attention(
            qkv.flatten(0, 1), cos, sin, keys, values, position, attention.scaling, visible
        )
        return output

    output = layer.append_with(write)
    return None if output is None else output.unsqueeze(1)


def _layer(attention: Any, cache: Any) -> GrowingLayer | None:
    """The layer of the cache, if a token can be appended to it."""
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    index = attention.layer_idx
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    if type(layer) is not GrowingLayer or layer.keys is None:
        return None
    tensors = (layer.keys, layer.values)
    is_bf16 = all(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return layer if is_bf16 and tensors[0].shape == tensors[1].shape else None


def _fits(attention: Any, angles: Tensor, mask: Tensor | None, tokens: int) -> bool:
    """Whether the operator takes heads of this size, these angles and this mask."""
    return (
        attention.head_dim % 16 == 0
        and attention.head_dim == angles.shape[-1] <= MAX_HEAD
        and angles.dtype == torch.bfloat16
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1:] == (1, 1, tokens)))
    )


def _is_plain(attention: Any, qkv: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether nothing is asked for that the operator does not compute."""
    return (
        type(qkv) is Tensor
        and not (attention.training and attention.attention_dropout)
        and kwargs.get("sliding_window") is None
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and not kwargs.get("output_attentions", False)
    )
