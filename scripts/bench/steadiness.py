"""Time a deployed layer beside ``torch._int_mm`` again and again, to see what a machine does to it.

    python -m scripts.bench.steadiness [--minutes 30] [--busy 1] [--shapes NxK ...] [--tokens M ...]

A virtual machine can move its CPUs to cores that are far from each other, and others can keep them
busy. ``_int_mm``, which neither quantises nor scales, is the yardstick: the two take turns, so
``_int_mm / ours`` should stay the same. ``--busy`` starts processes that compute all the time, as
another program on the machine would.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from bitlinear import runtime
from scripts.bench import contestants, machine, report
from scripts.bench.arguments import Shape, parse_count, parse_seconds, parse_shape
from scripts.bench.devices import DEVICES
from scripts.bench.timing import Call

YARDSTICK = "int_mm"
SHAPES = [(768, 384), (1024, 1024), (2560, 2560), (5120, 5120)]
TOKENS = [16, 32, 128]

# (_int_mm's time, ours) in microseconds.
Pair = tuple[float, float]


def measure(
    shapes: Sequence[Shape], tokens: Sequence[int], seconds: float, budget: float
) -> dict[tuple[Shape, int], list[Pair]]:
    """Time all products in turns until ``seconds`` are over; return the times of each turn."""
    device = DEVICES["cpu"]
    kernel = contestants.chosen_kernel(device.name)
    if kernel is None:
        raise SystemExit("steadiness: there is no compiled kernel: python -m bitlinear.doctor")
    fields = {}
    for shape in shapes:
        layers = contestants.Layers(*shape, [YARDSTICK], [kernel], device)
        for M in tokens:
            field, _ = layers.contestants(M, device.modes[""])
            by_name = {contestant.name: contestant.call for contestant in field}
            fields[shape, M] = by_name[YARDSTICK], by_name[kernel]
    pairs: dict[tuple[Shape, int], list[Pair]] = {product: [] for product in fields}
    end = time.monotonic() + seconds
    while not pairs[next(iter(pairs))] or time.monotonic() < end:
        for product, (yardstick, ours) in fields.items():
            if len(pairs[product]) % 2 == 0:
                pair = mean_us(yardstick, budget / 2), mean_us(ours, budget / 2)
            else:
                second = mean_us(ours, budget / 2)
                pair = mean_us(yardstick, budget / 2), second
            pairs[product].append(pair)
    return pairs


def mean_us(call: Call, seconds: float) -> float:
    """The mean time of a call: unlike a median, it counts the calls that others have slowed."""
    call()
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or count == 0:
        call()
        count += 1
    return 1e6 * elapsed / count


def summarize(pairs: Sequence[Pair]) -> dict[str, str]:
    """Return the medians of both, and how far the ratio of their times goes from its median."""
    yardstick, ours = (statistics.median(times) for times in zip(*pairs))
    ratios = sorted(first / second for first, second in pairs)
    # The most extreme twentieths are single disturbances.
    cut = len(ratios) // 20
    low, high = ratios[cut], ratios[-1 - cut]
    median = statistics.median(ratios)
    return {
        "_int_mm, us": f"{yardstick:.1f}",
        "ours, us": f"{ours:.1f}",
        "_int_mm / ours": f"{median:.2f}",
        "of 90 % of the turns": f"{low:.2f} to {high:.2f}",
        "spread": f"{(high - low) / median:.0%}",
        "turns": str(len(ratios)),
    }


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep ``count`` CPUs busy meanwhile."""
    loop = [sys.executable, "-c", "while True: pass"]
    with contextlib.ExitStack() as processes:
        for _ in range(count):
            process = processes.enter_context(subprocess.Popen(loop))
            processes.callback(process.kill)
        yield


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.steadiness", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--shapes", nargs="+", type=parse_shape, metavar="NxK", default=SHAPES)
    add("--tokens", nargs="+", type=parse_count, metavar="M", default=TOKENS)
    add("--minutes", type=parse_seconds, default=30.0, help="how long in all (default: 30)")
    add(
        "--budget",
        type=parse_seconds,
        default=0.1,
        help="seconds of each turn (default: 0.1; a busy core needs some 2, many time slices)",
    )
    add("--busy", type=parse_count, metavar="N", help="processes that compute all the time")
    options = parser.parse_args(argv)
    with busy_processes(options.busy or 0), torch.inference_mode():
        results = measure(options.shapes, options.tokens, 60 * options.minutes, options.budget)
    rows = [
        {report.SHAPE: f"{N} x {K}", "M": str(M), **summarize(pairs)}
        for ((N, K), M), pairs in results.items()
    ]
    described = machine.describe(runtime.current().hardware, "cpu")
    threads = report.plural(torch.get_num_threads(), "thread")
    busy = report.plural(options.busy or 0, "busy core")
    print(f"{machine.display_name(described)}, {threads}, {busy}\n")
    cells = [tuple(row.values()) for row in rows]
    print(report.markdown(tuple(rows[0]), cells, words=(report.SHAPE,)))


if __name__ == "__main__":
    main()
