"""The lookup of rows of a ternary table: packed, and in training by the straight-through estimator.

An embedding returns rows of its weight. Both forms quantise that weight as a layer does, and
return ``t * s_w`` in fp32, rounded once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import Function, compiles_transform


def deployed_lookup(
    ids: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    dim: int,
    dtype: torch.dtype,
    group_size: int = 0,
) -> Tensor:
    """Look rows up in a packed table, and expand these rows alone.

    Args:
        ids: int32 or int64, any shape, values from 0 to ``N - 1``.
        w_packed: uint8, shape ``(N, ceil(dim/4))``; see :mod:`bitlinear.packing`. Its codes are not
            checked.
        w_scale: fp32, shape ``(1,)`` or ``(N, 1)``; with groups ``(N, ceil(dim/group_size))``.
        dim: The values of a row.
        dtype: Floating-point dtype of the result.
        group_size: The number of values of a row that share a scale; 0 or -1 if all do.

    Returns:
        Shape ``(*ids.shape, dim)``: new memory, without a gradient.

    Raises:
        IndexError: An index is out of range (on a GPU, a failed assertion, as in ``nn.Embedding``).
        RuntimeError: ``ids`` has another dtype.
    """
    rows, scales = _gather(ids, w_packed, w_scale.detach())
    return _expand(rows, scales, dim, dtype, group_size).reshape(*ids.shape, dim)


def straight_through_lookup(
    ids: Tensor, weight: Tensor, eps: float, group_size: int, **options: Any
) -> Tensor:
    """Look rows up in a table that is quantised in every call, with straight-through gradients.

    The gradient of the weight is that of ``F.embedding(ids, weight, **options)``. Only the rows
    that are looked up are expanded. With scales of the rows, only they are quantised.

    Args:
        ids: As for :func:`deployed_lookup`.
        weight: Floating point, shape ``(N, dim)``.
        eps: Lower bound of a scale.
        group_size: 0 for one scale per tensor, -1 for one per row, or the number of values of a row
            that share one.
        options: ``padding_idx``, ``scale_grad_by_freq``, ``sparse`` of ``F.embedding``.

    Returns:
        Shape ``(*ids.shape, dim)``, in the dtype of ``weight``.

    Raises:
        IndexError, RuntimeError: See :func:`deployed_lookup`.
    """
    if torch.is_grad_enabled() and torch.compiler.is_compiling() and compiles_transform():
        # In a transform, torch.compile ignores the backward() of a Function.
        return blended_lookup(ids, weight, torch.ones(()), eps, group_size, **options)
    latent = F.embedding(ids.reshape(-1), weight, **options)
    rows, scales = _quantize_rows(ids, latent, weight, eps, group_size)
    if torch.is_grad_enabled():
        output = _StraightThroughRows.apply(  # type: ignore[no-untyped-call]
            latent, rows, scales, group_size
        )
    else:
        output = _expand(rows, scales, weight.shape[1], weight.dtype, group_size)
    return cast(Tensor, output.reshape(*ids.shape, weight.shape[1]))


def blended_lookup(
    ids: Tensor, weight: Tensor, strength: Tensor, eps: float, group_size: int, **options: Any
) -> Tensor:
    """Look rows up in a partly quantised table: ``row + strength * (Q(row) - row)``.

    Args:
        ids, weight, eps, group_size, options: As for :func:`straight_through_lookup`.
        strength: fp32, shape ``()``: 0 for a plain embedding, 1 for a quantised one.

    Returns:
        Shape ``(*ids.shape, dim)``, in the dtype of ``weight``; the gradient is straight through.
    """
    latent = F.embedding(ids.reshape(-1), weight, **options)
    with torch.no_grad():
        rows, scales = _quantize_rows(ids, latent, weight, eps, group_size)
        quantized = _expand(rows, scales, weight.shape[1], torch.float32, group_size)
        step = strength * (quantized - latent)
    return (latent + step).to(weight.dtype).reshape(*ids.shape, weight.shape[1])


def _quantize_rows(
    ids: Tensor, latent: Tensor, weight: Tensor, eps: float, group_size: int
) -> tuple[Tensor, Tensor]:
    """The packed rows of these indices, uint8 ``(M, ceil(dim/4))``, and their scales."""
    quantize_weight = torch.ops.bitlinear.quantize_weight.default
    if group_size != 0:
        return cast("tuple[Tensor, Tensor]", quantize_weight(latent.detach(), eps, group_size))
    # The operator adds in an order of its own: only its scale has the bits of the deployed table.
    # It also packs the whole table, 2 bits a value, which is freed after the gather.
    return _gather(ids, *quantize_weight(weight.detach(), eps, group_size))


def _gather(ids: Tensor, w_packed: Tensor, w_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a packed table with these indices, as a table: ``(M, ceil(dim/4))``."""
    ids = ids.reshape(-1)
    scales = F.embedding(ids, w_scale) if w_scale.dim() == 2 else w_scale
    return F.embedding(ids, w_packed), scales


def _expand(rows: Tensor, scales: Tensor, dim: int, dtype: torch.dtype, group_size: int) -> Tensor:
    """The values of packed rows, ``(M, dim)``, in new memory."""
    # The operator has no fp64; an fp32 product is exact in it.
    out_dtype = torch.float32 if dtype == torch.float64 else dtype
    expand = torch.ops.bitlinear.expand_weight.default
    values: Tensor = expand(rows, dim, scales, out_dtype, group_size)
    return values.to(dtype)


class _StraightThroughRows(Function):
    """The quantised rows forward; the gradient passes to the rows before they were quantised."""

    @staticmethod
    def forward(latent: Tensor, rows: Tensor, scales: Tensor, group_size: int) -> Tensor:
        return _expand(rows, scales, latent.shape[1], latent.dtype, group_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None
