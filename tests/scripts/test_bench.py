"""The benchmark: its arithmetic on made-up times, and one small run of everything.

No test looks at a time that was measured.
"""

from __future__ import annotations

import math
import re
import socket
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitlinear
from bitlinear import runtime
from bitlinear.kernels import VARIANTS
from scripts.bench import benchmark, contestants, machine, peaks, report, targets, timing
from scripts.bench.devices import DEVICES
from scripts.bench.peaks import Peaks
from scripts.bench.report import Cell
from scripts.bench.timing import Contestant, Summary
from tests.kernels import native

CELL = Cell(N=64, K=30, M=4, threads=2, dtype="float32")

pytestmark = pytest.mark.skipif(
    runtime.current().kernel is None, reason="the benchmark needs a compiled kernel"
)


def summary(microseconds: float) -> Summary:
    return Summary(microseconds * 1e-6, microseconds * 0.9e-6, microseconds * 1.2e-6, 7)


def made_up(**microseconds: float) -> dict[str, Summary]:
    return {name: summary(its) for name, its in microseconds.items()}


# --------------------------------------------------------------------------------- timing


@given(st.floats(1e-6, 10), st.floats(1e-3, 10))
def test_a_plan_spends_its_share_and_no_more(call_seconds, share):
    its = timing.plan(call_seconds, share)
    assert timing.MIN_SAMPLES <= its.visits <= timing.ROUNDS
    assert its.samples >= 1
    assert sum(map(its.takes_part, range(timing.ROUNDS))) == its.visits
    spent = its.visits * (its.samples + its.warm_up) * its.calls * call_seconds
    assert spent <= share * 1.001 or (its.visits, its.samples) == (timing.MIN_SAMPLES, 1)


def test_a_short_call_is_timed_by_the_batch_and_often():
    its = timing.plan(5e-6, 0.2)
    assert its.calls * 5e-6 == pytest.approx(timing.SAMPLE_SECONDS)
    assert its.visits * its.samples > 500
    assert its.warm_up


def test_a_long_call_is_timed_three_times_far_apart():
    its = timing.plan(3.0, 0.2)
    assert (its.calls, its.samples, its.visits, its.warm_up) == (1, 1, 3, False)
    rounds = [number for number in range(timing.ROUNDS) if its.takes_part(number)]
    assert min(b - a for a, b in zip(rounds, rounds[1:])) >= timing.ROUNDS // 3


def test_quartiles():
    assert timing.summarize([5, 1, 4, 2, 3]) == Summary(median=3, p25=2, p75=4, samples=5)
    assert timing.summarize([1, 2]).median == 1.5


