"""Measure every cell of a benchmark, and fill in the results.

Everything runs in one process. In each cell (a shape, a batch size, a number of threads; on a GPU,
a way of timing) all contestants take turns, round after round, so that a machine whose speed drifts
treats them alike. The figures are medians and quartiles, beside the machine's peaks, which are
measured too.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from bitlinear import runtime
from bitlinear.kernels import VARIANTS
from bitlinear.packing import packed_shape
from scripts import tools
from scripts.bench import contestants, machine, peaks, records, report, timing
from scripts.bench.arguments import Shape
from scripts.bench.contestants import KERNEL, LAYER, OTHERS
from scripts.bench.devices import Device, Mode
from scripts.bench.peaks import Peaks
from scripts.bench.records import Cell, Record

with tools.importing("bench"):
    from tqdm import tqdm

# How often --check measures a lost cell, each time for twice as long, before the cell is lost.
MEASUREMENTS = 3


@dataclass(frozen=True)
class Setup:
    """The options of a benchmark.

    Attributes:
        shapes: ``(N, K)`` of the layers. The cells are all combinations of the shapes with
        tokens: these batch sizes,
        threads: these numbers of threads,
        modes: and these modes of the device.
        budget: Seconds for each cell.
        device: The device.
        kernels: The kernels that the deployed layer runs on, one after the other.
        chosen: The kernel that ``import bitlinear`` chose.
        others: The other contestants.
        json: The path of the results file.
        check: Whether a cell that ``chosen`` loses to a complete layer is measured again.
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
    def roles(self) -> dict[str, str]:
        """The role of every contestant."""
        kernels = dict.fromkeys(self.kernels, KERNEL)
        return {**kernels, **{name: OTHERS[name].role for name in self.others}}

    @property
    def layers(self) -> list[str]:
        """The complete layers, which ``chosen`` has to beat."""
        return [name for name, role in self.roles.items() if role == LAYER]

    @property
    def checked_modes(self) -> list[str]:
        """The modes that ``--check`` looks at."""
        return [name for name in self.modes if self.device.modes[name].checked]


def describe(setup: Setup) -> Record:
    """Return results without cells: the machine, the versions and the contestants."""
    kinds = {name: {"label": f"BitLinear {name}", "note": ""} for name in setup.kernels}
    kinds |= {
        name: {"label": OTHERS[name].label, "note": OTHERS[name].note} for name in setup.others
    }
    described = machine.describe(runtime.current().hardware, setup.device.name)
    return {
        "schema": records.SCHEMA,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "device": setup.device.name,
        "baseline": setup.device.baseline,
        "modes": setup.modes,
        "checked": setup.checked_modes,
        "budget_s": setup.budget,
        "machine": {**described, "threads": setup.threads},
        "versions": {**machine.versions(), **contestants.versions(setup.others)},
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "chosen_kernel": setup.chosen,
        "contestants": {name: {"role": setup.roles[name], **kind} for name, kind in kinds.items()},
        "peaks": [],
        "peaks_missing": {},
        "skipped": [],
        "cells": [],
    }


def measure(setup: Setup, results: Record) -> None:
    """Fill in the results, cell by cell, and keep the file up to date."""
    with _process_restored(setup.device.name), torch.inference_mode():
        _measure_cells(setup, results)


def _measure_cells(setup: Setup, results: Record) -> None:
    device = setup.device
    failed = contestants.build_kernels(setup.kernels) if device.name == "cpu" else {}
    kernels = [name for name in setup.kernels if name not in failed]
    peaks_by_threads = _measure_peaks(setup, kernels, results)
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
                records.note_skipped(results, cell, {**failed, **missing})
                bounds = _bounds(cell, kernels, peaks_by_threads.get(threads), device.modes[mode])
                results["cells"].append(_measure_cell(setup, cell, field, bounds))
                if setup.json is not None:
                    records.write(setup.json, results)
                bar.update()


def _measure_cell(
    setup: Setup, cell: Cell, field: Sequence[timing.Contestant], bounds: Mapping[str, float]
) -> Record:
    mode = setup.device.modes[cell.mode]
    for number in range(1, MEASUREMENTS + 1):
        times = timing.compare(field, setup.budget * 2 ** (number - 1), mode.timer)
        record = records.record(
            cell,
            times,
            roles=setup.roles,
            bounds=bounds,
            baseline=setup.device.baseline,
            measurements=number,
        )
        lead = records.lead(record, setup.chosen)
        if not (setup.check and mode.checked) or lead is None or lead >= 1:
            break
    return record


def _measure_peaks(setup: Setup, kernels: Sequence[str], results: Record) -> dict[int, Peaks]:
    """Measure the peaks by the number of threads; without a compiler there are none."""
    if setup.device.name == "cuda":
        name = machine.gpu()["name"]
        measured = peaks.measure_gpu(name, setup.chosen)
        if setup.chosen not in measured.multiply_add:
            results["peaks_missing"][setup.chosen] = f"the int8 peak of {name} is not in peaks.py"
        results["peaks"] = [records.peaks_record(measured)]
        return dict.fromkeys(setup.threads, measured)
    loops = {}
    compiler = runtime.current().hardware.compiler.value
    for variant in sorted(VARIANTS, key=lambda variant: -variant.priority):
        if variant.name in kernels:
            try:
                loops[variant.name] = peaks.compile_loops(variant, compiler)
            except (RuntimeError, OSError) as error:
                results["peaks_missing"][variant.name] = contestants.one_line(error)
    if not loops:
        return {}
    by_threads = {threads: peaks.measure(loops, threads) for threads in setup.threads}
    results["peaks"] = [records.peaks_record(measured) for measured in by_threads.values()]
    return by_threads


def _bounds(
    cell: Cell, kernels: Iterable[str], measured: Peaks | None, mode: Mode
) -> dict[str, float]:
    if measured is None or not mode.bounded:
        return {}
    return {name: measured.bound(name, cell.packed_bytes, cell.operations) for name in kernels}


@contextlib.contextmanager
def _process_restored(device: str) -> Iterator[None]:
    """Restore the number of threads and the kernel of this process at the end."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if device == "cpu":
            runtime.activate(None)
