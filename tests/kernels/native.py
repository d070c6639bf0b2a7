"""Compile kernel sources with the flags of their row in ``VARIANTS``, without torch."""

from __future__ import annotations

import atexit
import functools
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from bitlinear.kernels import DIRECTORY, VARIANTS, Variant
from bitlinear.runtime import hardware, verdicts

DRIVER = Path(__file__).with_name("driver.cpp")
COMPILERS = ("g++", "clang++")
CROSS_COMPILERS = {  # for aarch64, on a machine that is not
    "g++": "aarch64-linux-gnu-g++",
    "clang++": "clang++ --target=aarch64-linux-gnu",
}
# The Arm CPUs that qemu-user emulates on other machines. The first has no more than the variant
# requires: it faults at an instruction that the variant must not use.
EMULATED_CPUS = {
    "neon": ("cortex-a53", "max"),
    "neon_dotprod": ("cortex-a76", "max"),
}
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")

variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
compilers = pytest.mark.parametrize("compiler", COMPILERS)


def require(program: str) -> str:
    """Skip the test if the program is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    return program


def compiler_command(compiler: str, variant: Variant) -> list[str]:
    """The command that compiles for the variant's architecture; skips if there is none."""
    if variant.arch in ("any", this_machine().cpu.machine):
        return [require(compiler)]
    if variant.arch != "aarch64":
        pytest.skip(f"{variant.name} is for {variant.arch}")
    command = shlex.split(CROSS_COMPILERS[compiler])
    require(command[0])
    if not _has_headers(*command):
        pytest.skip(f"{CROSS_COMPILERS[compiler]} finds no C++ library for aarch64")
    return command


@functools.cache
def _has_headers(*command: str) -> bool:
    """clang++ compiles for every architecture, but its C++ library is a separate package."""
    preprocess = [*command, "-E", "-x", "c++", "-"]
    done = subprocess.run(preprocess, input=b"#include <string>", capture_output=True, check=False)
    return done.returncode == 0


def compile_variant(
    compiler: str,
    variant: Variant,
    output: Path,
    *arguments: str,
    directory: Path = DIRECTORY,
    driver: Path = DRIVER,
    driver_arguments: Sequence[str] = (),
) -> None:
    """Compile the kernel alone (``-c``), or link kernel, self-test and driver to a program.

    Kernel and self-test have the flags of the variant and ``arguments``; the driver is compiled
    without those for instruction sets and with ``driver_arguments``, once for all variants.
    """
    command = _compile_command(compiler, variant)
    kernel, *self_test = [directory / source for source in variant.sources]
    sources = [kernel]
    if "-c" not in arguments:
        shared_flags = [flag for flag in variant.cflags if not flag.startswith("-m")]
        built = _compile_driver(driver, *command, *shared_flags, *driver_arguments)
        # A linker takes the first definition of an inline function. The driver comes first, because
        # its reference has no checks of sanitizers, which would take most of the time.
        sources += [built, *self_test]
    command += [*variant.cflags, f"-I{directory}", *arguments]
    _run([*command, *map(str, sources), "-o", str(output)])


def _compile_command(compiler: str, variant: Variant) -> list[str]:
    command = [*compiler_command(compiler, variant), "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    if compiler == "g++":
        # GCC 12 warns of the deliberately undefined vectors in its own AVX-512 header.
        command += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    return command


@functools.cache
def _compile_driver(driver: Path, *command: str) -> Path:
    """The object file of a driver. It is deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="bitlinear-driver-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    output = Path(folder, "driver.o")
    _run([*command, f"-I{DIRECTORY}", "-c", str(driver), "-o", str(output)])
    return output


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def objdump(variant: Variant) -> list[str]:
    """The disassembler for the variant's architecture."""
    native = variant.arch in ("any", this_machine().cpu.machine)
    return [require("objdump" if native else f"{variant.arch}-linux-gnu-objdump")]


@functools.lru_cache(maxsize=1)
def this_machine() -> hardware.Hardware:
    return hardware.detect()


@functools.lru_cache(maxsize=1)
def usable_variants() -> frozenset[str]:
    """Names of the variants that this machine's CPU can run."""
    return frozenset(v.variant for v in verdicts.select(this_machine()) if v.ok)


def runners(variant: Variant) -> list[list[str]]:
    """Commands that run a compiled program, as prefixes: empty, or an emulator of each CPU."""
    if variant.arch in ("any", this_machine().cpu.machine):
        require_usable(variant)
        return [[]]
    return [emulator(cpu) for cpu in EMULATED_CPUS.get(variant.name, ("max",))]


def emulator(cpu: str) -> list[str]:
    """The emulator of an Arm CPU, with the libraries of the cross compiler."""
    names = ("qemu-aarch64", "qemu-aarch64-static")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"neither {' nor '.join(names)} is installed")
    return [found, "-L", "/usr/aarch64-linux-gnu", "-cpu", cpu]


def require_usable(variant: Variant) -> None:
    if variant.name not in usable_variants():
        pytest.skip(f"this CPU cannot run {variant.name}")
