"""Builds that fail, are killed or hang, and variants that give way to the next."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from bitlinear.runtime import artifacts, build
from tests.runtime.stand_ins import (
    compilations,
    compiler,
    finish,
    forget_loaded,
    given,
    python,
    stand_ins,
    start,
    states,
)


@pytest.mark.slow
def test_a_compiler_that_cannot_build_one_variant(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "g++: error: unrecognized command-line option '-mavx512vnni'"
    body = f'case "$*" in *-mavx512vnni*) echo "{line}" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "tools", body)))
    sources = stand_ins(tmp_path / "sources", ("good", "good"), cflags=("-mavx512vnni",))
    loaded = sources.load()
    assert loaded.kernel == "kernel1"
    assert given(loaded) == 1
    verdict = loaded.verdicts[0]
    assert (verdict.variant, verdict.status, verdict.code) == (
        "kernel0",
        "rejected",
        "compile-failed",
    )
    assert verdict.reason == line
    assert "--rebuild" in verdict.fix
    assert not verdict.ok

    count = len(compilations(tmp_path / "tools"))
    forget_loaded(monkeypatch)
    again = sources.load()
    assert states(again) == {"kernel0": "failed", "kernel1": "cached", "operator": "cached"}
    assert again.verdicts == loaded.verdicts
    assert len(compilations(tmp_path / "tools")) == count  # remembered


@pytest.mark.slow
def test_variants_that_fail_give_way_to_the_next(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {
        "broken": ("compile-failed", "kernel0.cpp:8:"),
        "illegal": ("illegal-instruction", "illegal instruction"),
        "mismatch": ("self-test-failed", "self-test failed: row 3 differs"),
        "crash": ("self-test-failed", "self-test failed: crashed with SIGSEGV"),
    }
    sources = stand_ins(tmp_path / "sources", (*expected, "good"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = sources.load()
        forget_loaded(monkeypatch)
        again = sources.load()
    assert loaded.kernel == again.kernel == "kernel4"
    for verdict, (code, reason) in zip(loaded.verdicts, expected.values()):
        assert (verdict.status, verdict.code) == ("rejected", code)
        assert reason in verdict.reason
    assert again.verdicts == loaded.verdicts
    assert "built" not in states(again).values()


@pytest.mark.slow
def test_a_kernel_that_the_system_refuses_gives_way_to_the_next(half: Path, tmp_path: Path) -> None:
    """As amx_int8, if a process is denied the tiles that the self-test was granted."""
    sources = stand_ins(tmp_path / "sources", ("good", "good"))
    file = sources.directory / "kernel0.cpp"
    file.write_text(file.read_text().replace("return &table", "return nullptr"))
    loaded = sources.load()
    assert loaded.kernel == "kernel1"
    assert loaded.verdicts[0].status == "rejected"
    assert loaded.verdicts[0].code == "illegal-instruction"
    assert "refuses this process a CPU feature that kernel0 needs" in loaded.verdicts[0].reason


@pytest.mark.slow
def test_a_failure_of_the_machine_is_tried_again(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once by the next import, then once an hour, and only one kernel of several."""
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    full = tmp_path / "full"
    full.touch()
    message = "fatal error: error writing to /tmp/x.s: No space left on device"
    cxx = compiler(tmp_path / "tools", f'[ -e "{full}" ] && {{ echo "{message}"; exit 1; }}')
    monkeypatch.setenv("CXX", str(cxx))
    sources = stand_ins(tmp_path / "sources", ("good", "good"))

    def tries() -> bool:
        before = len(compilations(tmp_path / "tools"))
        forget_loaded(monkeypatch)
        with pytest.warns(RuntimeWarning, match=message):
            loaded = sources.load()
        assert loaded.kernel is None
        reasons = {v.reason for v in loaded.verdicts if v.variant != "cuda"}
        assert reasons == {message}
        return len(compilations(tmp_path / "tools")) > before

    assert [tries(), tries(), tries()] == [True, True, False]
    now[0] += 3000.0
    with pytest.warns(RuntimeWarning, match="the next try is in 10 minutes, or now: .*--rebuild"):
        sources.load()
    now[0] += 601.0
    assert [tries(), tries()] == [True, False]
    assert not any("kernel1" in line for line in compilations(tmp_path / "tools"))

    full.unlink()
    now[0] += 3601.0
    forget_loaded(monkeypatch)
    assert sources.load().kernel == "kernel0"


@pytest.mark.slow
def test_a_failure_of_the_machine_that_is_mended_is_forgotten(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    body = f'[ -e "{broken}" ] && {{ echo "license checkout failed: timed out"; exit 1; }}'
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "tools", body)))
    sources = stand_ins(tmp_path / "sources")
    with pytest.warns(RuntimeWarning, match="license checkout failed: timed out"):
        assert sources.load().kernel is None
    broken.unlink()
    forget_loaded(monkeypatch)
    assert sources.load().kernel == "kernel0"


@pytest.mark.slow
def test_a_kernel_in_the_cache_serves_if_a_better_one_cannot_be_built_now(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    body = (
        f'[ -e "{broken}" ] && {{ echo "as: cannot open /tmp/x.o: Too many open files"; exit 1; }}'
    )
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "tools", body)))
    sources = stand_ins(tmp_path / "sources")
    sources.load()
    broken.touch()
    forget_loaded(monkeypatch)
    better = replace(sources.variants[0], name="better", priority=200)
    loaded = replace(sources, variants=(better, *sources.variants)).load()
    assert loaded.kernel == "kernel0"
    assert "Too many open files" in loaded.verdicts[0].reason


