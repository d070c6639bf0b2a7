"""Shared fixtures: one thread, made-up times, an imaginary GPU, one run of the language model."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from scripts.bench import benchmark, contestants, cuda_timing, machine, peaks, timing
from scripts.bench.devices import DEVICES
from scripts.bench.peaks import Peaks
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


@pytest.fixture
def no_gpu(monkeypatch):
    """A "GPU" that runs on the CPU: in place of graphs, lists of calls."""
    monkeypatch.setattr(contestants, "available_kernels", lambda device: ["reference"])
    monkeypatch.setattr(cuda_timing, "capture", lambda calls: lambda: [call() for call in calls])
    monkeypatch.setattr(cuda_timing, "graph_timer", timing.cpu_timer)
    monkeypatch.setattr(machine, "gpu", lambda: {"name": "Imaginary GPU", "l2_bytes": 2000})
    cuda = DEVICES["cuda"]
    modes = {name: replace(mode, timer=timing.cpu_timer) for name, mode in cuda.modes.items()}
    here = replace(cuda, torch_device="cpu", is_available=lambda: True, modes=modes)
    monkeypatch.setitem(DEVICES, "cuda", here)
    measured = Peaks(1, {1 << 30: 3e12}, {"bf16": 7e14})
    monkeypatch.setattr(peaks, "measure_gpu", lambda *_: measured)
