"""The benchmark's command on a CPU: one small run of everything, and runs with made-up times.

No test depends on a measured time.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch

from bitlinear import runtime
from scripts.bench import contestants, peaks, records, timing
from scripts.bench.__main__ import GRIDS, main
from scripts.bench.devices import DEVICES
from tests.scripts.times import made_up

pytestmark = pytest.mark.skipif(
    runtime.current().kernel is None, reason="the benchmark needs a compiled kernel"
)


TINY = ("--shapes", "64x30", "--tokens", "1", "3", "--budget", "0.02")


def test_an_undeployed_layer_is_timed_on_the_chosen_kernel():
    chosen, device = runtime.current().kernel, DEVICES["cpu"]
    layers = contestants.Layers(8, 8, ["undeployed"], ["scalar"], device)
    try:
        scalar, undeployed = layers.contestants(1, device.modes[""])[0]
        scalar.enter()
        assert runtime.current().kernel == "scalar"
        undeployed.enter()
        assert runtime.current().kernel == chosen
    finally:
        runtime.activate(None)


def test_a_run_of_everything(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peaks, "RUN_SECONDS", 1e-3)
    kernels = list(dict.fromkeys([runtime.current().kernel, "scalar"]))
    path = tmp_path / "results.json"
    before = torch.get_num_threads(), runtime.current().kernel
    options = ("--threads", "1", "2", "--kernels", *kernels, "--json", str(path))
    assert main([*TINY, *options]) == 0
    assert (torch.get_num_threads(), runtime.current().kernel) == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]

    results = records.read(path)
    assert results["complete"] is True
    assert results["chosen_kernel"] == runtime.current().kernel
    assert results["machine"]["threads"] == [1, 2]
    assert results["versions"]["torch"] == str(torch.__version__)
    assert [peak["threads"] for peak in results["peaks"]] == [1, 2]
    where = [(c["N"], c["K"], c["M"], c["threads"], c["dtype"]) for c in results["cells"]]
    assert where == [(64, 30, M, threads, "float32") for threads in (1, 2) for M in (1, 3)]
    roles = {name: kind["role"] for name, kind in results["contestants"].items()}
    assert [name for name, role in roles.items() if role == "kernel"] == kernels
    for cell in results["cells"]:
        skipped = {
            s["contestant"]
            for s in results["skipped"]
            if {key: cell[key] for key in ("N", "K", "M", "threads", "mode")} in s["cells"]
        }
        assert set(cell["contestants"]) == set(roles) - skipped
        for name, figures in cell["contestants"].items():
            assert figures["p25_us"] <= figures["median_us"] <= figures["p75_us"]
            assert figures["samples"] >= 1
            seconds = figures["median_us"] * 1e-6
            assert figures["gops"] == pytest.approx(
                2 * 64 * 30 * cell["M"] / seconds * 1e-9, rel=1e-4
            )
            assert (figures["gbps"] is None) == (roles[name] != "kernel")
            if name in kernels:
                assert figures["gbps"] == pytest.approx(64 * 8 / seconds * 1e-9, rel=1e-4)
                assert figures["share_of_bound"] > 0

    output = capsys.readouterr()
    assert "timing: 100%" in output.err
    rows = [line for line in output.out.splitlines() if line.startswith("| 64 x 30 ")]
    assert len(rows) == sum(len(cell["contestants"]) for cell in results["cells"])
    assert sum("**" in row for row in rows) == len(results["cells"])
    text = path.read_text()
    for private in (socket.gethostname(), str(Path.home()), str(Path.cwd()), str(tmp_path)):
        assert private not in text


def test_a_cell_lost_to_a_complete_layer_fails_the_check(scripted, tmp_path, capsys):
    chosen = runtime.current().kernel
    lost = made_up(**{chosen: 30, "fp32": 60, "bf16": 20})
    won = made_up(**{chosen: 10, "fp32": 60, "bf16": 20})
    budgets = scripted(won, lost, lost, lost)
    path = tmp_path / "results.json"
    options = ("--kernels", chosen, "--contestants", "bitlinear", "fp32", "bf16")
    assert main([*TINY, *options, "--check", "--json", str(path)]) == 1
    assert budgets == [0.02, 0.02, 0.04, 0.08]
    assert [cell["measurements"] for cell in records.read(path)["cells"]] == [1, 3]
    output = capsys.readouterr().out
    assert f"check failed: {chosen} does not win 1 of 2 cells" in output
    assert re.search(r"64 x 30, M = 3, .*: 30.0 us, 1.50x the 20.0 us of bf16", output)


def test_a_cell_without_an_opponent_fails_the_check(scripted, capsys):
    chosen = runtime.current().kernel
    scripted(*[made_up(**{chosen: 30, "int_mm": 60})] * 2)
    options = ("--kernels", chosen, "--contestants", "bitlinear", "fp32", "int_mm")
    assert main([*TINY, *options, "--check"]) == 1
    output = capsys.readouterr().out
    assert f"check failed: {chosen} does not win 2 of 2 cells" in output
    assert output.count("no complete layer was timed") == 2


def test_a_cell_that_is_won_when_measured_again_passes(scripted, capsys):
    chosen = runtime.current().kernel
    lost, won = made_up(**{chosen: 30, "fp32": 20}), made_up(**{chosen: 10, "fp32": 20})
    scripted(won, lost, won)
    options = ("--kernels", chosen, "--contestants", "bitlinear", "fp32")
    assert main([*TINY, *options, "--check"]) == 0
    assert "check passed: no complete layer is faster than" in capsys.readouterr().out


def test_cells_lost_to_layers_and_to_bare_products_are_counted_apart(scripted, capsys):
    chosen = runtime.current().kernel
    won = made_up(**{chosen: 20, "fp32": 60, "int_mm": 10})
    lost = made_up(**{chosen: 30, "fp32": 20, "int_mm": 10})
    scripted(won, lost, lost, lost)
    options = ("--kernels", chosen, "--contestants", "bitlinear", "fp32", "int_mm")
    assert main([*TINY, *options, "--check"]) == 1
    where = r"64 x 30, M = {}, \d+ threads?"
    first, second = where.format(1), where.format(3)
    assert re.search(
        f"""check failed: {chosen} does not win 1 of 2 cells
