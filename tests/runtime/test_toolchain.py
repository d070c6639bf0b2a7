"""Compilers, ninja and nvcc: present, missing and broken."""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from bitlinear.runtime import toolchain
from bitlinear.runtime.hardware import detect
from bitlinear.runtime.probe_cache import ProbeCache
from bitlinear.runtime.rejection import Rejection
from bitlinear.runtime.toolchain import Compiler

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory on PATH, still empty; nothing else names a compiler."""
    path = tmp_path / "bin"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return path


GCC = "echo 'g++ (Debian) 12.2.0'; echo 'Copyright (C) 2022 Free Software Foundation, Inc.'"
CLANG = "echo 'Debian clang version 14.0.6'"


def test_no_compiler(bin_dir: Path) -> None:
    found = detect()
    assert found.compiler.value is None
    assert found.compiler.rejection == Rejection(
        "no-compiler",
        "no C++ compiler: none of c++, g++, clang++ is on PATH",
        "install a C++ compiler (Debian and Ubuntu: apt install g++) or set CXX",
    )


@pytest.mark.parametrize(
    ("installed", "expected", "family"),
    [
        ({"c++": GCC, "g++": CLANG, "clang++": CLANG}, "c++", "gcc"),
        ({"g++": GCC, "clang++": CLANG}, "g++", "gcc"),
        ({"clang++": CLANG}, "clang++", "clang"),
        ({"c++": "echo 'Some C++ 1.0'"}, "c++", "unknown"),
    ],
)
def test_compiler_on_path(
    installed: dict[str, str], expected: str, family: str, bin_dir: Path
) -> None:
    for name, text in installed.items():
        program(bin_dir / name, text)
    compiler = detect().compiler.value
    assert compiler is not None
    assert compiler.path == str(bin_dir / expected)
    assert compiler.family == family
    assert "\n" not in compiler.version


def test_cxx_is_honoured_with_its_arguments(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bin_dir / "g++", "exit 1")
    program(bin_dir / "ccache", 'exec "$@"')
    real = program(bin_dir / "real" / "clang++-14", CLANG)
    (bin_dir / "clang").symlink_to(real)
    monkeypatch.setenv("CXX", "ccache clang --target=x86_64")
    compiler = detect().compiler.value
    assert compiler is not None
    assert compiler.path == "ccache clang --target=x86_64"
    assert compiler.realpath == str(real)
    assert compiler.version == "Debian clang version 14.0.6"
    assert compiler.family == "clang"


@pytest.mark.parametrize("value", ["missing-compiler", "ccache missing-compiler", "''"])
def test_cxx_that_does_not_exist_is_not_replaced(
    value: str, bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(bin_dir / "g++", GCC)
    program(bin_dir / "ccache", 'exec "$@"')
    monkeypatch.setenv("CXX", value)
    assert (
        detect().compiler.reason == f"no C++ compiler: CXX={value!r} is not an executable on PATH"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo 'no licence' >&2; exit 3", "--version failed with 3: no licence"),
        ("exit 1", "--version failed with 1: no message"),
        ("exit 0", "--version printed nothing"),
        ("kill -9 $$", "--version failed with -9: no message"),
    ],
)
def test_compiler_that_does_not_work(text: str, reason: str, bin_dir: Path) -> None:
    program(bin_dir / "c++", text)
    found = detect()
    assert found.compiler.reason == f"no C++ compiler: c++ {reason}"


def test_cxx_with_unbalanced_quotes(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ 'oops")
    assert "cannot be split into words" in detect().compiler.reason


def test_scripts_are_asked_again(bin_dir: Path, tmp_path: Path) -> None:
    # Same name, size and time: the compiler behind a wrapper has changed.
    path = program(bin_dir / "c++", "echo compiler 1")
    status = path.stat()
    assert detect(tmp_path).compiler.value.version == "compiler 1"  # type: ignore[union-attr]
    program(path, "echo compiler 2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert detect(tmp_path).compiler.value.version == "compiler 2"  # type: ignore[union-attr]


def test_failures_are_asked_again(bin_dir: Path, tmp_path: Path) -> None:
    path = program(bin_dir / "c++", "exit 1")
    assert detect(tmp_path).compiler.value is None
    program(path, GCC)
    assert detect(tmp_path).compiler.value is not None


NVCC = "echo 'nvcc: NVIDIA (R) Cuda compiler driver'; echo 'tools, release 13.0, V13.0.88'"


def toolkit(home: Path) -> Path:
    """What makes a directory a CUDA toolkit; its nvcc."""
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime_api.h").touch()
    return program(home / "bin" / "nvcc", NVCC)


def test_nvcc(bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert detect().nvcc.reason == "not looked for: torch is built without CUDA"
    home = tmp_path / "cuda"
    monkeypatch.setenv("CUDA_HOME", str(home))
    reason = f"no nvcc: no bin/nvcc and include/cuda_runtime_api.h in CUDA_HOME={str(home)!r}"
    assert detect(everything=True).nvcc.reason == reason
    path = str(toolkit(home))
    assert detect().nvcc.value is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for found in (detect(), detect(everything=True)):
        expected = Compiler(path, path, "tools, release 13.0, V13.0.88", "nvcc")
        assert found.nvcc.value == expected
        assert expected.release == "13.0"


def test_nvcc_on_path_and_elsewhere(
    bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> str:
        nvcc = detect(everything=True).nvcc.value
        return nvcc.path if nvcc else ""

    usual, packages = tmp_path / "usual", tmp_path / "site-packages"
    monkeypatch.setattr(toolchain, "_CUDA_HOME", str(usual))
    monkeypatch.setattr(sys, "path", [str(packages)])
    assert detect(everything=True).nvcc.reason.endswith(f"cuda_runtime_api.h in {usual}")
    packaged = str(toolkit(packages / "nvidia" / "cu13"))
    importlib.invalidate_caches()
    assert found() == packaged
    script = program(bin_dir / "nvcc", f"exec {tmp_path}/somewhere/nvcc")
    assert found() == packaged  # the script lies in no toolkit
    assert str(toolkit(usual)) == found()
    script.unlink()
    script.symlink_to(linked := toolkit(tmp_path / "linked"))
    assert found() == str(linked)
    monkeypatch.setenv("PATH", str(toolkit(tmp_path / "on path").parent))
    assert found() == str(tmp_path / "on path" / "bin" / "nvcc")


def test_ninja_of_the_package_is_found_off_path(bin_dir: Path) -> None:
    ninja = pytest.importorskip("ninja")
    found = detect().ninja.value
    assert found is not None
    assert Path(found).parent == Path(ninja.BIN_DIR)


def test_ninja_on_path_and_beside_python(
    bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    python = tmp_path / "venv" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    found = detect()
    assert found.ninja.rejection == Rejection(
        "no-compiler",
        "no ninja: the package ninja is not installed, and ninja is not on PATH",
        "pip install ninja",
    )
    beside = program(python.parent / "ninja", "echo 1.11")
    assert detect().ninja.value == str(beside)
    on_path = program(bin_dir / "ninja", "echo 1.11")
    assert detect().ninja.value == str(on_path)


@pytest.mark.parametrize(
    ("torch_cuda", "fix"),
    [
        (None, ""),
        ("12.8", "install the CUDA 12.8 toolkit, or set CUDA_HOME to where it is"),
        (
            "13.0",
            'pip install "cuda-toolkit[nvcc,cccl]==13.0.*", or '
            "install the CUDA 13.0 toolkit, or set CUDA_HOME to where it is",
        ),
    ],
)
def test_the_fix_of_a_missing_nvcc(
    torch_cuda: str | None, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    reason = f"no nvcc: no bin/nvcc and include/cuda_runtime_api.h in CUDA_HOME={str(tmp_path)!r}"
    found = toolchain.probe_nvcc(ProbeCache(None), torch_cuda)
    assert found.rejection == Rejection("no-compiler", reason, fix)


# --- Windows -------------------------------------------------------------------------------------

CL = (
    "echo 'Microsoft (R) C/C++ Optimizing Compiler Version 19.44.35207.1 for x64' >&2; "
    "echo 'usage: cl [ option... ] filename... [ /link linkoption... ]'"
)


@pytest.fixture
def windows(bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Windows keeps Visual Studio; nothing is there yet."""
    system = types.ModuleType("sys")  # not sys itself: shutil asks it how commands are named
    vars(system).update({**vars(sys), "platform": "win32"})
    monkeypatch.setattr(toolchain, "sys", system)
    monkeypatch.setenv("PROGRAMFILES(X86)", str(tmp_path / "programs"))
    return tmp_path / "programs"


