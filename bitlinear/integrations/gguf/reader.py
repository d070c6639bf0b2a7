"""A GGUF file: its metadata and the bytes of its tensors, checked against the size of the file."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ... import packing
from .types import TensorType, tensor_type

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DAMAGED = "download it again"

# The bytes of an array's values, by the number of their type; strings and arrays have no one size.
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file.

    Attributes:
        name: Its name in the file.
        type: Its type.
        shape: Its shape in the order of torch: ``(N, K)`` for the weight of a linear layer.
        offset: The position of its first byte in the file.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape, with a vector as one column."""
        rows, columns = (*self.shape, 1)[:2]
        return rows, columns


class GgufFile:
    """A file, mapped into memory.

    Args:
        path: The file.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not a GGUF file of a known version, is one part of several, is damaged or
            cut off, or its activations need a Hadamard transform.

    Attributes:
        path: The path, as given.
        tensors: The tensors, by name, in the order of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _check_start(self.path)
        try:
            self._reader = _Reader(self.path)
        except (
            *(ValueError, IndexError, KeyError, OverflowError, RecursionError, struct.error),
        ) as error:
            raise ValueError(
                f"{path} is damaged or cut off: its header cannot be read ({error}); {_DAMAGED}"
            ) from error
        self._check_metadata()
        self.tensors = self._check_tensors()

    def metadata(self, key: str) -> Any:
        """The value of a key, or None; raises ValueError if it is an array."""
        field = self._reader.fields.get(key)
        if field is None:
            return None
        if field.types[0] == _ARRAY:
            raise ValueError(f"{self.path}: {key} must be one value, but it is an array")
        return field.contents()

    def chunks(self, info: TensorInfo, block: int = 1) -> Iterator[tuple[int, Tensor]]:
        """The bytes of a matrix or vector, a few rows at a time, about a million weights at most.

        Args:
            info: The tensor. A vector is read as one column.
            block: The rows of a chunk hold a multiple of so many weights.

        Yields:
            The index of the first row and a copy of the bytes, uint8, ``(rows, bytes of a row)``.
        """
        rows, columns = info.matrix_shape
        multiple = block // gcd(block, columns)
        step = max(1, packing.rows_per_chunk(columns) // multiple) * multiple
        for first in range(0, rows, step):
            count = min(step, rows - first)
            begin = info.offset + _bytes_of_blocks(info, first * columns)
            end = info.offset + _bytes_of_blocks(info, (first + count) * columns)
            # A tensor of torch must not lie in read-only memory.
            yield first, torch.from_numpy(np.array(self._reader.data[begin:end])).view(count, -1)

    def tail(self, info: TensorInfo) -> Tensor:
        """The bytes after the blocks of a tensor: uint8, ``(tail,)``."""
        begin = info.offset + _bytes_of_blocks(info, prod(info.shape))
        return torch.from_numpy(np.array(self._reader.data[begin : begin + info.type.tail]))

    def _check_metadata(self) -> None:
        if self.metadata("split.count") not in (None, 0, 1):
            raise ValueError(
                f"{self.path} is one of {self.metadata('split.count')} parts of a model: merge "
                f"them with llama-gguf-split --merge"
            )
        rotated = [key for key in self._reader.fields if key.startswith("prism.hadamard.")]
        if rotated:
            raise ValueError(
                f"{self.path} has {rotated[0]} in its metadata: its activations need a Hadamard "
                f"transform, without which the outputs are meaningless, and which is not supported "
                f"by this version"
            )

    def _check_tensors(self) -> dict[str, TensorInfo]:
        """The tensors, after a check that the bytes of each lie in the file and in no other."""
        entries = self._reader.entries
        file_size = len(self._reader.data)
        starts = sorted({start for *_, start in entries} | {file_size})
        next_start = dict(zip(starts, starts[1:]))
        if len(starts) <= len(entries) and len({name for name, *_ in entries}) == len(entries):
            raise ValueError(f"{self.path} is damaged: two tensors lie at one place; {_DAMAGED}")
        tensors: dict[str, TensorInfo] = {}
        for name, number, shape, start in entries:
            where = f"{self.path}: tensor {name}"
            if name in tensors:
                raise ValueError(f"{where} is in the file twice: {_DAMAGED}")
            if not shape or min(shape) < 1:
                raise ValueError(f"{where} has no weights, its shape is {list(shape)}: {_DAMAGED}")
            if start >= file_size:
                raise ValueError(
                    f"{where} starts at byte {start}, but the file has only {file_size}: it is "
                    f"cut off; {_DAMAGED}"
                )
            space = next_start[start] - start
            kind = tensor_type(number, prod(shape), space)
            if shape[-1] % kind.block:
                raise ValueError(
                    f"{where} has rows of {shape[-1]} weights, which are no whole blocks of "
                    f"{kind.block}, as {kind.name} has them: {_DAMAGED}"
                )
            size = kind.size(prod(shape))
            if size > space:
                reason = "is cut off" if next_start[start] == file_size else "is damaged"
                raise ValueError(
                    f"{where} of type {kind.name} and shape {list(shape)} takes {size} bytes, but "
                    f"the file has only {space} for it: it {reason}; {_DAMAGED}"
                )
            tensors[name] = TensorInfo(name, kind, shape, start)
        return tensors


def _bytes_of_blocks(info: TensorInfo, weights: int) -> int:
    return weights // info.type.block * info.type.block_bytes


def _check_start(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) < 8 or start[:4] != _MAGIC:
        raise ValueError(f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
    version = int.from_bytes(start[4:], "little")
    if version not in _VERSIONS:
        swapped = int.from_bytes(start[4:], "big") in _VERSIONS
        what = "is big-endian" if swapped else f"has version {version} of GGUF"
        raise ValueError(
            f"{path} {what}, but only little-endian files of the versions 2 and 3 can be read: "
            f"convert the original checkpoint again"
        )


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """The reader of gguf, which also accepts types of tensors that it does not know.

    It passes over arrays, such as the tokens of a tokenizer, whose entries would take hundreds of
    megabytes.

    Attributes:
        entries: For each tensor the name, the number of the type, the shape in the order of torch,
            and the position of the first byte.
    """

    entries: list[tuple[str, int, tuple[int, ...], int]]

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != _ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        return self._array_bytes(orig_offs), [], [], [gguf.GGUFValueType.ARRAY]

    def _array_bytes(self, start: int) -> int:
        kind, count = struct.unpack_from("<IQ", self.data, start)
        offset = start + 12
        if kind in _VALUE_BYTES:
            offset += count * _VALUE_BYTES[kind]
        elif kind not in (_STRING, _ARRAY):
            raise ValueError(f"an array has values of the unknown type {kind}")
        else:
            for _ in range(count):
                if kind == _ARRAY:
                    offset += self._array_bytes(offset)
                else:
                    offset += 8 + struct.unpack_from("<Q", self.data, offset)[0]
        if offset > len(self.data):
            raise ValueError("an array ends after the end of the file")
        return offset - start

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        self.entries = []
        for field in fields:
            _, name, _, dims, number, offset = field.parts
            self.entries.append(
                (
                    str(bytes(name), encoding="utf-8"),
                    int(number[0]),
                    tuple(int(size) for size in reversed(dims)),
                    int(start_offs + int(offset[0])),
                )
            )
