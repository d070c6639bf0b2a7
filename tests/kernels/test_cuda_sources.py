"""The CUDA sources: checks of the compiled code without a GPU; the native driver with a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from bitlinear.kernels import CUDA, DIRECTORY
from tests.kernels.native import require

SOURCES = [DIRECTORY / name for name in CUDA.sources if name.endswith(".cu")]
DRIVER = Path(__file__).with_name("cuda_driver.cu")
# The oldest of nvcc 13, the oldest with the instructions of mma.cu, and the one with wgmma.
ARCHITECTURES = ("75", "80", "90a")
# As in build_worker.py: the flags of the table and those that torch adds.
FLAGS = (*CUDA.cuda_cflags, *cpp_extension.COMMON_NVCC_FLAGS, f"-I{DIRECTORY}")
WARNINGS = ("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra")

# Bytes that a kernel may spill, by a part of its name. All other kernels must not spill.
ALLOWED_SPILLS = {
    "TileILi2ELi2ELi128ELb1ELi2ELb1E": 56,  # wgmma_groups.cu: 64 rows, 128 tokens, two halves of K
    "18small_batch_kernel": 68,  # outside of its loop over K
}

sources = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)


def test_every_source_is_built():
    """A library that lacks a source links, but cannot be loaded on a machine with a GPU."""
    assert set(SOURCES) == set((DIRECTORY / "cuda").glob("*.cu"))


def code_of(source):
    """A source, with the headers that it includes for their kernels, as wgmma.cu does."""
    text = source.read_text()
    names = re.findall(r'#include "(\w+\.cuh)"', text)
    headers = [source.with_name(name).read_text() for name in names]
    return text + "".join(code for code in headers if "__global__" in code)


def run(*command, timeout=600):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=timeout
    )


def compile_all(paths, directory, *arguments):
    """Compile each source to an object, in parallel. Returns ``{source: (result, object)}``."""
    nvcc = require("nvcc")

    def compile_one(source):
        output = directory / f"{source.stem}.o"
        return run(nvcc, *FLAGS, *WARNINGS, *arguments, "-c", source, "-o", output), output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(compile_one, paths)))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every source, compiled for all architectures at once, with the PTX beside the objects."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    directory = tmp_path_factory.mktemp("objects")
    keep = ("--keep", f"--keep-dir={directory}")
    return compile_all(SOURCES, directory, *targets, *keep, "-Xptxas", "-v")


@pytest.mark.slow
@sources
def test_compiles_without_a_warning(compiled, source):
    """torch is not on the include path: only ops.cpp may include it."""
    result, _ = compiled[source]
    assert result.returncode == 0, result.stdout + result.stderr
    # ptxas reports serialised wgmma products and ignored setmaxnreg as notes, not as warnings.
    assert "Potential Performance Loss" not in result.stdout + result.stderr


def check_spills(result):
    """Return the architectures of the kernels that ``ptxas -v`` has listed."""
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads",
        result.stdout + result.stderr,
        re.DOTALL,
    )
    for name, arch, stores, loads in found:
        allowed = max((b for part, b in ALLOWED_SPILLS.items() if part in name), default=0)
        assert int(stores) + int(loads) <= allowed, (name, arch)
    return {arch for _, arch, _, _ in found}


@pytest.mark.slow
@sources
def test_kernels_do_not_spill(compiled, source):
    result, _ = compiled[source]
    # The pattern must match the output of ptxas for every source that has a kernel.
    has_kernel = "__global__" in code_of(source)
    assert check_spills(result) == (set(ARCHITECTURES) if has_kernel else set())


@pytest.mark.slow
def test_the_gemv_does_not_spill_on_the_newest_consumer_gpus(tmp_path):
    """It uses all registers that it can have, and the compiler needs more of them for sm_120."""
    source = DIRECTORY / "cuda" / "gemv.cu"
    result, _ = compile_all([source], tmp_path, "-arch=sm_120", "-Xptxas", "-v")[source]
    assert check_spills(result) == {"120"}


@pytest.mark.slow
@sources
def test_float_operations_round_on_their_own(compiled, source):
    """The signs of fast-math are absent: fused multiply-add, approximations, flushed subnormals."""
    if source.name == "attention.cu":
        pytest.skip("attention has no bits that are specified")
    result, output = compiled[source]
    assert result.returncode == 0
    listings = [path.read_text() for path in output.parent.glob(f"{source.stem}.*.ptx")]
    assert len(listings) == len(ARCHITECTURES)
    for listing in listings:
        assert not re.findall(r"\b(?:fma\.\S+|\w+\.approx\S*|\S+\.ftz\S*)", listing)


@pytest.mark.slow
@sources
def test_a_kernel_that_lets_its_successor_start_waits_for_its_predecessor(compiled, source):
    """So the kernel completes after its predecessor, and its successor waits for both."""
    result, output = compiled[source]
    assert result.returncode == 0
    listing = "".join(path.read_text() for path in output.parent.glob(f"{source.stem}.*90a*.ptx"))
    kernels = [re.findall(r"griddepcontrol\.(\w+)", text) for text in listing.split(".entry")]
    assert all("wait" in calls for calls in kernels if "launch_dependents" in calls)
    assert any(kernels) == ("wait_for_predecessor" in code_of(source))


@pytest.mark.slow
def test_the_operator_compiles(tmp_path):
    """With the headers of this torch, whether it is built for CUDA or not."""
    # A CPU build of torch lacks only this header, which tells how torch was built.
    macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.touch()
    # nvcc adds CUDA's headers and passes C++ to the host's compiler.
    includes = [f"-isystem={path}" for path in cpp_extension.include_paths()]
    host = f"-Wall,-Wextra,-Werror,-fsyntax-only,-idirafter,{tmp_path}"
    command = [require("nvcc"), "-std=c++20", *includes, "-Xcompiler", host, "-c"]
    result = run(*command, DIRECTORY / "cuda" / "ops.cpp", "-o", tmp_path / "ops.o")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_driver_compiles(tmp_path):
    """CI has no GPU to run it on."""
    output = compile_all([DRIVER], tmp_path, "-arch=sm_80")
    result, _ = output[DRIVER]
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module", params=["newest", "sm_80"])
def driver(request, tmp_path_factory):
    """The native driver, with the newest code for this GPU and with the code of older ones."""
    major, minor = torch.cuda.get_device_capability(0)
    # From sm_90 on, the instructions of one generation alone need the suffix.
    suffix = "a" if major >= 9 and request.param == "newest" else ""
    capability = f"{major}{minor}{suffix}"
    virtual = capability
    if request.param == "sm_80":
        if (major, minor) <= (8, 0):
            pytest.skip("the newest code for this GPU is no newer")
        virtual = "80"
    arch = f"-gencode=arch=compute_{virtual},code=sm_{capability}"
    directory = tmp_path_factory.mktemp("driver")
    objects = compile_all([*SOURCES, DRIVER], directory, arch, "-lineinfo")
    for result, _ in objects.values():
        assert result.returncode == 0, result.stderr
    output = directory / "cuda_driver"
    linked = run(require("nvcc"), arch, *(o for _, o in objects.values()), "-o", output)
    assert linked.returncode == 0, linked.stderr
    return output


@pytest.mark.slow
@pytest.mark.cuda
def test_driver(driver):
    result = run(driver)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = dict(re.findall(r"(\w+): (\d+) passed, 0 failed", result.stdout))
    assert set(counts) == {
        "auto",
        "dp4a",
        "gemv",
        "small_batch",
        "mma",
        "wgmma",
        "small_layer",
        "plans",
        "training",
    }
    assert int(counts["auto"]) == int(counts["dp4a"]) > 4000
    assert min(int(counts[name]) for name in ("gemv", "mma", "small_layer", "plans")) > 0


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_driver_under_the_sanitizer(driver, tool):
    sanitizer = require("compute-sanitizer")
    leaks = ["--leak-check=full"] if tool == "memcheck" else []
    command = (sanitizer, f"--tool={tool}", *leaks, "--error-exitcode=9", driver, "quick")
    result = run(*command, timeout=1800)  # racecheck takes some minutes
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
