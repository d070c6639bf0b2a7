"""Small GGUF files, written by the package gguf, or by loops over the definition of a layout.

The tests import gguf and the integration from this module, which skips them if gguf is missing.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from bitlinear.integrations import gguf as integration  # noqa: E402

I2_S = 36
LAYOUTS = {"x86": 128, "arm": 64}
GROUPS = {"Q2_0": (42, 64), "PQ2_0": (142, 128), "PTQ1_0": (143, 128)}
"""Types of groups that the package gguf does not write: their numbers and their blocks."""


def quantize(t, scale, kind):
    """The bytes of ``scale * t`` from the quantiser of the package gguf."""
    values = (np.float32(scale) * t).astype(np.float32)
    return gguf.quantize(values, gguf.GGMLQuantizationType[kind])


def i2_s_bytes(t, scale, block):
    """The bytes of I2_S: the position of each weight is computed by itself."""
    out = bytearray(t.size // 4 + 32)
    for i, weight in enumerate(t.reshape(-1).tolist()):
        number, place = divmod(i, block)
        quarter, position = divmod(place, block // 4)
        out[number * (block // 4) + position] |= (weight + 1) << (6 - 2 * quarter)
    struct.pack_into("<f", out, t.size // 4, scale)
    return np.frombuffer(bytes(out), np.uint8)


def group_bytes(t, scale, kind):
    """The bytes of a type of GROUPS, ``(N, bytes)``; a block takes its scale from its weights."""
    block = GROUPS[kind][1]
    scales = np.broadcast_to(np.float32(scale), t.shape)
    encode = _two_bits if kind != "PTQ1_0" else _trits
    rows = []
    for weights, values in zip(t, scales):
        row = bytearray()
        for i in range(0, len(weights), block):
            codes = [int(w) + 1 for w in weights[i : i + block]]
            largest = max((v for v, c in zip(values[i : i + block], codes) if c != 1), default=0)
            row += encode(codes, struct.pack("<e", largest))
        rows.append(np.frombuffer(bytes(row), np.uint8))
    return np.stack(rows)


def _two_bits(codes, scale):
    out = bytearray(len(codes) // 4)
    for j, code in enumerate(codes):
        out[j // 4] |= code << (2 * (j % 4))
    return scale + bytes(out)


def _trits(codes, scale):
    out = b""
    for size, digits in ((16, 5), (8, 5), (2, 4)):
        part, codes = codes[: size * digits], codes[size * digits :]
        for j in range(size):
            number = sum(part[j + n * size] * 3 ** (4 - n) for n in range(digits))
            out += bytes([(number * 256 + 242) // 243])
    return out + scale


class Writer:
    """Collects tensors and metadata, and writes them."""

    def __init__(self, path, architecture="llama"):
        self.path = path
        self.writer = gguf.GGUFWriter(path, architecture)
        self.data = []

    def add(self, name, data, kind=None, shape=None):
        """Add floats, the bytes of a type of gguf, or bytes under any number with their shape."""
        data = np.ascontiguousarray(data)
        if kind is not None and not isinstance(kind, int):
            kind = gguf.GGMLQuantizationType[kind]
        # The library takes the shape as it is if the dtype is not uint8.
        dtype = np.dtype(np.float32) if shape is not None else data.dtype
        self.writer.add_tensor_info(name, shape or data.shape, dtype, data.nbytes, kind)
        self.data.append(data)
        return self

    def add_ternary(self, name, t, scale, kind):
        """``kind``: TQ1_0, TQ2_0, a key of GROUPS, or one of LAYOUTS for I2_S."""
        if kind in GROUPS:
            return self.add(name, group_bytes(t, scale, kind), GROUPS[kind][0], t.shape)
        if kind in LAYOUTS:
            return self.add(name, i2_s_bytes(t, scale, LAYOUTS[kind]), I2_S, t.shape)
        return self.add(name, quantize(t, scale, kind), kind)

    def write(self):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        for data in self.data:
            self.writer.write_tensor_data(data)
        self.writer.close()
        return self.path


def layout_of(kind):
    """The argument ``i2_s_layout`` for tensors of this kind."""
    return kind if kind in LAYOUTS else None


def read_one(path, **kwargs):
    """The only ternary tensor of a file."""
    (tensor,) = integration.tensors(path, **kwargs)
    return tensor
