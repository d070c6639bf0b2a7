"""The self-test itself: it passes a correct kernel, and no other."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bitlinear.kernels import DIRECTORY
from tests.kernels.native import require


def test_the_self_test_finds_a_wrong_result_of_every_function(tmp_path):
    sources = [Path(__file__).with_name("wrong_results.cpp")]
    sources += [DIRECTORY / "cpu" / name for name in ("decode.cpp", "selftest.cpp")]
    program = tmp_path / "wrong_results"
    command = [require("g++"), "-std=c++17", "-O0", f"-I{DIRECTORY}", *sources, "-o", program]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