def test_contestants_take_turns_forwards_and_backwards():
    log = []
    field = [
        Contestant(name, call=lambda: None, enter=lambda name=name: log.append(name))
        for name in "abc"
    ]
    times = timing.compare(field, budget=3.0, timer=lambda call, count: 1e-3)
    turns = "".join(log[len(field) :])  # they enter first to be estimated
    assert turns == "abccba" * (timing.ROUNDS // 2)
    assert {its.samples for its in times.values()} == {980}
    assert {its.median for its in times.values()} == {1e-3}


def test_the_clock_times_a_batch_of_calls():
    calls = []
    assert timing.cpu_timer(lambda: calls.append(1), 5) > 0
    assert len(calls) == 5


# --------------------------------------------------------------------------------- peaks


def test_the_bound_is_the_longer_of_reading_and_multiplying():
    its = Peaks(threads=1, read={1 << 10: 4e9, 1 << 20: 1e9}, multiply_add={"fast": 1e12})
    assert its.read_rate(1 << 9) == 4e9
    assert its.read_rate(1 << 15) == pytest.approx(2.5e9)
    assert its.read_rate(1 << 30) == 1e9
    assert its.bound("fast", 1 << 20, 10) == pytest.approx((1 << 20) / 1e9)
    assert its.bound("fast", 1 << 20, 10**12) == pytest.approx(1)
    assert its.bound("without", 1 << 20, 10**12) == pytest.approx((1 << 20) / 1e9)


@pytest.fixture(scope="module")
def loops():
    """``peaks.cpp`` with the flags of the kernel that runs here."""
    compiler = runtime.current().hardware.compiler.value
    if compiler is None:
        pytest.skip("no compiler")
    variant = next(v for v in VARIANTS if v.name == runtime.current().kernel)
    return {variant.name: peaks.compile_loops(variant, compiler)}


def test_the_loops_do_what_they_count(loops):
    its = next(iter(loops.values()))
    assert its.multiply_adds(10) == 10 * its.multiply_adds(1)
    data = torch.zeros(4096, dtype=torch.uint8)
    assert its.read_bytes(data.data_ptr(), 4096, 3) == 3 * 4096
    assert its.read_bytes(data.data_ptr(), 1023, 1) == 512


def test_peaks_are_measured_for_every_size_and_kernel(loops):
    its = peaks.measure(loops, threads=2, working_sets=(1 << 12, 1 << 16))
    assert list(its.read) == [1 << 12, 1 << 16]
    assert all(rate > 0 for rate in (*its.read.values(), *its.multiply_add.values()))
    if runtime.current().hardware.cpu.machine == "x86_64":
        assert list(its.multiply_add) == list(loops)


def test_loops_that_cannot_be_compiled_say_why():
    compiler = runtime.current().hardware.compiler.value
    if compiler is None:
        pytest.skip("no compiler")
    variant = VARIANTS[-1]
    broken = type(variant)(variant.name, variant.sources, ("-mno-such-instructions",))
    with pytest.raises(RuntimeError, match="no-such-instructions"):
        peaks.compile_loops(broken, compiler)
    with pytest.raises(RuntimeError, match="no C"):
        peaks.compile_loops(variant, None)


@pytest.mark.slow
@native.compilers
@native.variants
def test_the_sums_stay_in_registers(variant, compiler, tmp_path):
    """A loop that stores its sums would measure the stores."""
    output = tmp_path / "peaks.o"
    command = [*native.compiler_command(compiler, variant), "-std=c++17", *variant.cflags]
    command += ["-Wall", "-Wextra", "-Werror", "-fPIC", "-c", peaks.SOURCE, "-o", output]
    subprocess.run(command, check=True)
    objdump = [*native.objdump(variant), "-dw", "--no-show-raw-insn", output]
    text = subprocess.run(objdump, capture_output=True, text=True, check=True).stdout
    body = text.split("<multiply_adds>:")[1].split("\n\n")[0]
    if "ldtilecfg" in body:  # AMX stores the configuration of its tiles first, on the stack
        body = body.split("ldtilecfg")[1].partition("\n")[2]
    loop = re.split(r"vpdpbusd|vpmaddubsw|pmaddwd|tdpbsud|sdot|smmla|smlal", body, maxsplit=1)[1]
    assert not re.search(r"\(%|\[", re.sub(r".*(nop|lea|ldp).*", "", loop))


# --------------------------------------------------------------------------------- records


def test_a_record_follows_from_the_times():
    its = report.record(
        CELL,
        made_up(ours=10, fp32=40, int_mm=20, undeployed=5),
        kernels=["ours"],
        peers=["fp32", "bf16", "int_mm"],
        bounds={"ours": 4e-6},
        baseline="fp32",
    )
    assert its["fastest_peer"] == "int_mm"
    assert its["contestants"]["ours"] == {
        "median_us": 10,
        "p25_us": 9,
        "p75_us": 12,
        "samples": 7,
        "gops": pytest.approx(2 * 4 * 64 * 30 / 10e-6 * 1e-9),
        "gbps": pytest.approx(64 * 8 / 10e-6 * 1e-9),  # 30 weights take 8 bytes
        "share_of_bound": pytest.approx(0.4),
        "speedup_over_fp32": 4,
        "speedup_over_fastest_peer": 2,
    }
    assert its["contestants"]["fp32"]["gbps"] is None
    assert its["contestants"]["fp32"]["share_of_bound"] is None
    assert its["contestants"]["undeployed"]["speedup_over_fastest_peer"] == 4
    assert report.lead(its, "ours") == 2
    assert report.lead(its, "absent") is None


def test_a_record_without_peers_compares_with_none():
    its = report.record(
        CELL, made_up(ours=10), kernels=["ours"], peers=["fp32"], bounds={}, baseline="fp32"
    )
    assert its["fastest_peer"] is None
    ours = its["contestants"]["ours"]
    assert ours["speedup_over_fp32"] is None
    assert ours["speedup_over_fastest_peer"] is None
    assert ours["share_of_bound"] is None


def test_what_is_skipped_for_one_reason_is_one_entry():
    results = {"skipped": []}
    other = Cell(64, 30, 8, 2, "float32")
    report.note_skipped(results, CELL, {"int_mm": "too small"})
    report.note_skipped(results, other, {"int_mm": "too small", "bf16": "absent"})
    assert [(s["contestant"], s["reason"], len(s["cells"])) for s in results["skipped"]] == [
        ("int_mm", "too small", 2),
        ("bf16", "absent", 1),
    ]


def test_messages_lose_their_paths():
    error = RuntimeError("cannot open /home/somebody/x.cpp, N/A\nmore")
    assert contestants.one_line(error) == "cannot open <path>, N/A"


def test_a_file_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 0, but this version reads schema 1"):
        report.read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="does not hold results"):
        report.read(path)


