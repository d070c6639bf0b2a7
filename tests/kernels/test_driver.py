"""The native driver: every variant, both compilers, with and without sanitizers."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from native import SANITIZE, compile_variant, compilers, require_usable, variants

from bitlinear.kernels import DIRECTORY, VARIANTS

pytestmark = pytest.mark.slow


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@variants
@compilers
def test_driver(variant, compiler, tmp_path):
    require_usable(variant)
    compile_variant(compiler, variant, tmp_path / "driver")
    result = run(tmp_path / "driver")
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 failed" in result.stdout


@variants
def test_driver_under_sanitizers(variant, tmp_path):
    require_usable(variant)
    compile_variant("g++", variant, tmp_path / "driver", *SANITIZE)
    result = run(tmp_path / "driver")
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 failed" in result.stdout


def test_sanitizers_see_a_byte_beyond_the_buffer(tmp_path):
    """The pass above would be worth nothing if the driver's buffers had slack."""
    scalar = next(variant for variant in VARIANTS if variant.name == "scalar")
    shutil.copytree(DIRECTORY, tmp_path / "kernels")
    source = tmp_path / "kernels" / "scalar.cpp"
    text = source.read_text()
    correct = "memcpy(w.byte, p, static_cast<size_t>(n))"
    assert correct in text
    source.write_text(text.replace(correct, "memcpy(w.byte, p, kWidth + 0 * n)"))
    driver = tmp_path / "driver"
    compile_variant("g++", scalar, driver, *SANITIZE, directory=tmp_path / "kernels")
    result = run(driver, "quick")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
