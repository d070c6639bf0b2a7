"""The key of an artifact: every ingredient counts, and only what a library includes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bitlinear.kernels import CudaLibrary, Library, Variant
from bitlinear.runtime import artifacts, keys
from bitlinear.runtime.gpus import Driver, Gpu
from bitlinear.runtime.hardware import Hardware, detect
from bitlinear.runtime.toolchain import Compiler
from tests.runtime.test_artifacts import opened, publish

HOUR = 3600.0
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return detect()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "fast.cpp").write_text("int fast;")
    (directory / "shared.h").write_text("int shared;")
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    return directory


FAST = Variant("fast", ("fast.cpp",), ("-O3",), requires=frozenset({"avx2"}))


def test_every_ingredient_changes_the_key(
    sources: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hardware.compiler is not None
    other_cpu = replace(hardware.cpu, flags=frozenset({"avx2"}))
    changed = {
        "a compiler flag": (replace(FAST, cflags=("-O2",)), hardware),
        "a linker flag": (replace(FAST, ldflags=("-lm",)), hardware),
        "the compiler's version": (
            FAST,
            replace(hardware, compiler=replace(hardware.compiler, version="g++ 99")),
        ),
        "the compiler's file": (
            FAST,
            replace(hardware, compiler=replace(hardware.compiler, realpath="/opt/g++")),
        ),
        "torch": (FAST, replace(hardware, torch=replace(hardware.torch, version="9.9"))),
        "torch's commit": (FAST, replace(hardware, torch=replace(hardware.torch, git_version="f"))),
        "CUDA": (FAST, replace(hardware, torch=replace(hardware.torch, cuda="99.0"))),
        "the C++ ABI": (
            FAST,
            replace(
                hardware, torch=replace(hardware.torch, cxx11_abi=not hardware.torch.cxx11_abi)
            ),
        ),
        "libc": (FAST, replace(hardware, libc="glibc 9.9")),
        "the CPU": (FAST, replace(hardware, cpu=other_cpu)),
    }
    keys = {
        what: keys.key(keys.ingredients(library, sources, machine))
        for what, (library, machine) in changed.items()
    }
    keys["nothing"] = keys.key(keys.ingredients(FAST, sources, hardware))
    monkeypatch.setenv("CXX", "g++ -m32")
    keys["the compiler's arguments"] = keys.key(keys.ingredients(FAST, sources, hardware))
    monkeypatch.delenv("CXX")
    (sources / "shared.h").write_text("int shared = 1;")
    keys["a header"] = keys.key(keys.ingredients(FAST, sources, hardware))
    (sources / "fast.cpp").write_text("int fast = 1;")
    keys["the source"] = keys.key(keys.ingredients(FAST, sources, hardware))
    assert len(set(keys.values())) == len(keys), keys


@pytest.fixture
def gpu_sources(sources: Path) -> Path:
    (sources / "cuda").mkdir()
    for name in ("ops.cpp", "fast.cu", "tile.cuh", "inner.h", "notes.txt"):
        (sources / "cuda" / name).write_text(f"// {name}")
    return sources


GPU = CudaLibrary("cuda", ("cuda/ops.cpp", "cuda/fast.cu"), (), (), ("-O3",), ("sm_90a",), (0,))


def with_gpus(hardware: Hardware) -> Hardware:
    gpus = (Gpu("H100", (9, 0), 1), Gpu("A100", (8, 0), 1), Gpu("H100", (9, 0), 2))
    nvcc = Compiler("/cuda/bin/nvcc", "/cuda/bin/nvcc", "release 13.0, V13.0.88", "nvcc")
    return replace(hardware, driver=Driver("13.0", gpus), nvcc=nvcc)


def test_headers_are_those_beside_the_sources_and_of_the_package(gpu_sources: Path) -> None:
    assert keys.source_files(FAST, gpu_sources) == ["fast.cpp", "shared.h"]
    assert keys.source_files(GPU, gpu_sources) == [
        "cuda/ops.cpp", "cuda/fast.cu", "cuda/inner.h", "cuda/tile.cuh", "shared.h",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ops.cpp", "fast.cu", "tile.cuh", "inner.h"])
def test_cudas_sources_are_cudas_alone(gpu_sources: Path, hardware: Hardware, name: str) -> None:
    machine = with_gpus(hardware)
    before = [keys.ingredients(library, gpu_sources, machine) for library in (FAST, GPU)]
    (gpu_sources / "cuda" / name).write_text("// changed")
    after = [keys.ingredients(library, gpu_sources, machine) for library in (FAST, GPU)]
    assert before[0] == after[0]
    assert before[1]["sources"] != after[1]["sources"]
    (gpu_sources / "shared.h").write_text("// changed")
    assert keys.ingredients(GPU, gpu_sources, machine) != after[1]


def test_every_ingredient_of_cuda_changes_the_key(
    gpu_sources: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = with_gpus(hardware)
    assert machine.nvcc is not None
    assert machine.driver is not None

    def key(library: CudaLibrary = GPU, machine: Hardware = machine) -> str:
        return keys.key(keys.ingredients(library, gpu_sources, machine))

    first = key()
    assert key(replace(GPU, devices=(0, 2))) == first  # of one model
    keys = [
        first,
        key(replace(GPU, devices=(0, 1))),
        key(replace(GPU, architectures=("sm_90a", "sm_80"))),
        key(replace(GPU, cuda_cflags=("-O2",))),
        key(machine=replace(machine, nvcc=replace(machine.nvcc, version="release 13.1"))),
        key(machine=replace(machine, nvcc=replace(machine.nvcc, realpath="/other/nvcc"))),
        key(machine=replace(machine, driver=replace(machine.driver, cuda="13.1"))),
    ]
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-allow-unsupported-compiler")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_without_nvcc_what_another_built_serves(
    root: Path, gpu_sources: Path, hardware: Hardware
) -> None:
    machine, library = with_gpus(hardware), replace(GPU, name="fast")
    publish(root, keys.ingredients(library, gpu_sources, machine))
    without = keys.ingredients(library, gpu_sources, replace(machine, nvcc=None))
    assert artifacts.find(opened(root), without, any_compiler=False) is None
    assert artifacts.find(opened(root), without, any_compiler=True) is not None


def test_the_operator_serves_every_cpu_but_one_python(sources: Path, hardware: Hardware) -> None:
    operator = Library("fast", ("fast.cpp",), ())
    parts = keys.ingredients(operator, sources, hardware)
    other = replace(hardware, cpu=replace(hardware.cpu, model="another"))
    assert parts == keys.ingredients(operator, sources, other)
    assert "python" in parts
    assert "python" not in keys.ingredients(FAST, sources, hardware)