# --------------------------------------------------------------------------------- command


TINY = ("--shapes", "64x30", "--tokens", "1", "3", "--budget", "0.02")


@pytest.fixture
def no_peaks(monkeypatch):
    """For tests that need none: compiling and measuring them takes seconds."""
    monkeypatch.setattr(benchmark, "_measure_peaks", lambda *_: {})


@pytest.fixture
def scripted(monkeypatch, no_peaks):
    """Makes up the times of the following measurements; the budgets that they were given."""
    budgets = []

    def script(*measurements: dict[str, Summary]) -> list[float]:
        turns = iter(measurements)

        def compare(field, budget, timer):
            budgets.append(budget)
            return next(turns)

        monkeypatch.setattr(timing, "compare", compare)
        return budgets

    return script


def test_a_run_of_everything(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peaks, "RUN_SECONDS", 1e-3)
    kernels = list(dict.fromkeys([runtime.current().kernel, "scalar"]))
    path = tmp_path / "results.json"
    before = torch.get_num_threads(), runtime.current().kernel
    options = ("--threads", "1", "2", "--kernels", *kernels, "--json", str(path))
    assert benchmark.main([*TINY, *options]) == 0
    assert (torch.get_num_threads(), runtime.current().kernel) == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]

    results = report.read(path)
    assert results["complete"] is True
    assert results["chosen_kernel"] == runtime.current().kernel
    assert results["machine"]["threads"] == [1, 2]
    assert results["versions"]["torch"] == str(torch.__version__)
    assert [peak["threads"] for peak in results["peaks"]] == [1, 2]
    where = [(c["N"], c["K"], c["M"], c["threads"], c["dtype"]) for c in results["cells"]]
    assert where == [(64, 30, M, threads, "float32") for threads in (1, 2) for M in (1, 3)]
    roles = {name: its["role"] for name, its in results["contestants"].items()}
    assert [name for name, role in roles.items() if role == "kernel"] == kernels
    for cell in results["cells"]:
        skipped = {
            s["contestant"]
            for s in results["skipped"]
            if {key: cell[key] for key in ("N", "K", "M", "threads", "mode")} in s["cells"]
        }
        assert set(cell["contestants"]) == set(roles) - skipped
        for name, its in cell["contestants"].items():
            assert its["p25_us"] <= its["median_us"] <= its["p75_us"]
            assert its["samples"] >= timing.MIN_SAMPLES
            seconds = its["median_us"] * 1e-6
            assert its["gops"] == pytest.approx(2 * 64 * 30 * cell["M"] / seconds * 1e-9, rel=1e-4)
            assert (its["gbps"] is None) == (roles[name] != "kernel")
            if name in kernels:
                assert its["gbps"] == pytest.approx(64 * 8 / seconds * 1e-9, rel=1e-4)
                assert its["share_of_bound"] > 0

    output = capsys.readouterr()
    assert "timing: 100%" in output.err
    rows = [line for line in output.out.splitlines() if line.startswith("| 64 x 30 ")]
    assert len(rows) == sum(len(cell["contestants"]) for cell in results["cells"])
    assert sum("**" in row for row in rows) == len(results["cells"])
    text = path.read_text()
    for private in (socket.gethostname(), str(Path.home()), str(Path.cwd()), str(tmp_path)):
        assert private not in text


