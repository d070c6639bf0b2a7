"""The attention of one query token, with what a decoder layer does before it, in plain torch.

As one operator it rotates the query and the new key, writes the new key and value into a cache, and
attends: what takes some 20 operators of torch, most of whose time is not their computation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import ACTIVATION_DTYPES, dtype_name

MAX_HEAD, HEAD_UNIT = 256, 16
"""On a CPU, head sizes are multiples of 16, at most 256."""


def reference_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    position: Tensor | None = None,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Attend with one query token of each sequence.

    The rotation rounds each of its operations to the dtype, as ``apply_rotary_pos_emb`` of Llama in
    transformers does. Scores and sums are fp32; on a GPU the weights of the values are rounded to
    the dtype. A query that sees no key gives 0.

    Args:
        query: fp32, fp16 or bf16 (the kernel of the CPU: bf16 only), ``(batch, heads, 1, size)``.
        keys: ``(batch, key heads, length, size)``; as many heads share each key head.
        values: As ``keys``.
        mask: ``(batch, 1, 1, length)`` or ``(1, 1, 1, length)``: bool, True at keys that count; or
            numbers to add to the scores (not on the CPU). None for all keys.
        scale: Factor of the scores.
        position: Where the new key and value are written: int64, ``(1,)``; None for the last ones
            (not on a GPU). Beyond the keys it is an error on a CPU; on a GPU nothing is written.
        new_key: ``(batch, key heads, 1, size)``; it and the query are rotated first. None if the
            query is rotated, and keys and values are complete.
        new_value: As ``new_key``.
        cos: ``(batch, 1, size)`` or ``(1, 1, size)``, with ``new_key``.
        sin: As ``cos``.

    Returns:
        ``(batch, 1, heads, size)``, in the dtype of ``query``.

    Raises:
        NotImplementedError: The kernel does not compute this, see above.
        RuntimeError: Keys or values overlap themselves or each other.
        ValueError: A dtype, a shape, a device or a position is wrong, or an argument is missing.
    """
    _check(query, keys, values, mask, position, (new_key, new_value, cos, sin))
    batch, groups, length, size = keys.shape
    if new_key is not None:
        assert new_value is not None
        at = torch.tensor([length - 1], device=keys.device) if position is None else position
        if at.device.type == "cpu" and not 0 <= at < length:
            raise ValueError(
                f"bitlinear: position must be between 0 and {length - 1}, but it is {int(at)}"
            )
        query, new_key = (_rotate(x, cos, sin) for x in (query, new_key))
        new_value = new_value.clone()  # it can lie in the memory of the keys
        keys.index_copy_(2, at, new_key)
        values.index_copy_(2, at, new_value)
    q = query.reshape(batch, groups, query.shape[1] // groups, size).to(torch.float32)
    scores = q @ keys.to(torch.float32).transpose(2, 3) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1).masked_fill(scores == -torch.inf, 0.0)
    y = weights @ values.to(torch.float32)
    return y.to(query.dtype).reshape(batch, 1, query.shape[1], size)


def fake_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    position: Tensor | None = None,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Return an empty output."""
    _check(query, keys, values, mask, position, (new_key, new_value, cos, sin))
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    assert cos is not None
    assert sin is not None
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    new: Sequence[Tensor | None],
) -> None:
    """Raise the errors of :func:`reference_attend`; arguments.h has the same."""
    dtype = query.dtype
    if dtype not in ACTIVATION_DTYPES or query.dim() != 4 or query.shape[2] != 1:
        raise ValueError(
            f"bitlinear: query must be float32, float16 or bfloat16, of shape (batch, heads, 1, "
            f"size), but it is {dtype_name(dtype)} of shape {list(query.shape)}"
        )
    batch, heads, _, size = query.shape
    if keys.dim() != 4 or keys.shape[1] == 0 or heads % keys.shape[1] != 0:
        raise ValueError(
            f"bitlinear: keys must have shape ({batch}, key heads, length, {size}), {heads} heads "
            f"a multiple of the key heads, but they have shape {list(keys.shape)}"
        )
    groups, length = keys.shape[1:3]
    _check_like(query, "keys", keys, dtype, [batch, groups, length, size])
    _check_like(query, "values", values, dtype, [batch, groups, length, size])
    if mask is not None:
        kind = torch.bool if mask.dtype == torch.bool else dtype
        _check_like(query, "mask", mask, kind, [_batch(mask, batch), 1, 1, length])
    if position is not None:
        _check_like(query, "position", position, torch.int64, [1])
    given = [tensor for tensor in new if tensor is not None]
    if len(given) not in ((0, 4) if position is None else (4,)) or (given and not length):
        raise ValueError(
            f"bitlinear: new_key, new_value, cos and sin come together, and a position with them, "
            f"for at least one key, but {len(given)} of them are given for {length} keys"
        )
    if given:
        new_key, new_value, cos, sin = given
        _check_like(query, "new_key", new_key, dtype, [batch, groups, 1, size])
        _check_like(query, "new_value", new_value, dtype, [batch, groups, 1, size])
        _check_like(query, "cos", cos, dtype, [_batch(cos, batch), 1, size])
        _check_like(query, "sin", sin, dtype, [_batch(cos, batch), 1, size])


def _batch(tensor: Tensor, batch: int) -> int:
    """1 if the tensor serves all sequences, else ``batch``."""
    return 1 if tensor.dim() and tensor.shape[0] == 1 else batch


def _check_like(
    query: Tensor, name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]
) -> None:
    if tensor.dtype != dtype or list(tensor.shape) != shape or tensor.device != query.device:
        raise ValueError(
            f"bitlinear: {name} must be {dtype_name(dtype)}, of shape {shape}, on {query.device}, "
            f"but it is {dtype_name(tensor.dtype)} of shape {list(tensor.shape)} on {tensor.device}"
        )
