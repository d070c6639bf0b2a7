"""The native driver: every variant, both compilers, sanitizers; emulated on other machines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import pytest

from bitlinear.kernels import DIRECTORY, VARIANTS
from tests.kernels.native import (
    DRIVER,
    EMULATED_CPUS,
    SANITIZE,
    compile_variant,
    compilers,
    emulator,
    runners,
    this_machine,
    variants,
)

pytestmark = pytest.mark.slow

# The leak detector attaches to its own process, which an emulator does not allow.
NO_LEAK_DETECTOR = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}


def run(*command, env=None):
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=env
    )


def check(*command, env=None):
    result = run(*command, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 failed" in result.stdout


@variants
@compilers
def test_driver(variant, compiler, compiled_driver):
    first, *others = runners(variant)
    driver = compiled_driver(compiler, variant)
    # All cases run with one compiler only; fewer of them under emulation, which is slow.
    cases = "quick" if compiler != "g++" else "sparse" if first else "all"
    check(*first, driver, cases)
    for runner in others:
        check(*runner, driver, "quick")


# The CPU chooses between two large products, so other tests see one of them.
FORMS = {"avx512_vnni": [("-DBITLINEAR_IS_ZEN4=0",), ("-DBITLINEAR_IS_ZEN4=1",)]}


@pytest.mark.parametrize(
    ("variant", "flags"),
    [
        pytest.param(variant, flags, id=variant.name + "".join(flags))
        for variant in VARIANTS
        for flags in FORMS.get(variant.name, [()])
    ],
)
def test_driver_under_sanitizers(variant, flags, compiled_driver):
    runner = runners(variant)[0]
    driver = compiled_driver("g++", variant, *flags, *SANITIZE)
    # Under an emulator only the quick cases, which find the mistake below.
    check(*runner, driver, *(["quick"] if runner else []), env=NO_LEAK_DETECTOR if runner else None)


def test_the_driver_itself_under_sanitizers(tmp_path):
    """Above, only the kernels have the checks, and what they get from the heap."""
    variant = next(variant for variant in VARIANTS if variant.name == "scalar")
    driver = tmp_path / "driver"
    compile_variant("g++", variant, driver, *SANITIZE, driver_arguments=SANITIZE)
    check(driver, "quick")


@pytest.mark.parametrize("flag", ["-Os", "-fno-inline"])
def test_amx_does_not_depend_on_inlining(flag, compiled_driver):
    """GCC does not declare which memory AMX instructions read, and drops stores before them."""
    variant = next(variant for variant in VARIANTS if variant.name == "amx_int8")
    runners(variant)
    check(compiled_driver("g++", variant, flag), "quick")


@pytest.mark.parametrize(
    ("name", "file", "correct", "wrong"),
    [
        (
            "scalar",
            "cpu/scalar.cpp",
            "memcpy(w.byte, p, static_cast<size_t>(n))",
            "memcpy(w.byte, p, kWidth + 0 * n)",
        ),
        (
            "neon",
            "cpu/neon.h",
            "memcpy(bytes, p, static_cast<size_t>(n))",
            "memcpy(bytes, p, kWidth + 0 * n)",
        ),
    ],
    ids=["scalar", "neon"],
)
def test_sanitizers_see_a_byte_beyond_the_buffer(name, file, correct, wrong, tmp_path):
    """A pass under sanitizers proves nothing if the driver's buffers are too long."""
    variant = next(variant for variant in VARIANTS if variant.name == name)
    runner = runners(variant)[0]
    shutil.copytree(DIRECTORY, tmp_path / "kernels")
    source = tmp_path / "kernels" / file
    text = source.read_text()
    assert correct in text
    source.write_text(text.replace(correct, wrong))
    driver = tmp_path / "driver"
    compile_variant("g++", variant, driver, *SANITIZE, directory=tmp_path / "kernels")
    result = run(*runner, driver, "quick", env=NO_LEAK_DETECTOR)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


@pytest.mark.parametrize(
    ("correct", "wrong"),
    [
        ("bits + 0x7FFFu + ((bits >> 16) & 1u)", "bits"),
        ("static_cast<uint32_t>(h) << 16", "static_cast<uint32_t>(h | 1) << 16"),
    ],
    ids=["to bf16", "from bf16"],
)
def test_a_wrong_conversion_is_found(correct, wrong, tmp_path):
    """The reference converts with code of its own, so it finds mistakes in convert.h."""
    variant = next(variant for variant in VARIANTS if variant.name == "scalar")
    shutil.copytree(DIRECTORY, tmp_path / "kernels")
    source = tmp_path / "kernels" / "cpu" / "convert.h"
    text = source.read_text()
    assert correct in text
    source.write_text(text.replace(correct, wrong))
    driver = tmp_path / "driver"
    compile_variant("g++", variant, driver, directory=tmp_path / "kernels")
    result = run(driver, "quick")
    assert result.returncode == 1
    assert "dtype=2" in result.stdout


def test_the_self_test_reports_that_it_is_out_of_memory(tmp_path):
    """An exception that crosses the C interface ends the process."""
    variant = next(variant for variant in VARIANTS if variant.name == "scalar")
    program = tmp_path / "out_of_memory"
    source = DRIVER.with_name("out_of_memory.cpp")
    compile_variant("g++", variant, program, driver=source)
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "scalar: std::bad_alloc" in result.stdout


@pytest.mark.parametrize(
    ("name", "cpu"), [("neon_dotprod", "cortex-a53"), ("neon_i8mm", "cortex-a76")]
)
def test_an_emulated_cpu_faults_at_instructions_that_it_lacks(name, cpu, compiled_driver):
    """So a pass on the smallest CPU of a variant proves that the variant needs no more."""
    if this_machine().cpu.machine == "aarch64":
        pytest.skip("nothing is emulated here")
    variant = next(variant for variant in VARIANTS if variant.name == name)
    result = run(*emulator(cpu), compiled_driver("g++", variant), "quick")
    assert result.returncode == -signal.SIGILL


def test_emulated_cpus_are_for_arm_variants():
    assert set(EMULATED_CPUS) <= {v.name for v in VARIANTS if v.arch == "aarch64"}
