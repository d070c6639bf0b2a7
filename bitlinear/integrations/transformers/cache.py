"""A cache of keys and values that writes new tokens in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from .attention import rotate_and_attend
from .rotation import NewToken


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A ``DynamicLayer`` that keeps room for more tokens, instead of copying all in each call.

    ``keys`` and ``values`` are views of larger tensors. Their values never change: a new token is
    written behind them, and only if no token has been written there before. Otherwise (after
    ``crop``, ``reorder_cache`` and so on, or in a copy of the layer) they are copied. Where
    gradients are recorded and in compiled code it concatenates, as ``DynamicLayer`` does.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: tuple[_Room, _Room] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens; return all keys and all values.

        Args:
            key_states, value_states: ``(batch, heads, tokens, head_dim)``.
            args, kwargs: Ignored, as in ``DynamicLayer``.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = (self.keys, self.values)
        new = (key_states, value_states)
        if not all(map(_can_append, old, new)):
            self._rooms = None
            result: tuple[Tensor, Tensor] = super().update(*new, *args, **kwargs)
            return result
        if self._rooms is None or not all(map(_Room.takes, self._rooms, old, new)):
            self._rooms = (_Room(old[0], new[0]), _Room(old[1], new[1]))
        self.keys, self.values = map(_Room.append, self._rooms, new)
        return self.keys, self.values

    def rotate_and_attend(
        self, attend: Callable[..., Any], token: NewToken, mask: Tensor | None, **kwargs: Any
    ) -> Tensor | None:
        """Append one token and attend with it, in one step; None if that is not possible.

        See :func:`.attention.rotate_and_attend`.
        """
        old, new = (self.keys, self.values), (token.key, token.value)
        if (
            self._rooms is None
            or not all(map(_can_append, old, new))
            or not all(map(_Room.takes, self._rooms, old, new))
        ):
            return None
        # .data: as in _Room.append.
        keys, values = (room.tensor.data[:, :, : room.used + 1] for room in self._rooms)
        output = rotate_and_attend(attend, token, (keys, values, None), mask, **kwargs)
        if output is not None:
            self.keys, self.values = (room.take(1) for room in self._rooms)
        return output

    def reset(self) -> None:
        """Remove all tokens."""
        self._rooms = None
        super().reset()

    def offload(self) -> None:
        """Move the tokens to the CPU."""
        self._rooms = None
        super().offload()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the sequences of a beam search."""
        self._rooms = None
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._rooms = None
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences with these indices."""
        self._rooms = None
        super().batch_select_indices(indices)


class _Room:
    """A tensor with space for more tokens, shared by the layers that are shallow copies.

    Attributes:
        tensor: ``(batch, heads, capacity, head_dim)``.
        used: The tokens that have been written.
    """

    def __init__(self, old: Tensor, new: Tensor) -> None:
        self.used = old.shape[-2] if old.numel() else 0
        length = self.used + new.shape[-2]
        # The memory that stays unused is an eighth; each token is copied eight times on average.
        capacity = length + max(128, length // 8)
        self.tensor = new.new_empty(*new.shape[:2], capacity, new.shape[3])
        if self.used:
            self.tensor[:, :, : self.used] = old

    def takes(self, old: Tensor, new: Tensor) -> bool:
        """Whether ``old`` is all that has been written here, and ``new`` fits behind it."""
        batch, heads, capacity, head_dim = self.tensor.shape
        return (
            old.shape == (batch, heads, self.used, head_dim)
            and old.data_ptr() == self.tensor.data_ptr()
            and old.stride() == self.tensor.stride()
            and new.shape[:2] == (batch, heads)
            and self.used + new.shape[-2] <= capacity
            # A tensor made in inference mode can be written only there.
            and (torch.is_inference_mode_enabled() or not self.tensor.is_inference())
        )

    def append(self, new: Tensor) -> Tensor:
        """Write tokens; return all."""
        first = self.used
        # .data: the write must not mark older views as changed for autograd; they are not.
        self.tensor.data[:, :, first : first + new.shape[-2]] = new
        return self.take(new.shape[-2])

    def take(self, tokens: int) -> Tensor:
        """Count tokens that have been written; return all."""
        self.used += tokens
        return self.tensor[:, :, : self.used]


def _can_append(old: Tensor, new: Tensor) -> bool:
    """Whether ``new`` can be written behind ``old`` in a larger tensor."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(old) is type(new) is Tensor
        and old.dtype == new.dtype
        and old.device == new.device
        and new.dim() == 4
        and (not old.numel() or (old.shape[:2] == new.shape[:2] and old.shape[3] == new.shape[3]))
    )


def grow_in_place(cache: Any) -> None:
    """Replace the layers of a ``DynamicCache`` that copy all tokens by :class:`GrowingLayer`.

    Layers of a sliding window and of other kinds stay, and so do caches that are offloaded, and
    caches of other classes. Of an ``EncoderDecoderCache``, only the part of the decoder changes.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = new = GrowingLayer()
            new.__dict__.update(vars(layer))
