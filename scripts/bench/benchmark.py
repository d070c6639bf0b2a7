"""Times a deployed BitLinear, with each kernel that this machine can run, beside its alternatives.

    python -m scripts.bench [--grid floor] [--json scripts/bench/results/NAME.json] [--check]
    python -m scripts.bench --device cuda [...]

Everything runs in one process. In each cell (a shape, a batch size, a number of threads; on a GPU,
a way of timing) all contestants take turns, round after round, so that a machine whose speed drifts
treats them alike; figures are medians and quartiles, set against what the machine can do at best,
measured too. The table goes to standard output as Markdown; the JSON file has the same figures and
the circumstances.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from bitlinear import runtime
from bitlinear.kernels import VARIANTS
from bitlinear.packing import packed_shape
from scripts.bench import contestants, machine, peaks, report, timing
from scripts.bench.contestants import OTHERS, PEER
from scripts.bench.devices import DEVICES, Device, Mode
from scripts.bench.peaks import Peaks
from scripts.bench.report import Cell, Record

Shape = tuple[int, int]

GRIDS: dict[str, dict[str, tuple[list[Shape], list[int]]]] = {
    "cpu": {
        "quick": ([(1024, 1024), (4096, 4096)], [1, 8, 32, 256]),
        # Where a deployed layer must never be slower than an alternative.
        "floor": (
            [
                (64, 64), (512, 256), (256, 512), (1024, 1024), (2560, 2560), (4096, 4096),
                (2560, 6912), (6912, 2560), (14336, 4096),
            ],
            [1 << exponent for exponent in range(11)],
        ),
    },
    "cuda": {
        "quick": ([(2560, 6912), (8192, 8192)], [1, 16, 64, 1024]),
        "floor": (
            [
                (64, 64), (512, 256), (256, 512), (1024, 1024), (2560, 2560), (4096, 4096),
                (2560, 6912), (6912, 2560), (13824, 2560), (14336, 4096), (8192, 8192),
                (28672, 8192),
            ],
            [*(1 << exponent for exponent in range(11)), 4096],
        ),
    },
}  # fmt: skip

# How often --check measures a lost cell, each time for twice as long, before it believes it.
MEASUREMENTS = 3

FAILED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    setup = _parse(argv)
    results = _circumstances(setup)
    code = 0
    try:
        with _process_restored(setup.device.name), torch.inference_mode():
            _measure(setup, results)
        results["complete"] = True
    except KeyboardInterrupt:
        code = INTERRUPTED
    if setup.json is not None:
        report.write(setup.json, results)
    print(report.render(results))
    if setup.check and code == 0:
        verdict, passed = report.check(results)
        print(f"\n{verdict}")
        code = 0 if passed else FAILED
    return code


# --------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Setup:
    """What to measure.

    Attributes:
        shapes: ``(N, K)`` of the layers; the cells are all combinations of these,
        tokens: these batch sizes
        threads: these numbers of threads
        modes: and these modes of the device.
        budget: Seconds for each cell.
        device: Where.
        kernels: What the deployed layer runs on, one after the other.
        chosen: What ``import bitlinear`` chose for it.
        others: The other contestants.
        json: Where to write the results.
        check: Whether a cell that ``chosen`` loses is measured again, and counts as a failure.
    """

    shapes: list[Shape]
    tokens: list[int]
    threads: list[int]
    modes: list[str]
    budget: float
    device: Device
    kernels: list[str]
    chosen: str
    others: list[str]
    json: Path | None
    check: bool

    @property
    def peers(self) -> list[str]:
        """Those of the others that ``chosen`` has to beat."""
        return [name for name in self.others if OTHERS[name].roles[self.device.name] == PEER]


def parse_shape(text: str) -> Shape:
    """``(N, K)`` from ``NxK``, for argparse."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NxK, such as 4096x1024")
    return int(match[1]), int(match[2])


