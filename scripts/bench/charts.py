"""Parts of pictures: headings, lines with labels, heat maps. Nothing about benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scripts import tools

with tools.importing("bench"):
    from matplotlib.axes import Axes
    from matplotlib.colors import CenteredNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # part of matplotlib, so pictures look the same everywhere
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "figure.facecolor": "white",  # opaque, as the page may be dark
    "savefig.dpi": 160,
}
_GREY = "#666666"
# The colour of the subject of a picture.
EMPHASIS = "#D55E00"

# Keyword arguments of Axes.plot; "color" is always among them.
Look = dict[str, Any]
# (row, column) of a cell.
Index = tuple[int, int]


class End(NamedTuple):
    """The end of a line, and its label."""

    label: str
    x: float
    y: float
    color: str


def canvas(
    title: str,
    subtitle: str,
    *,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    top: float = 1.4,
    left: float = 1.0,
    right: float = 2.3,
    bottom: float = 0.65,
    between: float = 0.0,
) -> tuple[Figure, Any]:
    """Return a figure with its headings, and its axes: one, or an array of them.

    The subtitle has room for two lines.

    All sizes are in inches, so that headings and margins look the same on all pictures.
    """
    width, height = size
    figure = Figure(figsize=size)
    figure.text(0.15 / width, 1 - 0.36 / height, title, fontsize=15, weight="bold")
    figure.text(0.15 / width, 1 - 0.5 / height, subtitle, va="top", fontsize=10, color=_GREY)
    # subplots_adjust wants gaps in units of a panel.
    wide = (width - left - right - (columns - 1) * between) / columns
    high = (height - top - bottom - (rows - 1) * between) / rows
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=between / wide,
        hspace=between / high,
    )
    return figure, figure.subplots(rows, columns)


def line(axes: Axes, points: Mapping[int, float], look: Look, label: str) -> End:
    """Draw a line and return its end, for :func:`label_ends`."""
    x, y = zip(*sorted(points.items()))
    axes.plot(x, y, **look)
    return End(label, x[-1], y[-1], look["color"])


def hollow_points(axes: Axes, points: Mapping[int, float], look: Look) -> None:
    """Draw markers with a white face over a line, on points that are uncertain."""
    marker = {"marker": look.get("marker", "o"), "markersize": look.get("markersize", 5)}
    axes.plot(
        list(points),
        list(points.values()),
        linestyle="none",
        color=look["color"],
        markerfacecolor="white",
        **marker,
    )


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Write each label beside the end of its line, and move apart labels that would overlap."""
    axes.set_xlim(axes.get_xlim())  # the labels must not change the limits
    axes.set_ylim(axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((end.x, end.y))[1]) for end in ends]
    line = 14 / 72 / (axes.get_position().height * axes.figure.get_figheight())
    for end, height in zip(ends, spread(wanted, line)):
        axes.annotate(
            end.label,
            (end.x, end.y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=10,
            color=end.color,
            weight="bold" if end.color == EMPHASIS else "normal",
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),  # from where the text begins
                "color": end.color,
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 2,
                "shrinkB": 5,
            },
        )


def heat_map(axes: Axes, ratios: np.ndarray[Any, Any], prefixes: Mapping[Index, str]) -> None:
    """Draw ratios as colours and numbers; faster is orange, slower is purple.

    Args:
        axes: The axes.
        ratios: A ratio in each cell, or NaN.
        prefixes: Text in front of the number, by (row, column).
    """
    logs = np.log2(ratios)
    widest = max(1.0, float(np.nanmax(np.abs(logs)))) if np.isfinite(logs).any() else 1.0
    axes.imshow(logs, cmap="PuOr_r", norm=CenteredNorm(0, widest), aspect="auto")
    axes.grid(False)
    axes.tick_params(length=0)
    for (row, column), ratio in np.ndenumerate(ratios):
        strong = abs(logs[row, column]) > 0.6 * widest
        decimals = 2 if ratio < 2 else 1 if ratio < 10 else 0
        prefix = prefixes.get((row, column), "")
        text = "" if np.isnan(ratio) else f"{prefix}{ratio:.{decimals}f}"
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=9.5,
            color="white" if strong else "#222222",
        )
    for spine in axes.spines.values():
        spine.set_visible(False)


def log_ticks(axes: Axes, values: Sequence[int]) -> None:
    """Label logarithmic axes: with ``values`` and no others on x, with plain numbers on y."""
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    plain_y_ticks(axes)


def plain_y_ticks(axes: Axes) -> None:
    """Label a logarithmic y axis with plain numbers."""
    low, high = axes.get_ylim()
    if high < 10 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    elif high < 100 * low:  # powers of ten alone would be too few
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return the positions closest to ``wanted``, in the same order, at least ``gap`` apart."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    # With rank gaps subtracted, positions need only ascend: neighbours that do not are pooled into
    # their mean (isotonic regression).
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([wanted[index] - rank * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    flat = [float(np.mean(pool)) for pool in pools for _ in pool]
    positions = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        positions[index] = flat[rank] + rank * gap
    return positions
