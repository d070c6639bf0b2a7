"""The benchmark's report, in Markdown: the table and the check of results (see ``records.py``)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from scripts.bench import machine, records, targets
from scripts.bench.contestants import LAYER, PRODUCT
from scripts.bench.records import Record

SHAPE = "N x K (outputs x inputs)"
# Marks a time whose quartiles are far apart.
UNSTEADY = "~"

EXPLANATION = f"""\
median us, p25, p75: quartiles of the time of a call in microseconds, one call after the other, so
  that weights are as warm as the caches allow. A sample is one call or, if a call takes less than
  0.2 ms, the mean of several. {UNSTEADY} marks a median that is unsteady: its quartiles are more
  than {records.UNSTEADY_SPREAD:.0%} of it apart, or the budget allowed less than three samples.
Gop/s, GB/s: 2 M N K over the median; the bytes of the packed weights over the median.
of bound: the shortest time that is possible on this machine, over the median. The layer must read
  the packed weights, from memory or from the cache that holds them, and do the multiply-adds with
  the instructions of the kernel; both rates are measured first, on as many threads. A kernel that
  replaces multiply-adds by table look-ups can exceed 100 %.
over fp32, over bf16: how many times as fast as nn.Linear of that dtype.
over layer: how many times as fast as the fastest complete layer, which has floating-point inputs
  and outputs.
over product: how many times as fast as the fastest bare product, which quantises nothing."""

GPU_EXPLANATION = """\
cold: a CUDA graph calls copies of the layer in turn, each with weights of its own, so many that
  the packed ones fill the L2 twice (but at most 512: the weights of small layers stay there).
warm: a CUDA graph calls one layer as often; its weights stay in the L2 if they fit.
eager: Python issues the calls; if the GPU waits for it, the wait is part of the time. The check
  leaves this mode out.
In all three, calls follow each other in the stream's order and none reads another's output: a
  kernel that begins while its predecessor ends gains by that. Bounds are those of cold weights;
  the rate of int8 operations is the data sheet's."""


def render(results: Record) -> str:
    """Return everything that was measured."""
    parts = [_heading(results), _table(results), EXPLANATION]
    if "gpu" in results["machine"]:
        parts += [GPU_EXPLANATION, *_targets(results)]
    return "\n\n".join([*parts, *_notes(results)])


def title(cell: Mapping[str, Any]) -> str:
    """Return a cell's name."""
    setting = cell["mode"] or plural(cell["threads"], "thread")
    return f"{cell['N']} x {cell['K']}, M = {cell['M']}, {setting}"


def rate_unit(results: Record) -> tuple[str, float]:
    """Return the unit of ``gops`` for people, and the factor to it."""
    return ("Top/s", 1e-3) if "gpu" in results["machine"] else ("Gop/s", 1.0)


def check(results: Record) -> tuple[str, bool]:
    """Return whether no complete layer is faster than the chosen kernel in any cell, and where.

    Cells that a bare product wins are counted apart. They do not fail the check: it quantises
    nothing.
    """
    chosen = results["chosen_kernel"]
    cells = [cell for cell in results["cells"] if cell["mode"] in results["checked"]]
    # A kernel that could not be timed has not won, nor one without an opponent.
    untimed = [f"  {title(cell)}: not timed" for cell in cells if chosen not in cell["contestants"]]
    untimed += [
        f"  {title(cell)}: no complete layer was timed"
        for cell in cells
        if chosen in cell["contestants"] and records.lead(cell, chosen, LAYER) is None
    ]
    lost, lost_cells = _lost_cells(cells, chosen, LAYER)
    behind, behind_cells = _lost_cells(cells, chosen, PRODUCT)
    passed = not lost_cells and not untimed
    count = plural(len(cells), "cell")
    lines = [
        f"check passed: no complete layer is faster than {chosen} in any of {count}"
        if passed
        else f"check failed: {chosen} does not win {len(lost_cells) + len(untimed)} of {count}",
        f"lost to a complete layer: {lost}",
        *lost_cells,
        *untimed,
        f"lost to a bare product, which quantises nothing: {behind}",
        *behind_cells,
    ]
    return "\n".join(lines), passed


