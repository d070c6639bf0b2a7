"""Fixtures of the benchmark's tests: measurements without peaks, and with made-up times."""

from __future__ import annotations

import pytest

from scripts.bench import benchmark, timing
from scripts.bench.timing import Summary


@pytest.fixture
def no_peaks(monkeypatch):
    """Measure no peaks: to compile and to measure them takes seconds."""
    monkeypatch.setattr(benchmark, "_measure_peaks", lambda *_: {})


@pytest.fixture
def scripted(monkeypatch, no_peaks):
    """Return a function that makes up the times of the next measurements.

    It returns the list of the budgets that these measurements get.
    """
    budgets = []

    def script(*measurements: dict[str, Summary]) -> list[float]:
        remaining = iter(measurements)

        def compare(field, budget, timer):
            budgets.append(budget)
            return next(remaining)

        monkeypatch.setattr(timing, "compare", compare)
        return budgets

    return script
