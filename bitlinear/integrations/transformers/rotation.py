"""The rotation of queries and keys that lie side by side, in half of the operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...fusable import same_computation


class NewToken(NamedTuple):
    """The query, key and value of one token of each sequence, before the rotation.

    Attributes:
        rotate: ``apply_rotary_pos_emb`` of the model.
        query: ``(batch, heads, 1, head_dim)``.
        key, value: ``(batch, key heads, 1, head_dim)``.
        cos, sin: The angles, as ``rotate`` takes them.
    """

    rotate: Callable[..., Any]
    query: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor


def rotate_heads(
    rotate: Callable[..., Any], q: Tensor, k: Tensor, together: Tensor | None, *angles: Any
) -> Any:
    """Apply ``rotate`` to queries and keys; ``together`` is one tensor of both, or None."""
    rotated = None if together is None else rotate_together(rotate, together, *angles)
    if rotated is None:
        return rotate(q, k, *angles)
    return rotated.split([q.shape[1], k.shape[1]], dim=1)


def rotate_together(rotate: Callable[..., Any], x: Tensor, *angles: Any) -> Any:
    """Rotate heads of queries and of keys in one tensor.

    Args:
        rotate: ``apply_rotary_pos_emb`` of the model.
        x: ``(batch, heads, tokens, head_dim)``.
        angles: The cosines and the sines, ``(batch, tokens, head_dim)``.

    Returns:
        The rotated heads, the same bits as of ``rotate``; None if ``rotate`` is not the function
        of Llama in transformers.
    """
    if not is_rotation_of_llama(rotate):
        return None
    cos, sin = (angle.unsqueeze(1) for angle in angles)
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def is_rotation_of_llama(rotate: Callable[..., Any]) -> bool:
    """Whether ``rotate`` computes what ``apply_rotary_pos_emb`` of Llama in transformers does."""
    key = (rotate, getattr(rotate, "__globals__", {}).get("rotate_half"))
    is_known = _is_known.get(key)
    if is_known is None:
        is_known = same_computation(rotate, _rotate_of_llama)
        is_known = is_known and same_computation(key[1], _rotate_half_of_llama)
        _is_known[key] = is_known
    return is_known


# A model has one pair of functions, and a library that replaces them another one.
_is_known: dict[tuple[Any, Any], bool] = {}


def _rotate_half_of_llama(x: Any) -> Any:
    """As in transformers; a docstring is a part of the compiled code."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


rotate_half = _rotate_half_of_llama


def _rotate_of_llama(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """As in transformers."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
