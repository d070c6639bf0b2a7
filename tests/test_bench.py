"""The benchmark: its arithmetic on made-up times, and one small run of everything.

No test looks at a time that was measured.
"""

from __future__ import annotations

import math
import re
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import native

import bench
import contestants
import peaks
import report
import timing
from bitlinear import jit
from bitlinear.kernels import VARIANTS
from peaks import Peaks
from report import Cell
from timing import Contestant, Summary

CELL = Cell(N=64, K=30, M=4, threads=2, dtype="float32")

pytestmark = pytest.mark.skipif(
    jit.runtime().kernel is None, reason="the benchmark needs a compiled kernel"
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
    compiler = jit.runtime().hardware.compiler
    if compiler is None:
        pytest.skip("no compiler")
    variant = next(v for v in VARIANTS if v.name == jit.runtime().kernel)
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
    if jit.runtime().hardware.cpu.machine == "x86_64":
        assert list(its.multiply_add) == list(loops)


def test_loops_that_cannot_be_compiled_say_why():
    compiler = jit.runtime().hardware.compiler
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
    its = report.record(CELL, made_up(ours=10), kernels=["ours"], peers=["fp32"], bounds={})
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
    monkeypatch.setattr(bench, "_measure_peaks", lambda *_: {})


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
    kernels = list(dict.fromkeys([jit.runtime().kernel, "scalar"]))
    path = tmp_path / "results.json"
    before = torch.get_num_threads(), jit.runtime().kernel
    options = ("--threads", "1", "2", "--kernels", *kernels, "--json", str(path))
    assert bench.main([*TINY, *options]) == 0
    assert (torch.get_num_threads(), jit.runtime().kernel) == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]

    results = report.read(path)
    assert results["complete"] is True
    assert results["chosen_kernel"] == jit.runtime().kernel
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
            if {key: cell[key] for key in ("N", "K", "M", "threads")} in s["cells"]
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
    chosen = jit.runtime().kernel
    lost = made_up(**{chosen: 30, "fp32": 60, "int_mm": 20})
    won = made_up(**{chosen: 10, "fp32": 60, "int_mm": 20})
    budgets = scripted(won, lost, lost, lost)
    path = tmp_path / "results.json"
    options = ("--kernels", chosen, "--contestants", "bitlinear", "fp32", "int_mm")
    assert bench.main([*TINY, *options, "--check", "--json", str(path)]) == 1
    assert budgets == [0.02, 0.02, 0.04, 0.08]
    assert [cell["measurements"] for cell in report.read(path)["cells"]] == [1, 3]
    output = capsys.readouterr().out
    assert f"check failed: {chosen} is slower than a peer in 1 of 2 cells" in output
    assert re.search(r"64 x 30, M = 3, .*: 30.0 us, 1.50x the 20.0 us of int_mm", output)


def test_a_cell_that_is_won_when_measured_again_passes(scripted, capsys):
    chosen = jit.runtime().kernel
    lost, won = made_up(**{chosen: 30, "fp32": 20}), made_up(**{chosen: 10, "fp32": 20})
    scripted(won, lost, won)
    options = ("--kernels", chosen, "--contestants", "bitlinear", "fp32")
    assert bench.main([*TINY, *options, "--check"]) == 0
    assert "check passed: no peer is faster than" in capsys.readouterr().out


def test_neither_other_kernels_nor_the_undeployed_layer_are_peers(scripted):
    chosen = jit.runtime().kernel
    faster = dict.fromkeys([*contestants.available_kernels("cpu"), "undeployed"], 1)
    scripted(*[made_up(**{**faster, chosen: 30, "fp32": 60})] * 2)
    assert bench.main([*TINY, "--check"]) == 0


def test_without_check_a_lost_cell_is_measured_once(scripted):
    chosen = jit.runtime().kernel
    budgets = scripted(*[made_up(**{chosen: 30, "fp32": 20})] * 2)
    assert bench.main([*TINY, "--kernels", chosen]) == 0
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
    assert bench.main([*TINY, *options]) == 0
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

    monkeypatch.setattr(jit, "activate", activate)
    path = tmp_path / "results.json"
    options = ("--kernels", "scalar", "--contestants", "bitlinear", "fp32", "--json", str(path))
    assert bench.main([*TINY, *options]) == 0
    results = report.read(path)
    assert list(results["cells"][0]["contestants"]) == ["fp32"]
    assert "the compiler crashed" in results["skipped"][0]["reason"]


def test_an_interrupt_keeps_what_was_measured(monkeypatch, no_peaks, tmp_path, capsys):
    chosen, turns = jit.runtime().kernel, []

    def compare(field, budget, timer):
        turns.append(budget)
        if len(turns) == 2:
            raise KeyboardInterrupt
        return made_up(**{chosen: 10, "fp32": 20})

    monkeypatch.setattr(timing, "compare", compare)
    path = tmp_path / "results.json"
    assert bench.main([*TINY, "--kernels", chosen, "--check", "--json", str(path)]) == 130
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
        (["--json", "no/such/directory/x.json"], "there is no directory"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_floor_is_the_whole_grid():
    shapes, tokens = bench.GRIDS["floor"]
    assert len(set(shapes)) == 9
    assert tokens == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_on_a_gpu(tmp_path):
    path = tmp_path / "results.json"
    assert bench.main([*TINY, "--device", "cuda", "--json", str(path)]) == 0
    results = report.read(path)
    assert results["machine"]["gpu"]["name"]
    for cell in results["cells"]:
        assert {results["chosen_kernel"], "fp32", "fp16", "bf16"} <= set(cell["contestants"])
        assert all(math.isfinite(its["gops"]) for its in cell["contestants"].values())
