"""What the compilers made of the kernels: the right instructions, and none of other ISAs."""

from __future__ import annotations

import re
import subprocess

import pytest

from bitlinear.kernels import VARIANTS
from tests.kernels.native import compile_variant, compilers, objdump

# variant: (must appear, must not appear), as regular expressions over objdump's lines
EXPECTED = {
    "amx_int8": (r"tdpbsud", r"\{vex\} vpdpbusd"),
    "avx512_vnni": (r"vpdpbusd .*%zmm", r"\{vex\} vpdpbusd|tdpbsud"),
    # VEX-encoded, which objdump marks where both encodings exist; no EVEX prefix (62) anywhere.
    "avx_vnni": (r"\{vex\} vpdpbusd .*%ymm", r":\t62 "),
    "avx2": (r"vpmaddubsw .*%ymm", r":\t62 |vpdpbusd"),
    "neon_i8mm": (r"\tsmmla\t", r"\tz\d"),
    "neon_dotprod": (r"\tsdot\t.*\.4b\[", r"\t(smmla|usdot)\t"),
    "neon": (r"\tsmlal2\t", r"\t(sdot|udot|smmla|usdot)\t"),
    "scalar": (r"pmullw|pmaddwd|imul|\tmla\t|\tsmlal\t", r"%ymm|%zmm|\tsdot\t"),
}


@pytest.mark.slow
@compilers
@pytest.mark.parametrize("name", EXPECTED)
def test_instructions(name, compiler, tmp_path):
    variant = next(variant for variant in VARIANTS if variant.name == name)
    compile_variant(compiler, variant, tmp_path / "kernel.o", "-c")
    text = subprocess.run(
        [*objdump(variant), "-dw", tmp_path / "kernel.o"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    present, absent = EXPECTED[name]
    assert re.search(present, text)
    assert not re.search(absent, text)


def test_every_variant_has_an_expectation():
    assert set(EXPECTED) == {variant.name for variant in VARIANTS}
