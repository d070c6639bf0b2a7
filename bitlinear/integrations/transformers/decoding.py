"""What a converted model does otherwise than transformers when it generates.

Only functions import this module: it imports parts of transformers that a model needs anyway.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from .attention import select_attention
from .cache import grow_in_place
from .decoding_head import select_head
from .layers import pretrained_models

_Model = TypeVar("_Model", bound=nn.Module)


def speed_up_decoding(model: _Model) -> _Model:
    """Make the models of transformers inside ``model`` decode faster, in place.

    ``convert`` does so, and ``from_pretrained`` of a model with deployed layers. Other models, also
    without deployed layers, can be given to this function: those that ``gguf.load`` fills, or after
    :func:`bitlinear.deploy`. See :func:`~.attention.attention`, :class:`~.cache.GrowingLayer` and
    :class:`~.decoding_head.DecodingHead`.

    Args:
        model: Any module; models inside it that have another attention than ``sdpa`` keep it.

    Returns:
        ``model``.
    """
    inner: set[nn.Module] = set()
    for pretrained in pretrained_models(model):
        if pretrained not in inner:
            inner.update(pretrained.modules())
            select_attention(pretrained)
            select_head(pretrained)
            if grow_caches not in pretrained._forward_pre_hooks.values():
                pretrained.register_forward_pre_hook(grow_caches, with_kwargs=True)
    return model


def grow_caches(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Apply :func:`grow_in_place` to the cache in a call; a forward pre-hook of a model."""
    if not torch.compiler.is_compiling():
        for value in (*args, *kwargs.values()):
            grow_in_place(value)