def test_a_lost_cell_fails_the_check(scripted, tmp_path, capsys):
    chosen = runtime.current().kernel
    lost = made_up(**{chosen: 30, "fp32": 60, "int_mm": 20})
    won = made_up(**{chosen: 10, "fp32": 60, "int_mm": 20})
    budgets = scripted(won, lost, lost, lost)
    path = tmp_path / "results.json"
    options = ("--kernels", chosen, "--contestants", "bitlinear", "fp32", "int_mm")
    assert benchmark.main([*TINY, *options, "--check", "--json", str(path)]) == 1
    assert budgets == [0.02, 0.02, 0.04, 0.08]
    assert [cell["measurements"] for cell in report.read(path)["cells"]] == [1, 3]
    output = capsys.readouterr().out
    assert f"check failed: {chosen} is slower than a peer in 1 of 2 cells" in output
    assert re.search(r"64 x 30, M = 3, .*: 30.0 us, 1.50x the 20.0 us of int_mm", output)


def test_a_cell_that_is_won_when_measured_again_passes(scripted, capsys):
    chosen = runtime.current().kernel
    lost, won = made_up(**{chosen: 30, "fp32": 20}), made_up(**{chosen: 10, "fp32": 20})
    scripted(won, lost, won)
    options = ("--kernels", chosen, "--contestants", "bitlinear", "fp32")
    assert benchmark.main([*TINY, *options, "--check"]) == 0
    assert "check passed: no peer is faster than" in capsys.readouterr().out


def test_neither_other_kernels_nor_the_undeployed_layer_are_peers(scripted):
    chosen = runtime.current().kernel
    faster = dict.fromkeys([*contestants.available_kernels("cpu"), "undeployed"], 1)
    scripted(*[made_up(**{**faster, chosen: 30, "fp32": 60})] * 2)
    assert benchmark.main([*TINY, "--check"]) == 0


def test_without_check_a_lost_cell_is_measured_once(scripted):
    chosen = runtime.current().kernel
    budgets = scripted(*[made_up(**{chosen: 30, "fp32": 20})] * 2)
    assert benchmark.main([*TINY, "--kernels", chosen]) == 0
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
    assert benchmark.main([*TINY, *options]) == 0
    results = report.read(path)
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
    assert benchmark.main([*TINY, *options]) == 0
    results = report.read(path)
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
    assert benchmark.main([*TINY, "--kernels", chosen, "--check", "--json", str(path)]) == 130
    results = report.read(path)
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
        benchmark.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_floor_is_the_whole_grid():
    shapes, tokens = benchmark.GRIDS["cpu"]["floor"]
    assert len(set(shapes)) == 9
    assert tokens == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


# --------------------------------------------------------------------------------- GPUs


@pytest.fixture
def no_gpu(monkeypatch):
    """A "GPU" that runs on the CPU: in place of graphs, lists of calls."""
    monkeypatch.setattr(contestants, "available_kernels", lambda device: ["reference"])
    monkeypatch.setattr(timing, "capture", lambda calls: lambda: [call() for call in calls])
    monkeypatch.setattr(timing, "graph_timer", timing.cpu_timer)
    monkeypatch.setattr(machine, "gpu", lambda: {"name": "Imaginary GPU", "l2_bytes": 2000})
    cuda = DEVICES["cuda"]
    modes = {name: replace(mode, timer=timing.cpu_timer) for name, mode in cuda.modes.items()}
    here = replace(cuda, place="cpu", is_available=lambda: True, modes=modes)
    monkeypatch.setitem(DEVICES, "cuda", here)
    known = Peaks(1, {1 << 30: 3e12}, {"bf16": 7e14})
    monkeypatch.setattr(peaks, "measure_gpu", lambda *_: known)


GPU = ("--device", "cuda", "--shapes", "64x32", "--tokens", "1", "20", "--budget", "0.02")


