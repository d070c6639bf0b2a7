"""Where layers run, and what follows from it: a row for each device, with its ways of timing.

What times on a GPU and what looks for one is named here, so that a test can put something else in
its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Callable

import torch

from scripts.bench import machine, timing
from scripts.bench.timing import Call, Timer

# Of a layer whose weights are to be cold: more would take long to build and to capture, and what is
# smaller than a thousandth of an L2 is hardly bound by memory.
MAX_COPIES = 512


@dataclass(frozen=True)
class Mode:
    """A way of timing a layer.

    Attributes:
        timer: Times what ``arrange`` made.
        arrange: From the calls of some copies of a layer, each with weights of its own, to what is
            timed: a call, and how often it calls a layer.
        checked: Whether ``--check`` looks at it.
        bounded: Whether the rates that are measured first bound it.
    """

    timer: Timer
    arrange: Callable[[Sequence[Call]], tuple[Call, int]]
    checked: bool = True
    bounded: bool = True


@dataclass(frozen=True)
class Device:
    """A device, as far as the benchmark has to know it.

    Attributes:
        name: As on the command line and in the results.
        place: Where torch puts its tensors.
        dtype: Of BitLinear's input and output.
        baseline: The contestant that speed-ups refer to.
        budget: Seconds for each cell, unless told otherwise.
        modes: By name; the first one is what pictures show.
        cache_bytes: What weights have to exceed to be cold; 0 where no mode wants them so.
        is_available: Whether it is there.
    """

    name: str
    place: str
    dtype: torch.dtype
    baseline: str
    budget: float
    modes: Mapping[str, Mode]
    cache_bytes: Callable[[], int]
    is_available: Callable[[], bool]

    def copies(self, packed_bytes: int) -> int:
        """How many layers, called in turn, never find their packed weights in the cache.

        Twice the cache, as it need not evict what is oldest. All contestants get as many: they then
        stand for the same model, and all but the smallest weights are cold.
        """
        return min(MAX_COPIES, max(1, math.ceil(2 * self.cache_bytes() / packed_bytes)))


def _one(calls: Sequence[Call]) -> tuple[Call, int]:
    return calls[0], 1


def _graph_of_one(calls: Sequence[Call]) -> tuple[Call, int]:
    return timing.graph([calls[0]] * len(calls))


DEVICES = {
    "cpu": Device(
        name="cpu",
        place="cpu",
        dtype=torch.float32,
        baseline="fp32",
        budget=2.0,
        modes={"": Mode(timing.cpu_timer, _one)},
        cache_bytes=lambda: 0,
        is_available=lambda: True,
    ),
    "cuda": Device(
        name="cuda",
        place="cuda",
        dtype=torch.bfloat16,
        baseline="bf16",
        budget=0.3,
        modes={
            "cold": Mode(timing.graph_timer, timing.graph),
            # Unbounded: what the L2 delivers is not known.
            "warm": Mode(timing.graph_timer, _graph_of_one, bounded=False),
            # Unchecked: for small layers it is a figure of Python's.
            "eager": Mode(timing.cuda_timer, _one, checked=False, bounded=False),
        },
        cache_bytes=lambda: machine.gpu()["l2_bytes"],
        is_available=torch.cuda.is_available,
    ),
}
