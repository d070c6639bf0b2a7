"""Ternary weights from the bytes of GGUF types, and TQ2_0 from packed weights.

A weight is read as its code, ``t + 1``. The layouts are those of ``ggml-quants.c`` in llama.cpp
(TQ1_0, TQ2_0, Q2_0), of the same file of PrismML (PQ2_0, PTQ1_0) and of ``quantize_i2_s`` in
bitnet.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import packing

BLOCK = 256
"""Weights in a block of TQ1_0 and of TQ2_0."""

I2_S_BLOCKS = {"x86": 128, "arm": 64}
"""Weights in a block of I2_S, by the CPU that wrote the file."""

_TQ2_0_SHIFTS = (0, 2, 4, 6)


def decode_tq1_0(data: Tensor) -> tuple[Tensor, Tensor]:
    """Decode blocks of 54 bytes: weights as digits to the base 3, then the scale.

    Args:
        data: uint8, ``(rows, 54 * blocks)``.

    Returns:
        The codes, uint8, ``(rows, 256 * blocks)``, and the scales, fp32, ``(rows, blocks)``.
    """
    digits, scales = _split(data, 54)
    return _join_digits(digits, (32, 5), (16, 5), (4, 4)), scales


def decode_tq2_0(data: Tensor) -> tuple[Tensor, Tensor]:
    """Decode blocks of 66 bytes: weights of 2 bits, then the scale.

    Args:
        data: uint8, ``(rows, 66 * blocks)``.

    Returns:
        The codes, uint8, ``(rows, 256 * blocks)``, where 3 is invalid; and the scales, fp32,
        ``(rows, blocks)``.
    """
    bits, scales = _split(data, 66)
    halves = bits.unflatten(-1, (2, 32))
    codes = torch.stack([(halves >> shift) & 3 for shift in _TQ2_0_SHIFTS], dim=-2)
    return codes.flatten(1), scales


def decode_q2_0(data: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Decode blocks of Q2_0 or PQ2_0: the scale, then weights of 2 bits.

    Args:
        data: uint8, ``(rows, (2 + block / 4) * blocks)``.
        block: The weights of a block.

    Returns:
        The codes, uint8, ``(rows, block * blocks)``, where 3 is invalid; and the scales, fp32,
        ``(rows, blocks)``.
    """
    blocks = data.unflatten(1, (-1, 2 + block // 4))
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    codes = torch.stack([(blocks[..., 2:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return codes.flatten(1), scales.float()


def decode_ptq1_0(data: Tensor) -> tuple[Tensor, Tensor]:
    """Decode blocks of 28 bytes: weights as digits to the base 3, then the scale.

    Args:
        data: uint8, ``(rows, 28 * blocks)``.

    Returns:
        The codes, uint8, ``(rows, 128 * blocks)``, and the scales, fp32, ``(rows, blocks)``.
    """
    digits, scales = _split(data, 28)
    return _join_digits(digits, (16, 5), (8, 5), (2, 4)), scales


def decode_i2_s(data: Tensor, layout: str) -> Tensor:
    """Decode weights of 2 bits, in blocks that count through all rows.

    Args:
        data: uint8, ``(rows, K / 4)``, with a whole number of blocks.
        layout: A key of :data:`I2_S_BLOCKS`.

    Returns:
        The codes, uint8, ``(rows, K)``, where 3 is invalid.
    """
    blocks = data.reshape(-1, I2_S_BLOCKS[layout] // 4)
    codes = torch.stack([(blocks >> shift) & 3 for shift in (6, 4, 2, 0)], dim=-2)
    return codes.reshape(len(data), -1)


def encode_tq2_0(w_packed: Tensor, in_features: int, scales: Tensor) -> Tensor:
    """Write packed weights as TQ2_0, without a check: the inverse of :func:`decode_tq2_0`.

    Args:
        w_packed: uint8, ``(N, K / 4)``; see :mod:`bitlinear.packing`.
        in_features: ``K``, a multiple of 256.
        scales: fp16, ``(1,)``, ``(N, 1)`` or ``(N, K / 256)``.

    Returns:
        uint8, ``(N, 66 * K / 256)``, on the CPU.
    """
    rows, blocks = len(w_packed), in_features // BLOCK
    result = torch.empty(rows, blocks, 66, dtype=torch.uint8, device="cpu")
    block_scales = scales.cpu().expand(rows, blocks).contiguous()
    result[..., 64:] = block_scales.view(torch.uint8).unflatten(1, (blocks, 2))
    for first, chunk in packing.enumerate_chunks(w_packed.cpu()):
        codes = (packing.unpack_unchecked(chunk, in_features) + 1).to(torch.uint8)
        parts = codes.view(len(chunk), blocks, 2, 4, 32).unbind(-2)
        bits = torch.zeros_like(parts[0])
        for part, shift in zip(parts, _TQ2_0_SHIFTS):
            bits |= part << shift
        result[first : first + len(chunk), :, :64] = bits.flatten(-2)
    return result.flatten(1)


def _split(data: Tensor, block_bytes: int) -> tuple[Tensor, Tensor]:
    """Blocks without their scale, and the scales in fp32."""
    blocks = data.unflatten(1, (-1, block_bytes))
    scales = blocks[..., -2:].contiguous().view(torch.float16)[..., 0]
    return blocks[..., :-2], scales.float()


def _join_digits(data: Tensor, *parts: tuple[int, int]) -> Tensor:
    """The digits of blocks, ``(rows, weights)``. ``parts``: bytes, and the digits in each."""
    pieces = data.split([size for size, _ in parts], dim=-1)
    digits = [_digits(piece, count).flatten(-2) for piece, (_, count) in zip(pieces, parts)]
    return torch.cat(digits, dim=-1).flatten(1)


def _digits(data: Tensor, count: int) -> Tensor:
    """The first digits to the base 3 of bytes, which hold fractions of 256: ``(..., count, n)``."""
    # The product of two uint8 tensors is taken modulo 256, which drops the digits before.
    return torch.stack(
        [((data * 3**n).to(torch.int16) * 3 >> 8).to(torch.uint8) for n in range(count)], dim=-2
    )