def test_a_run_of_everything_that_a_gpu_does(no_gpu, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert benchmark.main([*GPU, "--json", str(path)]) == 0
    results = report.read(path)
    assert results["modes"] == ["cold", "warm", "eager"]
    assert results["checked"] == ["cold", "warm"]
    assert results["machine"]["gpu"]["name"] == "Imaginary GPU"
    where = [(cell["M"], cell["mode"], cell["dtype"]) for cell in results["cells"]]
    assert where == [(M, mode, "bfloat16") for M in (1, 20) for mode in results["modes"]]
    roles = {name: its["role"] for name, its in results["contestants"].items()}
    assert roles == {
        results["chosen_kernel"]: "kernel",
        "fp16": "peer",
        "bf16": "peer",
        "fp8": "other",
        "int_mm": "other",
    }
    for cell in results["cells"]:
        assert {results["chosen_kernel"], "fp16", "bf16"} <= set(cell["contestants"])
        assert cell["contestants"]["bf16"]["speedup_over_bf16"] == 1
        ours = cell["contestants"][results["chosen_kernel"]]
        assert (ours["share_of_bound"] is not None) == (cell["mode"] == "cold")
    output = capsys.readouterr().out
    assert "Imaginary GPU" in output
    assert "peaks: reading 1024 MB 3000 GB/s; multiply-adds bf16 700 Top/s" in output
    assert re.search(r"\| N x K +\| +M \| mode +\| contestant .* Top/s .* over bf16", output)
    assert "the int8 peak of Imaginary GPU is not in peaks.py" in output


def test_copies_have_weights_of_their_own_and_take_turns(no_gpu):
    device = DEVICES["cuda"]
    arranged = []

    def arrange(calls):
        arranged.append(calls)
        return calls[0], 1

    with torch.inference_mode():
        layers = contestants.Layers(64, 32, ["bf16", "int_mm"], ["reference"], device, copies=3)
    mode = replace(device.modes["cold"], arrange=arrange)
    field, failed = layers.contestants(20, mode)
    assert [contestant.name for contestant in field] == ["reference", "bf16", "int_mm"]
    assert failed == {}
    ours, bf16, int_mm = arranged
    assert len({call.func.w_packed.data_ptr() for call in ours}) == 3
    assert len({call.func.weight.data_ptr() for call in bf16}) == 3
    assert len({call.args[1].data_ptr() for call in int_mm}) == 3
    # They share the input, and the packed weights are copies, not packed anew.
    assert len({call.args[0].data_ptr() for call in int_mm}) == 1
    assert all(torch.equal(call.func.w_packed, ours[0].func.w_packed) for call in ours)
    # Of tensors made in inference mode a kernel cannot know whether they have changed.
    assert not any(call.func.w_packed.is_inference() for call in ours)


def test_cold_weights_fill_the_cache_twice(no_gpu):
    cuda = DEVICES["cuda"]
    assert [cuda.copies(size) for size in (1, 100, 1999, 4000, 10**9)] == [512, 40, 3, 1, 1]
    assert DEVICES["cpu"].copies(100) == 1


def test_a_graph_lasts_long_enough_to_be_timed(monkeypatch):
    log = []
    monkeypatch.setattr(timing, "capture", lambda calls: log.append(list(calls)) or "replay")
    monkeypatch.setattr(timing, "graph_timer", lambda call, count: timing.GRAPH_SECONDS / 2.5)
    assert timing.graph("ab") == ("replay", 6)
    assert log == [["a", "b"], ["a", "b"] * 3]
    monkeypatch.setattr(timing, "graph_timer", lambda call, count: 1.0)
    assert timing.graph("ab") == ("replay", 2)
    assert len(log) == 3


def test_the_time_of_a_graph_is_divided_among_its_calls():
    field = [Contestant("graph", lambda: None, repeats=8)]
    times = timing.compare(field, budget=0.1, timer=lambda call, count: 1e-3)
    assert times["graph"].median == 1e-3 / 8


def test_cold_and_warm_graphs_have_as_many_calls(monkeypatch):
    monkeypatch.setattr(timing, "graph", lambda calls: calls)
    modes = DEVICES["cuda"].modes
    assert modes["warm"].arrange(["a", "b"]) == ["a", "a"]
    assert modes["eager"].arrange(["a", "b"]) == ("a", 1)


def test_only_eager_cells_may_be_lost(no_gpu, scripted, capsys):
    won, lost = made_up(reference=10, bf16=20, fp8=5), made_up(reference=30, bf16=20)
    budgets = scripted(won, won, lost, won, lost, won, lost)
    options = ("--contestants", "bitlinear", "bf16", "fp8", "--kernels", "reference", "--check")
    assert benchmark.main([*GPU, *options]) == 0
    assert "no peer is faster than reference in 4 cells" in capsys.readouterr().out
    # The second token's warm cell is lost at first and measured again.
    assert budgets == [0.02] * 5 + [0.04, 0.02]


def test_a_kernel_that_no_graph_can_hold_fails_the_check(no_gpu, scripted, monkeypatch, capsys):
    def capture(calls):
        if isinstance(calls[0].func, bitlinear.BitLinear):
            raise RuntimeError("operation not permitted when stream is capturing")
        return calls[0]

    monkeypatch.setattr(timing, "capture", capture)
    scripted(*[made_up(bf16=20)] * 2)
    options = ("--contestants", "bitlinear", "bf16", "--modes", "cold", "--check")
    assert benchmark.main([*GPU, *options]) == 1
    output = capsys.readouterr().out
    assert "skipped: reference everywhere: operation not permitted" in output
    assert "64 x 32, M = 20, cold: not timed" in output


@pytest.mark.parametrize(
    ("name", "tops"),
    [
        ("NVIDIA H100 80GB HBM3", 1979),
        ("NVIDIA H100 PCIe", 1513),
        ("NVIDIA A100-SXM4-80GB", 624),
        ("NVIDIA H200", 1979),
    ],
)
def test_the_int8_peak_of_a_gpu(name, tops):
    assert peaks.int8_peak(name) == tops * 1e12


def test_the_int8_peak_of_an_unknown_gpu():
    assert peaks.int8_peak("Imaginary GPU") is None


def test_the_grid_of_a_gpu_holds_its_targets():
    shapes, tokens = benchmark.GRIDS["cuda"]["floor"]
    assert len(set(shapes)) == 12
    assert tokens == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
    assert set(targets.ONE_TOKEN) <= set(shapes)
    assert {*targets.FEW_TOKENS, *targets.MANY_TOKENS} <= set(tokens)


def cold(N, K, **microseconds):
    """Cells of a layer, as far as the targets look at them; ``M1=3`` for one token in 3 us."""
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
    its = targets.judge({"chosen_kernel": "cuda", "cells": [*cells, *warm]})
    assert [(v.what, v.wanted, v.figure, v.met) for v in its] == [
        ("2560 x 2560, M = 1", "<= 3 us", 2, True),
        ("8192 x 8192, M = 1", "<= 8 us", 9, False),
        ("2560 x 2560, M = 16", "<= 1.3 x M = 1", 1.25, True),
        ("2560 x 2560, M = 64", "<= 2 x M = 1", 2.5, False),
        ("8192 x 8192, M = 4096", ">= 1.5 x bf16", 2, True),
        ("8192 x 8192, M = 4096", ">= 1000 Top/s", pytest.approx(1099.5, abs=0.1), True),
    ]


def test_nothing_measured_meets_no_target():
    assert targets.judge({"chosen_kernel": "cuda", "cells": []}) == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_on_a_gpu(tmp_path):
    path = tmp_path / "results.json"
    assert benchmark.main([*GPU, "--json", str(path)]) == 0
    results = report.read(path)
    assert results["machine"]["gpu"]["l2_bytes"] > 0
    assert results["peaks"][0]["multiply_add_gops"]["bf16"] > 0
    for cell in results["cells"]:
        assert {results["chosen_kernel"], "fp16", "bf16"} <= set(cell["contestants"])
        assert all(math.isfinite(its["gops"]) for its in cell["contestants"].values())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_graph_makes_its_calls():
    count = torch.zeros(1, device="cuda")
    add = partial(count.add_, 1)
    replay = timing.capture([add] * 5)  # which calls it once before
    replay()
    assert count.item() == 6
    assert timing.graph_timer(replay, 2) > 0
    assert count.item() == 16
