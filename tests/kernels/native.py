"""Compiles kernel sources with the flags of their row, outside of torch."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from bitlinear import hardware, select
from bitlinear.kernels import DIRECTORY, VARIANTS, Variant

DRIVER = Path(__file__).with_name("driver.cpp")
COMPILERS = ("g++", "clang++")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")

variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
compilers = pytest.mark.parametrize("compiler", COMPILERS)


def require_compiler(compiler: str) -> str:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    return compiler


def compile_variant(
    compiler: str, variant: Variant, output: Path, *arguments: str, directory: Path = DIRECTORY
) -> None:
    """Runs the compiler on the kernel alone (``-c``), or on kernel, self-test and driver."""
    require_compiler(compiler)
    if variant.arch not in ("any", platform.machine()):
        pytest.skip(f"{variant.name} is for {variant.arch}")
    sources = [directory / variant.sources[0]]
    if "-c" not in arguments:
        sources = [directory / source for source in variant.sources] + [DRIVER]
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", *variant.cflags]
    # GCC 12 takes the deliberately undefined vectors of its own AVX-512 header for a mistake.
    command += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"] if compiler == "g++" else []
    command += [f"-I{directory}", *arguments, *map(str, sources), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@functools.lru_cache(maxsize=1)
def usable_variants() -> frozenset[str]:
    """The variants that this machine's CPU can run."""
    return frozenset(v.variant for v in select.select(hardware.detect()) if v.ok)


def require_usable(variant: Variant) -> None:
    if variant.name not in usable_variants():
        pytest.skip(f"this CPU cannot run {variant.name}")