def _lost_cells(cells: Sequence[Record], kernel: str, role: str) -> tuple[str, list[str]]:
    """Return how many cells a role wins, the worst one, and a line for each, the worst one first.

    Cells without a time of the kernel, or of the role, do not count.
    """
    leads = [(records.lead(cell, kernel, role), cell) for cell in cells]
    timed = [(lead, cell) for lead, cell in leads if lead is not None]
    lost = sorted((pair for pair in timed if pair[0] < 1), key=lambda pair: pair[0])
    summary = f"{len(lost)} of {plural(len(timed), 'cell')}"
    if lost:
        lead, cell = lost[0]
        summary += f", at worst {1 / lead:.2f}x in {title(cell)}"
    return summary, [
        f"  {title(cell)}: {_median(cell, kernel)} us, {1 / lead:.2f}x the "
        f"{_median(cell, cell[f'fastest_{role}'])} us of {cell[f'fastest_{role}']}"
        for lead, cell in lost
    ]


def _median(cell: Record, name: str) -> str:
    return microseconds(cell["contestants"][name]["median_us"])


def microseconds(value: float) -> str:
    """Return a time to a hundredth of a microsecond below 10, and to a tenth above."""
    return f"{value:.{2 if value < 10 else 1}f}"


def _heading(results: Record) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    on_gpu = "gpu" in results["machine"]
    lines = [
        machine.display_name(results["machine"]),
        f"{versions}; chosen kernel: {results['chosen_kernel']}",
    ]
    for role, name in ((LAYER, "complete layers"), (PRODUCT, "bare products")):
        labels = [
            results["contestants"][other]["label"] for other in records.names_of(results, role)
        ]
        lines.append(f"{name}: {', '.join(labels) or 'none'}")
    for peaks in results["peaks"]:
        unit, scale = rate_unit(results)
        reads = ", ".join(f"{_size(r['bytes'])} {r['gbps']:.0f}" for r in peaks["read"])
        rates = peaks["multiply_add_gops"].items()
        adds = ", ".join(f"{name} {rate * scale:.0f}" for name, rate in rates)
        whose = "" if on_gpu else f" of {plural(peaks['threads'], 'thread')}"
        lines.append(
            f"peaks{whose}: reading {reads} GB/s; multiply-adds {adds or 'unknown'} {unit}"
        )
    return "  \n".join(lines)


def _table(results: Record) -> str:
    """Return one row for each contestant in each cell, the chosen kernel in bold."""
    labels = {name: kind["label"] for name, kind in results["contestants"].items()}
    chosen, baseline = results["chosen_kernel"], results["baseline"]
    unit, scale = rate_unit(results)
    if chosen in labels:
        labels[chosen] = f"**{labels[chosen]}**"
    several = results["modes"] != [""]
    header = (
        SHAPE, "M", "mode" if several else "threads", "contestant", "median us", "p25", "p75",
        unit, "GB/s", "of bound", f"over {baseline}", "over layer", "over product",
    )  # fmt: skip
    ratios = (f"over_{baseline}", "over_fastest_layer", "over_fastest_product")
    rows = [
        (
            f"{cell['N']} x {cell['K']}",
            str(cell["M"]),
            cell["mode"] if several else str(cell["threads"]),
            labels[name],
            marked(microseconds(figures["median_us"]), figures),
            *(microseconds(figures[key]) for key in ("p25_us", "p75_us")),
            f"{figures['gops'] * scale:.1f}",
            _optional(figures["gbps"], "{:.1f}"),
            _optional(figures["share_of_bound"], "{:.0%}"),
            *(_optional(figures[f"speedup_{ratio}"], "{:.2f}x") for ratio in ratios),
        )
        for cell in results["cells"]
        for name, figures in cell["contestants"].items()
    ]
    return markdown(header, rows, words=(SHAPE, "mode", "contestant"))


def marked(text: str, *figures: Mapping[str, Any]) -> str:
    """Return ``text``, marked if it comes from an unsteady time."""
    return f"{UNSTEADY}{text}" if any(map(records.is_unsteady, figures)) else text


def _targets(results: Record) -> list[str]:
    """Return the table of a GPU's targets."""
    rows = [
        (
            verdict.product,
            verdict.wanted,
            f"{verdict.figure:.4g}",
            "met" if verdict.met else "missed",
        )
        for verdict in targets.judge(results)
    ]
    header = ("target (for an H100, cold)", "wanted", "measured", "verdict")
    return [markdown(header, rows, words=header)] if rows else []


def markdown(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[str]
) -> str:
    """Return a table: the columns in ``words`` are aligned to the left, the others to the right."""
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
    """Return the contestants' notes, and what is missing from the results."""
    kinds = results["contestants"].values()
    lines = [f"{kind['label']}: {kind['note']}" for kind in kinds if kind["note"]]
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
    """Return ``"1 thread"``, ``"2 threads"``."""
    return f"{count} {noun}" + ("s" if count != 1 else "")
