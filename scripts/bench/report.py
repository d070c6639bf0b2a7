"""From times to results: the records of the JSON file, the table, the check.

A results file is one JSON object, written by ``bench.py`` and read by ``plot.py``. ``SCHEMA``
counts up whenever a field disappears or changes its meaning. Its fields:

- ``schema``, ``time`` (UTC), ``complete`` (not interrupted), ``device``, ``budget_s``
- ``machine``, ``versions``, ``torch_cpu_capability``, ``chosen_kernel``
- ``baseline``: the contestant that speed-ups refer to
- ``modes``: the ways of timing; ``checked``: those in which the chosen kernel must lose to no peer
- ``contestants``: by name, a ``label`` for people, a ``role`` (``kernel``: a deployed layer on that
  kernel; ``peer``: what it has to beat; ``other``) and a ``note``
- ``peaks``: for each number of threads, see :func:`peaks_record`; ``peaks_missing``: by kernel, why
- ``skipped``: a ``contestant``, the ``reason``, and the ``cells`` from which it is missing
- ``cells``: see :func:`record`
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bench import targets
from scripts.bench.peaks import Peaks
from scripts.bench.timing import Summary

SCHEMA = 1

# What becomes an object of the JSON file.
Record = dict[str, Any]

# What files lack that were written before there were several ways of timing.
_ONE_MODE = {"baseline": "fp32", "modes": [""], "checked": [""]}


# --------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Cell:
    """One product, ``y[M, N] = x[M, K] @ w[N, K].T``, on a number of threads.

    Attributes:
        dtype: Of BitLinear's input and output.
        mode: How it is timed; "" on a CPU, where there is one way.
    """

    N: int
    K: int
    M: int
    threads: int
    dtype: str
    mode: str = ""

    @property
    def operations(self) -> int:
        """A multiply-add is two."""
        return 2 * self.M * self.N * self.K

    @property
    def packed_bytes(self) -> int:
        """The size of a deployed layer's weights."""
        return self.N * -(-self.K // 4)


def record(
    cell: Cell,
    times: Mapping[str, Summary],
    *,
    kernels: Collection[str],
    peers: Collection[str],
    bounds: Mapping[str, float],
    baseline: str,
    measurements: int = 1,
) -> Record:
    """A cell's figures; None where one has no meaning, or nothing to be computed from.

    Args:
        cell: What was computed.
        times: By contestant.
        kernels: The contestants that are deployed layers: they read the packed weights.
        peers: The contestants that a deployed layer is to beat.
        bounds: The least seconds that the machine can take, by kernel.
        baseline: The contestant that speed-ups refer to.
        measurements: How often the cell was measured; ``times`` are of the last time.
    """
    medians = {name: its.median for name, its in times.items()}
    fastest = min((name for name in peers if name in medians), key=medians.__getitem__, default="")
    contestants = {}
    for name, its in times.items():
        contestants[name] = {
            **quartiles(its),
            "gops": _ratio(cell.operations * 1e-9, its.median),
            "gbps": _ratio(cell.packed_bytes * 1e-9 if name in kernels else None, its.median),
            "share_of_bound": _ratio(bounds.get(name), its.median),
            f"speedup_over_{baseline}": _ratio(medians.get(baseline), its.median),
            "speedup_over_fastest_peer": _ratio(medians.get(fastest), its.median),
        }
    return {
        **asdict(cell),
        "measurements": measurements,
        "fastest_peer": fastest or None,
        "contestants": contestants,
    }


def quartiles(its: Summary) -> Record:
    """The distribution of a time."""
    return {
        "median_us": _short(its.median * 1e6),
        "p25_us": _short(its.p25 * 1e6),
        "p75_us": _short(its.p75 * 1e6),
        "samples": its.samples,
    }


def peaks_record(peaks: Peaks) -> Record:
    """What the machine can do at best on a number of threads."""
    return {
        "threads": peaks.threads,
        "read": [{"bytes": size, "gbps": _short(rate * 1e-9)} for size, rate in peaks.read.items()],
        "multiply_add_gops": {
            name: _short(rate * 1e-9) for name, rate in peaks.multiply_add.items()
        },
    }


def note_skipped(results: Record, cell: Cell, missing: Mapping[str, str]) -> None:
    """Adds to the results who is missing from a cell, and why."""
    where = {key: its for key, its in asdict(cell).items() if key != "dtype"}
    for name, reason in missing.items():
        for skipped in results["skipped"]:
            if (skipped["contestant"], skipped["reason"]) == (name, reason):
                skipped["cells"].append(where)
                break
        else:
            results["skipped"].append({"contestant": name, "reason": reason, "cells": [where]})


def lead(record: Record, kernel: str) -> float | None:
    """How many times as fast as the fastest peer a kernel is; None if either is missing."""
    its = record["contestants"].get(kernel)
    return None if its is None else its["speedup_over_fastest_peer"]


def only(results: Record, mode: str) -> Record:
    """The results of one way of timing."""
    cells = [cell for cell in results["cells"] if cell["mode"] == mode]
    return {**results, "modes": [mode], "cells": cells}


def _ratio(numerator: float | None, denominator: float) -> float | None:
    return None if numerator is None else _short(numerator / denominator)


def _short(value: float) -> float:
    """Six digits; more would be noise."""
    return float(f"{value:.6g}")


# --------------------------------------------------------------------------------- file


def write(path: Path, results: Record) -> None:
    """Writes the file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read(path: Path) -> Record:
    """The results in a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds something else, or results of another schema.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        schema = results["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not hold results of bench.py") from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path} holds results of schema {schema!r}, but this version reads schema {SCHEMA}: "
            "measure again, with the bench.py of this version"
        )
    for cell in results["cells"]:
        cell.setdefault("mode", "")
    return {**_ONE_MODE, **results}


