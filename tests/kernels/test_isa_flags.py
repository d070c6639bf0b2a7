"""A variant requires every CPU flag that its compiler flags switch on, and no other."""

from __future__ import annotations

import subprocess

import pytest

from bitlinear.kernels import VARIANTS, Variant
from tests.kernels.native import COMPILERS, compiler_command, this_machine

# Each macro that compilers define for an instruction set, and the flag of Linux that promises it.
MACROS = {
    "__SSE3__": "pni",
    "__SSSE3__": "ssse3",
    "__SSE4_1__": "sse4_1",
    "__SSE4_2__": "sse4_2",
    "__CRC32__": "sse4_2",  # the CRC32 instruction came with SSE4.2 and has no flag of its own
    "__POPCNT__": "popcnt",
    "__XSAVE__": "xsave",
    "__AVX__": "avx",
    "__F16C__": "f16c",
    "__FMA__": "fma",
    "__AVX2__": "avx2",
    "__AVXVNNI__": "avx_vnni",
    "__AVX512F__": "avx512f",
    "__EVEX256__": "avx512f",
    "__EVEX512__": "avx512f",
    "__AVX512BW__": "avx512bw",
    "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl",
    "__AVX512VNNI__": "avx512_vnni",
    "__AMX_TILE__": "amx_tile",
    "__AMX_INT8__": "amx_int8",
    "__AMXTILE__": "amx_tile",  # clang
    "__AMXINT8__": "amx_int8",
    "__ARM_NEON": "asimd",
    "__ARM_NEON_FP": "asimd",
    "__ARM_FEATURE_NUMERIC_MAXMIN": "asimd",  # gcc: its vector form
    "__ARM_FEATURE_QRDMX": "asimdrdm",
    "__ARM_FEATURE_ATOMICS": "atomics",
    "__ARM_FEATURE_CRC32": "crc32",
    "__ARM_FEATURE_DOTPROD": "asimddp",
    "__ARM_FEATURE_MATMUL_INT8": "i8mm",
}
# Consequences of the above that are no instruction sets.
OTHER_MACROS = ("__BIGGEST_ALIGNMENT__", "__FP_FAST_FMA")

# The least of each architecture, because some distributions' compilers default to more. For Arm it
# is below what any machine has, so that the vector instructions of Armv8.0-A count as added.
BASELINES = {"x86_64": ["-march=x86-64"], "aarch64": ["-march=armv8-a+nosimd"]}


def predefined(command: list[str]) -> set[str]:
    done = subprocess.run(
        [*command, "-dM", "-E", "-x", "c++", "-"],
        input="",
        capture_output=True,
        text=True,
        check=True,
    )
    return {line.split()[1] for line in done.stdout.splitlines()}


def switched_on(compiler: str, variant: Variant) -> frozenset[str]:
    """The flags (in the spelling of Linux) that ``cflags`` let ``compiler`` use."""
    command = compiler_command(compiler, variant)
    arch = this_machine().cpu.machine if variant.arch == "any" else variant.arch
    isa = [flag for flag in variant.cflags if flag.startswith("-m")]
    rest = [flag for flag in variant.cflags if not flag.startswith("-m")]
    baseline = [*command, *BASELINES.get(arch, []), *rest]
    try:
        macros = predefined([*baseline, *isa]) - predefined(baseline)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{compiler} is too old for {variant.name}: {error.stderr.strip()}")
    macros = {macro for macro in macros if not macro.startswith(OTHER_MACROS)}
    unknown = macros - set(MACROS)
    assert not unknown, f"say in MACROS or OTHER_MACROS what {sorted(unknown)} are"
    return frozenset(MACROS[macro] for macro in macros)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_everything_that_the_compiler_may_emit_is_required(variant: Variant, compiler: str) -> None:
    missing = switched_on(compiler, variant) - variant.requires
    assert not missing, f"add {sorted(missing)} to requires of {variant.name}"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_nothing_is_required_that_no_compiler_may_emit(variant: Variant) -> None:
    # -mavx512f implies FMA for clang and not for gcc: only both together tell what is too much.
    emitted = frozenset().union(*(switched_on(compiler, variant) for compiler in COMPILERS))
    assert variant.requires == emitted


def test_no_variant_is_tuned_to_the_building_machine() -> None:
    for variant in VARIANTS:
        assert not [flag for flag in variant.cflags if "native" in flag], variant.name
