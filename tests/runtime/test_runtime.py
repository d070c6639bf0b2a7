"""Choosing, building, caching and loading, with the real compiler and real processes.

Most tests use the small libraries of stand_ins.py; those that import the real package in another
process share the cache that this test session has filled by importing it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from bitlinear import runtime
from bitlinear.runtime import artifacts, build_environment, cache_directory, children
from bitlinear.runtime.hardware import detect
from bitlinear.runtime.rejection import rejected
from tests.runtime.stand_ins import (
    forget_loaded,
    given,
    python,
    stand_ins,
    states,
)


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


def test_a_changed_source_is_compiled_again(ready: Path, tmp_path: Path) -> None:
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
               "cpuinfo", "bitlinear.runtime.build", "bitlinear.runtime.diagnosis",
               "bitlinear.runtime.children", "bitlinear.doctor", "bitlinear.report"):
    assert module not in new, module
""",
        **warm,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


@pytest.mark.slow
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


@pytest.mark.slow
def test_activate_switches_the_operator(ready: Path, tmp_path: Path) -> None:
    sources = stand_ins(tmp_path / "sources", ("good", "good", "mismatch"))
    imported = sources.load()
    after = runtime.activate("kernel1")
    assert after.kernel == "kernel1"
    assert after is runtime.current()
    assert given(after) == 1
    assert states(after) == {"kernel0": "cached", "operator": "cached", "kernel1": "built"}
    assert given(runtime.activate("kernel0")) == 0
    with pytest.raises(RuntimeError, match="kernel2: self-test failed: row 3 differs"):
        runtime.activate("kernel2")
    with pytest.raises(RuntimeError, match="kernel9"):
        runtime.activate("kernel9")
    assert runtime.current().kernel == "kernel0"
    runtime.activate("kernel1")
    assert runtime.activate(None) is imported is runtime.current()
    assert given(imported) == 0


# --- Damage --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_damaged_artifacts_are_built_again(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = stand_ins(tmp_path / "sources")
    cold = sources.load()
    library = cold.artifacts["operator"].path
    meta_file = cold.artifacts["kernel0"].path.with_name(artifacts.META)
    # New files: this process has mapped the old ones.
    truncated = library.read_bytes()[:1000]
    library.unlink()
    library.write_bytes(truncated)
    meta = json.loads(meta_file.read_text())
    meta["ingredients"]["cpu"] = "another machine's"
    meta_file.write_text(json.dumps(meta))
    forget_loaded(monkeypatch)
    again = sources.load()
    assert states(again) == {"kernel0": "built", "operator": "built"}
    assert again.artifacts["operator"].path == library
    forget_loaded(monkeypatch)
    assert states(sources.load()) == {"kernel0": "cached", "operator": "cached"}


def test_a_damaged_artifact_and_no_compiler(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = stand_ins(tmp_path / "sources")
    library = sources.load().artifacts["kernel0"].path
    library.unlink()
    forget_loaded(monkeypatch)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler"):
        assert sources.load().kernel is None


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


@pytest.mark.slow
def test_no_compiler_but_somebody_elses_cache(warm: dict[str, str]) -> None:
    """As in a container that was built from an image with a compiler."""
    run = python(_USE, **warm, PATH="/nonexistent", CXX="")
    assert (run.stdout, run.stderr) == ("True\n", "")


@pytest.mark.slow
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
    without = replace(detect(), ninja=rejected("no-compiler", "no ninja: not installed", "fix it"))
    monkeypatch.setattr(runtime, "detect", lambda _: without)
    with pytest.warns(RuntimeWarning, match=r"no ninja: not installed \(fix it\)"):
        loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.verdicts[0].code == "no-compiler"


@pytest.mark.slow
def test_no_setuptools(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "setuptools.py").write_text("raise ImportError('No module named setuptools')")
    path = children.import_path()
    monkeypatch.setattr(build_environment, "import_path", lambda: [str(hidden), *path])
    with pytest.warns(RuntimeWarning, match=r"No module named setuptools.*pip install setuptools"):
        loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.verdicts[0].rejection is not None
    assert loaded.verdicts[0].rejection.momentary


def test_no_sources(fresh: Path, tmp_path: Path) -> None:
    sources = stand_ins(tmp_path / "sources")
    (sources.directory / "kernel0.cpp").unlink()
    with pytest.warns(RuntimeWarning, match="a source cannot be read"):
        assert sources.load().kernel is None


@pytest.mark.parametrize("obstacle", ["no home", pytest.param("unsafe", marks=pytest.mark.slow)])
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
        (fresh / f"user-{os.geteuid()}").symlink_to(tmp_path)  # another user may have made it
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
    assert "are lost when this process ends" in lines[0]


def test_nowhere_to_write_at_all(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nonexistent")
    monkeypatch.setattr(cache_directory, "_TEMPORARY", ())
    fresh.touch()
    with pytest.warns(RuntimeWarning, match="no place to compile.*BITLINEAR_CACHE_DIR"):
        loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.kernel is None


@pytest.mark.slow
def test_build_off(warm: dict[str, str]) -> None:
    run = python(_USE, **warm, BITLINEAR_BUILD="off")
    assert (run.stdout, run.stderr) == ("False\n", "")


def test_build_off_compiles_nothing(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLINEAR_BUILD", "off")
    loaded = stand_ins(tmp_path / "sources").load()
    assert {verdict.code for verdict in loaded.verdicts[:-1]} == {"forced-off"}
    assert loaded.problem == "BITLINEAR_BUILD=off"
    assert not any(fresh.glob("*/*/*"))


@pytest.mark.parametrize(
    ("variable", "values"),
    [
        ("BITLINEAR_BUILD", "auto, off or cached"),
        ("BITLINEAR_CUDA", "auto or off"),
        ("BITLINEAR_VERBOSE", "0 or 1"),
    ],
)
def test_a_switch_has_few_values(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, values: str
) -> None:
    monkeypatch.setenv(variable, "nein")
    with pytest.raises(ValueError, match=f"='nein' is not a setting; set it to {values}"):
        stand_ins(tmp_path / "sources").load()
    assert not artifacts.entries(fresh)
