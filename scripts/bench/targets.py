"""Targets of a deployed layer on an H100, the quantisation of its input included.

Figures are medians with cold weights, from the results of the benchmark (see ``records.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Shape = Sequence[int]

# One token: microseconds by (N, K).
ONE_TOKEN = {
    (2560, 2560): 3.0,
    (2560, 6912): 4.0,
    (4096, 4096): 3.5,
    (13824, 2560): 5.0,
    (8192, 8192): 8.0,
    (28672, 8192): 22.5,
}
# By the number of tokens: the longest time, in times of one token.
FEW_TOKENS = {16: 1.3, 64: 2.0}
# By the number of tokens: the smallest speed-up over nn.Linear bf16.
MANY_TOKENS = {1024: 1.5, 4096: 1.5}
# N, K, M of a product, and its smallest Top/s.
PRODUCT, PRODUCT_TOPS = (8192, 8192, 4096), 1000.0


@dataclass(frozen=True)
class Verdict:
    """A target beside its measured figure.

    Attributes:
        product: The layer and its tokens.
        wanted: The limit and its unit, for people.
        figure: The measured figure, in that unit.
        met: Whether the figure is within the limit.
    """

    product: str
    wanted: str
    figure: float
    met: bool


def judge(results: Mapping[str, Any]) -> list[Verdict]:
    """Compare the chosen kernel with each target that was measured."""
    times = {
        (cell["N"], cell["K"], cell["M"], name): figures["median_us"]
        for cell in results["cells"]
        if cell["mode"] == "cold"
        for name, figures in cell["contestants"].items()
    }

    def us(shape: Shape, M: int, name: str = results["chosen_kernel"]) -> float:
        return float(times.get((*shape, M, name), math.nan))

    verdicts = [_at_most(shape, 1, us(shape, 1), top, "us") for shape, top in ONE_TOKEN.items()]
    verdicts += [
        _at_most(shape, M, us(shape, M) / us(shape, 1), top, "x M = 1")
        for M, top in FEW_TOKENS.items()
        for shape in ONE_TOKEN
    ]
    verdicts += [
        _at_least(shape, M, us(shape, M, "bf16") / us(shape, M), minimum, "x bf16")
        for M, minimum in MANY_TOKENS.items()
        for shape in ONE_TOKEN
    ]
    *shape, M = PRODUCT
    tops = 2e-6 * math.prod(PRODUCT) / us(shape, M)
    verdicts.append(_at_least(shape, M, tops, PRODUCT_TOPS, "Top/s"))
    return [verdict for verdict in verdicts if not math.isnan(verdict.figure)]


def _at_most(shape: Shape, M: int, figure: float, limit: float, unit: str) -> Verdict:
    return Verdict(_name(shape, M), f"<= {limit:g} {unit}", figure, figure <= limit)


def _at_least(shape: Shape, M: int, figure: float, limit: float, unit: str) -> Verdict:
    return Verdict(_name(shape, M), f">= {limit:g} {unit}", figure, figure >= limit)


def _name(shape: Shape, M: int) -> str:
    return f"{shape[0]} x {shape[1]}, M = {M}"
