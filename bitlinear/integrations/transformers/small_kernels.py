"""Computations of one token that are a few numbers each, so that launches are their whole time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_is_enabled = ContextVar("_is_enabled", default=False)

# Parts of a row whose largest elements are found side by side; a GPU reads a row in one block.
_MOST_PARTS, _LEAST_PARTS = 512, 32


def rotate_and_store(
    rotate: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
) -> Tensor:
    """Rotate queries and keys, and write keys and values into a cache, in place.

    Args:
        rotate: ``apply_rotary_pos_emb`` of the model.
        q: ``(batch, heads, 1, head_dim)``.
        k, v: ``(batch, key heads, 1, head_dim)``.
        cos, sin: As for ``rotate``.
        keys, values: ``(batch, key heads, length, head_dim)``.
        position: int64, shape ``(1,)``; the index along ``length``.

    Returns:
        The rotated queries.
    """
    q, k = rotate(q, k, cos, sin)
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    return q


def largest(scores: Tensor) -> Tensor:
    """``scores.argmax(-1)`` for ``(batch, vocabulary)``: the first one, if several are equal."""
    batch, length = scores.shape
    parts = next((n for n in range(_MOST_PARTS, _LEAST_PARTS, -1) if length % n == 0), 1)
    values, indices = scores.view(batch, parts, -1).max(-1)
    part = values.argmax(-1, keepdim=True)
    return (indices.gather(-1, part) + part * (length // parts)).squeeze(-1)


@contextlib.contextmanager
def compiling(enabled: bool) -> Iterator[None]:
    """Let :func:`call` compile in this thread."""
    token = _is_enabled.set(enabled)
    try:
        yield
    finally:
        _is_enabled.reset(token)


def call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call a function of tensors; compiled inside :func:`compiling`.

    Compiled, it rounds to 16 bits wherever the function does. The first call of a function takes
    about a second, and so does one with other sizes.
    """
    if not torch.compiler.is_compiling() and _is_enabled.get():
        function = _compiled(function)
    return function(*args)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Any]:
    return torch.compile(function, options={"emulate_precision_casts": True})
