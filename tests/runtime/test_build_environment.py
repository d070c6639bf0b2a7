"""Awkward paths, and the environment of the child process that compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitlinear.runtime import build_environment
from bitlinear.runtime.hardware import detect
from bitlinear.runtime.rejection import Probe, rejected
from bitlinear.runtime.toolchain import Compiler
from tests.runtime.stand_ins import (
    ROOT,
    compilations,
    compiler,
    python,
    stand_ins,
)

AWKWARD = "a b $HOME 'ä' \"q\" $"


@pytest.mark.slow
def test_awkward_paths(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache, the sources, the temporary directory and a directory of sys.path."""
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
    packages = Path(str(torch.__file__)).parents[1]
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
    return build_environment.build_environment(detect(), links)


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
        assert build_environment._max_jobs() == 1
    finally:
        os.sched_setaffinity(0, mask)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("cpus", "available", "limit", "expected"),
    [
        (64, 64 * GIB, "max", 4),
        (3, 64 * GIB, "max", 3),
        (64, 6 * GIB, "max", 3),
        (64, 64 * GIB, str(4 * GIB), 2),  # of a container
        (64, 1 * GIB, "max", 1),
        (64, 64 * GIB, "0", 1),
        (64, None, None, 1),  # a system that does not tell
    ],
)
def test_a_job_needs_a_cpu_and_memory(
    cpus: int,
    available: int | None,
    limit: str | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {}
    if available is not None:
        files["/proc/meminfo"] = f"MemTotal: 99999999999 kB\nMemAvailable:  {available >> 10} kB\n"
    if limit is not None:
        files["/sys/fs/cgroup/memory.max"] = f"{limit}\n"

    def read_text(path: Path, encoding: str) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(build_environment, "available_cpus", lambda: cpus)
    assert build_environment._max_jobs() == expected


def test_the_child_uses_the_tools_of_the_key_and_speaks_english(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/last")
    ninja = tmp_path / AWKWARD / "ninja"
    links = tmp_path / "links"
    links.mkdir()
    machine = replace(detect(), ninja=Probe(str(ninja)))
    environment = build_environment.build_environment(machine, links)
    first, *_, last = environment["PATH"].split(":")
    assert (first, last) == (str(links / "bin"), "/last")
    assert os.readlink(links / "bin" / "ninja") == str(ninja)
    wrapper = Path(environment["CXX"])
    assert wrapper.parent == links / "bin"
    assert wrapper.stat().st_mode & 0o777 == 0o700
    assert environment["LC_ALL"] == "C"


def test_a_relative_compiler_is_the_one_of_this_directory(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path / "tools")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "tools/c++ -DX='a b'")
    wrapper = Path(environment_of_child(tmp_path)["CXX"])
    assert wrapper.read_text() == f"#!/bin/sh\nexec {tmp_path}/tools/c++ '-DX=a b' \"$@\"\n"


def test_the_directory_of_a_build_has_a_plain_name_and_can_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging, awkward, usual = tmp_path / "staging", tmp_path / AWKWARD, tmp_path / "usual"
    for path in (staging, awkward, usual):
        path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(usual))
    full: list[Path] = []
    why = "cannot be written to (No space left on device)"
    monkeypatch.setattr(build_environment, "why_unusable", lambda path: why if path in full else "")
    assert build_environment.plain_directory(staging).parent == staging
    directory = build_environment.plain_directory(awkward)
    assert directory.parent == usual
    assert directory.stat().st_mode & 0o777 == 0o700
    full += [staging]
    assert build_environment.plain_directory(staging).parent == usual
    full += [usual, *map(Path, ("/tmp", "/var/tmp", "/dev/shm"))]
    with pytest.raises(OSError, match=r"staging cannot be .*; .*usual cannot be .*; /tmp cannot"):
        build_environment.plain_directory(staging)


def test_a_build_does_not_work_where_others_could_change_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    awkward, usual = tmp_path / AWKWARD, tmp_path / "usual"
    awkward.mkdir()
    usual.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(usual))
    assert build_environment.plain_directory(awkward).parent == usual
    usual.chmod(0o777)
    assert build_environment.plain_directory(awkward).parent == Path("/tmp")
    usual.chmod(0o1777)
    assert build_environment.plain_directory(awkward).parent == usual


def test_compilers_keep_their_files_beside_the_build(tmp_path: Path) -> None:
    environment = build_environment.build_environment(detect(), tmp_path)
    assert environment["TMPDIR"] == str(tmp_path)


def test_what_needs_quotes_on_the_import_path_gets_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("plain-1.0", "a:b", "a b", "ä", "$HOME")
    path = [str(tmp_path / name) for name in names]
    monkeypatch.setattr(build_environment, "import_path", lambda: path)
    links = tmp_path / "links"
    links.mkdir()
    found = build_environment.plain_import_path(links)
    assert found == [path[0], *(str(links / f"path{number}") for number in range(1, 5))]
    assert [os.readlink(link) for link in found[1:]] == path[1:]


def test_nvcc_has_its_toolkit_and_the_host_compiler(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_NVCC", "another")
    for home in (tmp_path / "plain", tmp_path / AWKWARD):
        nvcc = str(home / "bin" / "nvcc")
        links = tmp_path / f"links of {home.name}"
        links.mkdir()
        machine = replace(detect(), nvcc=Probe(Compiler(nvcc, nvcc, "release 13.0", "nvcc")))
        environment = build_environment.build_environment(machine, links)
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
    machine = replace(detect(), nvcc=Probe(Compiler(nvcc, nvcc, "release 13.0", "nvcc")))
    directory, *others = build_environment.build_environment(machine, links)["LIBRARY_PATH"].split(
        ":"
    )
    assert Path(directory, "libcudart.so").resolve() == library
    assert others == ["/one", "/two"]


@pytest.mark.parametrize("form", ["env {}", pytest.param("env A='b c' {}", marks=pytest.mark.slow)])
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_verbose_shows_the_commands(
    half: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BITLINEAR_VERBOSE", "1")
    stand_ins(tmp_path / "sources").load()
    assert "-c " in capfd.readouterr().err


@pytest.mark.slow
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


def test_windows_finds_ninja_and_cl_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = types.ModuleType("os")
    vars(windows).update({**vars(os), "name": "nt"})
    monkeypatch.setattr(build_environment, "os", windows)
    monkeypatch.setenv("PATH", "usual")
    monkeypatch.setenv("CXX", "a path")
    cl, ninja = str(tmp_path / "tools" / "cl.exe"), str(tmp_path / "packages" / "ninja.exe")
    compiler = Compiler("cl", cl, "Version 19.44", "msvc")
    for found, expected in (
        ({"compiler": Probe(compiler), "ninja": Probe(ninja)}, ["packages", "tools"]),
        ({"compiler": rejected("no-compiler", "none"), "ninja": Probe(ninja)}, ["packages"]),
    ):
        hardware = replace(detect(), nvcc=rejected("no-compiler", "none"), **found)
        environment = build_environment.build_environment(hardware, tmp_path)
        directories = [*(str(tmp_path / name) for name in expected), "usual"]
        assert environment["PATH"] == os.pathsep.join(directories)
        assert "CXX" not in environment
