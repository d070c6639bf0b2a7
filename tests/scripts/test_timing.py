"""Timing: plans, budgets and turns, with made-up clocks; and CUDA graphs."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scripts.bench import cuda_timing, timing
from scripts.bench.devices import DEVICES
from scripts.bench.timing import Contestant, Plan, Summary

SECONDS = st.floats(1e-6, 10)


def planned_seconds(plan: Plan, call_seconds: float) -> float:
    return plan.visits * (plan.samples + plan.warm_up) * plan.calls * call_seconds


@given(SECONDS, st.floats(0, 10))
def test_a_plan_never_exceeds_its_share(call_seconds, share):
    plan = timing.plan(call_seconds, share)
    assert 0 <= plan.visits <= timing.ROUNDS
    assert plan.samples >= (plan.visits > 0)
    assert sum(map(plan.takes_part, range(timing.ROUNDS))) == plan.visits
    assert planned_seconds(plan, call_seconds) <= share * 1.001


@given(st.lists(SECONDS, min_size=1, max_size=9), st.floats(1e-3, 10))
def test_a_budget_is_divided_completely(calls, budget):
    shares = timing.divide(calls, budget)
    assert sum(shares) == pytest.approx(budget)
    assert min(shares) >= 0


def test_a_short_call_is_timed_in_batches_and_often():
    plan = timing.plan(5e-6, 0.2)
    assert plan.calls * 5e-6 == pytest.approx(timing.SAMPLE_SECONDS)
    assert plan.visits * plan.samples > 500
    assert plan.warm_up


def test_a_long_call_is_timed_without_warm_up_in_rounds_far_apart():
    plan = timing.plan(3.0, 9.5)
    assert plan == Plan(calls=1, samples=1, visits=3, warm_up=False)
    rounds = [number for number in range(timing.ROUNDS) if plan.takes_part(number)]
    assert min(b - a for a, b in zip(rounds, rounds[1:])) >= timing.ROUNDS // 3


def test_quartiles():
    assert timing.summarize([5, 1, 4, 2, 3]) == Summary(median=3, p25=2, p75=4, samples=5)
    assert timing.summarize([1, 2]).median == 1.5


def test_contestants_take_turns_forwards_and_backwards():
    log = []
    field = [
        Contestant(name, call=lambda: None, enter=lambda name=name: log.append(name))
        for name in "abc"
    ]
    times = timing.compare(field, budget=3.0, timer=lambda call, count: 1e-3)
    turns = "".join(log[len(field) :])  # they enter first for their estimates
    assert turns == "abccba" * (timing.ROUNDS // 2)
    assert {summary.samples for summary in times.values()} == {960}
    assert {summary.median for summary in times.values()} == {1e-3}


@given(st.dictionaries(st.sampled_from("abcdefgh"), SECONDS, min_size=1), st.floats(0.01, 5))
def test_the_budget_is_kept_except_for_two_calls_of_each(seconds, budget):
    spent = []

    def timer(call, count):
        spent.append(seconds[call] * count)
        return seconds[call]

    times = timing.compare([Contestant(name, name) for name in seconds], budget, timer)
    first = sum((1 if call > timing.LONG_SECONDS else 4) * call for call in seconds.values())
    set_up = sum(seconds.values())
    assert sum(spent) <= set_up + max(budget, first) * 1.001
    assert {name: summary.median for name, summary in times.items()} == pytest.approx(seconds)
    assert all(summary.samples >= 1 for summary in times.values())


def test_a_call_that_is_longer_than_the_budget_costs_the_others_no_sample():
    seconds = {"long": 5.0, "short": 1e-3}
    field = [Contestant(name, name) for name in seconds]
    times = timing.compare(field, budget=6.0, timer=lambda call, count: seconds[call])
    assert times["long"].samples == 1
    assert times["short"].samples > 300


def test_a_first_call_that_compiles_counts_for_nothing():
    durations = {"compiled": itertools.chain([100.0], itertools.repeat(1e-3))}
    durations["plain"] = itertools.repeat(1e-3)
    field = [Contestant(name, name) for name in durations]
    times = timing.compare(field, budget=2.0, timer=lambda call, count: next(durations[call]))
    assert times["compiled"] == times["plain"]
    assert times["compiled"].median == times["compiled"].p75 == 1e-3
    assert times["compiled"].samples > 300


def test_the_clock_times_a_batch_of_calls():
    calls = []
    assert timing.cpu_timer(lambda: calls.append(1), 5) > 0
    assert len(calls) == 5


# --------------------------------------------------------------------------------- CUDA graphs


def test_a_graph_lasts_long_enough_to_be_timed(monkeypatch):
    log = []
    monkeypatch.setattr(cuda_timing, "capture", lambda calls: log.append(list(calls)) or "replay")
    half = cuda_timing.GRAPH_SECONDS / 2.5
    monkeypatch.setattr(cuda_timing, "graph_timer", lambda call, count: half)
    assert cuda_timing.graph("ab") == ("replay", 6)
    assert log == [["a", "b"], ["a", "b"] * 3]
    monkeypatch.setattr(cuda_timing, "graph_timer", lambda call, count: 1.0)
    assert cuda_timing.graph("ab") == ("replay", 2)
    assert len(log) == 3


def test_the_time_of_a_graph_is_divided_among_its_calls():
    field = [Contestant("graph", lambda: None, repeats=8)]
    times = timing.compare(field, budget=0.1, timer=lambda call, count: 1e-3)
    assert times["graph"].median == 1e-3 / 8


def test_cold_and_warm_graphs_have_as_many_calls(monkeypatch):
    monkeypatch.setattr(cuda_timing, "graph", lambda calls: calls)
    modes = DEVICES["cuda"].modes
    assert modes["warm"].arrange(["a", "b"]) == ["a", "a"]
    assert modes["eager"].arrange(["a", "b"]) == ("a", 1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_graph_makes_its_calls():
    count = torch.zeros(1, device="cuda")
    add = partial(count.add_, 1)
    replay = cuda_timing.capture([add] * 5)  # which calls it once before
    replay()
    assert count.item() == 6
    assert cuda_timing.graph_timer(replay, 2) > 0
    assert count.item() == 16