# --------------------------------------------------------------------------------- text

EXPLANATION = """\
median us, p25, p75: quartiles of the time of a call in microseconds, one call after the other, so
  that weights are as warm as the caches allow. A sample is one call or, where a call takes less
  than 0.2 ms, the mean of several.
Gop/s, GB/s: 2 M N K over the median; the bytes of the packed weights over the median.
of bound: the least time that this machine can take, over the median. It must read the packed
  weights, from memory or from the cache that holds them, and do the multiply-adds with the
  instructions of the kernel; both rates are measured first, on as many threads. A kernel that
  replaces multiply-adds by table look-ups can exceed 100 %.
over fp32, over bf16, over peer: how many times as fast as nn.Linear of that dtype, and as the
  fastest peer."""

GPU_EXPLANATION = """\
cold: a CUDA graph calls copies of the layer in turn, each with weights of its own, so many that
  the packed ones fill the L2 twice (but at most 512: the weights of small layers stay there).
warm: a CUDA graph calls one layer as often; its weights stay in the L2 if they fit.
eager: Python issues the calls; where the GPU waits for it, that is part of the time, and the
  check leaves it out.
In all three, calls follow each other in the stream's order and none reads another's output: a
  kernel that begins while its predecessor ends gains by that. Bounds are those of cold weights;
  the rate of int8 operations is the data sheet's."""


def render(results: Record) -> str:
    """Everything that was measured, for people, in Markdown."""
    parts = [_heading(results), _table(results), EXPLANATION]
    if "gpu" in results["machine"]:
        parts += [GPU_EXPLANATION, *_targets(results)]
    return "\n\n".join([*parts, *_notes(results)])


def title(cell: Mapping[str, Any]) -> str:
    """A cell's name for people."""
    setting = cell["mode"] or plural(cell["threads"], "thread")
    return f"{cell['N']} x {cell['K']}, M = {cell['M']}, {setting}"


def rate_unit(results: Record) -> tuple[str, float]:
    """The unit of ``gops`` for people, and what to multiply it by."""
    return ("Top/s", 1e-3) if "gpu" in results["machine"] else ("Gop/s", 1.0)


def check(results: Record) -> tuple[str, bool]:
    """Whether the chosen kernel is nowhere slower than the fastest peer, and where it is."""
    chosen = results["chosen_kernel"]
    cells = [cell for cell in results["cells"] if cell["mode"] in results["checked"]]
    leads = [(cell, lead(cell, chosen)) for cell in cells]
    checked = [(cell, ahead) for cell, ahead in leads if ahead is not None]
    lost = [
        f"  {title(cell)}: {_median(cell, chosen)} us, {1 / ahead:.2f}x the "
        f"{_median(cell, cell['fastest_peer'])} us of {cell['fastest_peer']}"
        for cell, ahead in checked
        if ahead < 1
    ]
    # A kernel that could not be timed has not won.
    lost += [f"  {title(cell)}: not timed" for cell in cells if chosen not in cell["contestants"]]
    count = plural(len(cells), "cell")
    if not lost:
        return f"check passed: no peer is faster than {chosen} in {count}", True
    first = f"check failed: {chosen} is slower than a peer in {len(lost)} of {count}"
    return "\n".join([first, *lost]), False


