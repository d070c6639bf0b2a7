"""Failures that the cache remembers: when they are due, what they say, and their JSON."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitlinear.runtime.failures import RETRY_SECONDS, Failure
from bitlinear.runtime.rejection import Rejection

NOW = 1_800_000_000.0
LASTING = Rejection("self-test-failed", "self-test failed: row 3 differs", "report a bug")
MOMENTARY = Rejection("compile-failed", "the disk is full", "make room", momentary=True)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


@pytest.mark.parametrize("attempts", [1, 2, 100])
@pytest.mark.parametrize("age", [0.0, RETRY_SECONDS, 1e9, -1e9])
def test_a_lasting_failure_is_never_due(attempts: int, age: float) -> None:
    assert not Failure(LASTING, attempts, NOW - age).is_due()


@pytest.mark.parametrize("age", [0.0, 1.0, RETRY_SECONDS, -1e9])
def test_a_first_momentary_failure_is_due_at_once(age: float) -> None:
    assert Failure(MOMENTARY, 1, NOW - age).is_due()


@pytest.mark.parametrize("attempts", [2, 3, 100])
@pytest.mark.parametrize(
    ("age", "is_due"),
    [
        (0.0, False),
        (1.0, False),
        (RETRY_SECONDS - 1, False),
        (RETRY_SECONDS, True),
        (1e9, True),
        (-1.0, True),  # the clock went back
        (-1e9, True),
    ],
)
def test_a_repeated_momentary_failure_is_due_once_an_hour(
    attempts: int, age: float, is_due: bool
) -> None:
    assert Failure(MOMENTARY, attempts, NOW - age).is_due() == is_due


def test_attempts_are_counted() -> None:
    first = Failure.now(MOMENTARY, None)
    assert first == Failure(MOMENTARY, 1, NOW)
    other = replace(MOMENTARY, reason="the disk is full again")
    second = Failure.now(other, replace(first, time=NOW - 60))
    assert second == Failure(other, 2, NOW)
    assert Failure.now(MOMENTARY, second).attempts == 3


def test_a_lasting_failure_keeps_its_fix() -> None:
    assert Failure(LASTING, 2, NOW).described() == LASTING


@pytest.mark.parametrize(
    ("age", "minutes"),
    [(0.0, 60), (60.0, 59), (1800.0, 30), (RETRY_SECONDS - 1, 1), (2 * RETRY_SECONDS, 1)],
)
def test_the_fix_of_a_momentary_failure_says_when_the_next_try_is(age: float, minutes: int) -> None:
    described = Failure(MOMENTARY, 2, NOW - age).described()
    fix = (
        f"make room; the next try is in {minutes} minutes, "
        "or now: python -m bitlinear.doctor --rebuild"
    )
    assert described == replace(MOMENTARY, fix=fix)


def test_the_next_try_is_the_fix_if_there_is_no_other() -> None:
    described = Failure(replace(MOMENTARY, fix=""), 2, NOW).described()
    assert described.fix.startswith("the next try is in 60 minutes, or now: ")


@pytest.mark.parametrize("rejection", [LASTING, MOMENTARY, Rejection("no-gpu", "é\n\udcff")])
def test_json_round_trip(rejection: Rejection) -> None:
    failure = Failure(rejection, 3, NOW + 0.125)
    assert Failure.from_json(json.loads(json.dumps(failure.to_json()))) == failure


def test_the_path_of_the_log_is_not_kept() -> None:
    failure = Failure(replace(MOMENTARY, log=Path("/tmp/log.txt")), 1, NOW)
    assert "log.txt" not in json.dumps(failure.to_json())
    assert Failure.from_json(failure.to_json()) == Failure(MOMENTARY, 1, NOW)


GOOD = Failure(MOMENTARY, 2, NOW).to_json()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rejection": GOOD["rejection"]},
        {**GOOD, "rejection": None},
        {**GOOD, "rejection": {}},
        {**GOOD, "rejection": "the disk is full"},
        {**GOOD, "rejection": {"code": "compile-failed"}},
        {**GOOD, "rejection": {**GOOD["rejection"], "colour": "red"}},
        {**GOOD, "attempts": None},
        {**GOOD, "attempts": "many"},
        {**GOOD, "attempts": []},
        {**GOOD, "time": None},
        {**GOOD, "time": "yesterday"},
        {**GOOD, "time": {}},
        [],
        None,
        "text",
    ],
    ids=str,
)
def test_damaged_json_raises(values: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Failure.from_json(values)
