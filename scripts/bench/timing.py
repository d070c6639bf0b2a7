"""Time calls against each other: in turns, round after round, within a budget.

All contestants share one process and one stretch of time, and every second round runs backwards. So
a machine that changes its speed, or that others use too, treats all contestants alike.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

import numpy as np

Call = Callable[[], object]
# (call, count): seconds per call, the mean of `count` calls in a row.
Timer = Callable[[Call, int], float]

ROUNDS = 20
# Quartiles of fewer samples say nothing.
MIN_SAMPLES = 3
# One reading of the clock costs about 0.1 us: shorter calls are timed in batches.
SAMPLE_SECONDS = 200e-6
# A visit begins with an untimed sample, which brings weights and code back into the caches and
# wakes the threads. Calls as long as this do not need one.
LONG_SECONDS = 50e-3


def do_nothing() -> None:
    """Enter a turn that needs no preparation."""


@dataclass(frozen=True)
class Contestant:
    """A call to time.

    Attributes:
        name: Its name in the results.
        call: The call.
        enter: Called before each turn, and not timed.
        repeats: How many layers one ``call`` runs; the results are per layer.
    """

    name: str
    call: Call
    enter: Call = do_nothing
    repeats: int = 1


@dataclass(frozen=True)
class Plan:
    """How often a contestant is timed.

    Attributes:
        calls: Calls in a row that make one sample, which is their mean.
        samples: Samples in each visit.
        visits: Rounds that the contestant takes part in, spread evenly.
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
    """Distribute ``share`` seconds over the rounds, for a call that takes ``call_seconds``.

    The plan never takes longer than ``share``: without time for one visit it has none.
    """
    calls, warm_up, visit = _shortest_visit(call_seconds)
    visits = min(int(share / visit), ROUNDS)
    samples = int(share / visits / (calls * call_seconds)) - warm_up if visits else 0
    return Plan(calls, samples, visits, warm_up)


def divide(calls_seconds: Sequence[float], budget: float) -> list[float]:
    """Divide ``budget`` seconds among calls: first the time of ``MIN_SAMPLES`` visits of each.

    The shortest calls come first, so that a call that takes the whole budget costs the others no
    sample. The rest is divided equally.
    """
    needs = [MIN_SAMPLES * _shortest_visit(seconds)[2] for seconds in calls_seconds]
    shares = [0.0] * len(needs)
    rest = budget
    for index in sorted(range(len(needs)), key=needs.__getitem__):
        if needs[index] > rest:
            break
        shares[index] = needs[index]
        rest -= needs[index]
    return [share + rest / len(needs) for share in shares]


def _shortest_visit(call_seconds: float) -> tuple[int, bool, float]:
    """Return the calls of a sample, whether a warm-up comes first, and the seconds of one visit."""
    calls = max(1, round(SAMPLE_SECONDS / call_seconds))
    warm_up = call_seconds < LONG_SECONDS
    return calls, warm_up, (1 + warm_up) * calls * call_seconds


def summarize(samples: Sequence[float]) -> Summary:
    """Return the quartiles, interpolated linearly."""
    p25, median, p75 = np.percentile(samples, (25, 50, 75))
    return Summary(float(median), float(p25), float(p75), len(samples))


def compare(contestants: Sequence[Contestant], budget: float, timer: Timer) -> dict[str, Summary]:
    """Time every contestant, all of them together in ``budget`` seconds.

    The first call of each is its set-up (it compiles, allocates, captures) and counts for nothing.
    The next ones tell how long it takes. They are part of the budget, and only they can exceed it:
    a contestant that is left with no time has that one sample.

    Args:
        contestants: In the order of the first round.
        budget: Seconds of timed and warm-up calls.
        timer: How a call is timed.

    Returns:
        The times by the contestants' names.
    """
    first = [_first_times(contestant, timer) for contestant in contestants]
    estimates = [min(times) for times in first]
    shares = divide(estimates, max(0.0, budget - sum(map(sum, first))))
    plans = [plan(seconds, share) for seconds, share in zip(estimates, shares)]
    # A short call's first times are those of cold caches.
    samples = {
        contestant.name: [] if schedule.visits and schedule.warm_up else [estimate]
        for contestant, schedule, estimate in zip(contestants, plans, estimates)
    }
    pairs = list(zip(contestants, plans))
    for number in range(ROUNDS):
        for contestant, schedule in pairs if number % 2 == 0 else reversed(pairs):
            if schedule.takes_part(number):
                contestant.enter()
                if schedule.warm_up:
                    timer(contestant.call, schedule.calls)
                samples[contestant.name] += [
                    timer(contestant.call, schedule.calls) for _ in range(schedule.samples)
                ]
    return {
        contestant.name: summarize(
            [seconds / contestant.repeats for seconds in samples[contestant.name]]
        )
        for contestant in contestants
    }


def _first_times(contestant: Contestant, timer: Timer) -> list[float]:
    contestant.enter()
    timer(contestant.call, 1)
    first = timer(contestant.call, 1)
    more = 0 if first > LONG_SECONDS else 3
    return [first, *(timer(contestant.call, 1) for _ in range(more))]


def cpu_timer(call: Call, count: int) -> float:
    """Time calls that have finished when they return."""
    turns = itertools.repeat(None, count)
    start = time.perf_counter()
    for _ in turns:
        call()
    return (time.perf_counter() - start) / count
