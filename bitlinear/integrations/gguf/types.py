"""The types of tensors in GGUF files: their sizes, and why some of them are refused.

The numbers are those of ggml, and of the projects that have added numbers of their own: bitnet.cpp
(I2_S, TL1, TL2), ik_llama.cpp (IQ1_BN, IQ2_BN) and PrismML's llama.cpp (PQ2_0, PTQ1_0).
"""

from __future__ import annotations

from typing import NamedTuple

import gguf


class TensorType(NamedTuple):
    """A type of tensors.

    Attributes:
        name: The name in ggml.
        block: The number of weights in a block.
        block_bytes: The bytes of a block; 0 if the size of a tensor is not known.
        tail: The bytes after the last block.
        refusal: Why no tensor of this type can be read, and what to do; ``""`` otherwise.
    """

    name: str
    block: int
    block_bytes: int
    tail: int = 0
    refusal: str = ""

    def size(self, weights: int) -> int:
        """The bytes of a tensor with so many weights."""
        return weights // self.block * self.block_bytes + self.tail


TERNARY_TYPES = ("TQ1_0", "TQ2_0", "I2_S", "Q2_0", "PQ2_0", "PTQ1_0")
"""Types that become packed weights."""

FLOAT_TYPES = ("F32", "F16", "BF16")
"""Types without quantisation, for any tensor."""

_CONVERT = "convert the original checkpoint to TQ2_0 or TQ1_0 instead"
_TABLES = f"has its weights in the order of kernels that were generated for one model: {_CONVERT}"
_PER_ROW = f"of ik_llama.cpp is not supported by this version: {_CONVERT}"

_TL2 = TensorType("TL2", 1, 0, refusal=_TABLES)
_PQ2_0 = TensorType("PQ2_0", 128, 34)

# These replace what the package gguf says about a number.
_TYPES = {
    36: TensorType("I2_S", 4, 1, 32),
    38: TensorType("TL1", 4, 1, 32, _TABLES),
    41: TensorType("Q1_0", 128, 18, refusal="has binary weights, -1 and 1: they are not ternary"),
    42: TensorType("Q2_0", 64, 18),
    134: TensorType("IQ1_BN", 1, 0, refusal=_PER_ROW),
    135: TensorType("IQ2_BN", 1, 0, refusal=_PER_ROW),
    142: _PQ2_0,
    143: TensorType("PTQ1_0", 128, 28),
}


def tensor_type(number: int, weights: int, space: int) -> TensorType:
    """The type with this number, of a tensor with so many weights in so many bytes of a file.

    Two numbers have two meanings, which the bytes tell apart: 39 is MXFP4, and TL2 in bitnet.cpp,
    which takes less than half of the bytes; 42 is Q2_0, and PQ2_0 in older files of PrismML.
    """
    if number == gguf.GGMLQuantizationType.MXFP4 and space < _from_gguf(number).size(weights):
        return _TL2
    if number == 42 and space < _TYPES[42].size(weights):
        return _PQ2_0
    if number in _TYPES:
        return _TYPES[number]
    try:
        return _from_gguf(number)
    except (ValueError, KeyError):
        reason = "is not known to this version: upgrade bitlinear and gguf, or convert the file"
        return TensorType(f"number {number}", 1, 0, refusal=reason)


def _from_gguf(number: int) -> TensorType:
    kind = gguf.GGMLQuantizationType(number)
    return TensorType(kind.name, *gguf.GGML_QUANT_SIZES[kind])
