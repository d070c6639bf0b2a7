"""Choosing, building, caching and loading, with the real compiler and real processes.

Most tests use the small libraries of stand_ins.py; those that import the real package in another
process share the cache that this test session has filled by importing it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import bitlinear
from bitlinear import runtime
from bitlinear.runtime import artifacts, build
from bitlinear.runtime.hardware import Compiler, Driver, Gpu, Hardware, detect
from bitlinear.runtime.verdicts import Verdict
from tests.runtime.stand_ins import compilations, compiler, finish, given, stand_ins, start

ROOT = Path(bitlinear.__file__).parents[1]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As in a process that has loaded nothing yet, with a cold cache in the directory given."""
    for name in ("BITLINEAR_KERNEL", "BITLINEAR_BUILD", "BITLINEAR_VERBOSE", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BITLINEAR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("BITLINEAR_CUDA", "off")  # whatever this machine has
    monkeypatch.setattr(runtime, "_state", runtime._State())
    yield tmp_path / "cache"
    staging = tmp_path / "cache" / artifacts.STAGING
    assert not staging.exists() or not any(staging.iterdir())


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the stand-in operator and kernel0, as they are by default."""
    directory = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITLINEAR_CACHE_DIR", str(directory / "cache"))
        patch.setenv("BITLINEAR_CUDA", "off")
        patch.setattr(runtime, "_state", runtime._State())
        assert stand_ins(directory / "sources").load().kernel == "kernel0"
    return directory / "cache"


@pytest.fixture
def half(fresh: Path, compiled: Path) -> Path:
    """A fresh process whose cache holds the operator already: only kernels are compiled."""
    shutil.copytree(compiled / "operator", fresh / "operator")
    fresh.chmod(0o700)
    return fresh


def forget_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_state", runtime._State())


def states(loaded: runtime.Runtime) -> dict[str, str]:
    return {name: artifact.state for name, artifact in loaded.artifacts.items()}


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script that imports the real package."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=tempfile.gettempdir(),  # -c looks for packages there first
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def warm() -> dict[str, str]:
    """The environment in which the real package finds everything compiled."""
    loaded = runtime.current()
    if loaded.kernel is None or loaded.cache.path is None:
        pytest.skip(f"no compiled kernel: {loaded.problem}")
    return {"BITLINEAR_CACHE_DIR": str(loaded.cache.path)}


# --- Cold and warm -------------------------------------------------------------------------------


def test_cold_then_warm(
    fresh: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sources = stand_ins(tmp_path / "sources", ("good", "good"))
    cold = sources.load()
    assert cold.kernel == "kernel0"
    assert cold.problem == ""
    assert states(cold) == {"kernel0": "built", "operator": "built"}  # only the chosen variant
    assert cold.artifacts["kernel0"].self_test == "bit-exact with scalar"
    assert cold.artifacts["operator"].self_test.startswith("ran on 2 of")
    assert given(cold) == 0
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("bitlinear: compiling the kernel0 kernel and the operator for this")
    assert "happens once, takes 10 to 20 s" in first
    assert last.startswith("bitlinear: compiled in ")

    forget_loaded(monkeypatch)
    warm = sources.load()
    assert states(warm) == {"kernel0": "cached", "operator": "cached"}
    assert replace(warm.artifacts["kernel0"], state="built") == cold.artifacts["kernel0"]
    assert capfd.readouterr().err == ""


def test_a_changed_source_is_compiled_again(fresh: Path, compiled: Path, tmp_path: Path) -> None:
    shutil.copytree(compiled, fresh)
    changed = stand_ins(tmp_path / "sources", operator="// another").load()
    assert states(changed) == {"kernel0": "cached", "operator": "built"}


def test_the_warm_path_imports_and_starts_nothing_that_only_a_build_needs(
    warm: dict[str, str],
) -> None:
    run = python(
        """
import sys
import torch
started = []
def hook(event, arguments):
    # A compiler that is a script may be asked for its version each time, and costs 5 ms.
    if event in ("subprocess.Popen", "os.posix_spawn"):
        command = list(arguments[1])
        if command[-1] != "--version" or "ninja" in command[0]:
            started.append(command)
    elif event in ("os.fork", "os.exec", "os.system"):
        started.append(event)
sys.addaudithook(hook)
loaded_by_torch = set(sys.modules)
import bitlinear
assert bitlinear.HAS_BITLINEAR
assert not started, started
assert not torch.cuda.is_initialized()
new = set(sys.modules) - loaded_by_torch
for module in ("torch.utils.cpp_extension", "setuptools", "distutils", "filelock", "ninja",
               "cpuinfo", "bitlinear.runtime.build_worker", "bitlinear.doctor"):
    assert module not in new, module
""",
        **warm,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


def test_import_starts_no_threads_and_survives_a_fork(warm: dict[str, str]) -> None:
    run = python(
        """
import os
import torch
before = len(os.listdir("/proc/self/task"))
import bitlinear
assert len(os.listdir("/proc/self/task")) <= before
if os.fork() == 0:
    layer = bitlinear.BitLinear(512, 512).deploy()
    os._exit(0 if layer(torch.ones(64, 512)).shape == (64, 512) else 1)  # enough for threads
assert os.wait()[1] == 0
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(eval, "__import__('bitlinear').HAS_BITLINEAR").result()
""",
        **warm,
    )
    assert run.returncode == 0, run.stderr


def test_activate_switches_the_operator(half: Path, tmp_path: Path) -> None:
    sources = stand_ins(tmp_path / "sources", ("good", "good", "mismatch"))
    imported = sources.load()
    after = runtime.activate("kernel1")
    assert after.kernel == "kernel1"
    assert after is runtime.current()
    assert given(after) == 1
    assert states(after) == {"kernel0": "built", "operator": "cached", "kernel1": "built"}
    assert given(runtime.activate("kernel0")) == 0
    with pytest.raises(RuntimeError, match="kernel2: self-test failed: row 3 differs"):
        runtime.activate("kernel2")
    with pytest.raises(RuntimeError, match="kernel9"):
        runtime.activate("kernel9")
    assert runtime.current().kernel == "kernel0"
    runtime.activate("kernel1")
    assert runtime.activate(None) is imported is runtime.current()
    assert given(imported) == 0


# --- Several processes, killed processes ---------------------------------------------------------


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
    assert json.loads((root / ".lock.owner").read_text())["pid"] == killed.pid  # it left this

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
    with pytest.warns(RuntimeWarning, match="the compiler did not come to an end"):
        loaded = sources.load()
    assert loaded.kernel is None
    assert not artifacts.artifacts(fresh)  # it may not hang the next time
    wait_for(lambda: not processes_with(str(tmp_path)), 10)


_HOLD = """
import json, os, socket, sys, time
from filelock import FileLock
with FileLock(sys.argv[1] + "/.lock"):
    with open(sys.argv[1] + "/.lock.owner", "w") as owner:
        json.dump({"pid": int(sys.argv[2]) or os.getpid(), "host": socket.gethostname()}, owner)
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def hold_lock(root: Path, pid: int, seconds: float) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(root), str(pid), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_the_lock_says_whom_it_waits_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with hold_lock(tmp_path, 0, 2.0) as holder, build.lock(tmp_path):
        assert holder.wait(5) == 0
        owner = json.loads((tmp_path / ".lock.owner").read_text())
        assert owner["pid"] == os.getpid()
    host = os.uname().nodename
    assert capfd.readouterr().err == (
        f"bitlinear: waiting for process {holder.pid} on host {host}, which is compiling\n"
    )
    assert not (tmp_path / ".lock.owner").exists()


def test_the_lock_does_not_wait_for_the_dead_nor_for_ever(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    with hold_lock(tmp_path, dead.pid, 600) as holder:
        began = time.monotonic()
        with build.lock(tmp_path):
            pass
        assert time.monotonic() - began < 5
        holder.kill()
    with hold_lock(tmp_path, 0, 600) as holder:
        with build.lock(tmp_path, seconds=1.0):
            pass
        holder.kill()


def test_without_filelock_or_locks_the_build_goes_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build.lock(tmp_path / "missing"):  # no directory, so no lock
        pass
    monkeypatch.setitem(sys.modules, "filelock", None)
    with build.lock(tmp_path):
        assert not (tmp_path / ".lock.owner").exists()


# --- Damage --------------------------------------------------------------------------------------


def test_damaged_artifacts_are_built_again(
    fresh: Path, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(compiled, fresh)
    sources = stand_ins(tmp_path / "sources")
    cold = sources.load()
    library = cold.artifacts["operator"].path
    meta_file = cold.artifacts["kernel0"].path.with_name(artifacts.META)
    # New files: this process has mapped the old ones.
    truncated = library.read_bytes()[:1000]
    library.unlink()
    library.write_bytes(truncated)
    meta = json.loads(meta_file.read_text())
    meta["ingredients"]["cpu"] = "that of another machine"
    meta_file.write_text(json.dumps(meta))
    forget_loaded(monkeypatch)
    again = sources.load()
    assert states(again) == {"kernel0": "built", "operator": "built"}
    assert again.artifacts["operator"].path == library
    forget_loaded(monkeypatch)
    assert states(sources.load()) == {"kernel0": "cached", "operator": "cached"}


def test_a_damaged_artifact_and_no_compiler(
    fresh: Path, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(compiled, fresh)
    sources = stand_ins(tmp_path / "sources")
    library = sources.load().artifacts["kernel0"].path
    library.unlink()
    forget_loaded(monkeypatch)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler"):
        assert sources.load().kernel is None


# --- Variants that cannot be had -----------------------------------------------------------------


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


def test_a_kernel_that_the_system_refuses_gives_way_to_the_next(half: Path, tmp_path: Path) -> None:
    """As amx_int8 does where a process is denied the tiles that the self-test had been granted."""
    sources = stand_ins(tmp_path / "sources", ("good", "good"))
    file = sources.directory / "kernel0.cpp"
    file.write_text(file.read_text().replace("return &table", "return nullptr"))
    loaded = sources.load()
    assert loaded.kernel == "kernel1"
    assert loaded.verdicts[0].status == "rejected"
    assert "kernel0 cannot be loaded: the system refuses" in loaded.verdicts[0].reason


@pytest.mark.slow
def test_a_failure_of_the_machine_is_not_remembered(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    full.touch()
    message = "fatal error: error writing to /tmp/x.s: No space left on device"
    cxx = compiler(tmp_path / "tools", f'[ -e "{full}" ] && {{ echo "{message}"; exit 1; }}')
    monkeypatch.setenv("CXX", str(cxx))
    sources = stand_ins(tmp_path / "sources")
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert sources.load().kernel is None
    assert not artifacts.artifacts(fresh)
    full.unlink()
    forget_loaded(monkeypatch)
    assert sources.load().kernel == "kernel0"


def test_a_child_that_is_killed_is_not_remembered(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's out-of-memory killer takes whatever is large."""
    body = f"for p in $(grep -l '{fresh}' /proc/[0-9]*/cmdline); do p=${{p%/cmdline}}; "
    body += "case $(tr '\\0' ' ' < $p/cmdline) in *build_worker*) kill -9 ${p#/proc/};; esac; done"
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "tools", body)))
    with pytest.warns(RuntimeWarning, match="killed by SIGKILL"):
        assert stand_ins(tmp_path / "sources").load().kernel is None
    assert not artifacts.artifacts(fresh)


def test_an_operator_that_cannot_be_built(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
def test_an_operator_without_threads(fresh: Path, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="ran on 1 of .* threads"):
        stand_ins(tmp_path / "sources", threads=1).load()


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


def test_a_nonsense_kernel_is_an_error_that_lists_the_valid_ones(tmp_path: Path) -> None:
    run = python(
        "import bitlinear", BITLINEAR_KERNEL="nonsense", BITLINEAR_CACHE_DIR=str(tmp_path / "cache")
    )
    assert run.returncode == 1
    assert "ValueError: BITLINEAR_KERNEL='nonsense'" in run.stderr
    assert "scalar" in run.stderr
    assert "compiling" not in run.stderr


# --- Machines without this and that --------------------------------------------------------------

_USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bitlinear
import torch
layer = bitlinear.BitLinear(5, 3).deploy()
assert layer(torch.ones(2, 5)).shape == (2, 3)
print(bitlinear.HAS_BITLINEAR)
for warning in caught:
    print(warning.category.__name__, warning.message)
"""


def test_no_compiler(tmp_path: Path) -> None:
    run = python(_USE, BITLINEAR_CACHE_DIR=str(tmp_path / "c"), PATH="/nonexistent", CXX="")
    assert run.returncode == 0, run.stderr
    has, *warned = run.stdout.splitlines()
    assert has == "False"
    (warning,) = warned
    assert warning.startswith("RuntimeWarning bitlinear runs its slow reference implementation: no")
    assert "C++ compiler" in warning
    assert "apt install g++" in warning
    assert run.stderr == ""


def test_no_compiler_but_somebody_elses_cache(warm: dict[str, str]) -> None:
    """As in a container that was built from an image with a compiler."""
    run = python(_USE, **warm, PATH="/nonexistent", CXX="")
    assert (run.stdout, run.stderr) == ("True\n", "")


def test_no_ninja_on_path(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "as", "ld"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    assert shutil.which("ninja") is None
    assert stand_ins(tmp_path / "sources").load().kernel == "kernel0"


def test_no_ninja_at_all(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = replace(detect(), ninja=None, ninja_reason="it is not installed")
    monkeypatch.setattr(runtime, "detect", lambda _: without)
    with pytest.warns(RuntimeWarning, match=r"no ninja: it is not installed \(pip install ninja\)"):
        loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.verdicts[0].code == "no-compiler"


def test_no_setuptools(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "setuptools.py").write_text("raise ImportError('No module named setuptools')")
    monkeypatch.syspath_prepend(str(hidden))
    with pytest.warns(RuntimeWarning, match=r"No module named setuptools.*pip install setuptools"):
        stand_ins(tmp_path / "sources").load()
    assert not artifacts.artifacts(fresh)


def test_no_sources(fresh: Path, tmp_path: Path) -> None:
    sources = stand_ins(tmp_path / "sources")
    (sources.directory / "kernel0.cpp").unlink()
    with pytest.warns(RuntimeWarning, match="a source cannot be read"):
        assert sources.load().kernel is None


@pytest.mark.parametrize("obstacle", ["no home", "unsafe"])
def test_a_home_that_cannot_be_written_to(
    fresh: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    obstacle: str,
) -> None:
    """Root may write anywhere: what is in the way here stops root, too."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    if obstacle == "no home":
        monkeypatch.delenv("BITLINEAR_CACHE_DIR")
    else:
        fresh.mkdir()
        fresh.chmod(0o777)
    loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.kernel == "kernel0"
    assert loaded.cache.temporary
    assert loaded.cache.unsafe == (obstacle == "unsafe")
    assert loaded.cache.path is not None
    assert loaded.cache.path.stat().st_mode & 0o777 == 0o700
    lines = capfd.readouterr().err.splitlines()
    if obstacle != "no home":
        refused = f"BITLINEAR_CACHE_DIR is not used: {fresh} can be written to by others"
        assert lines.pop(0).startswith(f"bitlinear: {refused}")
        assert str(fresh) in lines[0]
    assert lines[0].startswith("bitlinear: no cache directory (")
    assert "is lost when this process ends" in lines[0]


def test_nowhere_to_write_at_all(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nonexistent")
    fresh.touch()
    with pytest.warns(RuntimeWarning, match="no place to compile.*BITLINEAR_CACHE_DIR"):
        loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.kernel is None


def test_build_off(tmp_path: Path, warm: dict[str, str]) -> None:
    run = python(_USE, **warm, BITLINEAR_BUILD="off")
    assert (run.stdout, run.stderr) == ("False\n", "")
    run = python(
        "import bitlinear; print({v.code for v in bitlinear.available_kernels() if not v.ok})",
        BITLINEAR_CACHE_DIR=str(tmp_path / "cache"),
        BITLINEAR_BUILD="off",
    )
    assert "forced-off" in run.stdout
    assert not any((tmp_path / "cache").glob("*/*/*"))


@pytest.mark.parametrize("variable", ["BITLINEAR_BUILD", "BITLINEAR_CUDA"])
def test_a_switch_knows_two_words(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "nein")
    with pytest.raises(ValueError, match=f"{variable}='nein' means nothing. Set it to auto or off"):
        stand_ins(tmp_path / "sources").load()
    assert not artifacts.artifacts(fresh)


# --- CUDA ----------------------------------------------------------------------------------------


def with_gpus(nvcc: str = "13.0") -> Hardware:
    """This machine, with two GPUs that can be used beside one that cannot."""
    real = detect()
    path = "/cuda/bin/nvcc"
    capabilities = ((9, 0), (5, 2), (8, 0))
    gpus = tuple(Gpu(f"GPU of {major}.{minor}", (major, minor), 1) for major, minor in capabilities)
    return replace(
        real,
        torch=replace(real.torch, cuda="13.0"),
        driver=Driver("13.0", gpus),
        driver_reason="",
        nvcc=Compiler(path, path, f"release {nvcc}, V{nvcc}.1", "nvcc") if nvcc else None,
        nvcc_reason="" if nvcc else "it is not installed",
    )


@pytest.fixture(scope="session")
def compiled_beside_gpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `compiled`, with the CUDA build of torch that `with_gpus` pretends."""
    directory = tmp_path_factory.mktemp("compiled_beside_gpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITLINEAR_CACHE_DIR", str(directory / "cache"))
        patch.setenv("BITLINEAR_CUDA", "off")
        patch.setattr(runtime, "_state", runtime._State())
        patch.setattr(runtime, "detect", lambda _: with_gpus())
        loaded = stand_ins(directory / "sources").load()
    assert loaded.cuda == Verdict("cuda", False, "BITLINEAR_CUDA=off", code="forced-off")
    assert loaded.cuda_problem == ""
    assert states(loaded) == {"kernel0": "built", "operator": "built"}
    return directory / "cache"


@pytest.fixture
def gpus(fresh: Path, compiled_beside_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh process on such a machine, whose cache holds everything but CUDA's kernels."""
    shutil.copytree(compiled_beside_gpus, fresh)
    monkeypatch.delenv("BITLINEAR_CUDA")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(runtime, "detect", lambda _: with_gpus())
    return fresh


CPU_ONLY = {"kernel0": "cached", "operator": "cached"}


def test_cuda_is_built_beside_the_rest_and_found_again(
    fresh: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("BITLINEAR_CUDA")
    monkeypatch.setattr(runtime, "detect", lambda _: with_gpus())
    tested = tmp_path / "tested"
    note = f'FILE* f = fopen("{tested}", "a"); fprintf(f, "%d ", device); fclose(f); return 0;'
    sources = stand_ins(tmp_path / "sources", cuda=note)
    loaded = sources.load()
    assert loaded.kernel == "kernel0"
    assert loaded.cuda.status == "chosen"
    assert loaded.cuda_problem == ""
    assert states(loaded) == {"kernel0": "built", "operator": "built", "cuda": "built"}
    assert loaded.artifacts["cuda"].self_test == "bit-exact with the reference on 2 GPUs"
    assert tested.read_text() == "0 2 "
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith(
        "bitlinear: compiling the kernel0 kernel, the operator and the CUDA kernels for sm_80, "
        "sm_90a for this machine into "
    )
    assert first.endswith("happens once, takes about a minute")
    assert last.startswith("bitlinear: compiled in ")
    directory = loaded.artifacts["cuda"].directory
    assert directory is not None
    assert {file.name for file in directory.iterdir()} == {"cuda.so", artifacts.META, artifacts.LOG}
    assert not runtime.torch.cuda.is_initialized()  # type: ignore[no-untyped-call]

    forget_loaded(monkeypatch)
    assert states(sources.load()) == {**CPU_ONLY, "cuda": "cached"}
    assert capfd.readouterr().err == ""
    assert tested.read_text() == "0 2 "


@pytest.mark.parametrize(
    ("self_test", "code", "reason", "remembered"),
    [
        ("return 1;", "self-test-failed", "self-test failed: GPU 0: stand-in", True),
        ("return 2 * (device == 2);", "compile-failed", "not be run: GPU 2: stand-in", False),
        ("nonsense", "compile-failed", "ops.cpp", True),
    ],
)
def test_a_failure_of_cuda_leaves_the_cpu_alone(
    gpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    self_test: str,
    code: str,
    reason: str,
    remembered: bool,
) -> None:
    sources = stand_ins(tmp_path / "sources", cuda=self_test)
    for again in (False, True):
        with pytest.warns(RuntimeWarning) as caught:
            loaded = sources.load()
        assert len(caught) == 1
        assert "slow reference implementation for CUDA tensors: " in str(caught[0].message)
        assert loaded.kernel == "kernel0"
        assert (loaded.cuda.status, loaded.cuda.code) == ("rejected", code)
        assert reason in loaded.cuda.reason
        assert loaded.cuda_problem == f"{loaded.cuda.reason} ({loaded.cuda.fix})"
        assert states(loaded) == {**CPU_ONLY, "cuda": "failed"}
        assert ("compiling" in capfd.readouterr().err) == (not again or not remembered)
        forget_loaded(monkeypatch)
    assert bool(list(gpus.glob("cuda/*"))) == remembered


@pytest.mark.parametrize(
    ("nvcc", "code", "reason", "fix"),
    [
        (
            "",
            "no-compiler",
            "no nvcc: it is not installed",
            'pip install "cuda-toolkit[nvcc,cccl]==13.0.*", or install the CUDA 13.0 toolkit, or ',
        ),
        (
            "12.8",
            "cuda-mismatch",
            "nvcc is of CUDA 12.8, torch is built for CUDA 13.0",
            "install the CUDA 13.0 toolkit, or ",
        ),
    ],
)
def test_a_toolkit_that_will_not_do(
    gpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    nvcc: str,
    code: str,
    reason: str,
    fix: str,
) -> None:
    monkeypatch.setattr(runtime, "detect", lambda _: with_gpus(nvcc))
    sources = stand_ins(tmp_path / "sources")
    with pytest.warns(RuntimeWarning, match="or set CUDA_HOME to where it is"):
        loaded = sources.load()
    assert loaded.cuda.fix == fix + "set CUDA_HOME to where it is"
    assert (loaded.kernel, loaded.cuda.code, loaded.cuda.reason) == ("kernel0", code, reason)
    assert capfd.readouterr().err == ""

    # What somebody else has compiled needs none.
    forget_loaded(monkeypatch)
    monkeypatch.setattr(runtime, "detect", lambda _: with_gpus())
    assert states(sources.load())["cuda"] == "built"
    forget_loaded(monkeypatch)
    monkeypatch.setattr(runtime, "detect", lambda _: with_gpus(nvcc))
    assert states(sources.load())["cuda"] == "cached"


def test_cuda_without_an_operator(gpus: Path, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="too old") as caught:
        loaded = stand_ins(tmp_path / "sources", operator="#error too old").load()
    assert len(caught) == 1
    assert loaded.kernel is None
    assert loaded.cuda.status == "chosen"
    assert states(loaded) == {"kernel0": "cached", "operator": "failed", "cuda": "built"}


def test_cuda_without_a_kernel(gpus: Path, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="row 3 differs"):
        loaded = stand_ins(tmp_path / "sources", ("mismatch",)).load()
    assert loaded.kernel is None
    assert loaded.cuda.status == "chosen"


def test_cuda_stays_when_the_operator_is_switched(gpus: Path, tmp_path: Path) -> None:
    imported = stand_ins(tmp_path / "sources", ("good", "good")).load()
    assert imported.cuda.status == "chosen"
    after = runtime.activate("kernel1")
    assert after.cuda == imported.cuda
    assert after.artifacts["cuda"] == imported.artifacts["cuda"]


def test_only_what_the_list_allows_is_compiled(
    gpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
    loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.cuda.reason.startswith("GPU of 9.0 (compute_80), GPU of 5.2 (requires")
    meta = json.loads(loaded.artifacts["cuda"].path.with_name(artifacts.META).read_text())
    assert meta["ingredients"]["nvcc_flags"] == (
        "-gencode=arch=compute_80,code=compute_80 -gencode=arch=compute_80,code=sm_80"
    )


def test_build_off_is_for_cuda_too(
    gpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLINEAR_BUILD", "OFF")
    loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.kernel is None
    assert loaded.cuda.code == "forced-off"
    assert loaded.cuda_problem == ""


def test_kernels_may_be_there_before_the_operator_is_defined() -> None:
    """C++ enters CUDA's kernels first where Python has to define the operator."""
    run = python(
        """
import torch
early = torch.library.Library("bitlinear", "IMPL")
early.impl("linear", lambda *arguments: "the kernel", "CUDA")
import bitlinear
has = torch._C._dispatch_has_kernel_for_dispatch_key
assert has("bitlinear::linear", "CUDA")
assert not torch.cuda.is_initialized()
assert bitlinear.BitLinear(5, 3).deploy()(torch.ones(2, 5)).shape == (2, 3)
""",
        BITLINEAR_BUILD="off",
    )
    assert run.returncode == 0, run.stderr


# --- Paths and the child's environment -----------------------------------------------------------

AWKWARD = "a b $HOME 'ä' \"q\" $"


def test_awkward_paths(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the cache, the sources, the temporary directory and whatever Python imports from."""
    awkward = tmp_path / AWKWARD
    (awkward / "tmp").mkdir(parents=True)
    (awkward / "site:packages").mkdir()
    monkeypatch.setenv("TMPDIR", str(awkward / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("BITLINEAR_CACHE_DIR", str(awkward / "cache"))
    monkeypatch.syspath_prepend(str(awkward / "site:packages"))
    loaded = stand_ins(awkward / "sources").load()
    assert loaded.kernel == "kernel0"
    assert loaded.cache.path == awkward / "cache"
    assert not list((awkward / "tmp").iterdir())


@pytest.mark.slow
def test_the_package_and_torch_in_awkward_paths(tmp_path: Path) -> None:
    awkward = tmp_path / AWKWARD
    packages = Path(str(bitlinear.runtime.torch.__file__)).parents[1]
    (awkward / "bitlinear").parent.mkdir()
    shutil.copytree(ROOT / "bitlinear", awkward / "bitlinear")
    (awkward / "site packages").symlink_to(packages)
    run = python(
        "import bitlinear, torch; print(bitlinear.__file__, torch.__file__, sep='\\n'); "
        "print(bitlinear.HAS_BITLINEAR)",
        PYTHONPATH=os.pathsep.join([str(awkward), str(awkward / "site packages")]),
        BITLINEAR_CACHE_DIR=str(awkward / "cache"),
        BITLINEAR_CUDA="off",
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        str(awkward / "bitlinear" / "__init__.py"),
        str(awkward / "site packages" / "torch" / "__init__.py"),
        "True",
    ], run.stderr
    assert len(list((awkward / "cache").glob("*/*/*.so"))) == 2


def environment_of_child(tmp_path: Path) -> dict[str, str]:
    links = tmp_path / "links"
    links.mkdir(exist_ok=True)
    return build._environment(detect(), links)


def test_max_jobs(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = int(environment_of_child(tmp_path)["MAX_JOBS"])
    assert 1 <= jobs <= min(4, len(os.sched_getaffinity(0)))
    monkeypatch.setenv("MAX_JOBS", "7")
    shutil.rmtree(tmp_path / "links")
    assert environment_of_child(tmp_path)["MAX_JOBS"] == "7"


def test_one_job_where_there_is_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mask)})
    try:
        assert build._max_jobs() == 1
    finally:
        os.sched_setaffinity(0, mask)


def test_nvcc_has_its_toolkit_and_the_host_compiler(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_NVCC", "another")
    for home in (tmp_path / "plain", tmp_path / AWKWARD):
        nvcc = str(home / "bin" / "nvcc")
        links = tmp_path / f"links of {home.name}"
        links.mkdir()
        machine = replace(detect(), nvcc=Compiler(nvcc, nvcc, "release 13.0", "nvcc"))
        environment = build._environment(machine, links)
        assert os.path.realpath(environment["CUDA_HOME"]) == str(home)
        assert (environment["CUDA_HOME"] == str(home)) == (home.name == "plain")
        assert environment["CC"] == environment["CXX"]
        assert "PYTORCH_NVCC" not in environment


def test_the_linker_finds_the_runtime_of_nvidias_packages(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBRARY_PATH", "/one:/two")
    library = tmp_path / "cu13" / "lib" / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    library.with_name("libcudart.so.13.0.96").touch()
    nvcc = str(tmp_path / "cu13" / "bin" / "nvcc")
    links = tmp_path / "links"
    links.mkdir()
    machine = replace(detect(), nvcc=Compiler(nvcc, nvcc, "release 13.0", "nvcc"))
    directory, *others = build._environment(machine, links)["LIBRARY_PATH"].split(":")
    assert Path(directory, "libcudart.so").resolve() == library
    assert others == ["/one", "/two"]


@pytest.mark.parametrize("form", ["env {}", "env A='b c' {}"])
def test_cxx_with_arguments(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    cxx = compiler(tmp_path / "tools")
    monkeypatch.setenv("CXX", form.format(cxx))
    assert stand_ins(tmp_path / "sources").load().kernel == "kernel0"
    assert len(compilations(tmp_path / "tools")) == 2


def needs_libstdcxx(library: Path) -> bool:
    command = ["readelf", "-d", str(library)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "Shared library: [libstdc++.so.6]" in shown


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_libstdcxx_is_shared_though_the_linker_finds_the_static_one_first(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a toolchain whose links lead to packages that are not installed."""
    cxx = str(compiler(tmp_path / "tools"))
    command = [cxx, "-print-file-name=libstdc++.a"]
    archive = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(archive):
        pytest.skip("there is no static libstdc++")
    first = tmp_path / "first"
    first.mkdir()
    (first / "libstdc++.a").symlink_to(archive)
    (first / "libstdc++.so").symlink_to("nowhere")
    cxx += f" -L{first}"  # with -B clang++ would not look there for libraries
    monkeypatch.setenv("CXX", cxx)
    text = "std::string text(int number) { return std::to_string(number) + std::string(99, ' '); }"
    sources = stand_ins(tmp_path / "sources", operator=f"#include <string>\n{text}")

    unaided = tmp_path / "unaided.so"
    source = sources.directory / "operator.cpp"
    subprocess.run([*cxx.split(), "-shared", "-fPIC", "-o", unaided, source], check=True)
    assert not needs_libstdcxx(unaided)
    assert needs_libstdcxx(sources.load().artifacts["operator"].path)


def test_verbose_shows_the_commands(
    half: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BITLINEAR_VERBOSE", "1")
    stand_ins(tmp_path / "sources").load()
    assert "-c " in capfd.readouterr().err


def test_the_childs_environment_is_its_own(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What users set for their own program must not decide whether a kernel passes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nonexistent")
    assert stand_ins(tmp_path / "sources").load().kernel == "kernel0"
