"""Fixtures for all tests, and the same random numbers in every run."""

from __future__ import annotations

import logging
import os
import tempfile

# Read when torch loads its OpenMP library. Threads that wait then sleep: if they spin, small layers
# take ten times as long on a machine whose cores are busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.processes import Processes

if "ATEN_CPU_CAPABILITY" in os.environ:
    # The key of torch's cache of compiled graphs does not contain the capability.
    folder = f"inductor-{os.getuid()}-{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), folder))

settings.register_profile("bitlinear", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("bitlinear")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def fresh_compiler():
    """Drop the compiled code of other tests, which counts against dynamo's limits."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def processes():
    """Processes on CPUs, for the whole session, because each takes seconds to start."""
    pool = Processes()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def gpu_processes():
    """Processes with one GPU each, for the whole session."""
    pool = Processes("cuda")
    yield pool
    pool.stop()


@pytest.fixture
def threads():
    """``threads(n)`` sets the number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def log(caplog):
    """A function that returns the messages of the logger ``"bitlinear"`` so far."""
    caplog.set_level(logging.INFO, logger="bitlinear")

    def lines():
        return [r.getMessage() for r in caplog.records if r.name == "bitlinear"]

    return lines
