"""Devices that layers run on: a row for each, with its ways of timing.

These rows name everything that asks for a GPU or times on one, so that a test can replace it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Callable

import torch

from scripts.bench import cuda_timing, machine, timing
from scripts.bench.timing import Call, Timer

# The most copies of a layer whose weights are to be cold. More take long to build and to capture,
# and a layer smaller than a thousandth of an L2 is hardly bound by memory.
MAX_COPIES = 512


@dataclass(frozen=True)
class Mode:
    """A way of timing a layer.

    Attributes:
        timer: Times the call that ``arrange`` returns.
        arrange: From the calls of some copies of a layer, each with weights of its own, to the call
            to time, and how many layers it runs.
        checked: Whether ``--check`` looks at this mode.
        bounded: Whether the measured peaks bound the times of this mode.
    """

    timer: Timer
    arrange: Callable[[Sequence[Call]], tuple[Call, int]]
    checked: bool = True
    bounded: bool = True


@dataclass(frozen=True)
class Device:
    """A device, as the benchmark needs to know it.

    Attributes:
        name: Its name on the command line and in the results.
        torch_device: The device of torch's tensors.
        dtype: The dtype of BitLinear's input and output.
        baseline: The contestant that speed-ups refer to.
        budget: The default number of seconds for each cell.
        modes: By name; pictures show the first one.
        cache_bytes: The size that weights must exceed to be cold; 0 if no mode needs them cold.
        is_available: Whether this machine has it.
    """

    name: str
    torch_device: str
    dtype: torch.dtype
    baseline: str
    budget: float
    modes: Mapping[str, Mode]
    cache_bytes: Callable[[], int]
    is_available: Callable[[], bool]

    def copies(self, packed_bytes: int) -> int:
        """Return how many layers, called in turn, never find their packed weights in the cache.

        Together they fill the cache twice, because a cache need not evict the oldest line. All
        contestants get as many copies: they then stand for the same model.
        """
        return min(MAX_COPIES, max(1, math.ceil(2 * self.cache_bytes() / packed_bytes)))


def _first_call(calls: Sequence[Call]) -> tuple[Call, int]:
    return calls[0], 1


def _graph_of_first_call(calls: Sequence[Call]) -> tuple[Call, int]:
    return cuda_timing.graph([calls[0]] * len(calls))


DEVICES = {
    "cpu": Device(
        name="cpu",
        torch_device="cpu",
        dtype=torch.float32,
        baseline="fp32",
        budget=2.0,
        modes={"": Mode(timing.cpu_timer, _first_call)},
        cache_bytes=lambda: 0,
        is_available=lambda: True,
    ),
    "cuda": Device(
        name="cuda",
        torch_device="cuda",
        dtype=torch.bfloat16,
        baseline="bf16",
        budget=0.3,
        modes={
            "cold": Mode(cuda_timing.graph_timer, cuda_timing.graph),
            # Unbounded: the bandwidth of the L2 is not measured.
            "warm": Mode(cuda_timing.graph_timer, _graph_of_first_call, bounded=False),
            # Unchecked: for small layers it measures Python.
            "eager": Mode(cuda_timing.stream_timer, _first_call, checked=False, bounded=False),
        },
        cache_bytes=lambda: machine.gpu()["l2_bytes"],
        is_available=torch.cuda.is_available,
    ),
}


def choose_device(parser: argparse.ArgumentParser, name: str) -> Device:
    """Return the device that ``--device`` names; end with an error if this machine lacks it."""
    device = DEVICES[name]
    if not device.is_available():
        parser.error(f"--device {name}: torch finds no GPU")
    return device
