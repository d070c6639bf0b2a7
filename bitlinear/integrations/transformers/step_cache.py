"""A static cache while one step after the other reads one token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

from .attention import rotate_and_attend
from .rotation import NewToken
from .small_kernels import call, rotate_and_store

USE_GENERATE = "call model.generate instead"
"""The remedy for what cannot be captured."""


class StepLayer(StaticLayer):  # type: ignore[misc]
    """A ``StaticLayer`` that writes one token at a position that all layers share.

    A ``StaticLayer`` counts its tokens in each call. Here whoever runs the step counts.

    Attributes:
        position: int64, shape ``(1,)``.
    """

    position: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token; return all keys and all values."""
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def rotate_and_update(self, token: NewToken) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries and keys and write one token; return queries, all keys, all values."""
        cache = (self.keys, self.values, self.position)
        q = call(rotate_and_store, *token, *cache)
        return q, self.keys, self.values

    def rotate_and_attend(
        self, attend: Callable[..., Any], token: NewToken, mask: Tensor | None, **kwargs: Any
    ) -> Tensor | None:
        """:func:`.attention.rotate_and_attend` with this cache."""
        cache = (self.keys, self.values, self.position)
        return rotate_and_attend(attend, token, cache, mask, **kwargs)

    def get_seq_length(self) -> Tensor:
        """The number of tokens, a tensor without dimensions, as in ``StaticLayer``."""
        return self.position.squeeze(0)


def make_cache(config: Any, room: int, length: int) -> StaticCache:
    """A cache with room for ``room`` tokens, of which the call can need ``length``.

    If all windows of the model hold the tokens of the call, none slides: the cache then has room
    for the tokens of the shortest window at most.
    """
    cache = StaticCache(config=config, max_cache_len=room)
    shortest = min(layer.max_cache_len for layer in cache.layers)
    if shortest < length:
        return cache
    for index, layer in enumerate(cache.layers):
        if type(layer) in (StaticLayer, StaticSlidingWindowLayer):
            cache.layers[index] = StaticLayer(max_cache_len=shortest)
    return cache


def why_no_steps(cache: Any, batch: int, length: int) -> str:
    """Why :func:`stepping` cannot use a cache, and the remedy; empty if it can.

    Args:
        cache: Of the caller, or from :func:`make_cache`.
        batch: The number of sequences.
        length: The most tokens of each that the cache must hold.
    """
    if type(cache) is not StaticCache:
        return (
            f"the cache is a {type(cache).__name__}, but only a StaticCache can be captured: pass "
            f"one or none, or {USE_GENERATE}"
        )
    if cache.offloading:
        return f"the cache is offloaded: {USE_GENERATE}"
    for layer in cache.layers:
        if type(layer) is StaticSlidingWindowLayer and layer.max_cache_len < length:
            return (
                f"the window of the attention has {layer.max_cache_len} tokens, but the call can "
                f"need {length}: {USE_GENERATE}"
            )
        if type(layer) is StaticSlidingWindowLayer:
            return f"the cache has a window that slides: pass no cache, or {USE_GENERATE}"
        if type(layer) is not StaticLayer:
            return f"the cache has a layer of the class {type(layer).__name__}: {USE_GENERATE}"
        if layer.max_cache_len < length:
            return (
                f"the cache holds {layer.max_cache_len} tokens, but the call can need {length}: "
                f"begin with a StaticCache whose max_cache_len is at least {length}"
            )
        if layer.is_initialized and layer.keys.shape[0] != batch:
            return (
                f"the cache holds {layer.keys.shape[0]} sequences, but the inputs are {batch}: "
                f"pass another cache"
            )
    return ""


@contextlib.contextmanager
def stepping(cache: StaticCache) -> Iterator[Tensor]:
    """Let steps count the tokens of a cache instead of its layers.

    Args:
        cache: A cache that :func:`why_no_steps` has nothing against, with tokens in it.

    Yields:
        The number of tokens, int64, shape ``(1,)``: where the next step writes. Each step adds one.
    """
    position = cache.layers[0].cumulative_length.clone().reshape(1)
    try:
        for layer in cache.layers:
            layer.__class__ = StepLayer
            layer.position = position
        yield position
    finally:
        for layer in cache.layers:
            if type(layer) is StepLayer:
                layer.__class__ = StaticLayer
                del layer.position
                layer.cumulative_length.copy_(position[0])
