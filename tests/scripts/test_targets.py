"""The targets of a layer on an H100."""

from __future__ import annotations

import pytest

from scripts.bench import targets
from scripts.bench.__main__ import GRIDS


def test_the_grid_of_a_gpu_holds_its_targets():
    shapes, tokens = GRIDS["cuda"]["floor"]
    assert len(set(shapes)) == 12
    assert tokens == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
    assert set(targets.ONE_TOKEN) <= set(shapes)
    assert {*targets.FEW_TOKENS, *targets.MANY_TOKENS} <= set(tokens)


def cold(N, K, **microseconds):
    """Cells of a layer, with the fields that the targets read; ``M1=3`` is one token in 3 us."""
    return [
        {
            "N": N,
            "K": K,
            "M": int(M[1:]),
            "mode": "cold",
            "contestants": {"cuda": {"median_us": us}, "bf16": {"median_us": 2 * us}},
        }
        for M, us in microseconds.items()
    ]


def test_targets_are_met_or_missed():
    cells = [
        *cold(2560, 2560, M1=2, M16=2.5, M64=5),
        *cold(8192, 8192, M1=9, M4096=500),
    ]
    warm = [{**cell, "mode": "warm", "contestants": {"cuda": {"median_us": 1}}} for cell in cells]
    verdicts = targets.judge({"chosen_kernel": "cuda", "cells": [*cells, *warm]})
    assert [(v.product, v.wanted, v.figure, v.met) for v in verdicts] == [
        ("2560 x 2560, M = 1", "<= 3 us", 2, True),
        ("8192 x 8192, M = 1", "<= 8 us", 9, False),
        ("2560 x 2560, M = 16", "<= 1.3 x M = 1", 1.25, True),
        ("2560 x 2560, M = 64", "<= 2 x M = 1", 2.5, False),
        ("8192 x 8192, M = 4096", ">= 1.5 x bf16", 2, True),
        ("8192 x 8192, M = 4096", ">= 1000 Top/s", pytest.approx(1099.5, abs=0.1), True),
    ]


def test_without_measurements_there_are_no_verdicts():
    assert targets.judge({"chosen_kernel": "cuda", "cells": []}) == []
