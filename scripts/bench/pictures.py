"""Pictures of the benchmark's results (see ``records.py``); ``plot.py`` writes them to files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, NamedTuple, Optional

import numpy as np
from torch import nn

import bitlinear
from scripts import tools
from scripts.bench import charts, machine, records, report
from scripts.bench.arguments import Shape
from scripts.bench.contestants import KERNEL, LAYER, PRODUCT
from scripts.bench.records import Record
from scripts.bench.timing import MIN_SAMPLES

with tools.importing("bench"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

# The colours of Okabe and Ito, which the colour-blind tell apart. The chosen kernel is a heavy line
# in vermilion, the other kernels are dashed lines in a dull relative.
OTHER_KERNELS, REST = "#C27D52", "#8A8A8A"
ALTERNATIVES = {
    "fp32": ("#222222", "s"),
    "fp16": ("#56B4E9", "P"),
    "bf16": ("#0072B2", "^"),
    "int8_dynamic": ("#009E73", "D"),
    "int_mm": ("#CC79A7", "v"),
    "fp8": ("#009E73", "D"),  # as int8_dynamic, which is never on the same machine
}
# The modes of a GPU, for people.
MODES = {
    "cold": "weights from memory",
    "warm": "weights from the L2",
    "eager": "called from Python, weights from the L2",
}
UNSTEADY = f"quartiles over {records.UNSTEADY_SPREAD:.0%} apart or under {MIN_SAMPLES} samples"
DASHES = [(0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1, 1.5))]

# The linear layers in each block of a transformer with 1.2 billion weights: how many, N, K.
BLOCKS, HIDDEN, INNER = 24, 2048, 5632
BLOCK = ((4, HIDDEN, HIDDEN), (2, INNER, HIDDEN), (1, HIDDEN, INNER))

# From a contestant's figures to a lower quartile, a median and an upper quartile.
Quartiles = Callable[[Record], tuple[float, float, float]]
# From a cell to a limit that no contestant can pass, or None.
Limit = Callable[[Record], Optional[float]]


class ByBatch(NamedTuple):
    """A picture with the batch size on x: title, unit, the values on y, and a limit by its name."""

    title: str
    unit: str
    quartiles: Quartiles
    limit_name: str
    limit: Limit


def latency(results: Record, shape: Shape, threads: int) -> Figure:
    """Draw the time of a call by batch size, a line for each contestant."""

    def bound(cell: Record) -> float | None:
        figures = cell["contestants"].get(results["chosen_kernel"])
        return (
            figures
            and figures["share_of_bound"]
            and (figures["share_of_bound"] * figures["median_us"])
        )

    picture = ByBatch(
        f"Time of a layer of {layer_name(shape)}",
        "microseconds",
        lambda figures: (figures["p25_us"], figures["median_us"], figures["p75_us"]),
        "bound",
        bound,
    )
    return _by_batch(results, shape, threads, picture)


def throughput(results: Record, shape: Shape, threads: int) -> Figure:
    """Draw operations per second by batch size, a line for each contestant."""
    name, scale = report.rate_unit(results)

    def quartiles(figures: Record) -> tuple[float, float, float]:
        rate = figures["gops"] * scale
        work = rate * figures["median_us"]
        return work / figures["p75_us"], rate, work / figures["p25_us"]

    peaks = {peak["threads"]: peak["multiply_add_gops"] for peak in results["peaks"]}
    peak = peaks.get(threads, {}).get(results["chosen_kernel"])
    picture = ByBatch(
        f"Throughput of a layer of {layer_name(shape)}",
        f"{name}, 2 M N K per call",
        quartiles,
        "peak of multiply-adds",
        lambda _: peak and peak * scale,
    )
    return _by_batch(results, shape, threads, picture)


def speedup(results: Record, threads: int) -> Figure:
    """Draw how many times as fast the chosen kernel is, by shape and batch size."""
    chosen, baseline = results["chosen_kernel"], results["baseline"]
    cells = [cell for cell in _cells(results, threads) if chosen in cell["contestants"]]
    shapes = sorted({shape_of(cell) for cell in cells}, key=weight_count)
    tokens = sorted({cell["M"] for cell in cells})
    # By title, the other contestant of the ratio, or the field of a cell that names it.
    panels = {f"over nn.Linear {baseline}": baseline}
    for role, text in (
        (LAYER, "complete layer"),
        (PRODUCT, "bare product, which quantises nothing"),
    ):
        labels = [_label(results, name) for name in records.names_of(results, role)]
        if labels:
            panels[f"over the fastest {text} ({', '.join(labels)})"] = f"fastest_{role}"
    figure, rows = charts.canvas(
        f"Speed-up of {_label(results, chosen)}",
        _subtitle(results, threads, f"{report.UNSTEADY} {UNSTEADY}"),
        size=(9.5, 2.1 + len(panels) * (0.4 + 0.36 * max(2, len(shapes)))),
        rows=len(panels),
        left=1.5,
        right=0.2,
        between=0.65,
    )
    for axes, (title, reference) in zip(rows, panels.items()):
        ratios = np.full((len(shapes), len(tokens)), np.nan)
        prefixes = {}
        for cell in cells:
            contestants = cell["contestants"]
            ratio = contestants[chosen][f"speedup_over_{reference}"]
            if ratio is not None:
                index = shapes.index(shape_of(cell)), tokens.index(cell["M"])
                ratios[index] = ratio
                compared = contestants[cell.get(reference, baseline)]
                prefixes[index] = report.marked("", contestants[chosen], compared)
        charts.heat_map(axes, ratios, prefixes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xticks(range(len(tokens)), [str(M) for M in tokens])
        axes.set_yticks(range(len(shapes)), [_size_name(shape) for shape in shapes])
        axes.set_ylabel("N x K")  # the whole label is longer than a panel of few rows
    rows[-1].set_xlabel(f"batch size M (tokens)   ·   {report.SHAPE}")
    return figure


def memory(results: Record) -> Figure:
    """Draw the bytes of the weights of one layer, and of all linear layers of a transformer."""
    models = {
        "one linear layer\n4096 x 4096": [(1, 4096, 4096)],
        f"the linear layers of {BLOCKS} transformer blocks (outputs x inputs)\n"
        f"q, k, v, o: {HIDDEN} x {HIDDEN}; gate, up: {INNER} x {HIDDEN}; "
        f"down: {HIDDEN} x {INNER}": [(BLOCKS * count, N, K) for count, N, K in BLOCK],
    }
    figure, panels = charts.canvas(
        "Memory of the weights",
        # The same on any machine.
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
            _bytes(size) + ("" if size == whole else f"  ({size / whole:.1%})")
            for size in sizes.values()
        ]
        axes.bar_label(bars, texts, padding=6)
        axes.set_title(title, loc="left", fontsize=9.5)
        axes.set_xlim(0, 1.25 * whole)
        axes.invert_yaxis()
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(False)
        axes.tick_params(length=0)
    panels[1].tick_params(labelleft=False)
    return figure


def scaling(results: Record, shape: Shape) -> Figure:
    """Draw time and speed-up of the chosen kernel by the number of threads, beside the baseline."""
    chosen = results["chosen_kernel"]
    cells = [cell for cell in results["cells"] if shape_of(cell) == shape]
    tokens = sorted({cell["M"] for cell in cells})
    counts = sorted({cell["threads"] for cell in cells})
    looks, baseline = _looks(results), results["baseline"]
    figure, (times, speedups) = charts.canvas(
        f"{_label(results, chosen)} on more threads, a layer of {layer_name(shape)}",
        _subtitle(results, None, f"medians; hollow: {UNSTEADY}"),
        size=(12, 5.3),
        columns=2,
        right=1.1,
        between=2.1,
    )
    time_ends, speedup_ends = [], []
    for M, marker in zip(sorted({tokens[0], tokens[len(tokens) // 2], tokens[-1]}), "os^"):
        for name, label in ((chosen, f"M = {M}"), (baseline, f"{baseline}, M = {M}")):
            figures = {
                cell["threads"]: cell["contestants"][name]
                for cell in cells
                if cell["M"] == M and name in cell["contestants"]
            }
            if not figures:
                continue
            look = {**looks[name], "marker": marker}
            medians = {count: row["median_us"] for count, row in figures.items()}
            time_ends.append(charts.line(times, medians, look, label))
            _mark_unsteady(times, figures, medians, look)
            if name == chosen and counts[0] in medians:
                gains = {count: medians[counts[0]] / median for count, median in medians.items()}
                speedup_ends.append(charts.line(speedups, gains, look, label))
    ideal = {count: count / counts[0] for count in counts}
    look = {"color": REST, "linestyle": DASHES[0]}
    speedup_ends.append(charts.line(speedups, ideal, look, "ideal"))
    base = report.plural(counts[0], "thread")
    for axes, ends, title in (
        (times, time_ends, "microseconds"),
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
    """Return the state_dict's bytes of layers without bias, (how many, N, K), by their kind."""

    def total(build: Callable[[int, int], nn.Module]) -> int:
        # On the meta device tensors have shapes and dtypes, and no memory.
        states = [(count, build(K, N).state_dict().values()) for count, N, K in layers]
        return sum(count * sum(tensor.nbytes for tensor in state) for count, state in states)

    meta: charts.Look = {"bias": False, "device": "meta"}
    return {
        "nn.Linear fp32": total(lambda K, N: nn.Linear(K, N, **meta)),
        "nn.Linear bf16": total(lambda K, N: nn.Linear(K, N, **meta).bfloat16()),
        "BitLinear, deployed": total(lambda K, N: bitlinear.BitLinear(K, N, **meta).deploy()),
    }


