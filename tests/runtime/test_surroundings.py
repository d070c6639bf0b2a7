"""Oddities of a machine: the import never fails, and no way to the reference is silent."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pkgutil
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from bitlinear import runtime
from bitlinear.runtime import artifacts, provider, resolution
from bitlinear.runtime.artifacts import Artifact
from bitlinear.runtime.cache_directory import CacheDirectory
from bitlinear.runtime.gpus import Driver, Gpu
from bitlinear.runtime.loader import Loader
from bitlinear.runtime.rejection import Probe, Rejection, rejected
from bitlinear.runtime.verdicts import Verdict
from tests.runtime.machines import machine, read_cpu
from tests.runtime.stand_ins import (
    LOAD,
    ROOT,
    compilations,
    compiler,
    finish,
    forget_loaded,
    python,
    stand_ins,
    start,
    states,
)

# --- Anything unexpected -------------------------------------------------------------------------

# What is left when everything else has failed, and the children, which are not imported.
_LAST = {"keep_loaded", "unexpected", "without_kernel", "reject_usable", "announce", "write"}
_NOT_ON_THE_WAY = {"__init__", "settings", "build_worker", "gpu_probe", "py_cpuinfo_probe"}


def _modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(runtime.__path__)]
    return [importlib.import_module(f"bitlinear.runtime.{name}") for name in names]


def _functions() -> Iterator[tuple[str, str]]:
    for module in _modules():
        short = module.__name__.rpartition(".")[2]
        for name, value in vars(module).items():
            is_own = inspect.isfunction(value) and value.__module__ == module.__name__
            if is_own and short not in _NOT_ON_THE_WAY and name not in _LAST:
                yield short, name


def _raise(*arguments: object, **named: object) -> None:
    raise RuntimeError("injected")


@pytest.mark.slow
def test_whatever_raises_the_import_ends_well(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every function of the runtime fails in turn, with a warm cache and with an empty one."""
    sources = stand_ins(tmp_path / "sources")
    reached = set()
    for module, name in _functions():
        for is_warm in (True, False):
            with monkeypatch.context() as patch:
                if not is_warm:
                    patch.setenv("BITLINEAR_CACHE_DIR", str(tmp_path / "empty"))
                    patch.setenv("CXX", "/nonexistent/c++")
                _inject(patch, module, name)
                forget_loaded(patch)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    loaded = sources.load()
            where = f"{module}.{name}, {'warm' if is_warm else 'cold'}"
            if "injected" in loaded.problem:
                reached.add(where)
            _check(loaded, caught, where)
    for where in ("resolution.resolve, warm", "artifacts.find, warm", "hardware.detect, cold"):
        assert where in reached


def _inject(patch: pytest.MonkeyPatch, module: str, name: str) -> None:
    original = getattr(importlib.import_module(f"bitlinear.runtime.{module}"), name)
    for place in (runtime, *_modules()):
        if vars(place).get(name) is original:
            patch.setattr(place, name, _raise)


def _check(loaded: runtime.Runtime, caught: list[warnings.WarningMessage], where: str) -> None:
    """A compiled kernel is in use, or one warning says why not."""
    messages = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    if loaded.kernel is not None:
        assert messages == [], where
        return
    assert loaded.problem, where
    (message,) = messages
    assert message.startswith("bitlinear runs its slow reference implementation: "), where
    assert loaded.problem in message, where


