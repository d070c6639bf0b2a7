"""The attention of one new token in bf16, as an operator, in plain torch.

It does in one step what a decoder layer does between its first two products: it rotates queries and
keys, appends the key and the value to a cache, and attends. On a CPU these are 20 operators of
torch, most of whose time is not their computation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import dtype_name

MAX_HEAD = 256
"""The size of the largest head; sizes are multiples of 16."""


def reference_decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend with one new token of each sequence, and append it to the cache.

    The rotation rounds each of its operations to bf16, as transformers does. Scores, weights and
    sums are fp32, and the result is rounded once. A query that sees no key gives 0.

    Args:
        qkv: bf16, ``(batch, (heads + 2 * key heads) * head size)``: queries, keys, values.
        cos: bf16, ``(1, head size)`` or ``(batch, head size)``, for the rotation.
        sin: As ``cos``.
        keys: bf16, ``(batch, key heads, capacity, head size)``; the new key is written at
            ``length``.
        values: As ``keys``.
        length: The number of tokens in the cache before.
        scale: Factor of the scores.
        mask: bool, ``(1, length + 1)`` or ``(batch, length + 1)``, True at keys that count; None
            for all.

    Returns:
        bf16, ``(batch, heads * head size)``.

    Raises:
        TypeError: A tensor is not bf16.
        ValueError: A shape, a size, a device or the mask is wrong.
    """
    _check(qkv, cos, sin, keys, values, length, mask)
    batch, groups, _, size = keys.shape
    heads = qkv.reshape(batch, -1, size)
    count = heads.shape[1] - 2 * groups
    turned = heads[:, : count + groups]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    keys[:, :, length] = turned[:, count:]
    values[:, :, length] = heads[:, count + groups :]
    q = turned[:, :count].reshape(batch, groups, -1, size).to(torch.float32)
    scores = q @ keys[:, :, : length + 1].to(torch.float32).transpose(2, 3) * scale
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:
        hidden = ~mask[:, None, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).masked_fill(hidden, 0.0)
    y = weights @ values[:, :, : length + 1].to(torch.float32)
    return y.to(torch.bfloat16).reshape(batch, -1)


def fake_decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Return an empty output."""
    _check(qkv, cos, sin, keys, values, length, mask)
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3])


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    mask: Tensor | None,
) -> None:
    """Raise the errors of :func:`reference_decode_attention`; arguments.h has the same."""
    for tensor in (qkv, cos, sin, keys, values):
        if tensor.dtype != torch.bfloat16:
            raise TypeError(
                f"bitlinear: qkv, cos, sin, keys and values must be bfloat16, but one is "
                f"{dtype_name(tensor.dtype)}"
            )
        if tensor.device != qkv.device:
            raise ValueError(
                f"bitlinear: all tensors must be on one device, but qkv is on {qkv.device} and "
                f"another one is on {tensor.device}"
            )
    if (
        any(t.dim() != 4 or t.stride()[2:] != (t.shape[3], 1) for t in (keys, values))
        or keys.shape != values.shape
    ):
        raise ValueError(
            f"bitlinear: keys and values must have one shape, (batch, key heads, capacity, head "
            f"size), and the tokens of a head one behind the other, but they have shapes "
            f"{list(keys.shape)} and {list(values.shape)} and strides {list(keys.stride())} and "
            f"{list(values.stride())}"
        )
    batch, groups, capacity, size = keys.shape
    if not 16 <= size <= MAX_HEAD or size % 16 != 0:
        raise ValueError(
            f"bitlinear: the head size must be a multiple of 16, at most {MAX_HEAD}, but it is "
            f"{size}"
        )
    if not 0 <= length < capacity:
        raise ValueError(
            f"bitlinear: length must be at least 0 and below the capacity of the keys, {capacity}, "
            f"but it is {length}"
        )
    if (
        (qkv.dim() != 2 or qkv.shape[0] != batch or groups == 0)
        or qkv.shape[1] % (groups * size) != 0
        or qkv.shape[1] < 3 * groups * size
    ):
        raise ValueError(
            f"bitlinear: qkv must have shape ({batch}, heads * {size}), with a multiple of "
            f"{groups} query heads and {2 * groups} heads of keys and values, but it has shape "
            f"{list(qkv.shape)}"
        )
    if list(cos.shape) not in ([1, size], [batch, size]) or sin.shape != cos.shape:
        raise ValueError(
            f"bitlinear: cos and sin must have shape (1, {size}) or ({batch}, {size}), but they "
            f"have shapes {list(cos.shape)} and {list(sin.shape)}"
        )
    if mask is not None and (
        mask.dtype != torch.bool
        or list(mask.shape) not in ([1, length + 1], [batch, length + 1])
        or mask.device != qkv.device
    ):
        raise ValueError(
            f"bitlinear: mask must be bool, of shape (1, {length + 1}) or ({batch}, {length + 1}), "
            f"on {qkv.device}, but it is {dtype_name(mask.dtype)} of shape {list(mask.shape)} on "
            f"{mask.device}"
        )
