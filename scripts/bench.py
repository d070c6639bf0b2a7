"""Times a deployed BitLinear, with each kernel that this machine can run, beside ``nn.Linear``.

    python scripts/bench.py [--shapes 4096x4096 1024x1024] [--tokens 1 32 512]

One process, one run: for each shape and batch size all contestants are timed in turn, round after
round, so that a drift of the machine's speed hits them alike. Figures are medians in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Callable

import torch
from torch import nn
from tqdm import tqdm

import bitlinear
from bitlinear import jit

Contestants = dict[str, Callable[[], object]]


def usable_kernels() -> list[str]:
    """The kernel variants that this machine can run, best first."""
    return [verdict.variant for verdict in bitlinear.available_kernels() if verdict.ok]


def contestants(n: int, k: int, m: int) -> Contestants:
    """What is timed for ``y[m, n] = x[m, k] @ w[n, k].T``, by name."""
    x = torch.randn(m, k)
    linear = nn.Linear(k, n).eval()
    half = nn.Linear(k, n, dtype=torch.bfloat16).eval()
    half_x = x.bfloat16()
    undeployed = bitlinear.BitLinear.from_linear(linear)
    deployed = bitlinear.BitLinear(k, n).deploy()

    return {
        "nn.Linear fp32": lambda: linear(x),
        "nn.Linear bf16": lambda: half(half_x),
        "undeployed": lambda: undeployed(x),
        **{name: lambda: deployed(x) for name in usable_kernels()},
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(calls: Contestants, budget: float) -> dict[str, float]:
    """Median microseconds of each call, in rounds until ``budget`` seconds have passed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    kernels = usable_kernels()
    end = time.perf_counter() + budget
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        rounds += 1
        for name, call in calls.items():
            if name in kernels:
                jit.activate(name)
            call()  # brings weights and code into the cache
            times[name] += [seconds(call) for _ in range(3)]
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "4096x4096"], metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 256], metavar="M")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per row (default: 2)")
    arguments = parser.parse_args()
    chosen = jit.runtime().kernel
    if chosen is None:
        parser.exit(1, f"no compiled kernel: {jit.runtime().problem}\n")

    cells = [(shape, m) for shape in arguments.shapes for m in arguments.tokens]
    rows = []
    with torch.inference_mode():
        for shape, m in tqdm(cells, desc="timing", unit="cell"):
            n, k = map(int, shape.split("x"))
            result = medians(contestants(n, k, m), arguments.budget)
            speedup = result["nn.Linear fp32"] / result[chosen]
            rows.append((f"{n} x {k}", str(m), *(f"{us:.1f}" for us in result.values()), speedup))
    names = list(result)

    print(f"{jit.runtime().hardware.cpu.brand}, {torch.get_num_threads()} threads; medians in us")
    print(f"| N x K | M | {' | '.join(names)} | {chosen} over fp32 |")
    print("|---" * (len(names) + 3) + "|")
    for *columns, speedup in rows:
        print(f"| {' | '.join(columns)} | {speedup:.1f}x |")


if __name__ == "__main__":
    main()
