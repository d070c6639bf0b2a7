"""Peak rates of a machine, and the bound that they set on the time of a layer.

Two rates are measured: reading memory, by the size of the working set (so that the right cache
counts), and int8 multiply-adds with the instructions of each kernel variant. ``peaks.cpp`` holds
the loops; they run on as many threads as the layer. torch reads a GPU's memory, and a GPU's rate of
int8 multiply-adds comes from its data sheet.
"""

from __future__ import annotations

import ctypes
import math
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from bitlinear.kernels import Variant
from bitlinear.runtime.toolchain import Compiler
from scripts.bench import cuda_timing, timing

SOURCE = Path(__file__).with_name("peaks.cpp")

# Working sets from a fast cache to memory, in bytes.
WORKING_SETS = tuple(4**step << 16 for step in range(7))  # 64 KB ... 256 MB
UNIT = 512  # read_bytes reads multiples of this

# Long beside the start of the threads.
RUN_SECONDS = 10e-3
RUNS = 7

# Operands of a GPU: far larger than its caches.
GPU_READ_BYTES = 1 << 30
GPU_PRODUCT = 8192

# Dense int8 operations per second, from NVIDIA's data sheets, by the beginning of torch's name. The
# first entry that fits counts.
INT8_PEAKS = {
    "NVIDIA H100 PCIe": 1513e12,
    "NVIDIA H100 80GB HBM3": 1979e12,
    "NVIDIA H200 NVL": 1671e12,
    "NVIDIA H200": 1979e12,
    "NVIDIA A100": 624e12,
    "NVIDIA L40S": 733e12,
    "NVIDIA GeForce RTX 4090": 661e12,
    "NVIDIA GeForce RTX 3090": 284e12,
    "Tesla T4": 130e12,
}

# (thread, passes): the units of work that were done.
Work = Callable[[int, int], int]


@dataclass(frozen=True)
class Peaks:
    """The peak rates of a number of threads.

    Attributes:
        threads: How many threads ran at once.
        read: Bytes per second, by the size of the working set.
        multiply_add: Operations per second (a multiply-add is two), by kernel variant. A variant
            whose instruction set has no dot product of bytes is absent. On a GPU also "bf16", for
            comparison: the rate of a large product.
    """

    threads: int
    read: dict[int, float]
    multiply_add: dict[str, float]

    def read_rate(self, size: int) -> float:
        """Interpolate the bytes per second of a working set of ``size`` bytes."""
        sizes = sorted(self.read)
        rates = [self.read[measured] for measured in sizes]
        return float(np.interp(math.log(size), np.log(sizes), rates))

    def bound(self, variant: str, packed_bytes: int, operations: int) -> float:
        """Return the shortest seconds in which the weights are read and multiplied one by one."""
        seconds = packed_bytes / self.read_rate(packed_bytes)
        if variant in self.multiply_add:
            seconds = max(seconds, operations / self.multiply_add[variant])
        return seconds


