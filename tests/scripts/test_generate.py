"""The benchmark of whole models: its cells, its report, its picture."""

from __future__ import annotations

import json
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from transformers import AutoModelForCausalLM

from bitlinear import runtime
from scripts.bench import generate, plot
from scripts.bench.generation import (
    breakdown,
    contestants,
    measure,
    memory,
    models,
    picture,
    report,
)
from scripts.bench.generation.contestants import Kind
from scripts.bench.generation.measure import Cell
from scripts.bench.peaks import Peaks
from tests.scripts.tiny_model import HEADS, HIDDEN, KV_HEADS, TINY, VOCABULARY, WEIGHTS

pytestmark = pytest.mark.skipif(
    runtime.current().kernel is None, reason="the benchmark needs a compiled kernel"
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)


@pytest.fixture
def no_peaks(monkeypatch):
    monkeypatch.setattr(measure, "measure_peaks", lambda *_: Peaks(1, {1 << 20: 1e9}, {}))


def run(tmp_path, *arguments, memory=("--no-memory",), code=0):
    path = tmp_path / "results.json"
    options = ["--shape", "tiny", "--budget", "0.02", *memory, "--json", str(path), *arguments]
    assert generate.main(options) == code
    return json.loads(path.read_text())


ONE_CELL = ("--prefill", "8", "--depths", "--batches", "1")