def _by_batch(results: Record, shape: Shape, threads: int, picture: ByBatch) -> Figure:
    cells = [cell for cell in _cells(results, threads) if shape_of(cell) == shape]
    cells.sort(key=lambda cell: cell["M"])
    tokens = [cell["M"] for cell in cells]
    note = f"medians, quartiles; hollow: {UNSTEADY}"
    figure, axes = charts.canvas(
        picture.title, _subtitle(results, threads, note), size=(9.5, 5.8), top=1.15
    )
    axes.set(xscale="log", yscale="log", xlabel="batch size M (tokens)")
    axes.set_ylabel(picture.unit)
    ends = []
    for name, look in _looks(results).items():
        figures = {
            cell["M"]: cell["contestants"][name] for cell in cells if name in cell["contestants"]
        }
        if figures:
            low, middle, high = zip(*map(picture.quartiles, figures.values()))
            axes.fill_between(
                list(figures), low, high, color=look["color"], alpha=0.15, linewidth=0
            )
            medians = dict(zip(figures, middle))
            ends.append(charts.line(axes, medians, look, _label(results, name)))
            _mark_unsteady(axes, figures, medians, look)
    levels = {cell["M"]: level for cell in cells if (level := picture.limit(cell)) is not None}
    if levels:
        look = {"color": REST, "linewidth": 1.0}
        ends.append(charts.line(axes, levels, look, picture.limit_name))
    charts.log_ticks(axes, tokens)
    charts.label_ends(axes, ends)
    return figure


