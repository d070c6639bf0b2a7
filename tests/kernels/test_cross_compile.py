"""Every kernel, its self-test and the native driver, compiled for macOS and for Windows.

The compiler is the clang of the package ziglang, which has the headers and libraries of both
systems. Wine runs the drivers for Windows; nothing here runs those for macOS.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from bitlinear.kernels import DIRECTORY, VARIANTS
from tests.kernels.native import DRIVER, require, require_usable
from tests.kernels.test_disassembly import check_instructions
from tests.kernels.test_isa_flags import MACROS, OTHER_MACROS, predefined

pytestmark = pytest.mark.slow

WINDOWS = "x86_64-windows-gnu"
MACOS = {"aarch64-macos": "aarch64", "x86_64-macos": "x86_64"}
TARGETS = {**MACOS, WINDOWS: "x86_64"}

# What makes portability.h take the branch of MSVC, whose intrinsics clang has too.
AS_MSVC = ("-DBITLINEAR_MSVC", "-fms-extensions")

EXPORTS = {"bitlinear_kernels", "bitlinear_selftest"}


def cases(targets):
    """Each target with each variant that it can compile."""
    return pytest.mark.parametrize(
        ("target", "variant"),
        [
            pytest.param(target, variant, id=f"{target}-{variant.name}")
            for target, arch in targets.items()
            for variant in VARIANTS
            if variant.arch in ("any", arch)
        ],
    )


windows_variants = pytest.mark.parametrize(
    "variant",
    [variant for variant in VARIANTS if variant.arch in ("any", "x86_64")],
    ids=lambda variant: variant.name,
)


@pytest.fixture(scope="session")
def zig(tmp_path_factory):
    """``zig(command, *arguments)`` runs one of zig's compilers and returns its output."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed")
    # It builds the libraries of a target once: two minutes for the C++ library of Windows.
    cache = os.environ.get("ZIG_GLOBAL_CACHE_DIR") or str(tmp_path_factory.mktemp("zig"))

    def run(*command):
        done = subprocess.run(
            [sys.executable, "-m", "ziglang", *map(str, command)],
            env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def compiled(zig, tmp_path_factory):
    """``compiled(target, variant, *flags)``: the objects of the kernel and of its self-test.

    Without a variant: the object of the driver.
    """
    objects = {}

    def compile_once(target, variant=None, *flags):
        key = (target, variant and variant.name, flags)
        if key not in objects:
            folder = tmp_path_factory.mktemp("objects")
            sources = [DIRECTORY / source for source in variant.sources] if variant else [DRIVER]
            own_flags = list(spelled_for_zig((variant or VARIANTS[-1]).cflags))
            objects[key] = [folder / f"{source.stem}.o" for source in sources]
            for source, output in zip(sources, objects[key]):
                warnings = ["-Wall", "-Wextra", "-Werror"]
                command = ["c++", "-target", target, "-std=c++17", *warnings, *own_flags, *flags]
                zig(*command, f"-I{DIRECTORY}", "-c", source, "-o", output)
        return objects[key]

    return compile_once


def spelled_for_zig(flags):
    """zig takes -mcpu in its own spelling in place of -march."""
    march = re.compile(r"-march=armv(\d)(?:\.(\d))?-a(.*)")
    for flag in flags:
        found = march.fullmatch(flag)
        if found is None:
            yield flag
        else:
            major, minor, extensions = found.groups()
            yield f"-mcpu=generic+v{major}{f'_{minor}' if minor else ''}a{extensions}"


def test_spelled_for_zig():
    flags = ["-O3", "-march=armv8-a", "-march=armv8.2-a+dotprod"]
    expected = ["-O3", "-mcpu=generic+v8a", "-mcpu=generic+v8_2a+dotprod"]
    assert list(spelled_for_zig(flags)) == expected


def output_of(*command):
    require(command[0])
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


@cases(TARGETS)
def test_instructions(target, variant, compiled):
    kernel, *_ = compiled(target, variant)
    if target.startswith("aarch64"):
        text = output_of("llvm-objdump", "-d", "--triple=aarch64", "--mattr=+v8.6a,+sve", kernel)
    else:
        text = as_gnu_prints_x86(output_of("llvm-objdump", "-d", kernel))
    assert "<unknown>" not in text
    if "amx_tile" in variant.requires and target in MACOS:
        assert "tdpb" not in text  # no Mac has AMX, so the compiler drops the kernel
        return
    if variant.arch == "any" and target == "aarch64-macos":
        # The least that compilers assume there is an M1, which has the dot product.
        variant = replace(variant, requires=variant.requires | {"asimddp"})
    check_instructions(variant, text)


def as_gnu_prints_x86(disassembly):
    """GNU has a tab between address and bytes, and blanks between an instruction's parts."""
    lines = (
        re.match(r"( *[0-9a-f]+:) ([0-9a-f ]+)\t(.*)", line) for line in disassembly.splitlines()
    )
    parts = (found.groups() for found in lines if found)
    return "\n".join(
        f"{address}\t{code}\t{instruction.expandtabs(1)}" for address, code, instruction in parts
    )


@cases(MACOS)
def test_a_library_for_macos_exports_two_functions(target, variant, zig, compiled, tmp_path):
    """Linked as torch links it: what is missing is found when it is loaded."""
    library = tmp_path / "library.dylib"
    link = ["cc", "-target", target, "-shared", "-nostdlib", "-undefined", "dynamic_lookup"]
    zig(*link, *compiled(target, variant), "-o", library)
    lines = output_of("llvm-nm", "--extern-only", "--defined-only", library).splitlines()
    symbols = {line.split()[-1] for line in lines if line} - {"___dso_handle", "__mh_dylib_header"}
    assert symbols == {f"_{name}" for name in EXPORTS}


@pytest.mark.parametrize("target", MACOS)
def test_the_driver_compiles_for_macos(target, compiled):
    compiled(target)


@windows_variants
def test_an_object_for_windows_exports_its_function(variant, compiled):
    """The linker of a library exports what the objects declare, and no other symbol."""
    exported = {
        name
        for compiled_object in compiled(WINDOWS, variant)
        for name in re.findall(
            r"/EXPORT:(\S+)|-export:(\S+)",
            output_of("llvm-readobj", "--coff-directives", compiled_object),
        )
    }
    assert {first or second for first, second in exported} == EXPORTS


@pytest.fixture(scope="session")
def wine(tmp_path_factory):
    """``wine(program, *arguments)``: the ended process."""
    program = next(filter(None, map(shutil.which, ("wine64", "wine"))), None)
    if program is None:
        pytest.skip("wine is not installed")
    prefix = str(tmp_path_factory.mktemp("wine") / "prefix")
    environment = {**os.environ, "WINEPREFIX": prefix, "WINEDEBUG": "-all", "WINEARCH": "win64"}

    def run(*command):
        return subprocess.run(
            [program, *map(str, command)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run


@pytest.mark.parametrize("flags", [(), AS_MSVC], ids=["clang", "msvc"])
@windows_variants
def test_the_driver_under_wine(variant, flags, zig, compiled, wine, tmp_path):
    require_usable(variant)
    program = tmp_path / "driver.exe"
    objects = [*compiled(WINDOWS, None, *flags), *compiled(WINDOWS, variant, *flags)]
    # Without flags for instruction sets: zig would build its libraries anew for each of them.
    zig("c++", "-target", WINDOWS, "-O2", *objects, "-o", program)
    result = wine(program, "quick")
    if "amx_tile" in variant.requires and "the system refuses" in result.stdout:
        assert result.returncode == 1  # Wine 8 has no function that asks for tiles
        return
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.match(rf"{variant.name}: \d+ passed, 0 failed", result.stdout)


@pytest.mark.parametrize(
    ("triple", "baseline"),
    [
        ("arm64-apple-macos11", "-march=armv8-a+nosimd"),
        ("x86_64-apple-macos11", "-march=x86-64"),
        ("x86_64-pc-windows-msvc", "-march=x86-64"),
    ],
)
def test_flags_switch_on_what_the_rows_require(triple, baseline, zig):
    """With the very flags of the rows, for the targets of the systems' own compilers."""
    command = [sys.executable, "-m", "ziglang", "clang", f"--target={triple}", baseline]
    arch = triple.split("-")[0].replace("arm64", "aarch64")
    for variant in VARIANTS:
        if variant.arch != arch:
            continue
        macros = predefined([*command, *variant.cflags]) - predefined([*command, "-O3"])
        found = {macro for macro in macros if macro in MACROS}
        assert {MACROS[macro] for macro in found} <= variant.requires, variant.name
        others = {macro for macro in macros - found if not macro.startswith(OTHER_MACROS)}
        assert others <= {"NDEBUG", "__NO_MATH_ERRNO__"}, variant.name
