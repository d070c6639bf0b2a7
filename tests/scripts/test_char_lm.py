"""The results of the language model: figures, picture and table."""

from __future__ import annotations

from dataclasses import asdict

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from scripts import char_lm
from scripts.char_training import LINEAR, TERNARY
from tests.scripts.small_char_lm import TINY, results_of

pytestmark = pytest.mark.slow


def test_results_are_complete(finished):
    results = results_of(finished)
    assert results["settings"] == asdict(TINY)
    assert {"machine", "versions", "kernel", "threads", "time"} < set(results)
    networks = results["networks"]
    assert list(networks) == [LINEAR, TERNARY, char_lm.DEPLOYED]
    for name, network in networks.items():
        assert network["character"]["median_us"] > network["linear_layers"]["median_us"] > 0
        assert len(network["sample"]) == len(char_lm.PROMPT) + char_lm.SAMPLE
        assert network["bits_per_character"] == pytest.approx(network["validation_loss"] / 0.693147)
        assert ("step_s" in network) == (name != char_lm.DEPLOYED)
    weights = TINY.depth * 12 * TINY.width**2
    size = {name: network["bytes"] for name, network in networks.items()}
    scales = TINY.depth * 4
    assert size[LINEAR] == size[TERNARY]
    assert size[LINEAR] - size[char_lm.DEPLOYED] == weights * 15 / 4 - 4 * scales


def test_deploying_changes_no_bit(finished):
    results = results_of(finished)
    assert char_lm.same_bits(results)
    results["networks"][char_lm.DEPLOYED]["validation_loss"] += 1e-15
    assert not char_lm.same_bits(results)


def test_the_picture_and_the_table(finished, tmp_path):
    assert (finished / "losses.png").read_bytes().startswith(b"\x89PNG")
    rows = char_lm.table(results_of(finished)).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [LINEAR, TERNARY, char_lm.DEPLOYED]
