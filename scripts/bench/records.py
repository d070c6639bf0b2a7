"""The results file: one JSON object that the benchmark writes and ``plot.py`` reads.

``SCHEMA`` counts up when a field disappears or changes its meaning. The fields:

- ``schema``, ``time`` (UTC), ``complete`` (not interrupted), ``device``, ``budget_s``
- ``machine``, ``versions``, ``torch_cpu_capability``, ``chosen_kernel``
- ``baseline``: the contestant that speed-ups refer to
- ``modes``: the ways of timing; ``checked``: the modes that ``--check`` looks at
- ``contestants``: by name, a ``label`` for people, a ``role`` (see ``contestants.py``), a ``note``
- ``peaks``: for each number of threads, see :func:`peaks_record`; ``peaks_missing``: the reason, by
  kernel
- ``skipped``: a ``contestant``, the ``reason``, and the ``cells`` that it is missing from
- ``cells``: see :func:`record`
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bench.contestants import KERNEL, LAYER, OTHERS, PRODUCT
from scripts.bench.peaks import Peaks
from scripts.bench.timing import MIN_SAMPLES, Summary

SCHEMA = 2

# The quartiles of an unsteady time are further apart than this share of the median.
UNSTEADY_SPREAD = 0.25

# An object of the JSON file.
Record = dict[str, Any]

# Schema 1 had a role "peer", for layers and for bare products. The layer without deploy() is left
# out: it kept quantised weights from call to call, which it no longer does.
_STALE_IN_SCHEMA_1 = "undeployed"
# Older files of schema 1, from before there were several ways of timing, lack these.
_ONE_MODE = {"baseline": "fp32", "modes": [""], "checked": [""]}


@dataclass(frozen=True)
class Cell:
    """One product, ``y[M, N] = x[M, K] @ w[N, K].T``, on a number of threads.

    Attributes:
        dtype: The dtype of BitLinear's input and output.
        mode: The way of timing; "" on a CPU, which has one.
    """

    N: int
    K: int
    M: int
    threads: int
    dtype: str
    mode: str = ""

    @property
    def operations(self) -> int:
        """The number of operations; a multiply-add is two."""
        return 2 * self.M * self.N * self.K

    @property
    def packed_bytes(self) -> int:
        """The size of a deployed layer's weights."""
        return self.N * -(-self.K // 4)


def record(
    cell: Cell,
    times: Mapping[str, Summary],
    *,
    roles: Mapping[str, str],
    bounds: Mapping[str, float],
    baseline: str,
    measurements: int = 1,
) -> Record:
    """Return a cell's figures; None stands for a figure that cannot be computed.

    Args:
        cell: The product.
        times: By contestant.
        roles: By contestant; a kernel reads the packed weights.
        bounds: The shortest possible seconds on this machine, by kernel.
        baseline: The contestant that speed-ups refer to.
        measurements: How often the cell was measured; ``times`` are the last ones.
    """
    contestants = {
        name: {
            **quartiles(summary),
            "gops": _ratio(cell.operations * 1e-9, summary.median),
            "gbps": _ratio(
                cell.packed_bytes * 1e-9 if roles[name] == KERNEL else None, summary.median
            ),
            "share_of_bound": _ratio(bounds.get(name), summary.median),
        }
        for name, summary in times.items()
    }
    figures = {**asdict(cell), "measurements": measurements, "contestants": contestants}
    return _with_speedups(figures, roles, baseline)


def _with_speedups(cell: Record, roles: Mapping[str, str], baseline: str) -> Record:
    """Add the fastest layer, the fastest bare product, and every contestant's speed-ups."""
    contestants = cell["contestants"]
    medians = {name: figures["median_us"] for name, figures in contestants.items()}
    references = {f"speedup_over_{baseline}": baseline}
    for role in (LAYER, PRODUCT):
        names = [name for name in medians if roles[name] == role]
        cell[f"fastest_{role}"] = min(names, key=medians.__getitem__, default=None)
        references[f"speedup_over_fastest_{role}"] = cell[f"fastest_{role}"]
    for figures in contestants.values():
        for key, name in references.items():
            figures[key] = _ratio(medians.get(name), figures["median_us"])
    return cell


def quartiles(summary: Summary) -> Record:
    """Return the distribution of a time."""
    return {
        "median_us": _short(summary.median * 1e6),
        "p25_us": _short(summary.p25 * 1e6),
        "p75_us": _short(summary.p75 * 1e6),
        "samples": summary.samples,
    }


def is_unsteady(figures: Mapping[str, Any]) -> bool:
    """Whether quartiles are far apart, or come from too few samples to tell."""
    spread = figures["p75_us"] - figures["p25_us"]
    return figures["samples"] < MIN_SAMPLES or spread > UNSTEADY_SPREAD * figures["median_us"]


def peaks_record(peaks: Peaks) -> Record:
    """Return the machine's peaks on a number of threads."""
    return {
        "threads": peaks.threads,
        "read": [{"bytes": size, "gbps": _short(rate * 1e-9)} for size, rate in peaks.read.items()],
        "multiply_add_gops": {
            name: _short(rate * 1e-9) for name, rate in peaks.multiply_add.items()
        },
    }


def note_skipped(results: Record, cell: Cell, missing: Mapping[str, str]) -> None:
    """Add to the results which contestants are missing from a cell, and why."""
    where = {key: value for key, value in asdict(cell).items() if key != "dtype"}
    for name, reason in missing.items():
        for skipped in results["skipped"]:
            if (skipped["contestant"], skipped["reason"]) == (name, reason):
                skipped["cells"].append(where)
                break
        else:
            results["skipped"].append({"contestant": name, "reason": reason, "cells": [where]})


def lead(cell: Record, kernel: str, role: str = LAYER) -> float | None:
    """Return how many times as fast as the fastest of a role a kernel is; None without either."""
    figures = cell["contestants"].get(kernel)
    return None if figures is None else figures[f"speedup_over_fastest_{role}"]


def of_mode(results: Record, mode: str) -> Record:
    """Return the results of one way of timing."""
    cells = [cell for cell in results["cells"] if cell["mode"] == mode]
    return {**results, "modes": [mode], "cells": cells}


def names_of(results: Record, role: str) -> list[str]:
    """Return the contestants of a role."""
    return [name for name, kind in results["contestants"].items() if kind["role"] == role]


def _ratio(numerator: float | None, denominator: float) -> float | None:
    return None if numerator is None else _short(numerator / denominator)


def _short(value: float) -> float:
    """Round to six digits; more would be noise."""
    return float(f"{value:.6g}")


# --------------------------------------------------------------------------------- file


def write(path: Path, results: Record) -> None:
    """Write the file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read(path: Path) -> Record:
    """Return the results in a file, in the current schema.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a results file, or its schema is unknown.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        schema = results["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a results file of python -m scripts.bench") from error
    if schema == 1:
        return _from_schema_1(results)
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema!r}, but this version reads schemas 1 and {SCHEMA}: measure "
            "again with this version's python -m scripts.bench"
        )
    return results


def _from_schema_1(results: Record) -> Record:
    results = {**_ONE_MODE, **results, "schema": SCHEMA}
    results["contestants"].pop(_STALE_IN_SCHEMA_1, None)
    for name, kind in results["contestants"].items():
        if kind["role"] != KERNEL:
            kind["role"] = OTHERS[name].role
    roles = {name: kind["role"] for name, kind in results["contestants"].items()}
    for cell in results["cells"]:
        cell.setdefault("mode", "")
        cell.pop("fastest_peer", None)
        cell["contestants"].pop(_STALE_IN_SCHEMA_1, None)
        for figures in cell["contestants"].values():
            figures.pop("speedup_over_fastest_peer", None)
        _with_speedups(cell, roles, results["baseline"])
    return results