def test_a_run(no_peaks, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # not installed
    names = ["bitlinear", "bf16", "llama_q6_k"]
    grid = ["--prefill", "8", "--depths", "4", "20", "--batches", "1", "2", "--layers", "1"]
    results = run(tmp_path, *grid, "--contestants", *names)
    assert results["complete"]
    assert results["model"]["num_hidden_layers"] == 1
    assert results["model"]["weights"] == WEIGHTS // 2 + VOCABULARY * HIDDEN
    cells = [(c["phase"], c["length"], c["batch"]) for c in results["cells"]]
    lengths = [("prefill", 8), ("decode", 4), ("decode", 20)]
    assert cells == [(*length, batch) for batch in (1, 2) for length in lengths]
    for cell in results["cells"]:
        tokens = cell["batch"] * (cell["length"] if cell["phase"] == "prefill" else 1)
        assert list(cell["contestants"]) == names[:2]
        for name, figures in cell["contestants"].items():
            seconds = figures["median_us"] * 1e-6
            assert figures["tokens_per_s"] == pytest.approx(tokens / seconds, rel=1e-4)
            if cell["phase"] == "prefill":
                assert figures["share_of_floor"] is None
                continue
            cache = cell["length"] * cell["batch"] * 2 * 2 * KV_HEADS * HIDDEN // HEADS
            floor = (results["contestants"][name]["token_bytes"] + cache) / 1e9
            assert figures["share_of_floor"] == pytest.approx(floor / seconds, rel=1e-4)
    for kind in results["contestants"].values():
        assert set(kind["parts"]["us"]) == set(breakdown.PARTS)
        assert kind["parts"]["depth"] == 4
    (skipped,) = results["skipped"]
    assert skipped["contestant"] == "llama_q6_k"
    assert len(skipped["cells"]) == len(cells)
    assert "pip install llama-cpp-python" in skipped["reason"]
    out = capsys.readouterr().out
    assert "| decode  |     20 |     2 | **BitLinear, convert(model)** |" in out
    assert "skipped: llama_q6_k in prefill 8, batch 1; " in out
    monkeypatch.setitem(plot.charts.STYLE, "savefig.dpi", 30)
    plot.main([str(tmp_path / "results.json")])
    assert (tmp_path / "results-models.png").stat().st_size > 1000


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_on_a_gpu(tmp_path):
    grid = ["--prefill", "8", "--depths", "4", "--batches", "1", "2", "--device", "cuda"]
    results = run(tmp_path, *grid, "--contestants", "bitlinear", "bf16")
    assert results["skipped"] == []
    phases = ["prefill", "decode", "captured decode", "captured step"]
    assert [cell["phase"] for cell in results["cells"]] == 2 * phases
    for cell in results["cells"]:
        assert all(figures["tokens_per_s"] > 0 for figures in cell["contestants"].values())


class SteadyEngine:
    """Takes a millisecond for each token that it reads."""

    token_bytes = 10**6

    def first_token(self, length, batch):
        return lambda: 1e-3 * length * batch

    def next_tokens(self, depth, batch, count):
        return lambda: 1e-3 * batch * count


def test_the_figures_are_those_of_the_calls(no_peaks, tmp_path, monkeypatch):
    monkeypatch.setitem(contestants.KINDS, "bf16", Kind("steady", lambda _: SteadyEngine()))
    grid = ["--prefill", "8", "--depths", "4", "--batches", "1", "3"]
    results = run(tmp_path, *grid, "--contestants", "bf16")
    medians = [cell["contestants"]["bf16"]["median_us"] for cell in results["cells"]]
    assert medians == pytest.approx([8e3, 1e3, 24e3, 3e3])
    rates = [cell["contestants"]["bf16"]["tokens_per_s"] for cell in results["cells"]]
    assert rates == pytest.approx([1000] * 4)
    assert results["contestants"]["bf16"]["parts"] is None


def test_a_call_over_the_limit_is_left_out(no_peaks, tmp_path):
    arguments = [*ONE_CELL, "--contestants", "bf16", "--limit", "1e-6"]
    results = run(tmp_path, *arguments, code=generate.NOTHING_RAN)
    assert results["cells"][0]["contestants"] == {}
    assert "over the limit of 1e-06 s" in results["skipped"][0]["reason"]


def test_an_interrupted_run_keeps_its_cells(no_peaks, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(breakdown, "measure", interrupt)
    path = tmp_path / "results.json"
    arguments = ["--prefill", "--depths", "4", "--batches", "1", "--contestants", "bf16"]
    options = ["--shape", "tiny", "--budget", "0.02", "--no-memory", "--json", str(path)]
    assert generate.main([*options, *arguments]) == generate.INTERRUPTED
    results = json.loads(path.read_text())
    assert not results["complete"]
    assert len(results["cells"]) == 1
    assert "interrupted after 1 cell" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--prefill", "4097"], ["--prefill", "--depths"]])
def test_lengths_outside_the_model_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        generate.main(arguments)
    assert "give at least one length, and none over 4096" in capsys.readouterr().err


def test_the_time_of_a_pass_is_linear_in_its_tokens():
    cost = measure._linear_cost([1.0, 64.0])
    assert [cost(1), cost(64), cost(1024)] == [1, 64, 1024]
    assert measure._linear_cost([2.0, 1.0])(1024) == 2  # never less than one token


def test_the_process_of_a_contestant_needs_memory():
    found = memory.generate("bf16", "tiny", None, "cpu", 1, None)
    assert found["peak_bytes"] >= found["before_bytes"] > 1e6


@pytest.mark.parametrize("name", models.SETTINGS)
def test_our_models_are_loaded(name, tmp_path):
    memory.write(name, "tiny", 1, str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    made = contestants.KINDS[name].make(contestants.Materials("tiny", 1, "cpu", 1, tmp_path))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in made.model.modules()]
    assert models.token_bytes(loaded) == made.token_bytes
    found = memory.generate("no contestant", "", None, "cpu", 1, str(tmp_path))
    assert found["peak_bytes"] >= found["before_bytes"] > 1e6


def test_memory_is_measured_after_another_process_has_saved_our_models(
    no_peaks, tmp_path, monkeypatch
):
    saved, measured = {}, {}

    def save(name, shape, layers, folder):
        saved[folder] = (name, shape, layers)

    def measure_memory(name, path, **arguments):
        measured[name] = path and saved[path]
        return {"peak_bytes": 3, "before_bytes": 2}

    monkeypatch.setattr(memory, "save", save)
    monkeypatch.setattr(memory, "measure", measure_memory)
    names = ["bitlinear_int8_head", "bf16"]
    results = run(tmp_path, *ONE_CELL, "--contestants", *names, memory=())
    assert measured == {names[0]: (names[0], "tiny", None), "bf16": None}
    assert results["contestants"]["bf16"]["memory"] == {"peak_bytes": 3, "before_bytes": 2}


@pytest.mark.slow
def test_the_memory_is_that_of_another_process(tmp_path):
    made = {"name": "bitlinear_int8_head", "shape": "small", "layers": 1}
    memory.save(**made, folder=str(tmp_path))
    found = memory.measure(**made, device="cpu", threads=1, path=str(tmp_path))
    assert found["peak_bytes"] - found["before_bytes"] > 32000 * 768  # the embedding


def test_the_failure_of_another_process_is_named(tmp_path):
    path = str(tmp_path / "missing.gguf")
    with pytest.raises(RuntimeError, match=r"its memory was not measured: .*(llama|missing)"):
        memory.measure(name="", shape="", layers=1, device="cpu", threads=1, path=path)


def figures(median, samples, rate, share):
    quartiles = {"median_us": median, "p25_us": median - 1e3, "p75_us": median + 1e3}
    return {**quartiles, "samples": samples, "tokens_per_s": rate, "share_of_floor": share}


RESULTS = {
    "time": "2026-01-02T03:04:05+00:00",
    "complete": True,
    "machine": {"cpu": "Imaginary CPU", "threads": 2},
    "versions": {"bitlinear": "0.1", "torch": "2.13", "transformers": "5.24"},
    "chosen_kernel": "avx2",
    "model": {"shape": "tiny", "weights": 2_400_000_000, **TINY},
    "read": [{"bytes": 1 << 30, "gbps": 40.0}],
    "contestants": {
        "bitlinear": {
            "label": "ours",
            "note": "",
            "ours": True,
            "token_bytes": 10**9,
            "memory": {"peak_bytes": 2 * 10**9, "before_bytes": 5 * 10**8},
            "parts": {"us": dict.fromkeys(breakdown.PARTS, 1500.0)},
        },
        "llama_q6_k": {
            "label": "theirs",
            "note": "a note",
            "ours": False,
            "token_bytes": 10**9,
            "memory": None,
            "parts": None,
        },
    },
    "skipped": [{"contestant": "bf16", "reason": "no reason", "cells": []}],
    "cells": [
        {
            **vars(Cell("decode", 128, batch)),
            "contestants": {
                "bitlinear": figures(50e3, 2, 20.0 * batch, 0.5),
                "llama_q6_k": figures(40e3, 9, 25.0 * batch, 0.625),
            },
        }
        for batch in (1, 4)
    ],
}


def test_the_report():
    lines = report.render(RESULTS).splitlines()
    rows = [[text.strip() for text in line.split("|")[1:-1]] for line in lines]
    assert ["decode", "128", "1", "**ours**", "~50", "49", "51", "20", "50%", "~0.80x"] in rows
    assert ["decode", "128", "1", "theirs", "40", "39", "41", "25", "62%", "1.00x"] in rows
    assert ["ours", "1.00 GB", "2.00 GB", "0.50 GB", "", *["1.5"] * 5] in rows
    assert ["theirs", "1.00 GB", *[""] * 8] in rows
    assert "skipped: bf16: no reason" in lines
    assert "theirs: a note" in lines


def test_the_picture():
    figure = picture.draw(RESULTS)
    rates, memories = figure.axes
    assert [text.get_text() for text in rates.get_yticklabels()] == ["ours", "theirs"]
    assert [bar.get_width() for bar in rates.patches] == [20, 25]
    assert [text.get_text() for text in rates.texts] == ["~20", "25"]
    assert [text.get_text() for text in memories.texts] == ["2.00", "not measured"]
    assert figure.texts[0].get_text() == "Generating with a model of 2.4 billion weights"