def visual_studio(programs: Path, version: str = "14.44.35207") -> Path:
    """Install Visual Studio with its locator; the compiler."""
    home = programs / "Microsoft Visual Studio" / "2022" / "BuildTools"
    installer = programs / "Microsoft Visual Studio" / "Installer"
    program(installer / "vswhere.exe", f"echo '{home}'")
    build = home / "VC" / "Auxiliary" / "Build"
    build.mkdir(parents=True)
    (build / "Microsoft.VCToolsVersion.default.txt").write_text(f"{version}\r\n")
    tools = home / "VC" / "Tools" / "MSVC"
    program(tools / "14.29.30133" / "bin" / "Hostx64" / "x64" / "cl", "exit 1")
    return program(tools / version / "bin" / "Hostx64" / "x64" / "cl", CL)


def test_msvc_on_path(windows: Path, bin_dir: Path) -> None:
    visual_studio(windows)
    program(bin_dir / "g++", GCC)  # torch cannot use it there
    path = str(program(bin_dir / "cl", CL))
    found = toolchain.probe_compiler(ProbeCache(None)).value
    version = "Microsoft (R) C/C++ Optimizing Compiler Version 19.44.35207.1 for x64"
    assert found == Compiler(path, path, version, "msvc")


def test_msvc_of_visual_studio(windows: Path) -> None:
    path = visual_studio(windows)
    found = toolchain.probe_compiler(ProbeCache(None)).value
    assert found is not None
    assert (found.path, found.family) == (str(path), "msvc")


