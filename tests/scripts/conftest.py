"""Shared fixtures: one thread, measurements with made-up times, one run of the language model."""

from __future__ import annotations

import contextlib

import pytest
import torch

from scripts.bench import benchmark, timing
from scripts.bench.timing import Summary
from tests.scripts.small_char_lm import arguments


@contextlib.contextmanager
def single_thread():
    """Run torch on one thread, here and in processes that are started.

    Threads that share a busy core wait for each other, and such small networks gain nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread():
    with single_thread():
        yield


@pytest.fixture(scope="session")
def text():
    """The text of the language model."""
    from scripts import char_training

    return char_training.load_text()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The output directory of a small run of the language model that nothing has interrupted."""
    from scripts import char_lm

    out = tmp_path_factory.mktemp("finished")
    with single_thread():
        char_lm.main(arguments(out))
    return out


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
