"""The flags of every library, as the compilers and linkers of each system spell them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitlinear.kernels import CUDA, OPS, VARIANTS, Library
from bitlinear.kernels.flags import compiler_flags, linker_flags

LIBRARIES = (*VARIANTS, OPS, CUDA)

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)


@libraries
def test_the_rows_have_the_flags_of_gcc_and_clang(library: Library) -> None:
    assert compiler_flags(library, "linux") == library.cflags
    assert linker_flags(library, "linux") == library.ldflags
    assert compiler_flags(library, "darwin") == library.cflags


@libraries
def test_as_needed_is_for_linkers_that_know_it(library: Library) -> None:
    assert linker_flags(library, "darwin") == linker_flags(library, "windows") == ()


@libraries
def test_msvc_gets_only_its_own_flags(library: Library) -> None:
    flags = compiler_flags(library, "windows")
    assert {"/fp:precise", "/DNDEBUG"} <= set(flags)
    assert all(flag.startswith("/") for flag in flags)
    assert ("/openmp" in flags) == library.starts_threads


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("amx_int8", "/arch:AVX512"),
        ("avx512_vnni", "/arch:AVX512"),
        ("avx_vnni", "/arch:AVX2"),
        ("avx2", "/arch:AVX2"),
        ("scalar", None),
    ],
)
def test_the_instruction_sets_of_msvc(name: str, flag: str | None) -> None:
    variant = next(variant for variant in VARIANTS if variant.name == name)
    flags = compiler_flags(variant, "windows")
    assert [spelled for spelled in flags if spelled.startswith("/arch")] == ([flag] if flag else [])


def test_a_new_flag_needs_a_counterpart() -> None:
    """An instruction set needs none: a variant is one file and one row."""
    assert compiler_flags(replace(OPS, cflags=("-msse4.1",)), "windows") == ("/openmp",)
    with pytest.raises(ValueError, match="-funroll-loops has no counterpart"):
        compiler_flags(replace(OPS, cflags=("-funroll-loops",)), "windows")
    with pytest.raises(ValueError, match="-lm has no counterpart"):
        linker_flags(replace(OPS, ldflags=("-lm",)), "darwin")