def test_the_cl_of_cxx(windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visual_studio(windows)
    path = program(tmp_path / "Program Files" / "cl", CL)
    for value in (str(path), f'"{path}"'):
        monkeypatch.setenv("CXX", value)
        found = toolchain.probe_compiler(ProbeCache(None)).value
        assert found is not None
        assert found.path == str(path)
    monkeypatch.setenv("CXX", r"C:\missing\cl.exe")
    found = toolchain.probe_compiler(ProbeCache(None))
    assert r"missing\\cl.exe' is not an executable on PATH" in found.reason


@pytest.mark.parametrize("missing", ["", "vswhere.exe", "default.txt", "cl"])
def test_no_msvc(windows: Path, missing: str) -> None:
    if missing:
        visual_studio(windows)
        for path in windows.rglob(f"*{missing}"):
            path.unlink()
    assert toolchain.probe_compiler(ProbeCache(None)).rejection == Rejection(
        "no-compiler",
        "no C++ compiler: cl is neither on PATH nor in a Visual Studio",
        "install the Visual Studio Build Tools with their C++ tools, or set CXX to the path of cl",
    )


def test_a_cl_that_does_not_work(windows: Path, bin_dir: Path) -> None:
    program(bin_dir / "cl", "exit 3")
    found = toolchain.probe_compiler(ProbeCache(None))
    assert found.reason == f"no C++ compiler: {bin_dir / 'cl'} failed with 3: no message"