@pytest.mark.parametrize("method", ["load_kernels", "load_operator", "use_kernels"])
def test_a_loader_that_raises(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(Loader, method, _raise)
    with pytest.warns(RuntimeWarning, match="unexpected RuntimeError: injected") as caught:
        loaded = stand_ins(tmp_path / "sources").load()
    _check(loaded, list(caught), method)


# --- A cached library that cannot be loaded ------------------------------------------------------


def _refuse(root: Path) -> Callable[[Loader, Artifact], object]:
    """A loader for which a directory is mounted noexec."""
    load = Loader.load_kernels

    def refusing(self: Loader, artifact: Artifact) -> object:
        if root in artifact.path.parents:
            raise OSError(f"{artifact.path}: failed to map segment from shared object")
        return load(self, artifact)

    return refusing


@pytest.mark.slow
def test_what_cannot_be_loaded_is_built_elsewhere(
    ready: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Loader, "load_kernels", _refuse(ready))
    loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.kernel == "kernel0"
    assert loaded.cache.temporary
    assert states(loaded) == {"kernel0": "built", "operator": "built"}
    errors = capfd.readouterr().err
    assert f"bitlinear: {ready} holds what cannot be loaded: {ready}/kernel0/" in errors
    assert errors.count("failed to map segment") == 2  # with the announcement of the directory


def test_what_cannot_be_loaded_nor_built_is_the_reason(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loader, "load_kernels", _refuse(ready))
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.warns(RuntimeWarning, match="failed to map segment.*no C\\+\\+ compiler") as caught:
        loaded = stand_ins(tmp_path / "sources").load()
    _check(loaded, list(caught), "noexec")


@pytest.mark.slow
def test_deleted_between_lookup_and_load(
    ready: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It is built again in the same place."""
    tested = provider.tested
    deleted = []

    def test_and_delete(artifact: Artifact, *arguments: object) -> object:
        result = tested(artifact, *arguments)  # type: ignore[arg-type]
        if artifact.name == "kernel0" and not deleted:
            deleted.append(artifact.directory)
            shutil.rmtree(artifact.directory)
        return result

    monkeypatch.setattr(provider, "tested", test_and_delete)
    loaded = stand_ins(tmp_path / "sources").load()
    assert deleted
    assert loaded.cache.path == ready
    assert states(loaded) == {"kernel0": "built", "operator": "cached"}
    assert "looking again" in capfd.readouterr().err


# --- The disk ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk(
    fresh: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One build, in the temporary directory, which the user hears of."""
    real = resolution.why_unusable

    def why_unusable(directory: Path, size: int = 1) -> str:
        full = size > 1 and directory == fresh
        return "cannot be written to (No space left on device)" if full else real(directory, size)

    monkeypatch.setattr(resolution, "why_unusable", why_unusable)
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "tools")))
    loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.kernel == "kernel0"
    assert loaded.cache.temporary
    assert not artifacts.entries(fresh)
    assert len(compilations(tmp_path / "tools")) == 2  # the kernel and the operator
    errors = capfd.readouterr().err
    assert f"no cache directory ({fresh} cannot be written to (No space left on device)" in errors
    assert "are lost when this process ends" in errors


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(fresh: Path, tmp_path: Path) -> None:
    """Nothing of it is remembered."""
    file = stand_ins(tmp_path / "sources").write(tmp_path / "stand_ins.json")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        limited = start(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    result, errors = finish(limited)
    assert result["kernel"] is None
    assert "File too large" in result["problem"]
    assert errors.count("RuntimeWarning") == 1
    result, _ = finish(start(file))
    assert result["states"] == {"kernel0": "built", "operator": "built"}


@pytest.mark.slow
@pytest.mark.parametrize("deletes", ["the cache", "the entries"])
def test_deleted_during_a_build(tmp_path: Path, deletes: str) -> None:
    """By `rm -rf`, and by `doctor --clean` where locks do not work."""
    root = tmp_path / "cache"
    file = stand_ins(tmp_path / "sources").write(tmp_path / "stand_ins.json")
    slow = tmp_path / "slow"
    slow.touch()
    cxx = compiler(tmp_path / "tools", f'while [ -e "{slow}" ]; do sleep 0.1; done')
    process = start(file, CXX=str(cxx), BITLINEAR_CACHE_DIR=str(root))
    deadline = time.monotonic() + 60
    while len(compilations(tmp_path / "tools")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if deletes == "the cache":
        shutil.rmtree(root)
    else:
        artifacts.clean(root)
    slow.unlink()
    result, errors = finish(process)
    assert result["states"] == {"kernel0": "built", "operator": "built"}
    assert "was deleted during the build" in errors
    assert bool(artifacts.entries(root)) == (deletes == "the entries")


# --- The process ---------------------------------------------------------------------------------

_WITHOUT_STDERR = {
    "closed": "sys.stderr.close()",
    "replaced": "sys.stderr = type('Log', (), {'write': lambda self, text: None})()",
    "full": "sys.stderr = open('/dev/full', 'w', buffering=1)",
    "none": "sys.stderr = None",
}


@pytest.mark.parametrize(
    "kind",
    ["closed", *(pytest.param(k, marks=pytest.mark.slow) for k in ("replaced", "full", "none"))],
)
def test_nothing_can_be_written_to_stderr(tmp_path: Path, kind: str) -> None:
    """Neither the progress nor the warning ends the import."""
    file = tmp_path / "file"
    file.touch()
    run = python(
        f"import sys; {_WITHOUT_STDERR[kind]}; import bitlinear; print(bitlinear.HAS_BITLINEAR)",
        BITLINEAR_CACHE_DIR=str(file),  # announced as unusable
        HOME=str(tmp_path),
        XDG_CACHE_HOME="",
        PATH="/nonexistent",
        CXX="",
    )
    assert run.stdout == "False\n"


@pytest.mark.slow
def test_a_warning_that_is_an_error_leaves_a_package_that_can_be_imported(tmp_path: Path) -> None:
    run = python(
        """
import warnings
warnings.simplefilter("error", RuntimeWarning)
try:
    import bitlinear
except RuntimeWarning as warning:
    print(str(warning)[:41])
warnings.simplefilter("ignore")
import bitlinear
print(bitlinear.HAS_BITLINEAR)
""",
        BITLINEAR_CACHE_DIR=str(tmp_path / "cache"),
        PATH="/nonexistent",
        CXX="",
    )
    assert run.stdout == "bitlinear runs its slow reference impleme\nFalse\n", run.stderr


@pytest.mark.slow
def test_a_script_beside_files_with_names_of_modules(fresh: Path, tmp_path: Path) -> None:
    """They shadow what Python loads at its start, and what a build imports."""
    folder = tmp_path / "script"
    folder.mkdir()
    for name in ("encodings", "site", "sitecustomize", "runpy", "setuptools", "cpuinfo"):
        (folder / f"{name}.py").write_text("raise ImportError('a file of the user')\n")
    file = stand_ins(tmp_path / "sources").write(tmp_path / "stand_ins.json")
    (folder / "train.py").write_text(LOAD)
    run = subprocess.run(
        [sys.executable, str(folder / "train.py"), str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert '"kernel": "kernel0"' in run.stdout, run.stderr


@pytest.mark.slow
def test_few_open_files(fresh: Path, tmp_path: Path) -> None:
    file = stand_ins(tmp_path / "sources").write(tmp_path / "stand_ins.json")
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, old[1]))
    try:
        limited = start(file)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    with contextlib.suppress(AssertionError):
        finish(limited)  # torch itself may need more
    result, _ = finish(start(file))
    assert result["kernel"] == "kernel0"


def test_no_interpreter_to_build_with(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a program that embeds Python."""
    monkeypatch.setenv("BITLINEAR_CHILD", "1")
    with pytest.warns(RuntimeWarning, match="is a child of an import of bitlinear") as caught:
        loaded = stand_ins(tmp_path / "sources").load()
    _check(loaded, list(caught), "no interpreter")
    assert loaded.verdicts[0].code == "no-compiler"


# --- GPUs ----------------------------------------------------------------------------------------

_OLD_GPU = Driver("13.0", (Gpu("an old GPU", (5, 2), 1),))


@pytest.mark.parametrize(
    ("driver", "code", "is_silent"),
    [
        (rejected("no-gpu", "no NVIDIA driver is loaded"), "no-gpu", True),
        (Probe(Driver("13.0", ())), "no-gpu", True),
        (rejected("cuda-mismatch", "the driver does not answer"), "cuda-mismatch", False),
        (Probe(_OLD_GPU), "no-gpu", False),
        (Probe(_OLD_GPU), "forced-off", True),
        (Probe(_OLD_GPU), "not-cached", False),
    ],
)
def test_cuda_tensors_take_no_silent_way(driver: Probe[Driver], code: str, is_silent: bool) -> None:
    """Silent is what the user asked for, and where there can be no CUDA tensor."""
    hardware = replace(machine(read_cpu("zen4"), cuda="13.0"), driver=driver)
    verdict = Verdict("cuda", rejection=Rejection(code, "the reason"))
    loaded = runtime.Runtime("avx2", (verdict,), CacheDirectory(None), {}, "", hardware)
    assert loaded.cuda_problem == ("" if is_silent else "the reason")
