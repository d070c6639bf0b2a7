"""The memory of processes, in bytes. Reads /proc, so that only Linux can run it."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def output_of(script, *arguments):
    """Run a script that measures memory in a process of its own; return its output."""
    # malloc must return large blocks to the system. By default it learns to keep them, so that
    # what was freed still counts, and what is allocated later does not.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    root = Path(__file__).parents[1]
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=root
    ).stdout


def growth_of(run):
    """By how much a function raises the resident memory, at its highest."""
    before = reset_peak()
    run()
    return resident("VmHWM") - before


def reset_peak():
    """Reset the peak; return what is resident.

    ``ru_maxrss`` would start at the peak of the parent process, gigabytes perhaps.
    """
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", bool)(0)  # what is free, or later calls reuse it
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name):
    """``VmRSS`` now, ``VmHWM`` at most, ``RssAnon`` outside files."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024
