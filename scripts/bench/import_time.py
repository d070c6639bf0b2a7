"""Time ``import bitlinear``: cold (it compiles the kernel) and warm (from the cache).

    python -m scripts.bench.import_time [--runs 9]

Each import runs in a fresh process, after ``import torch``, with a cache directory of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from scripts.bench.arguments import parse_count

PROGRAM = """
import time, torch
start = time.perf_counter()
import bitlinear
seconds = time.perf_counter() - start
assert bitlinear.HAS_BITLINEAR, "no kernel could be compiled; see python -m bitlinear.doctor"
print(seconds)
"""


def import_seconds(cache: str) -> float:
    """Return the seconds of ``import bitlinear`` in a new process, after ``import torch``."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        # With bytecode, as for an installed package.
        env={
            **{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
            "BITLINEAR_CACHE_DIR": cache,
            "PYTHONPYCACHEPREFIX": os.path.join(cache, "bytecode"),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(result.stdout)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=parse_count, default=9, help="warm imports to time (default: 9)"
    )
    runs = parser.parse_args(argv).runs
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
