"""Times calls against each other: in turns, round after round, as often as a budget allows.

What is compared shares one process and one stretch of time, and every second round runs backwards,
so that a machine that changes its speed, or is shared with others, treats all alike.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch

Call = Callable[[], object]
# (call, count): seconds per call, averaged over `count` calls in a row.
Timer = Callable[[Call, int], float]

ROUNDS = 20
MIN_SAMPLES = 3
# One reading of the clock costs about 0.1 us: shorter calls are timed by the batch.
SAMPLE_SECONDS = 200e-6
# So long that the gap between two replays of a graph, some 2 us, makes no difference.
GRAPH_SECONDS = 1e-3
# Some 0.3 ms, in which the host launches the first graph of a sample.
LEAD_CYCLES = 500_000
# A visit begins with an untimed sample, which brings weights and code back into the caches and
# wakes the threads. To calls as long as this that makes no difference.
LONG_SECONDS = 50e-3


def nothing() -> None:
    """What a contestant does that needs not be called before its turns."""


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Attributes:
        name: Its name in the results.
        call: What is timed.
        enter: Called before each of its turns, and not timed.
        repeats: How often ``call`` does what its time is to be given of.
    """

    name: str
    call: Call
    enter: Call = nothing
    repeats: int = 1


@dataclass(frozen=True)
class Plan:
    """How often a contestant is timed.

    Attributes:
        calls: Calls in a row that make one sample, which is their mean.
        samples: Samples in each visit.
        visits: Rounds that it takes part in, spread evenly.
        warm_up: Whether an untimed sample comes first in each visit.
    """

    calls: int
    samples: int
    visits: int
    warm_up: bool

    def takes_part(self, number: int) -> bool:
        """Whether one of the visits falls into this round of ``ROUNDS``."""
        return (number + 1) * self.visits // ROUNDS > number * self.visits // ROUNDS


@dataclass(frozen=True)
class Summary:
    """The distribution of the samples: seconds per call at its quartiles, and their number."""

    median: float
    p25: float
    p75: float
    samples: int


def plan(call_seconds: float, share: float) -> Plan:
    """How to spend ``share`` seconds on a call that takes ``call_seconds``.

    Three samples are taken whatever they cost; where a share buys many, they are distributed over
    all rounds.
    """
    calls = max(1, round(SAMPLE_SECONDS / call_seconds))
    sample = calls * call_seconds
    warm_up = call_seconds < LONG_SECONDS
    affordable = int(share / ((1 + warm_up) * sample))
    visits = min(max(affordable, MIN_SAMPLES), ROUNDS)
    samples = max(1, int(share / visits / sample) - warm_up)
    return Plan(calls, samples, visits, warm_up)


def summarize(samples: Sequence[float]) -> Summary:
    """The quartiles, interpolated linearly."""
    p25, median, p75 = np.percentile(samples, (25, 50, 75))
    return Summary(float(median), float(p25), float(p75), len(samples))


def compare(contestants: Sequence[Contestant], budget: float, timer: Timer) -> dict[str, Summary]:
    """Times every contestant in about ``budget`` seconds, shared equally; by name.

    The order of ``contestants`` is that of the first round.
    """
    share = budget / max(1, len(contestants))
    plans = [plan(_estimate(contestant, timer), share) for contestant in contestants]
    samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    pairs = list(zip(contestants, plans))
    for number in range(ROUNDS):
        for contestant, its in pairs if number % 2 == 0 else reversed(pairs):
            if its.takes_part(number):
                contestant.enter()
                if its.warm_up:
                    timer(contestant.call, its.calls)
                samples[contestant.name] += [
                    timer(contestant.call, its.calls) for _ in range(its.samples)
                ]
    return {
        its.name: summarize([seconds / its.repeats for seconds in samples[its.name]])
        for its in contestants
    }


def _estimate(contestant: Contestant, timer: Timer) -> float:
    contestant.enter()
    first = timer(contestant.call, 1)
    if first > LONG_SECONDS:
        return first
    return min(timer(contestant.call, 1) for _ in range(3))


def cpu_timer(call: Call, count: int) -> float:
    """The timer of calls that have finished when they return."""
    turns = itertools.repeat(None, count)
    start = time.perf_counter()
    for _ in turns:
        call()
    return (time.perf_counter() - start) / count


def cuda_timer(call: Call, count: int) -> float:
    """The timer of calls that queue work on the current CUDA stream.

    It is the rate at which calls in a row go through: where the GPU waits for Python to launch the
    next one, that is part of it.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in itertools.repeat(None, count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / count


def graph_timer(call: Call, count: int) -> float:
    """The timer of CUDA graphs' replays; without the time in which the host launches the first."""
    torch.cuda._sleep(LEAD_CYCLES)
    return cuda_timer(call, count)


def graph(calls: Sequence[Call]) -> tuple[Call, int]:
    """The calls one after the other as one CUDA graph, as often as makes it last.

    Returns:
        What replays it, and how many calls that makes.
    """
    replay = capture(calls)
    graph_timer(replay, 1)  # the first one also brings it to the GPU
    passes = math.ceil(GRAPH_SECONDS / graph_timer(replay, 1))
    if passes > 1:
        replay = capture([*calls] * passes)
    return replay, len(calls) * passes


def capture(calls: Sequence[Call]) -> Call:
    """One CUDA graph of the calls, in their order; what replays it on the current stream.

    Raises:
        RuntimeError: A call does what a graph cannot hold, such as waiting for the GPU.
    """
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    recorded = torch.cuda.CUDAGraph()
    # torch.cuda.graph switches streams by itself, but not back if the capture fails.
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):  # whatever a first call sets up is not for the graph
            call()
        with torch.cuda.graph(recorded, stream=stream):
            for call in calls:
                call()

    def replay(_kept: Sequence[Call] = tuple(calls)) -> None:  # with the tensors that it reads
        recorded.replay()

    return replay


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()