def _median(cell: Record, name: str) -> str:
    return _microseconds(cell["contestants"][name]["median_us"])


def _microseconds(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1}f}"


def _heading(results: Record) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    gpu = results["machine"].get("gpu")
    lines = [
        gpu["name"] if gpu else results["machine"]["cpu"],
        f"{versions}; chosen kernel: {results['chosen_kernel']}",
    ]
    for peaks in results["peaks"]:
        unit, scale = rate_unit(results)
        reads = ", ".join(f"{_size(r['bytes'])} {r['gbps']:.0f}" for r in peaks["read"])
        rates = peaks["multiply_add_gops"].items()
        adds = ", ".join(f"{name} {rate * scale:.0f}" for name, rate in rates)
        whose = "" if gpu else f" of {plural(peaks['threads'], 'thread')}"
        lines.append(
            f"peaks{whose}: reading {reads} GB/s; multiply-adds {adds or 'unknown'} {unit}"
        )
    return "  \n".join(lines)


def _table(results: Record) -> str:
    """One row for each contestant in each cell, the chosen kernel in bold."""
    labels = {name: its["label"] for name, its in results["contestants"].items()}
    chosen, baseline = results["chosen_kernel"], results["baseline"]
    unit, scale = rate_unit(results)
    if chosen in labels:
        labels[chosen] = f"**{labels[chosen]}**"
    several = results["modes"] != [""]
    header = (
        "N x K", "M", "mode" if several else "threads", "contestant", "median us", "p25", "p75",
        unit, "GB/s", "of bound", f"over {baseline}", "over peer",
    )  # fmt: skip
    rows = [
        (
            f"{cell['N']} x {cell['K']}",
            str(cell["M"]),
            cell["mode"] if several else str(cell["threads"]),
            labels[name],
            *(_microseconds(its[key]) for key in ("median_us", "p25_us", "p75_us")),
            f"{its['gops'] * scale:.1f}",
            _optional(its["gbps"], "{:.1f}"),
            _optional(its["share_of_bound"], "{:.0%}"),
            _optional(its[f"speedup_over_{baseline}"], "{:.2f}x"),
            _optional(its["speedup_over_fastest_peer"], "{:.2f}x"),
        )
        for cell in results["cells"]
        for name, its in cell["contestants"].items()
    ]
    return markdown(header, rows, words=("N x K", "mode", "contestant"))


def _targets(results: Record) -> list[str]:
    """The targets of a GPU, and what became of them."""
    rows = [
        (its.what, its.wanted, f"{its.figure:.4g}", "met" if its.met else "missed")
        for its in targets.judge(results)
    ]
    header = ("target (for an H100, cold)", "wanted", "measured", "verdict")
    return [markdown(header, rows, words=header)] if rows else []


def markdown(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[str]
) -> str:
    """A table, with the columns that hold words to the left, and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    sides = ["<" if column in words else ">" for column in header]
    lines = [
        "| " + " | ".join(f"{text:{s}{w}}" for text, s, w in zip(row, sides, widths)) + " |"
        for row in (header, *rows)
    ]
    rules = [f"{'-' * (w + 1)}{':' if s == '>' else '-'}" for s, w in zip(sides, widths)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _notes(results: Record) -> list[str]:
    """What a reader must know besides."""
    contestants = results["contestants"].values()
    lines = [f"{its['label']}: {its['note']}" for its in contestants if its["note"]]
    for skipped in results["skipped"]:
        cells = skipped["cells"]
        everywhere = len(cells) >= len(results["cells"])
        where = "everywhere" if everywhere else f"in {'; '.join(map(title, cells))}"
        lines.append(f"skipped: {skipped['contestant']} {where}: {skipped['reason']}")
    for name, reason in results["peaks_missing"].items():
        lines.append(f"no peaks of {name}: {reason}")
    if not results["complete"]:
        lines.append(f"interrupted after {plural(len(results['cells']), 'cell')}")
    return lines


def _size(count: int) -> str:
    return f"{count >> 20} MB" if count >= 1 << 20 else f"{count >> 10} KB"


def plural(count: int, noun: str) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return f"{count} {noun}" + ("s" if count != 1 else "")
