"""The picture of generation: tokens per second and memory, a bar for each contestant."""

from __future__ import annotations

from collections.abc import Mapping

from scripts import tools
from scripts.bench import charts, machine, report
from scripts.bench.generation import measure
from scripts.bench.records import Record

with tools.importing("bench"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY = "#bbbbbb"


def draw(results: Record) -> Figure:
    """Draw the cells of the smallest batch, and the memory."""
    contestants = results["contestants"]
    batch = min(cell["batch"] for cell in results["cells"])
    panels = {
        f"{cell['phase']}, {cell['length']} tokens\ntokens/s": _rates(cell)
        for cell in results["cells"]
        # A step alone takes nearly the time of a captured decode.
        if cell["batch"] == batch and cell["phase"] != measure.STEP
    }
    memory = {
        name: (kind["memory"]["peak_bytes"] / 1e9, f"{kind['memory']['peak_bytes'] / 1e9:.2f}")
        for name, kind in contestants.items()
        if kind["memory"]
    }
    if memory:
        panels["peak memory of a process\nGB"] = memory
    shown = ("bitlinear", "torch", "transformers", "llama-cpp-python")
    numbers = results["versions"]
    versions = [f"{name} {numbers[name]}" for name in shown if name in numbers]
    subtitle = (
        machine.display_name(results["machine"]),
        report.plural(results["machine"]["threads"], "thread"),
        report.plural(batch, "sequence"),
    )
    details = (*versions, results["time"][:10], f"{report.UNSTEADY} unsteady")
    figure, axes = charts.canvas(
        f"Generating with a model of {_weights(results)} weights",
        "\n".join("   ·   ".join(parts) for parts in (subtitle, details)),
        size=(3.7 + 2.2 * len(panels), 2.0 + 0.32 * len(contestants)),
        columns=len(panels),
        top=1.65,
        left=3.4,
        right=0.3,
        bottom=0.2,
        between=0.4,
    )
    # With one panel there is no array of axes.
    for index, (title, bars) in enumerate(panels.items()):
        panel = axes[index] if len(panels) > 1 else axes
        _draw_bars(panel, title, bars, contestants)
        panel.tick_params(length=0, labelleft=index == 0)
    return figure


def _rates(cell: Record) -> dict[str, tuple[float, str]]:
    """Return the length and the text of each contestant's bar."""
    return {
        name: (
            figures["tokens_per_s"],
            report.marked(f"{figures['tokens_per_s']:.3g}", figures),
        )
        for name, figures in cell["contestants"].items()
    }


def _draw_bars(
    axes: Axes, title: str, bars: Mapping[str, tuple[float, str]], contestants: Mapping[str, Record]
) -> None:
    lengths = [bars.get(name, (0.0, ""))[0] for name in contestants]
    texts = [bars.get(name, (0.0, "not measured"))[1] for name in contestants]
    labels = [kind["label"] for kind in contestants.values()]
    colours = [charts.EMPHASIS if kind["ours"] else _GREY for kind in contestants.values()]
    drawn = axes.barh(labels, lengths, height=0.62, color=colours)
    axes.bar_label(drawn, texts, padding=4, fontsize=9.5)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(0, 1.35 * max([*lengths, 1e-9]))
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.grid(False)


def _weights(results: Record) -> str:
    count = results["model"]["weights"]
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.0f} million"