lost to a complete layer: 1 of 2 cells, at worst 1.50x in {second}
  {second}: 30.0 us, 1.50x the 20.0 us of fp32
lost to a bare product, which quantises nothing: 2 of 2 cells, at worst 3.00x in {second}
  {second}: 30.0 us, 3.00x the 10.0 us of int_mm
  {first}: 20.0 us, 2.00x the 10.0 us of int_mm
""",
        capsys.readouterr().out,
    )


def test_a_bare_product_that_is_faster_does_not_fail_the_check(scripted, capsys):
    chosen = runtime.current().kernel
    scripted(*[made_up(**{chosen: 30, "fp32": 60, "int_mm": 20})] * 2)
    options = ("--kernels", chosen, "--contestants", "bitlinear", "fp32", "int_mm")
    assert main([*TINY, *options, "--check"]) == 0
    output = capsys.readouterr().out
    assert "complete layers: nn.Linear fp32  \nbare products: torch._int_mm" in output
    assert "lost to a complete layer: 0 of 2 cells\n" in output
    assert "lost to a bare product, which quantises nothing: 2 of 2 cells" in output


def test_only_complete_layers_can_fail_the_check(scripted):
    chosen = runtime.current().kernel
    faster = dict.fromkeys([*contestants.available_kernels("cpu"), "undeployed", "int_mm"], 1)
    scripted(*[made_up(**{**faster, chosen: 30, "fp32": 60})] * 2)
    assert main([*TINY, "--check"]) == 0


def test_without_check_a_lost_cell_is_measured_once(scripted):
    chosen = runtime.current().kernel
    budgets = scripted(*[made_up(**{chosen: 30, "fp32": 20})] * 2)
    assert main([*TINY, "--kernels", chosen]) == 0
    assert len(budgets) == 2


def test_what_cannot_run_is_skipped_and_reported(monkeypatch, no_peaks, tmp_path, capsys):
    def no_engine(*arguments, **options):
        raise RuntimeError("Didn't find engine for operation quantized::linear_prepack NoQEngine")

    def wants_more_rows(x, weight):
        if len(x) < 2:
            raise RuntimeError("self.size(0) needs to be greater than 1, but got 1")
        return x

    monkeypatch.setattr(torch.ao.quantization, "quantize_dynamic", no_engine)
    monkeypatch.setattr(torch, "_int_mm", wants_more_rows)
    path = tmp_path / "results.json"
    options = ("--contestants", "int8_dynamic", "int_mm", "fp32", "--json", str(path))
    assert main([*TINY, *options]) == 0
    results = records.read(path)
    assert [list(cell["contestants"]) for cell in results["cells"]] == [
        ["fp32"],
        ["fp32", "int_mm"],
    ]
    skipped = {s["contestant"]: s for s in results["skipped"]}
    assert [cell["M"] for cell in skipped["int8_dynamic"]["cells"]] == [1, 3]
    assert [cell["M"] for cell in skipped["int_mm"]["cells"]] == [1]
    output = capsys.readouterr().out
    assert "skipped: int8_dynamic everywhere: Didn't find engine" in output
    assert re.search(r"skipped: int_mm in 64 x 30, M = 1, .*: self.size\(0\) needs", output)


def test_a_kernel_that_does_not_build_is_skipped(monkeypatch, no_peaks, tmp_path):
    def activate(name):
        if name is not None:
            raise RuntimeError(f"cannot switch to {name}: the compiler crashed")

    monkeypatch.setattr(runtime, "activate", activate)
    path = tmp_path / "results.json"
    options = ("--kernels", "scalar", "--contestants", "bitlinear", "fp32", "--json", str(path))
    assert main([*TINY, *options]) == 0
    results = records.read(path)
    assert list(results["cells"][0]["contestants"]) == ["fp32"]
    assert "the compiler crashed" in results["skipped"][0]["reason"]


def test_an_interrupt_keeps_what_was_measured(monkeypatch, no_peaks, tmp_path, capsys):
    chosen, turns = runtime.current().kernel, []

    def compare(field, budget, timer):
        turns.append(budget)
        if len(turns) == 2:
            raise KeyboardInterrupt
        return made_up(**{chosen: 10, "fp32": 20})

    monkeypatch.setattr(timing, "compare", compare)
    path = tmp_path / "results.json"
    assert main([*TINY, "--kernels", chosen, "--check", "--json", str(path)]) == 130
    results = records.read(path)
    assert results["complete"] is False
    assert len(results["cells"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert "interrupted after 1 cell" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4096"], "'4096' is not of the form NxK, such as 4096x1024"),
        (["--shapes", "64x0"], "'64x0' is not of the form NxK"),
        (["--tokens", "0"], "'0' is not a whole number above 0"),
        (["--threads", "two"], "'two' is not a whole number above 0"),
        (["--budget", "nan"], "'nan' is not a number of seconds above 0"),
        (["--kernels", "abacus"], "--kernels: on this machine there are"),
        (["--contestants", "fp16"], "--contestants: on cpu there are bitlinear, fp32"),
        (["--contestants", "bitlinear", "--check"], "leave them in"),
        (["--modes", "cold"], "--modes: on cpu there are none"),
        (["--json", "no/such/directory/x.json"], "there is no directory"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_floor_is_the_whole_grid():
    shapes, tokens = GRIDS["cpu"]["floor"]
    assert len(set(shapes)) == 9
    assert tokens == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
