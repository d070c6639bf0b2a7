"""Measure prefill, decode, memory and the parts of a token of each contestant, cell by cell.

The results are one JSON object, with the conventions of ``records.py``. Its fields:

- ``schema``, ``benchmark`` ("generate"), ``time`` (UTC), ``complete``, ``device``, ``budget_s``,
  ``limit_s``, ``machine``, ``versions``, ``chosen_kernel``,
  ``llama_system_info``
- ``model``: the name of the ``shape``, its config's sizes, the number of ``weights``
- ``read``: the bandwidth of memory by the size of the working set
- ``contestants``: by name, ``label``, ``note``, ``ours`` (whether it is a setting of ``convert``),
  ``token_bytes`` (of weights that a token reads), ``memory`` (see ``memory.py``) and ``parts``
  (microseconds of each part of a token; see ``breakdown.py``), or None where there is none
- ``skipped``: a ``contestant``, the ``reason``, and the ``cells`` that it is missing from
- ``cells``: a ``phase``, a ``length`` (of the prompt, or of what is in the cache), a ``batch``, and
  by contestant the quartiles of a pass, ``tokens_per_s``, and ``share_of_floor``: the time in which
  memory can be read, over the median; None for a prefill
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Callable

import torch

from bitlinear import runtime
from bitlinear.kernels import VARIANTS
from scripts import tools
from scripts.bench import contestants as layers
from scripts.bench import machine, peaks, records, timing
from scripts.bench.devices import Device
from scripts.bench.generation import breakdown, llama, memory, models
from scripts.bench.generation.contestants import KINDS, Engine, Materials
from scripts.bench.generation.torch_engine import TorchEngine
from scripts.bench.peaks import Peaks
from scripts.bench.records import Record

with tools.importing("bench"):
    from tqdm import tqdm
with tools.importing("dev"):
    import transformers

PREFILL, DECODE, CAPTURED, STEP = "prefill", "decode", "captured decode", "captured step"

# A call of a decoding generates tokens for about so long, but at most so many.
CALL_SECONDS, CALL_TOKENS = 0.5, 16
# Captured tokens take a tenth of the time.
CAPTURED_TOKENS = 64
# Prompts that tell how long a pass takes.
PROBES = (1, 64)
# Beyond any cache of a usual machine.
MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Cell:
    """What is timed: a phase, the length of its prompt or cache, and the number of sequences."""

    phase: str
    length: int
    batch: int

    @property
    def title(self) -> str:
        """The cell for people."""
        return title(asdict(self))

    @property
    def tokens(self) -> int:
        """The tokens that a pass reads."""
        return self.batch * (self.length if self.phase == PREFILL else 1)


def title(cell: Record) -> str:
    """Return the name of a cell of the results."""
    return f"{cell['phase']} {cell['length']}, batch {cell['batch']}"


@dataclass(frozen=True)
class Setup:
    """The options of the benchmark.

    Attributes:
        shape: A name in ``models.SHAPES``.
        layers: Another number of layers, or None.
        device: The device.
        threads: Of torch and of llama.cpp.
        contestants: Names in ``KINDS``.
        prefill: Lengths of prompts.
        depths: Numbers of tokens in the cache when a decoding begins.
        batches: Numbers of sequences.
        budget: Seconds of each cell.
        limit: A contestant whose call takes more seconds than this is left out of a cell.
        with_memory: Whether to measure memory.
        json: The path of the results file.
    """

    shape: str
    layers: int | None
    device: Device
    threads: int
    contestants: list[str]
    prefill: list[int]
    depths: list[int]
    batches: list[int]
    budget: float
    limit: float
    with_memory: bool
    json: Path | None

    @property
    def cells(self) -> list[Cell]:
        """All cells, the short ones first."""
        lengths = [(PREFILL, n) for n in self.prefill] + [(DECODE, n) for n in self.depths]
        if self.device.name == "cuda":
            lengths += [(phase, n) for phase in (CAPTURED, STEP) for n in self.depths]
        return [Cell(phase, n, batch) for batch in self.batches for phase, n in lengths]


def describe(setup: Setup) -> Record:
    """Return results without figures."""
    config = models.make_config(setup.shape, setup.layers)
    sizes = {key: getattr(config, key) for key in models.SHAPES[setup.shape]}
    described = machine.describe(runtime.current().hardware, setup.device.name)
    versions = {**machine.versions(), "transformers": transformers.__version__}
    llama_cpp = llama.describe()
    if llama_cpp is not None:
        versions[llama.PACKAGE] = llama_cpp["version"]
    return {
        "schema": records.SCHEMA,
        "benchmark": "generate",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "device": setup.device.name,
        "budget_s": setup.budget,
        "limit_s": setup.limit,
        "machine": {**described, "threads": setup.threads},
        "versions": versions,
        "llama_system_info": llama_cpp and llama_cpp["system_info"],
        "chosen_kernel": layers.chosen_kernel(setup.device.name),
        "model": {"shape": setup.shape, **sizes, "weights": models.weight_count(**sizes)},
        "read": [],
        "contestants": {},
        "skipped": [],
        "cells": [],
    }


def measure(setup: Setup, results: Record) -> None:
    """Fill in the results, and keep the file up to date."""
    torch.set_num_threads(setup.threads)
    with tempfile.TemporaryDirectory() as folder:
        materials = Materials(
            setup.shape, setup.layers, setup.device.torch_device, setup.threads, Path(folder)
        )
        _Measurement(setup, results, materials).run()


class _Measurement:
    def __init__(self, setup: Setup, results: Record, materials: Materials) -> None:
        self._setup, self._results, self._materials = setup, results, materials
        self._engines: dict[str, Engine] = {}
        self._costs: dict[str, Callable[[int], float]] = {}
        self._memory: dict[str, dict[str, int]] = {}

    def run(self) -> None:
        measured = measure_peaks(self._setup.device, self._setup.threads)
        self._results["read"] = records.peaks_record(measured)["read"]
        names = self._setup.contestants
        has_memory = self._setup.with_memory and memory.STATUS.exists()
        stages = [
            # Memory first, as long as this process leaves the machine's to others.
            *((f"memory of {n}", partial(self._measure_memory, n)) for n in names if has_memory),
            *((f"making {n}", partial(self._make, n)) for n in names),
            *((c.title, partial(self._measure_cell, c, measured)) for c in self._setup.cells),
            *((f"parts of {n}", partial(self._measure_parts, n)) for n in names),
        ]
        with tqdm(stages, unit="stage") as bar:
            for title, stage in bar:
                bar.set_postfix_str(title)
                stage()
                if self._setup.json is not None:
                    records.write(self._setup.json, self._results)

    def _skip(self, name: str, reason: str, cells: Sequence[Cell] = ()) -> None:
        for skipped in self._results["skipped"]:
            if (skipped["contestant"], skipped["reason"]) == (name, reason):
                break
        else:
            skipped = {"contestant": name, "reason": reason, "cells": []}
            self._results["skipped"].append(skipped)
        skipped["cells"] += map(asdict, cells)

    def _measure_memory(self, name: str) -> None:
        setup, kind = self._setup, KINDS[name]
        made = {"name": name, "shape": setup.shape, "layers": setup.layers}
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = str(self._materials.gguf(kind.head)) if kind.head else None
                if name in models.SETTINGS:
                    memory.save(**made, folder=folder)
                    path = folder
                self._memory[name] = memory.measure(
                    **made, device=setup.device.torch_device, threads=setup.threads, path=path
                )
        except (RuntimeError, OSError) as error:
            self._skip(name, f"no memory: {layers.one_line(error)}")

    def _make(self, name: str) -> None:
        kind = KINDS[name]
        try:
            engine = kind.make(self._materials)
            cost = _linear_cost([_second_time(engine.first_token(n, 1)) for n in PROBES])
        except (RuntimeError, OSError) as error:
            self._skip(name, layers.one_line(error), self._setup.cells)
            return
        self._engines[name], self._costs[name] = engine, cost
        self._results["contestants"][name] = {
            "label": kind.label,
            "note": kind.note,
            "ours": name in models.SETTINGS,
            "token_bytes": engine.token_bytes,
            "memory": self._memory.get(name),
            "parts": None,
        }

    def _measure_cell(self, cell: Cell, measured: Peaks) -> None:
        field = []
        for name, engine in self._engines.items():
            try:
                field.append(self._contestant(name, engine, cell))
            except RuntimeError as error:
                self._skip(name, layers.one_line(error), [cell])
        times = timing.compare(field, self._setup.budget, _self_timer)
        cache = models.cache_bytes(self._materials.config) * cell.length * cell.batch
        figures = {}
        for name, time in times.items():
            total = self._engines[name].token_bytes + cache
            floor = total / measured.read_rate(total) / time.median
            figures[name] = {
                **records.quartiles(time),
                "tokens_per_s": float(f"{cell.tokens / time.median:.6g}"),
                "share_of_floor": None if cell.phase == PREFILL else float(f"{floor:.6g}"),
            }
        self._results["cells"].append({**asdict(cell), "contestants": figures})

    def _contestant(self, name: str, engine: Engine, cell: Cell) -> timing.Contestant:
        """Return what to time.

        Raises:
            RuntimeError: It would take too long, or memory or a CUDA graph cannot hold it.
        """
        seconds = self._costs[name](cell.tokens)
        count = max(1, min(CALL_TOKENS, int(CALL_SECONDS / seconds)))
        passes = 1 if cell.phase == PREFILL else 1 + count
        if passes * seconds > self._setup.limit:
            raise RuntimeError(
                f"a call would take {passes * seconds:.0f} s, over the limit of "
                f"{self._setup.limit:g} s"
            )
        if cell.phase in (CAPTURED, STEP):
            if not isinstance(engine, TorchEngine):
                raise RuntimeError("only models of torch are captured")
            make = engine.captured_tokens if cell.phase == CAPTURED else engine.captured_steps
            call = make(cell.length, cell.batch, CAPTURED_TOKENS)
            return timing.Contestant(name, call, repeats=CAPTURED_TOKENS)
        if cell.phase == PREFILL:
            return timing.Contestant(name, engine.first_token(cell.length, cell.batch))
        call = engine.next_tokens(cell.length, cell.batch, count)
        return timing.Contestant(name, call, repeats=count)

    def _measure_parts(self, name: str) -> None:
        engine = self._engines.get(name)
        depth = min(self._setup.depths, default=0)
        if not isinstance(engine, TorchEngine) or not depth:
            return
        count = max(1, min(CALL_TOKENS, int(CALL_SECONDS / self._costs[name](1))))
        parts = breakdown.measure(engine, depth, 1, count)
        self._results["contestants"][name]["parts"] = {
            "depth": depth,
            "batch": 1,
            "tokens": count,
            "us": {part: float(f"{seconds * 1e6:.6g}") for part, seconds in parts.items()},
        }


def measure_peaks(device: Device, threads: int) -> Peaks:
    """Measure the bandwidth of memory.

    Raises:
        RuntimeError: There is no compiler, or it fails.
    """
    kernel = layers.chosen_kernel(device.name)
    if device.name == "cuda":
        return peaks.measure_gpu(machine.gpu()["name"], kernel)
    (variant,) = (variant for variant in VARIANTS if variant.name == kernel)
    loops = peaks.compile_loops(variant, runtime.current().hardware.compiler.value)
    return peaks.measure({kernel: loops}, threads, (*peaks.WORKING_SETS, MEMORY_BYTES))


def _self_timer(call: timing.Call, count: int) -> float:
    """Time calls that return the seconds that count."""
    return sum(float(call()) for _ in range(count)) / count


def _second_time(call: Callable[[], float]) -> float:
    call()  # compiles, allocates
    return call()


def _linear_cost(seconds: Sequence[float]) -> Callable[[int], float]:
    """Return the seconds of a pass by its number of tokens, from the times of the probes."""
    low, high = PROBES
    slope = max(0.0, (seconds[1] - seconds[0]) / (high - low))
    return lambda tokens: seconds[0] + slope * (tokens - low)
