"""Peaks: the bound, the loops that measure them, and data sheets."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from bitlinear import runtime
from bitlinear.kernels import VARIANTS
from scripts.bench import peaks
from scripts.bench.peaks import Peaks
from tests.kernels import native

pytestmark = pytest.mark.skipif(
    runtime.current().kernel is None, reason="the benchmark needs a compiled kernel"
)


def test_the_bound_is_the_longer_of_reading_and_multiplying():
    measured = Peaks(threads=1, read={1 << 10: 4e9, 1 << 20: 1e9}, multiply_add={"fast": 1e12})
    assert measured.read_rate(1 << 9) == 4e9
    assert measured.read_rate(1 << 15) == pytest.approx(2.5e9)
    assert measured.read_rate(1 << 30) == 1e9
    assert measured.bound("fast", 1 << 20, 10) == pytest.approx((1 << 20) / 1e9)
    assert measured.bound("fast", 1 << 20, 10**12) == pytest.approx(1)
    assert measured.bound("without", 1 << 20, 10**12) == pytest.approx((1 << 20) / 1e9)


@pytest.fixture(scope="module")
def loops():
    """``peaks.cpp`` with the flags of the kernel that runs here."""
    compiler = runtime.current().hardware.compiler.value
    if compiler is None:
        pytest.skip("no compiler")
    variant = next(v for v in VARIANTS if v.name == runtime.current().kernel)
    return {variant.name: peaks.compile_loops(variant, compiler)}


def test_the_loops_do_the_work_that_they_count(loops):
    library = next(iter(loops.values()))
    assert library.multiply_adds(10) == 10 * library.multiply_adds(1)
    data = torch.zeros(4096, dtype=torch.uint8)
    assert library.read_bytes(data.data_ptr(), 4096, 3) == 3 * 4096
    assert library.read_bytes(data.data_ptr(), 1023, 1) == 512


def test_peaks_are_measured_for_every_size_and_kernel(loops, monkeypatch):
    monkeypatch.setattr(peaks, "RUN_SECONDS", 1e-3)
    measured = peaks.measure(loops, threads=2, working_sets=(1 << 12, 1 << 16))
    assert list(measured.read) == [1 << 12, 1 << 16]
    assert all(rate > 0 for rate in (*measured.read.values(), *measured.multiply_add.values()))
    if runtime.current().hardware.cpu.machine == "x86_64":
        assert list(measured.multiply_add) == list(loops)


def test_loops_that_cannot_be_compiled_give_the_reason():
    compiler = runtime.current().hardware.compiler.value
    if compiler is None:
        pytest.skip("no compiler")
    variant = VARIANTS[-1]
    broken = type(variant)(variant.name, variant.sources, ("-mno-such-instructions",))
    with pytest.raises(RuntimeError, match="no-such-instructions"):
        peaks.compile_loops(broken, compiler)
    with pytest.raises(RuntimeError, match="no C"):
        peaks.compile_loops(variant, None)


@pytest.mark.slow
@native.compilers
@native.variants
def test_the_sums_stay_in_registers(variant, compiler, tmp_path):
    """A loop that stores its sums would measure the stores."""
    output = tmp_path / "peaks.o"
    command = [*native.compiler_command(compiler, variant), "-std=c++17", *variant.cflags]
    command += ["-Wall", "-Wextra", "-Werror", "-fPIC", "-c", peaks.SOURCE, "-o", output]
    subprocess.run(command, check=True)
    objdump = [*native.objdump(variant), "-dw", "--no-show-raw-insn", output]
    text = subprocess.run(objdump, capture_output=True, text=True, check=True).stdout
    body = text.split("<multiply_adds>:")[1].split("\n\n")[0]
    if "ldtilecfg" in body:  # AMX stores the configuration of its tiles first, on the stack
        body = body.split("ldtilecfg")[1].partition("\n")[2]
    loop = re.split(r"vpdpbusd|vpmaddubsw|pmaddwd|tdpbsud|sdot|smmla|smlal", body, maxsplit=1)[1]
    assert not re.search(r"\(%|\[", re.sub(r".*(nop|lea|ldp).*", "", loop))


@pytest.mark.parametrize(
    ("name", "tops"),
    [
        ("NVIDIA H100 80GB HBM3", 1979),
        ("NVIDIA H100 PCIe", 1513),
        ("NVIDIA A100-SXM4-80GB", 624),
        ("NVIDIA H200", 1979),
    ],
)
def test_the_int8_peak_of_a_gpu(name, tops):
    assert peaks.int8_peak(name) == tops * 1e12


def test_an_unknown_gpu_has_no_int8_peak():
    assert peaks.int8_peak("Imaginary GPU") is None