@pytest.mark.slow
def test_a_child_that_is_killed(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the kernel's out-of-memory killer."""
    body = f"for p in $(grep -l '{fresh}' /proc/[0-9]*/cmdline); do p=${{p%/cmdline}}; "
    body += "case $(tr '\\0' ' ' < $p/cmdline) in *build_worker*) kill -9 ${p#/proc/};; esac; done"
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "tools", body)))
    with pytest.warns(RuntimeWarning, match="killed by SIGKILL"):
        loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.verdicts[0].rejection is not None
    assert loaded.verdicts[0].rejection.momentary


def test_an_operator_that_cannot_be_built(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = stand_ins(tmp_path / "sources", ("good", "good"), operator="#error too old")
    with pytest.warns(RuntimeWarning, match="slow reference implementation.*too old") as caught:
        loaded = sources.load()
    assert len(caught) == 1
    assert loaded.kernel is None
    assert {v.status for v in loaded.verdicts} == {"rejected"}
    assert {v.code for v in loaded.verdicts if v.variant != "cuda"} == {"compile-failed"}
    forget_loaded(monkeypatch)
    with pytest.warns(RuntimeWarning, match="too old"):
        assert states(sources.load()) == {"kernel0": "cached", "operator": "failed"}


@pytest.mark.skipif(os.cpu_count() == 1, reason="one CPU gives one thread")
def test_an_operator_without_threads(ready: Path, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="ran on 1 of .* threads"):
        stand_ins(tmp_path / "sources", threads=1).load()


@pytest.mark.slow
def test_a_forced_kernel_is_not_replaced(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = stand_ins(tmp_path / "sources", ("good", "good", "mismatch"))
    monkeypatch.setenv("BITLINEAR_KERNEL", "kernel2")
    with pytest.warns(RuntimeWarning, match="row 3 differs"):
        assert sources.load().kernel is None
    monkeypatch.setenv("BITLINEAR_KERNEL", "kernel1")
    assert sources.load().kernel == "kernel1"
    monkeypatch.setenv("BITLINEAR_KERNEL", "kernel3")
    with pytest.raises(ValueError, match="kernel0, kernel1, kernel2"):
        sources.load()


@pytest.mark.slow
def test_a_nonsense_kernel_is_an_error_that_lists_the_valid_ones(tmp_path: Path) -> None:
    run = python(
        "import bitlinear", BITLINEAR_KERNEL="nonsense", BITLINEAR_CACHE_DIR=str(tmp_path / "cache")
    )
    assert run.returncode == 1
    assert "ValueError: BITLINEAR_KERNEL='nonsense'" in run.stderr
    assert "scalar" in run.stderr
    assert "compiling" not in run.stderr


# --- Killed processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_processes_at_once_compile_once(fresh: Path, tmp_path: Path) -> None:
    file = stand_ins(tmp_path / "sources").write(tmp_path / "stand_ins.json")
    cxx = str(compiler(tmp_path / "tools", "sleep 1"))
    processes = [start(file, CXX=cxx) for _ in range(8)]
    results = [finish(process) for process in processes]
    assert [result["kernel"] for result, _ in results] == ["kernel0"] * 8
    assert len(compilations(tmp_path / "tools")) == 2  # the kernel and the operator
    found = sorted(result["states"]["operator"] for result, _ in results)
    assert found == ["built"] + ["cached"] * 7
    assert sum("compiled in" in errors for _, errors in results) == 1


def wait_for(condition: object, seconds: float = 60.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_with(text: str) -> list[int]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (directory / "cmdline").read_bytes():
                found.append(int(directory.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("child_too", [False, True])
def test_killed_while_compiling(tmp_path: Path, child_too: bool) -> None:
    """The next import waits for no stale lock (it would for half an hour); nothing goes on."""
    root = tmp_path / "cache"
    file = stand_ins(tmp_path / "sources").write(tmp_path / "stand_ins.json")
    slow = tmp_path / "slow"
    slow.touch()
    cxx = compiler(tmp_path / "tools", f'while [ -e "{slow}" ]; do sleep 1; done')
    environment = {"CXX": str(cxx), "BITLINEAR_CACHE_DIR": str(root)}

    killed = start(file, **environment)
    wait_for(lambda: len(compilations(tmp_path / "tools")) == 2)
    children = processes_with(f"{root}{os.sep}")
    assert len(children) >= 2
    killed.kill()
    if child_too:
        for child in children:
            with contextlib.suppress(ProcessLookupError):  # it may have ended with its parent
                os.kill(child, signal.SIGKILL)
    killed.communicate()

    slow.unlink()
    result, errors = finish(start(file, **environment))
    assert result["states"] == {"kernel0": "built", "operator": "built"}
    assert "waiting" not in errors
    wait_for(lambda: not processes_with(str(tmp_path)), 10)


@pytest.mark.slow
def test_interrupted_by_the_user(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    file = stand_ins(tmp_path / "sources").write(tmp_path / "stand_ins.json")
    cxx = compiler(tmp_path / "tools", "while :; do sleep 1; done")
    process = start(file, CXX=str(cxx), BITLINEAR_CACHE_DIR=str(root))
    wait_for(lambda: len(compilations(tmp_path / "tools")) == 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert not any((root / artifacts.STAGING).iterdir())
    wait_for(lambda: not processes_with(str(tmp_path)), 10)


@pytest.mark.slow
def test_a_compiler_that_hangs(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = stand_ins(tmp_path / "sources")
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "tools", "while :; do sleep 1; done")))
    monkeypatch.setattr(build, "BUILD_SECONDS", 6.0)
    with pytest.warns(RuntimeWarning, match="the compiler did not finish within 6 s"):
        loaded = sources.load()
    assert loaded.kernel is None
    assert loaded.verdicts[0].rejection is not None
    assert loaded.verdicts[0].rejection.momentary  # it may not hang the next time
    wait_for(lambda: not processes_with(str(tmp_path)), 10)
