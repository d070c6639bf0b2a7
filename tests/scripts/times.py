"""Made-up times, for tests that must not depend on measured ones."""

from __future__ import annotations

from scripts.bench.timing import Summary


def summary(microseconds: float) -> Summary:
    """Return a steady time."""
    return Summary(microseconds * 1e-6, microseconds * 0.9e-6, microseconds * 1.1e-6, 7)


def made_up(**microseconds: float) -> dict[str, Summary]:
    """Return the times of a cell, by contestant."""
    return {name: summary(median) for name, median in microseconds.items()}
