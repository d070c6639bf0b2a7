"""Draws the README's pictures from the results of ``bench.py``.

    python -m scripts.bench.plot scripts/bench/results/NAME.json [--output-dir DIRECTORY]

Writes NAME-latency.png and NAME-throughput.png (one shape, by batch size), NAME-speedup.png (all
shapes), NAME-memory.png and, if there are results on several numbers of threads, NAME-threads.png;
beside the results, unless told otherwise. Of a GPU's ways of timing they show one, cold weights if
those were timed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, Optional

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import nn

import bitlinear
from scripts.bench import charts, report
from scripts.bench.benchmark import Shape, parse_count, parse_shape
from scripts.bench.report import Record

# The colours of Okabe and Ito, which the colour-blind tell apart. The kernel that runs is vermilion
# and heavy, the other kernels are its dull and dashed relatives.
OTHER_KERNELS, REST = "#C27D52", "#8A8A8A"
PEERS = {
    "fp32": ("#222222", "s"),
    "fp16": ("#56B4E9", "P"),
    "bf16": ("#0072B2", "^"),
    "int8_dynamic": ("#009E73", "D"),
    "int_mm": ("#CC79A7", "v"),
    "fp8": ("#009E73", "D"),  # as int8_dynamic, which is never on the same machine
}
# How weights lie in a GPU, for people.
MODES = {
    "cold": "weights from memory",
    "warm": "weights from the L2",
    "eager": "called from Python, weights from the L2",
}
DASHES = [(0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1, 1.5))]

# The linear layers in each block of a transformer with 1.2 billion weights: how many, N, K.
BLOCKS, HIDDEN, INNER = 24, 2048, 5632
BLOCK = ((4, HIDDEN, HIDDEN), (2, INNER, HIDDEN), (1, HIDDEN, INNER))

# From a contestant's figures to what is drawn: lower quartile, median, upper quartile.
Quartiles = Callable[[Record], tuple[float, float, float]]
# From a cell to what no contestant can pass, or None.
Limit = Callable[[Record], Optional[float]]


# --------------------------------------------------------------------------------- pictures


def latency(results: Record, shape: Shape, threads: int) -> Figure:
    """The time of a call by batch size, a line for each contestant."""

    def bound(cell: Record) -> float | None:
        its = cell["contestants"].get(results["chosen_kernel"])
        return its and its["share_of_bound"] and its["share_of_bound"] * its["median_us"]

    return _by_batch(
        results,
        shape,
        threads,
        title=f"Time of one {_name(shape)} layer",
        unit="microseconds",
        quartiles=lambda its: (its["p25_us"], its["median_us"], its["p75_us"]),
        limit=("bound", bound),
    )


def throughput(results: Record, shape: Shape, threads: int) -> Figure:
    """Operations per second by batch size, a line for each contestant."""

    name, scale = report.rate_unit(results)

    def quartiles(its: Record) -> tuple[float, float, float]:
        rate = its["gops"] * scale
        work = rate * its["median_us"]
        return work / its["p75_us"], rate, work / its["p25_us"]

    peaks = {its["threads"]: its["multiply_add_gops"] for its in results["peaks"]}
    peak = peaks.get(threads, {}).get(results["chosen_kernel"])
    return _by_batch(
        results,
        shape,
        threads,
        title=f"Throughput of one {_name(shape)} layer",
        unit=f"{name}, 2 M N K per call",
        quartiles=quartiles,
        limit=("peak of multiply-adds", lambda _: peak and peak * scale),
    )


def speedup(results: Record, threads: int) -> Figure:
    """How many times as fast the chosen kernel is, by shape and batch size."""
    chosen = results["chosen_kernel"]
    cells = [cell for cell in _cells(results, threads) if chosen in cell["contestants"]]
    shapes = sorted({_shape(cell) for cell in cells}, key=_weights)
    tokens = sorted({cell["M"] for cell in cells})
    figure, panels = charts.canvas(
        f"Speed-up of {_label(results, chosen)}",
        _subtitle(results, threads),
        size=(9.5, 2.6 + 0.72 * max(2, len(shapes))),
        rows=2,
        left=1.3,
        right=0.2,
        between=0.65,
    )
    baseline = results["baseline"]
    keys = (f"speedup_over_{baseline}", "speedup_over_fastest_peer")
    titles = (f"over nn.Linear {baseline}", "over the fastest peer")
    for axes, key, title in zip(panels, keys, titles):
        ratios = np.full((len(shapes), len(tokens)), np.nan)
        for cell in cells:
            place = shapes.index(_shape(cell)), tokens.index(cell["M"])
            ratios[place] = cell["contestants"][chosen][key] or np.nan
        charts.heat_map(axes, ratios)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xticks(range(len(tokens)), [str(M) for M in tokens])
        axes.set_yticks(range(len(shapes)), [_name(shape) for shape in shapes])
    panels[1].set_xlabel("batch size M (tokens)")
    return figure


def memory(results: Record) -> Figure:
    """The bytes of the weights of one layer, and of all linear layers of a transformer."""
    models = {
        "one linear layer\n4096 x 4096": [(1, 4096, 4096)],
        f"the linear layers of a transformer of {BLOCKS} blocks\n"
        f"q, k, v, o: {HIDDEN} x {HIDDEN}; gate, up, down: {HIDDEN} x {INNER}": [
            (BLOCKS * count, N, K) for count, N, K in BLOCK
        ],
    }
    figure, panels = charts.canvas(
        "Memory of the weights",
        # Not the machine: it makes no difference.
        _separated("the bytes of the state_dict, on any machine", *_versions(results)),
        size=(11.5, 3.3),
        columns=2,
        top=1.45,
        left=1.75,
        right=0.2,
        bottom=0.2,
        between=0.5,
    )
    for axes, (title, layers) in zip(panels, models.items()):
        sizes = weight_bytes(layers)
        whole = sizes["nn.Linear fp32"]
        colours = [charts.EMPHASIS if name.startswith("BitLinear") else "#bbbbbb" for name in sizes]
        bars = axes.barh(list(sizes), list(sizes.values()), height=0.62, color=colours)
        texts = [
            _size(size) + ("" if size == whole else f"  ({size / whole:.1%})")
            for size in sizes.values()
        ]
        axes.bar_label(bars, texts, padding=6)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlim(0, 1.25 * whole)
        axes.invert_yaxis()
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(False)
        axes.tick_params(length=0)
    panels[1].tick_params(labelleft=False)
    return figure


def scaling(results: Record, shape: Shape) -> Figure:
    """Time and speed-up of the chosen kernel by the number of threads; fp32 for comparison."""
    chosen = results["chosen_kernel"]
    cells = [cell for cell in results["cells"] if _shape(cell) == shape]
    tokens = sorted({cell["M"] for cell in cells})
    counts = sorted({cell["threads"] for cell in cells})
    looks, baseline = _looks(results), results["baseline"]
    figure, (times, speedups) = charts.canvas(
        f"{_label(results, chosen)} on more threads, {_name(shape)}",
        _subtitle(results),
        size=(12, 5.2),
        columns=2,
        right=1.1,
        between=2.1,
    )
    time_ends, speedup_ends = [], []
    for M, marker in zip(sorted({tokens[0], tokens[len(tokens) // 2], tokens[-1]}), "os^"):
        for name, label in ((chosen, f"M = {M}"), (baseline, f"{baseline}, M = {M}")):
            medians = {
                cell["threads"]: cell["contestants"][name]["median_us"]
                for cell in cells
                if cell["M"] == M and name in cell["contestants"]
            }
            if not medians:
                continue
            look = {**looks[name], "marker": marker}
            time_ends.append(charts.line(times, medians, look, label))
            if name == chosen and counts[0] in medians:
                gains = {count: medians[counts[0]] / its for count, its in medians.items()}
                speedup_ends.append(charts.line(speedups, gains, look, label))
    ideal = {count: count / counts[0] for count in counts}
    look = {"color": REST, "linestyle": DASHES[0]}
    speedup_ends.append(charts.line(speedups, ideal, look, "ideal"))
    base = report.plural(counts[0], "thread")
    for axes, ends, title in (
        (times, time_ends, "microseconds (median)"),
        (speedups, speedup_ends, f"speed-up over {base}"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="threads")
        axes.set_title(title, loc="left", fontsize=11)
        charts.log_ticks(axes, counts)
        charts.label_ends(axes, ends)
    speedups.set_yticks(list(ideal.values()), [f"{gain:g}" for gain in ideal.values()])
    speedups.yaxis.set_minor_locator(NullLocator())
    return figure


# --------------------------------------------------------------------------------- parts


def weight_bytes(layers: Sequence[tuple[int, int, int]]) -> dict[str, int]:
    """Bytes in the state_dict of layers without bias, given as (how many, N, K), by their kind."""

    def total(build: Callable[[int, int], nn.Module]) -> int:
        # On the meta device tensors have shapes and dtypes, and no memory.
        states = [(count, build(K, N).state_dict().values()) for count, N, K in layers]
        return sum(
            count * sum(t.numel() * t.element_size() for t in state) for count, state in states
        )

    meta: charts.Look = {"bias": False, "device": "meta"}
    return {
        "nn.Linear fp32": total(lambda K, N: nn.Linear(K, N, **meta)),
        "nn.Linear bf16": total(lambda K, N: nn.Linear(K, N, **meta).bfloat16()),
        "BitLinear, deployed": total(lambda K, N: bitlinear.BitLinear(K, N, **meta).deploy()),
    }


def _by_batch(
    results: Record,
    shape: Shape,
    threads: int,
    *,
    title: str,
    unit: str,
    quartiles: Quartiles,
    limit: tuple[str, Limit],
) -> Figure:
    cells = [cell for cell in _cells(results, threads) if _shape(cell) == shape]
    cells.sort(key=lambda cell: cell["M"])
    tokens = [cell["M"] for cell in cells]
    figure, axes = charts.canvas(title, _subtitle(results, threads), size=(9.5, 5.6), top=0.9)
    axes.set(xscale="log", yscale="log", xlabel="batch size M (tokens)")
    axes.set_ylabel(f"{unit} (median; bands: quartiles)")
    ends = []
    for name, look in _looks(results).items():
        figures = {
            cell["M"]: quartiles(cell["contestants"][name])
            for cell in cells
            if name in cell["contestants"]
        }
        if figures:
            low, middle, high = zip(*figures.values())
            axes.fill_between(
                list(figures), low, high, color=look["color"], alpha=0.15, linewidth=0
            )
            ends.append(charts.line(axes, dict(zip(figures, middle)), look, _label(results, name)))
    name, level = limit
    levels = {cell["M"]: its for cell in cells if (its := level(cell)) is not None}
    if levels:
        ends.append(charts.line(axes, levels, {"color": REST, "linewidth": 1.0}, name))
    charts.log_ticks(axes, tokens)
    charts.label_ends(axes, ends)
    return figure


def _looks(results: Record) -> dict[str, charts.Look]:
    """How to draw the line of each contestant, the chosen kernel last and so on top."""
    chosen = results["chosen_kernel"]
    roles = {name: its["role"] for name, its in results["contestants"].items()}
    kernels = [name for name, role in roles.items() if role == "kernel" and name != chosen]
    looks: dict[str, charts.Look] = {}
    for name in roles:
        if name in PEERS:
            colour, marker = PEERS[name]
            looks[name] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6}
        elif name in kernels:
            dashes = DASHES[kernels.index(name) % len(DASHES)]
            looks[name] = {"color": OTHER_KERNELS, "linestyle": dashes, "linewidth": 1.8}
        elif name != chosen:
            looks[name] = {"color": REST, "linestyle": DASHES[2], "linewidth": 1.6}
    if chosen in roles:
        looks[chosen] = {"color": charts.EMPHASIS, "marker": "o", "markersize": 6.5, "linewidth": 3}
    return looks


def _subtitle(results: Record, threads: int | None = None) -> str:
    """What the figures hold for."""
    machine = results["machine"]
    name = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    parts = [re.sub(r"\((R|TM)\)", "", name)]
    if threads is not None:
        (mode,) = results["modes"]
        parts.append(MODES[mode] if mode else report.plural(threads, "thread"))
    return _separated(*parts, *_versions(results))


def _versions(results: Record) -> list[str]:
    versions = [f"{name} {results['versions'][name]}" for name in ("bitlinear", "torch")]
    return [*versions, results["time"][:10]]


def _separated(*parts: str) -> str:
    return "   ·   ".join(parts)


def _label(results: Record, name: str) -> str:
    return str(results["contestants"][name]["label"])


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _name(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"


def _shape(cell: Record) -> Shape:
    return cell["N"], cell["K"]


def _weights(shape: Shape) -> tuple[int, Shape]:
    return shape[0] * shape[1], shape


def _cells(results: Record, threads: int) -> list[Record]:
    return [cell for cell in results["cells"] if cell["threads"] == threads]


# --------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("results", type=Path, help="a JSON file of bench.py")
    add("--output-dir", type=Path, metavar="DIRECTORY", help="default: that of the results")
    add("--shape", type=parse_shape, metavar="NxK", help="default: 4096x4096, or else the largest")
    add("--threads", type=parse_count, metavar="T", help="default: the most that were measured")
    add("--mode", choices=MODES, help="of timing on a GPU; default: the first that was measured")
    options = parser.parse_args(argv)
    try:
        results = report.read(options.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    mode = options.mode or results["modes"][0]
    if mode not in results["modes"]:
        parser.error(f"--mode: {options.results} has nothing {mode}")
    results = report.only(results, mode)
    chosen = results["chosen_kernel"]
    cells = [cell for cell in results["cells"] if chosen in cell["contestants"]]
    if not cells:
        parser.error(f"{options.results} has no times of {chosen}, the chosen kernel")
    threads = options.threads or max(cell["threads"] for cell in cells)
    shapes = {_shape(cell) for cell in cells if cell["threads"] == threads}
    if not shapes:
        parser.error(
            f"--threads: {options.results} has nothing on {report.plural(threads, 'thread')}"
        )
    shape = options.shape or ((4096, 4096) if (4096, 4096) in shapes else max(shapes, key=_weights))
    if shape not in shapes:
        parser.error(f"--shape: {options.results} has no {_name(shape)}")

    directory = options.output_dir or options.results.parent
    directory.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(charts.STYLE):
        figures = {
            "latency": latency(results, shape, threads),
            "throughput": throughput(results, shape, threads),
            "speedup": speedup(results, threads),
            "memory": memory(results),
        }
        if len({cell["threads"] for cell in cells if _shape(cell) == shape}) > 1:
            figures["threads"] = scaling(results, shape)
        for name, figure in figures.items():
            path = directory / f"{options.results.stem}-{name}.png"
            figure.savefig(path)
            print(path)


if __name__ == "__main__":
    main()
