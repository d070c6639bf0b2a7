"""Measures what ``import bitlinear`` costs: cold (all is compiled) and warm (from the cache).

    python -m scripts.bench.import_time [--runs 9]

Each figure is taken in fresh processes, after ``import torch``, with a cache directory of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

PROGRAM = """
import time, torch
start = time.perf_counter()
import bitlinear
seconds = time.perf_counter() - start
assert bitlinear.HAS_BITLINEAR, "no kernel could be compiled; see python -m bitlinear.doctor"
print(seconds)
"""


def import_seconds(cache: str) -> float:
    """Seconds that ``import bitlinear`` takes in a new process, torch being imported already."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "BITLINEAR_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9, help="warm imports to time (default: 9)")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as cache:
        cold = import_seconds(cache)
        warm = sorted(import_seconds(cache) for _ in range(runs))
    print(f"cold import: {cold:.1f} s on {os.cpu_count()} CPUs (target: 15 s on 2)")
    print(
        f"warm import: {statistics.median(warm) * 1e3:.0f} ms, median of {runs} "
        f"({warm[0] * 1e3:.0f} to {warm[-1] * 1e3:.0f}; target: 100 ms)"
    )


if __name__ == "__main__":
    main()
