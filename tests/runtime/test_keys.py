"""The key of an artifact: every ingredient counts, and only files that a library includes."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from bitlinear.kernels import CUDA, DIRECTORY, OPS, VARIANTS, CudaLibrary, Library, Variant
from bitlinear.runtime import keys
from bitlinear.runtime.gpus import Driver, Gpu
from bitlinear.runtime.hardware import Hardware, detect
from bitlinear.runtime.keys import ingredients, key_of, self_test_machine, serves, source_files
from bitlinear.runtime.rejection import Probe, rejected
from bitlinear.runtime.toolchain import Compiler
from tests.runtime.machines import with_release
from tests.runtime.test_artifacts import find, publish

ALL = (*VARIANTS, OPS, CUDA)
FAST = Variant("fast", ("fast.cpp",), ("-O3",), requires=frozenset({"avx2"}))


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    compiler = Compiler("c++", "/usr/bin/g++-12", "g++ 12.2", "gcc")
    return replace(detect(), compiler=Probe(compiler))


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "fast.cpp").write_text('#include "shared.h"\nint fast;')
    (directory / "shared.h").write_text("int shared;")
    (directory / "other.h").write_text("int other;")
    return directory


# gcc(1), "Environment variables affecting GCC"; Apple's clang and MSVC.
GCC_VARIABLES = (
    "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH",
    "GCC_EXEC_PREFIX",
)  # fmt: skip
OTHER_VARIABLES = ("SDKROOT", "INCLUDE", "LIB")


def key(library: Library, directory: Path, machine: Hardware) -> str:
    return key_of(ingredients(library, directory, machine))


def test_every_ingredient_changes_the_key(
    sources: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, torch = hardware.compiler.value, hardware.torch
    assert compiler is not None
    changed = {
        "a compiler flag": (replace(FAST, cflags=("-O2",)), {}),
        "a linker flag": (replace(FAST, ldflags=("-lm",)), {}),
        "the compiler's version": (FAST, {"compiler": Probe(replace(compiler, version="g++ 99"))}),
        "the compiler's file": (FAST, {"compiler": Probe(replace(compiler, realpath="/opt/g++"))}),
        "no compiler": (FAST, {"compiler": rejected("no-compiler", "none")}),
        "torch": (FAST, {"torch": replace(torch, version="9.9")}),
        "torch's commit": (FAST, {"torch": replace(torch, git_version="f")}),
        "CUDA": (FAST, {"torch": replace(torch, cuda="99.0")}),
        "the C++ ABI": (FAST, {"torch": replace(torch, cxx11_abi=not torch.cxx11_abi)}),
        "libc": (FAST, {"libc": "glibc 9.9"}),
        "the system": (FAST, {"system": "darwin"}),
        "the architecture": (FAST, {"cpu": replace(hardware.cpu, machine="riscv64")}),
    }
    found = {
        what: key(library, sources, replace(hardware, **changes))  # type: ignore[arg-type]
        for what, (library, changes) in changed.items()
    }
    found["nothing"] = key(FAST, sources, hardware)
    monkeypatch.setenv("CXX", "g++ -m32")
    found["the compiler's arguments"] = key(FAST, sources, hardware)
    monkeypatch.delenv("CXX")
    for variable in (*GCC_VARIABLES, *OTHER_VARIABLES):
        monkeypatch.setenv(variable, "/opt")
        found[variable] = key(FAST, sources, hardware)
        monkeypatch.delenv(variable)
    (sources / "shared.h").write_text("int shared = 1;")
    found["a header"] = key(FAST, sources, hardware)
    (sources / "fast.cpp").write_text('#include "shared.h"\nint fast = 1;')
    found["the source"] = key(FAST, sources, hardware)
    worker = sources / keys._WORKER.name
    worker.write_text("another recipe")
    monkeypatch.setattr(keys, "_WORKER", worker)
    found["the build"] = key(FAST, sources, hardware)
    monkeypatch.setattr(keys, "_FORMAT", "another")
    found["the format"] = key(FAST, sources, hardware)
    assert len(set(found.values())) == len(found), found


def test_the_order_of_the_ingredients_does_not_matter(sources: Path, hardware: Hardware) -> None:
    parts = ingredients(FAST, sources, hardware)
    assert key_of(dict(reversed(parts.items()))) == key_of(parts)
    assert re.fullmatch("[0-9a-f]{32}", key_of(parts))


def test_a_library_serves_every_cpu_and_its_self_test_one(
    sources: Path, hardware: Hardware
) -> None:
    operator = Library("fast", ("fast.cpp",), ())
    other = replace(hardware, cpu=replace(hardware.cpu, model="another"))
    for library in (FAST, operator):
        assert ingredients(library, sources, hardware) == ingredients(library, sources, other)
    assert self_test_machine(FAST, hardware) != self_test_machine(FAST, other)
    assert self_test_machine(operator, hardware) == self_test_machine(operator, other)
    assert "python" in ingredients(operator, sources, hardware)
    assert "python" not in ingredients(FAST, sources, hardware)


# --- Headers -------------------------------------------------------------------------------------


def test_headers_are_followed_from_the_file_that_includes_them(tmp_path: Path) -> None:
    files = {
        "cpu/one.cpp": '#include "near.h"\n#include <system.h>\n  #  include "../shared.h"\n',
        "cpu/near.h": '#pragma once\n#if 0\n#include "never.h"\n#endif\n#include "torch/x.h"\n',
        "cpu/never.h": "",
        "cpu/shared.h": "",  # not this one
        "shared.h": '#include "deep/far.cuh"\n#include "../outside.h"\n// #include "cpu/none.h"\n',
        "deep/far.cuh": '#include "../shared.h"\n',  # a cycle
        "cpu/none.h": "",
        "../outside.h": "",
    }
    for name, text in files.items():
        path = tmp_path / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = source_files(Library("one", ("cpu/one.cpp",), ()), tmp_path / "sources")
    assert found == ["cpu/one.cpp", "cpu/near.h", "cpu/never.h", "deep/far.cuh", "shared.h"]


def test_a_header_that_is_not_included_does_not_count(sources: Path, hardware: Hardware) -> None:
    before = key(FAST, sources, hardware)
    (sources / "other.h").write_text("int other = 1;")
    assert key(FAST, sources, hardware) == before
    assert source_files(FAST, sources) == ["fast.cpp", "shared.h"]


def compilers_files(library: Library) -> set[str]:
    """The files of the package that a compiler reads to compile the library."""
    torch_headers = [f"-isystem{path}" for path in include_paths()]
    rules = subprocess.run(
        # -MG: a header of CUDA or of another architecture may be missing.
        ["g++", "-MM", "-MG", "-std=c++17", "-xc++", *torch_headers, *library.sources],
        cwd=DIRECTORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [DIRECTORY / word for word in re.findall(r"[^\s:\\]+\.(?:h|cuh|cpp|cu)\b", rules)]
    inside = (path.resolve() for path in paths if path.is_file())
    return {path.relative_to(DIRECTORY).as_posix() for path in inside}


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("library", ALL, ids=lambda library: library.name)
def test_the_files_of_a_library_are_those_that_a_compiler_reads(library: Library) -> None:
    assert set(source_files(library, DIRECTORY)) == compilers_files(library)


@pytest.mark.parametrize("header", ["cpu/avx512.h", "cpu/neon.h", "cpu/gemm_panel.h", "abi.h"])
def test_a_header_changes_the_keys_of_its_users_alone(
    header: str, tmp_path: Path, hardware: Hardware
) -> None:
    directory = tmp_path / "kernels"
    shutil.copytree(DIRECTORY, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    machine = with_gpus(hardware)
    before = {library.name: key(library, directory, machine) for library in ALL}
    (directory / header).write_bytes((directory / header).read_bytes() + b"\n")
    after = {library.name: key(library, directory, machine) for library in ALL}
    users = {lib.name for lib in ALL if header in source_files(lib, DIRECTORY)}
    assert {name for name in before if before[name] != after[name]} == users
    others = [lib for lib in ALL if lib.name not in users]
    if header == "cpu/avx512.h":
        assert users
        assert all("avx512f" in lib.requires for lib in VARIANTS if lib.name in users)
        assert all("avx512f" not in getattr(lib, "requires", ()) for lib in others)


# --- CUDA ----------------------------------------------------------------------------------------


@pytest.fixture
def gpu_sources(sources: Path) -> Path:
    (sources / "cuda").mkdir()
    texts = {
        "ops.cpp": '#include "inner.h"',
        "fast.cu": '#include "tile.cuh"\n#include "../shared.h"',
        "tile.cuh": '#include "inner.h"',
        "inner.h": "",
        "unused.h": "",
    }
    for name, text in texts.items():
        (sources / "cuda" / name).write_text(text)
    return sources


GPU = CudaLibrary("cuda", ("cuda/ops.cpp", "cuda/fast.cu"), (), (), ("-O3",), ("sm_90a",), (0,))


def with_gpus(hardware: Hardware) -> Hardware:
    gpus = (Gpu("H100", (9, 0), 1), Gpu("A100", (8, 0), 1), Gpu("H100", (9, 0), 2))
    return replace(hardware, driver=Probe(Driver("13.0", gpus)), nvcc=Probe(with_release("13.0")))


def test_sources_come_first(gpu_sources: Path) -> None:
    assert source_files(GPU, gpu_sources) == [
        "cuda/ops.cpp", "cuda/fast.cu", "cuda/inner.h", "cuda/tile.cuh", "shared.h",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ops.cpp", "fast.cu", "tile.cuh", "inner.h"])
def test_cudas_sources_are_cudas_alone(gpu_sources: Path, hardware: Hardware, name: str) -> None:
    machine = with_gpus(hardware)
    before = [key(library, gpu_sources, machine) for library in (FAST, GPU)]
    path = gpu_sources / "cuda" / name
    path.write_text(path.read_text() + "// changed")
    after = [key(library, gpu_sources, machine) for library in (FAST, GPU)]
    assert before[0] == after[0]
    assert before[1] != after[1]
    (gpu_sources / "shared.h").write_text("// changed")
    assert key(GPU, gpu_sources, machine) != after[1]


def test_every_ingredient_of_cuda_changes_the_key(
    gpu_sources: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = with_gpus(hardware)
    nvcc, driver = machine.nvcc.value, machine.driver.value
    assert nvcc is not None
    assert driver is not None

    def cuda_key(library: CudaLibrary = GPU, machine: Hardware = machine) -> str:
        return key(library, gpu_sources, machine)

    found = [
        cuda_key(),
        cuda_key(replace(GPU, architectures=("sm_90a", "sm_80"))),
        cuda_key(replace(GPU, cuda_cflags=("-O2",))),
        cuda_key(machine=replace(machine, nvcc=Probe(replace(nvcc, version="release 13.1")))),
        cuda_key(machine=replace(machine, nvcc=Probe(replace(nvcc, realpath="/other/nvcc")))),
    ]
    for variable in ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"):
        monkeypatch.setenv(variable, "-allow-unsupported-compiler")
        found.append(cuda_key())
    assert len(set(found)) == len(found)


def test_the_gpus_and_the_driver_belong_to_the_self_test(
    gpu_sources: Path, hardware: Hardware
) -> None:
    machine = with_gpus(hardware)
    driver = machine.driver.value
    assert driver is not None
    newer = replace(machine, driver=Probe(replace(driver, cuda="13.1")))
    more = replace(GPU, devices=(0, 1))
    assert key(GPU, gpu_sources, machine) == key(GPU, gpu_sources, newer)
    assert key(GPU, gpu_sources, machine) == key(more, gpu_sources, machine)
    same_model = replace(GPU, devices=(0, 2))
    assert self_test_machine(GPU, machine) == self_test_machine(same_model, machine)
    others = [(GPU, machine), (GPU, newer), (more, machine)]
    assert len({self_test_machine(*other) for other in others}) == 3


COMPILERS = ("compiler", "compiler_arguments", "search_paths", "nvcc")


def test_without_a_compiler_nothing_but_the_compiler_may_differ(
    gpu_sources: Path, hardware: Hardware
) -> None:
    for library in (FAST, GPU, Library("fast", ("fast.cpp",), ())):
        wanted = ingredients(library, gpu_sources, with_gpus(hardware))
        for name in wanted:
            found = {**wanted, name: "sm_35" if name == "architectures" else "another"}
            assert not serves(found, wanted, can_build=True), name
            assert serves(found, wanted, can_build=False) == (name in COMPILERS), name
        assert serves(wanted, wanted, can_build=True)


@pytest.mark.parametrize(
    ("compiled", "wanted", "with_a_compiler", "without"),
    [
        ("sm_90a", "sm_90a", True, True),
        ("sm_80 sm_90a", "sm_90a", True, True),
        ("sm_80 sm_90a", "sm_80 sm_90a", True, True),
        ("sm_90a", "sm_80 sm_90a", False, False),
        ("sm_80", "sm_86", False, True),  # runs there, but is not the best
        ("sm_86", "sm_80", False, False),
        ("sm_80", "sm_90a", False, False),
        ("compute_80", "sm_90a", False, True),
        ("compute_90", "sm_80", False, False),
        ("", "sm_80", False, False),
    ],
)
def test_which_architectures_serve(
    compiled: str, wanted: str, with_a_compiler: bool, without: bool
) -> None:
    found, needed = {"architectures": compiled, "libc": "1"}, {"architectures": wanted, "libc": "1"}
    assert serves(found, needed, can_build=True) == with_a_compiler
    assert serves(found, needed, can_build=False) == without
    assert not serves({**found, "libc": "2"}, needed, can_build=False)
    assert not serves({**found, "more": ""}, needed, can_build=False)
    assert not serves({}, needed, can_build=False)


def test_without_nvcc_anothers_artifact_serves(
    tmp_path: Path, gpu_sources: Path, hardware: Hardware
) -> None:
    root = tmp_path / "cache"
    root.mkdir(mode=0o700)
    machine, library = with_gpus(hardware), replace(GPU, name="fast")
    publish(root, ingredients(library, gpu_sources, machine))
    without = replace(machine, nvcc=rejected("no-compiler", "no nvcc"))
    parts = ingredients(library, gpu_sources, without)
    assert find(root, parts) is None
    assert find(root, parts, can_build=False) is not None


@pytest.mark.parametrize("can_build", [True, False])
def test_a_library_for_more_gpus_is_found(
    tmp_path: Path, gpu_sources: Path, hardware: Hardware, can_build: bool
) -> None:
    root = tmp_path / "cache"
    root.mkdir(mode=0o700)
    machine, library = with_gpus(hardware), replace(GPU, name="fast")
    more = replace(library, architectures=("sm_80", "sm_90a"))
    publish(root, ingredients(library, gpu_sources, machine))
    assert find(root, ingredients(more, gpu_sources, machine), can_build) is None
    built = publish(root, ingredients(more, gpu_sources, machine))
    for wanted in (replace(library, architectures=("sm_80",)), more):
        found = find(root, ingredients(wanted, gpu_sources, machine), can_build)
        assert found is not None
        assert found.key == built.key