def _mark_unsteady(
    axes: Axes, figures: dict[int, Record], medians: dict[int, float], look: charts.Look
) -> None:
    unsteady = {x: medians[x] for x, row in figures.items() if records.is_unsteady(row)}
    if unsteady:
        charts.hollow_points(axes, unsteady, look)


def _looks(results: Record) -> dict[str, charts.Look]:
    """Return the look of each contestant's line; the chosen kernel is last, and so on top."""
    chosen = results["chosen_kernel"]
    names = list(results["contestants"])
    kernels = [name for name in records.names_of(results, KERNEL) if name != chosen]
    looks: dict[str, charts.Look] = {}
    for name in names:
        if name in ALTERNATIVES:
            colour, marker = ALTERNATIVES[name]
            looks[name] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6}
        elif name in kernels:
            dashes = DASHES[kernels.index(name) % len(DASHES)]
            looks[name] = {"color": OTHER_KERNELS, "linestyle": dashes, "linewidth": 1.8}
        elif name != chosen:
            looks[name] = {"color": REST, "linestyle": DASHES[2], "linewidth": 1.6}
    if chosen in names:
        looks[chosen] = {"color": charts.EMPHASIS, "marker": "o", "markersize": 6.5, "linewidth": 3}
    return looks


def _subtitle(results: Record, threads: int | None, note: str) -> str:
    """Return the machine and the setting; below, the versions, the date and a note."""
    parts = [machine.display_name(results["machine"])]
    if threads is not None:
        (mode,) = results["modes"]
        parts.append(MODES[mode] if mode else report.plural(threads, "thread"))
    return f"{_separated(*parts)}\n{_separated(*_versions(results), note)}"


def _versions(results: Record) -> list[str]:
    versions = [f"{name} {results['versions'][name]}" for name in ("bitlinear", "torch")]
    return [*versions, results["time"][:10]]


def _separated(*parts: str) -> str:
    return "   ·   ".join(parts)


def _label(results: Record, name: str) -> str:
    return str(results["contestants"][name]["label"])


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _size_name(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"


def layer_name(shape: Shape) -> str:
    """Return the layer's sizes, for people."""
    return f"{_size_name(shape)} (outputs x inputs)"


def shape_of(cell: Record) -> Shape:
    """Return ``(N, K)`` of a cell."""
    return cell["N"], cell["K"]


def weight_count(shape: Shape) -> tuple[int, Shape]:
    """Return a key that sorts shapes by their number of weights."""
    return shape[0] * shape[1], shape


def _cells(results: Record, threads: int) -> list[Record]:
    return [cell for cell in results["cells"] if cell["threads"] == threads]
