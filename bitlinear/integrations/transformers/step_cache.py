"""A static cache while one step after the other reads one token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from .attention import rotate_and_attend
from .rotation import NewToken
from .small_kernels import call, rotate_and_store


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


def why_no_steps(cache: Any, length: int) -> str:
    """Why :func:`stepping` cannot use a cache for ``length`` tokens; empty if it can."""
    if type(cache) is not StaticCache:
        return f"the cache is a {type(cache).__name__}, but only a StaticCache can be captured"
    if cache.offloading:
        return "the cache is offloaded"
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}
    if others:
        return f"the cache has layers of the class {', '.join(sorted(others))}"
    room = min(layer.max_cache_len for layer in cache.layers)
    if room < length:
        return f"the cache holds {room} tokens, but the call can need {length}"
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
