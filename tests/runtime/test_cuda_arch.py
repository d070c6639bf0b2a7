"""Which architecture each GPU gets, by toolkit and by TORCH_CUDA_ARCH_LIST."""

from __future__ import annotations

import pytest

from bitlinear.kernels import CUDA, CudaLibrary
from bitlinear.runtime.cuda_arch import parse_architectures, runs_on, targets, toolkit
from bitlinear.runtime.gpus import Driver, Gpu
from bitlinear.runtime.rejection import SettingError
from tests.runtime.machines import machine, read_cpu


def compiled(capabilities: str, nvcc: str, listed: str = "") -> str:
    """The architectures for GPUs of these capabilities, "-" for none."""
    pairs = (map(int, text.split(".")) for text in capabilities.split())
    gpus = tuple(Gpu("a GPU", (major, minor), 1) for major, minor in pairs)
    hardware = machine(read_cpu("zen4"), nvcc, Driver(nvcc, gpus), nvcc)
    found = targets(hardware, listed)
    assert [target.gpu for target in found] == list(gpus)
    for target in found:
        assert bool(target.architecture) != bool(target.rejection)
    return " ".join(target.architecture or "-" for target in found)


@pytest.mark.parametrize(
    ("nvcc", "capabilities", "expected"),
    [
        ("11.8", "5.2 6.0 6.1 7.0 7.5 8.0 8.6 8.9", "- - sm_61 sm_70 sm_75 sm_80 sm_86 sm_89"),
        ("11.8", "9.0 12.0", "compute_89 compute_89"),  # 90a came with 12.0
        ("12.4", "6.1 7.0 8.9 9.0", "sm_61 sm_70 sm_89 sm_90a"),
        ("12.4", "10.0 12.0", "compute_90 compute_90"),  # not of 90a, which only 9.0 runs
        ("12.8", "9.0 10.0 12.0 12.1", "sm_90a sm_100 sm_120 compute_120"),
        ("12.9", "10.3 12.1", "sm_103 sm_121"),
        ("13.0", "6.1 7.0 7.2", "- - -"),
        ("13.0", "7.5 8.7 9.0 10.0 11.0 12.1", "sm_75 sm_87 sm_90a sm_100 sm_110 sm_121"),
        ("13.0", "13.0", "compute_121"),
        ("14.2", "7.5 9.0", "sm_75 sm_90a"),  # what comes is taken to be as 13.0, till it is known
        ("10.2", "7.5 9.0", "sm_75 compute_80"),
    ],
)
def test_what_the_toolkit_knows(nvcc: str, capabilities: str, expected: str) -> None:
    assert compiled(capabilities, nvcc) == expected
    assert compiled(capabilities, nvcc, "native") == expected


@pytest.mark.parametrize(
    ("listed", "capabilities", "expected"),
    [
        ("8.0;9.0a;8.6+PTX", "8.0 8.6 9.0", "sm_80 sm_86 sm_90a"),
        ("8.0;9.0a;8.6+PTX", "8.9 10.0 7.5", "sm_86 compute_86 -"),
        ("9.0", "9.0 10.0", "sm_90a -"),  # no other GPU would run plain 9.0
        ("9.0+PTX", "9.0 10.0", "sm_90a compute_90"),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "9.0 12.1", "sm_90a sm_120"),  # NVIDIA's containers
        ("8.0", "9.0", "-"),  # machine code is for one major version
        ("8.6", "8.0", "-"),
        ("5.2+PTX", "5.2 8.0", "- compute_52"),
        ("12.0f", "12.0", "sm_120"),
        ("Ampere", "8.0", "-"),
        ("nonsense;;8.x", "8.0", "-"),
    ],
)
def test_what_the_list_allows(listed: str, capabilities: str, expected: str) -> None:
    assert compiled(capabilities, "13.0", listed) == expected


def test_nothing_to_compile_for() -> None:
    cpu = read_cpu("zen4")
    driver = Driver("13.0", (Gpu("a GPU", (9, 0), 1),))
    assert targets(machine(cpu, "13.0", None)) == []
    assert targets(machine(cpu, None, driver)) == []
    assert toolkit(machine(cpu, None, driver, "13.0")) == ""


@pytest.mark.parametrize(
    ("torch", "nvcc", "expected"),
    [("13.0", "", "13.0"), ("13.0", "13.1", "13.1"), ("13.0", "12.8", "13.0")],
)
def test_the_toolkit_is_that_of_torch_where_nvcc_does_not_fit(
    torch: str, nvcc: str, expected: str
) -> None:
    assert toolkit(machine(read_cpu("zen4"), torch, None, nvcc)) == expected


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("8.0", "sm_80"),
        ("9.0", "sm_90a"),
        ("8.0,9.0a", "sm_80 sm_90a"),
        (" 8.0; 9.0  8.0,9.0a ", "sm_80 sm_90a"),
        ("9.0a+PTX", "sm_90a compute_90"),
        ("6.1 12.1f", "sm_61 sm_121"),
    ],
)
def test_architectures_to_compile_for_another_machine(listed: str, expected: str) -> None:
    assert " ".join(parse_architectures(listed)) == expected


@pytest.mark.parametrize(
    "listed", ["", " , ;", "Ampere", "8", "8.x", "8.0,nonsense", "6.0", "sm_80"]
)
def test_what_is_no_architecture(listed: str) -> None:
    with pytest.raises(SettingError):
        parse_architectures(listed)


@pytest.mark.parametrize(
    ("architecture", "on"),
    [
        ("sm_80", "sm_80 sm_86 sm_89"),
        ("sm_86", "sm_86 sm_89"),
        ("sm_90a", "sm_90a"),
        ("sm_100", "sm_100 sm_103"),
        ("sm_120", "sm_120 sm_121"),
        ("compute_80", "sm_80 sm_86 sm_89 sm_90a sm_100 sm_103 sm_120 sm_121"),
        ("compute_90", "sm_90a sm_100 sm_103 sm_120 sm_121"),
        ("compute_121", "sm_121"),
    ],
)
def test_which_gpus_run_it(architecture: str, on: str) -> None:
    every = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_103", "sm_120", "sm_121")
    assert [other for other in every if runs_on(architecture, other)] == on.split()


def test_flags_of_nvcc() -> None:
    library = CudaLibrary("cuda", (), (), (), ("-O3",), ("compute_90", "sm_90a"))
    assert library.nvcc_flags == (
        "-O3",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_90a,code=sm_90a",
    )
    assert "--fmad=false" in CUDA.cuda_cflags  # the numerics ask for two roundings