def parse_count(text: str) -> int:
    """A whole number above 0, for argparse."""
    if re.fullmatch(r"[1-9]\d*", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_seconds(text: str) -> float:
    """A duration above 0, for argparse."""
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"{report.EXPLANATION}\n{report.GPU_EXPLANATION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ["bitlinear", *OTHERS]
    budgets = ", ".join(f"{its.budget:g} on {name}" for name, its in DEVICES.items())
    add = parser.add_argument
    add("--grid", choices=GRIDS["cpu"], default="quick", help="which cells (default: quick)")
    add("--shapes", nargs="+", type=parse_shape, metavar="NxK", help="instead of the grid's")
    add("--tokens", nargs="+", type=parse_count, metavar="M", help="instead of the grid's")
    add("--threads", nargs="+", type=parse_count, metavar="T", help="default: those of torch")
    add("--modes", nargs="+", metavar="MODE", help="ways of timing on a GPU (default: all)")
    add("--budget", type=parse_seconds, help=f"seconds for each cell (default: {budgets})")
    add("--device", choices=DEVICES, default="cpu")
    add("--contestants", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--kernels", nargs="+", metavar="NAME", help="default: all that this machine can run")
    add("--json", type=Path, metavar="PATH", help="write the results there")
    add("--check", action="store_true", help="exit with 1 if the chosen kernel loses a cell")
    return parser


def _parse(argv: Sequence[str] | None) -> Setup:
    parser = _parser()
    options = parser.parse_args(argv)
    device = DEVICES[options.device]
    if not device.is_available():
        parser.error(f"--device {device.name}: torch finds no GPU")
    modes = options.modes or list(device.modes)
    if not set(modes) <= set(device.modes):
        parser.error(f"--modes: on {device.name} there are {', '.join(device.modes) or 'none'}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.parent}")

    here = ["bitlinear", *(name for name, kind in OTHERS.items() if device.name in kind.roles)]
    wanted = options.contestants or here
    if not set(wanted) <= set(here):
        parser.error(f"--contestants: on {device.name} there are {', '.join(here)}")
    available = contestants.available_kernels(device.name)
    kernels = (options.kernels or available) if "bitlinear" in wanted else []
    if not set(kernels) <= set(available):
        parser.error(f"--kernels: on this machine there are {', '.join(available)}")
    chosen = contestants.chosen_kernel(device.name)
    if chosen is None:
        parser.error(f"there is no compiled kernel: {runtime.current().problem}")
    shapes, tokens = GRIDS[device.name][options.grid]
    setup = Setup(
        shapes=options.shapes or shapes,
        tokens=options.tokens or tokens,
        threads=options.threads or [torch.get_num_threads()],
        modes=modes,
        budget=options.budget or device.budget,
        device=device,
        kernels=kernels,
        chosen=chosen,
        others=[name for name in here if name in wanted and name in OTHERS],
        json=options.json,
        check=options.check,
    )
    if setup.check and not (chosen in kernels and setup.peers and _checked(setup)):
        parser.error(f"--check compares {chosen} with its peers: leave them in")
    return setup


def _checked(setup: Setup) -> list[str]:
    return [name for name in setup.modes if setup.device.modes[name].checked]


# --------------------------------------------------------------------------------- measuring


def _circumstances(setup: Setup) -> Record:
    """The results before anything is measured."""
    labels = {
        name: {"role": "kernel", "label": f"BitLinear {name}", "note": ""} for name in setup.kernels
    }
    for name in setup.others:
        kind = OTHERS[name]
        role = kind.roles[setup.device.name]
        labels[name] = {"role": role, "label": kind.label, "note": kind.note}
    described = machine.describe(runtime.current().hardware, setup.device.name)
    return {
        "schema": report.SCHEMA,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "device": setup.device.name,
        "baseline": setup.device.baseline,
        "modes": setup.modes,
        "checked": _checked(setup),
        "budget_s": setup.budget,
        "machine": {**described, "threads": setup.threads},
        "versions": machine.versions(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "chosen_kernel": setup.chosen,
        "contestants": labels,
        "peaks": [],
        "peaks_missing": {},
        "skipped": [],
        "cells": [],
    }


def _measure(setup: Setup, results: Record) -> None:
    """Fills the results in, cell by cell, and keeps the file up to date."""
    device = setup.device
    failed = contestants.build_kernels(setup.kernels) if device.name == "cpu" else {}
    kernels = [name for name in setup.kernels if name not in failed]
    known = _measure_peaks(setup, kernels, results)
    dtype = str(device.dtype).rpartition(".")[2]
    settings = list(itertools.product(setup.threads, setup.tokens, setup.modes))
    with tqdm(total=len(setup.shapes) * len(settings), desc="timing", unit="cell") as bar:
        for N, K in setup.shapes:
            copies = device.copies(math.prod(packed_shape(N, K)))
            layers = contestants.Layers(N, K, setup.others, kernels, device, copies)
            for threads, M, mode in settings:
                torch.set_num_threads(threads)
                cell = Cell(N, K, M, threads, dtype, mode)
                bar.set_postfix_str(report.title(vars(cell)))
                field, missing = layers.contestants(M, device.modes[mode])
                report.note_skipped(results, cell, {**failed, **missing})
                bounds = _bounds(cell, kernels, known.get(threads), device.modes[mode])
                results["cells"].append(_measure_cell(setup, cell, field, bounds))
                if setup.json is not None:
                    report.write(setup.json, results)
                bar.update()


def _measure_cell(
    setup: Setup, cell: Cell, field: Sequence[timing.Contestant], bounds: Mapping[str, float]
) -> Record:
    mode = setup.device.modes[cell.mode]
    for number in range(1, MEASUREMENTS + 1):
        times = timing.compare(field, setup.budget * 2 ** (number - 1), mode.timer)
        record = report.record(
            cell,
            times,
            kernels=setup.kernels,
            peers=setup.peers,
            bounds=bounds,
            baseline=setup.device.baseline,
            measurements=number,
        )
        lead = report.lead(record, setup.chosen)
        if not (setup.check and mode.checked) or lead is None or lead >= 1:
            break
    return record


def _measure_peaks(setup: Setup, kernels: Sequence[str], results: Record) -> dict[int, Peaks]:
    """The peaks by the number of threads; empty where there is nothing to measure them with."""
    if setup.device.name == "cuda":
        name = machine.gpu()["name"]
        its = peaks.measure_gpu(name, setup.chosen)
        if setup.chosen not in its.multiply_add:
            results["peaks_missing"][setup.chosen] = f"the int8 peak of {name} is not in peaks.py"
        results["peaks"] = [report.peaks_record(its)]
        return dict.fromkeys(setup.threads, its)
    loops = {}
    compiler = runtime.current().hardware.compiler.value
    for variant in sorted(VARIANTS, key=lambda variant: -variant.priority):
        if variant.name in kernels:
            try:
                loops[variant.name] = peaks.compile_loops(variant, compiler)
            except (RuntimeError, OSError) as error:
                results["peaks_missing"][variant.name] = contestants.one_line(error)
    known = {threads: peaks.measure(loops, threads) for threads in setup.threads} if loops else {}
    results["peaks"] = [report.peaks_record(its) for its in known.values()]
    return known


def _bounds(
    cell: Cell, kernels: Iterable[str], known: Peaks | None, mode: Mode
) -> dict[str, float]:
    if known is None or not mode.bounded:
        return {}
    return {name: known.bound(name, cell.packed_bytes, cell.operations) for name in kernels}


@contextlib.contextmanager
def _process_restored(device: str) -> Iterator[None]:
    """Undoes what measuring changes in this process: the number of threads, and the kernel."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if device == "cpu":
            runtime.activate(None)


if __name__ == "__main__":
    raise SystemExit(main())
