"""The compilers' machine code: each kernel has its own instructions, and none of other ISAs."""

from __future__ import annotations

import re
import subprocess

import pytest

from bitlinear.kernels import VARIANTS
from tests.kernels.native import compilers, objdump, variants

# variant: the instruction that the kernel is made for, as a regular expression over objdump's lines
PRESENT = {
    "amx_int8": r"tdpbsud",
    "avx512_vnni": r"vpdpbusd .*%zmm",
    "avx_vnni": r"\{vex\} vpdpbusd .*%ymm",
    "avx2": r"vpmaddubsw .*%ymm",
    "neon_i8mm": r"\tsmmla\t",
    "neon_dotprod": r"\tsdot\t.*\.4b\[",
    "neon": r"\tsmlal2\t",
    "scalar": r"pmullw|pmaddwd|imul|\tmla\t|\tsmlal\t",
}

# CPU flag: what shows that an instruction set is used. It is an error in a kernel that does not
# require the flag. objdump marks VEX encodings of instructions that AVX-512 has too; the prefix
# 62 is EVEX's.
ISA_MARKS = {
    "avx": r"%ymm",
    "avx512f": r":\t62 |%zmm",
    "avx_vnni": r"\{vex\} vpdpbusd",
    "amx_int8": r"tdpb",
    "asimddp": r"\t[su]dot\t",
    "i8mm": r"\t(smmla|usdot)\t",
    "sve": r"\tz\d",
}


@pytest.mark.slow
@compilers
@variants
def test_instructions(variant, compiler, compiled_object):
    text = subprocess.run(
        [*objdump(variant), "-dw", compiled_object(compiler, variant)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    check_instructions(variant, text)


def check_instructions(variant, text):
    """Check the disassembly of a kernel, in the format of GNU objdump."""
    if variant.name in PRESENT:
        assert re.search(PRESENT[variant.name], text)
    for flag, mark in ISA_MARKS.items():
        if flag not in variant.requires:
            assert not re.search(mark, text), f"{variant.name} does not require {flag}"


def test_expectations_name_variants_and_flags():
    assert set(PRESENT) <= {variant.name for variant in VARIANTS}
    flags = frozenset().union(*(variant.requires for variant in VARIANTS))
    assert set(ISA_MARKS) <= flags | {"sve"}