def compile_loops(variant: Variant, compiler: Compiler | None) -> ctypes.CDLL:
    """Compile ``peaks.cpp`` with the flags of a variant that this machine can run.

    Raises:
        RuntimeError: There is no compiler, or it fails; the message is its first error.
        OSError: The compiler cannot be started, or the library cannot be loaded.
    """
    if compiler is None:
        raise RuntimeError("no C++ compiler")
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "peaks.so"
        command = [*shlex.split(compiler.path), "-std=c++17", *variant.cflags, "-fPIC", "-shared"]
        result = subprocess.run(
            [*command, SOURCE.name, "-o", str(library)],
            cwd=SOURCE.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["the compiler failed"]
            raise RuntimeError(next((line for line in lines if "error" in line), lines[0]))
        loops = ctypes.CDLL(str(library))  # stays loaded when the file is gone
    loops.multiply_adds.argtypes = [ctypes.c_int64]
    loops.multiply_adds.restype = ctypes.c_int64
    loops.read_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    loops.read_bytes.restype = ctypes.c_int64
    return loops


def measure(
    loops: dict[str, ctypes.CDLL], threads: int, working_sets: Sequence[int] = WORKING_SETS
) -> Peaks:
    """Measure the peaks, in about a second.

    Args:
        loops: By variant; memory is read with the first one.
        threads: How many threads to run at once.
        working_sets: Sizes to read, in bytes, of all threads together.
    """
    # Unwritten memory would be the one page of zeros. torch allocates it, as it does for weights.
    buffer = torch.ones(max(working_sets), dtype=torch.uint8)
    reader = next(iter(loops.values()))
    parts = {size: max(UNIT, size // threads // UNIT * UNIT) for size in working_sets}
    reading = {size: _reading(reader, buffer, part) for size, part in parts.items()}
    adding = {
        name: _multiplying(library) for name, library in loops.items() if library.multiply_adds(1)
    }
    rates = _best_rates([*reading.values(), *adding.values()], threads)
    read = dict(zip(reading, rates))
    multiply_add = {name: 2 * rate for name, rate in zip(adding, rates[len(read) :])}
    return Peaks(threads, read, multiply_add)


def measure_gpu(name: str, kernel: str) -> Peaks:
    """Measure the peaks of a GPU; the rate of int8 multiply-adds comes from its data sheet.

    Args:
        name: The name of the GPU.
        kernel: The kernel that multiplies int8 numbers.
    """
    data = torch.ones(GPU_READ_BYTES // 4, device="cuda")
    x = torch.randn(GPU_PRODUCT, GPU_PRODUCT, device="cuda", dtype=torch.bfloat16)
    # The floating-point sum is torch's only reduction that does little more than read.
    read = GPU_READ_BYTES / _best_seconds(data.sum)
    multiply_add = {"bf16": 2 * GPU_PRODUCT**3 / _best_seconds(lambda: x @ x)}
    peak = int8_peak(name)
    if peak is not None:
        multiply_add[kernel] = peak
    return Peaks(torch.get_num_threads(), {GPU_READ_BYTES: read}, multiply_add)


def int8_peak(name: str) -> float | None:
    """Return the dense int8 operations per second of a GPU; None if the table lacks it."""
    found = (peak for begin, peak in INT8_PEAKS.items() if name.startswith(begin))
    return next(found, None)


def _best_seconds(call: timing.Call) -> float:
    replay, repeats = cuda_timing.graph([call])
    return min(cuda_timing.graph_timer(replay, 1) for _ in range(RUNS)) / repeats


def _reading(loops: ctypes.CDLL, buffer: torch.Tensor, part: int) -> Work:
    def read(thread: int, passes: int) -> int:
        start = buffer.data_ptr() + thread * part % buffer.numel()
        return int(loops.read_bytes(start, part, passes))

    return read


def _multiplying(loops: ctypes.CDLL) -> Work:
    return lambda _, passes: int(loops.multiply_adds(1000 * passes))


def _best_rates(works: Sequence[Work], threads: int) -> list[float]:
    """Return the units per second of each kind of work, done by all threads at once."""
    best = [0.0] * len(works)
    # ctypes releases the GIL during a call, so Python's threads are enough.
    with ThreadPoolExecutor(threads) as pool:
        passes = [_long_enough(pool, work, threads) for work in works]
        # In rounds, so that a short disturbance costs no kind of work all its runs.
        for _ in range(RUNS):
            for index, work in enumerate(works):
                done, seconds = _run(pool, work, threads, passes[index])
                best[index] = max(best[index], done / seconds)
    return best


def _long_enough(pool: ThreadPoolExecutor, work: Work, threads: int) -> int:
    """Return the number of passes of a run."""
    passes = 1
    while (seconds := _run(pool, work, threads, passes)[1]) < RUN_SECONDS:
        passes *= max(2, math.ceil(RUN_SECONDS / seconds))
    return passes


def _run(pool: ThreadPoolExecutor, work: Work, threads: int, passes: int) -> tuple[int, float]:
    """Return the units of work of all threads at once, and the seconds from first to last."""
    barrier = threading.Barrier(threads)

    def one(thread: int) -> tuple[float, int, float]:
        barrier.wait()
        start = time.perf_counter()
        return start, work(thread, passes), time.perf_counter()

    starts, done, ends = zip(*pool.map(one, range(threads)))
    return sum(done), max(ends) - min(starts)
