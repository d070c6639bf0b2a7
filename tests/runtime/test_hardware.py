"""Probes: recorded CPUs, this machine, and everything that can be missing or broken."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import platform
import stat
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlinear.runtime import hardware
from bitlinear.runtime.hardware import (
    Cpu,
    Driver,
    Gpu,
    Hardware,
    Probe,
    detect,
    parse_proc_cpuinfo,
    parse_sysctl,
)
from tests.runtime.cpu_texts import CPUS, cpu_text, read_cpu
from tests.runtime.stand_ins import libcuda

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# --- Descriptions of CPUs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("haswell", "x86_64 GenuineIntel 6 63 2 Intel(R) Xeon(R) CPU E5-2680 v3 @ 2.50GHz"),
        ("zen2", "x86_64 AuthenticAMD 23 113 0 AMD Ryzen 9 3900XT 12-Core Processor"),
        ("graviton2", "aarch64 0x41 8 0xd0c r0x3p1 Arm 0x41 part 0xd0c"),
        ("raspberry_pi_4", "aarch64 0x41 8 0xd08 r0x0p3 Raspberry Pi 4 Model B Rev 1.1"),
        ("rk3588", "aarch64 0x41 8 0xd05 r0x2p0 Arm 0x41 part 0xd05 and 0x41 part 0xd0b"),
        ("exynos_9810", "aarch64 0x41 8 0xd05 r0x0p1 Arm 0x41 part 0xd05 and 0x53 part 0x002"),
        ("apple_m1", "aarch64 Apple 458787763   Apple M1"),
        ("apple_m2", "aarch64 Apple -634136515   Apple M2"),
        ("intel_mac_haswell", "x86_64 GenuineIntel  70  Intel(R) Core(TM) i7-4980HQ CPU @ 2.80GHz"),
    ],
)
def test_names(name: str, expected: str) -> None:
    cpu = read_cpu(name)
    parts = (cpu.machine, cpu.vendor, cpu.family, cpu.model, cpu.stepping, cpu.brand)
    assert " ".join(parts) == expected


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("sapphire_rapids", "pni avx2 f16c avx_vnni avx512f avx512_vnni amx_int8", "sse4a"),
        ("skylake_x", "avx2 avx512f avx512bw avx512dq avx512vl", "avx512_vnni avx_vnni"),
        ("alder_lake", "avx2 f16c avx_vnni", "avx512f avx512_vnni"),
        ("vm_hides_f16c", "avx avx2 xsave", "f16c fma"),
        ("graviton2", "asimd asimddp asimdhp", "i8mm bf16 sve"),
        ("graviton3", "asimd asimddp i8mm bf16 sve svei8mm", "sve2"),
        ("grace", "asimd asimddp i8mm bf16 sve sve2", "sme"),
        ("raspberry_pi_3", "asimd crc32", "asimddp i8mm atomics"),
        ("raspberry_pi_4", "asimd crc32", "asimddp i8mm atomics"),
        ("raspberry_pi_5", "asimd asimddp asimdhp", "i8mm bf16"),
        ("rk3588", "asimd asimddp asimdhp", "i8mm bf16"),
        ("exynos_9810", "asimd asimdhp", "asimddp"),
        ("big_little_mixed", "asimd crc32", "asimddp asimdhp atomics"),
        # macOS's names are turned into those of Linux.
        ("apple_m1", "asimd asimddp asimdhp asimdfhm asimdrdm atomics crc32", "i8mm bf16"),
        ("apple_m1_macos_11", "asimd asimdfhm atomics crc32", "asimddp i8mm bf16"),
        ("apple_m2", "asimd asimddp i8mm bf16", "sme"),
        ("apple_no_dot_product", "asimd asimdhp asimdfhm", "asimddp i8mm"),
        ("intel_mac_haswell", "pni ssse3 sse4_1 sse4_2 popcnt xsave avx f16c fma avx2", "avx512f"),
    ],
)
def test_flags(name: str, has: str, lacks: str) -> None:
    flags = read_cpu(name).flags
    assert flags is not None
    assert set(has.split()) <= flags
    assert not set(lacks.split()) & flags


@pytest.mark.parametrize("name", [n for n in CPUS if "machdep.cpu" not in cpu_text(n)])
def test_flags_are_those_of_the_recording(name: str) -> None:
    lines = cpu_text(name).splitlines()
    listed = [set(ln.partition(":")[2].split()) for ln in lines if ln.startswith(("flags", "Feat"))]
    assert (read_cpu(name).flags or set()) == set.intersection(*listed)


@pytest.mark.parametrize(
    "text", [cpu_text("empty_flags"), "", "\n", "processor\t: 0\n", "junk\n\n"]
)
def test_no_flags_are_unknown_flags(text: str) -> None:
    cpu = parse_proc_cpuinfo(text, "x86_64")
    assert cpu.flags is None
    assert cpu.reason == "/proc/cpuinfo lists no flags"
    assert parse_sysctl("", "aarch64").flags is None
    assert parse_sysctl("", "aarch64").reason == "sysctl lists no flags"


def test_only_flags_of_all_cores_count() -> None:
    # An Alder Lake with early firmware: AVX-512 on the performance cores alone.
    efficient = cpu_text("alder_lake")
    performance = efficient.replace("avx2", "avx2 avx512f avx512_vnni")
    for text in (efficient + performance, performance + efficient):
        flags = parse_proc_cpuinfo(text, "x86_64").flags
        assert flags == read_cpu("alder_lake").flags
    # big.LITTLE: cores with the dot product beside cores without, in either order.
    assert "asimddp" in cpu_text("big_little_mixed").split("\n\n")[0]
    assert "asimddp" not in cpu_text("big_little_mixed").split("\n\n")[-2]
    common = frozenset(["fp", "asimd", "evtstrm", "crc32", "cpuid"])
    blocks = cpu_text("big_little_mixed").strip().split("\n\n")
    for text in ("\n\n".join(blocks), "\n\n".join(blocks[::-1])):
        assert parse_proc_cpuinfo(text, "aarch64").flags == common
    # One core without any flags leaves nothing that is certain.
    text = cpu_text("zen4") + cpu_text("empty_flags")
    assert parse_proc_cpuinfo(text, "x86_64").flags is None


def test_macos_switches_override_cpuid() -> None:
    text = cpu_text("intel_mac_haswell") + "hw.optional.avx2_0: 0\nhw.optional.f16c: 1\n"
    flags = parse_sysctl(text, "x86_64").flags
    assert flags is not None
    assert "avx2" not in flags
    assert {"avx", "f16c"} <= flags


@pytest.mark.parametrize(
    "name",
    ["hw.optional.neon", "hw.optional.AdvSIMD", "hw.optional.arm.AdvSIMD"],  # as versions have it
)
def test_macos_spellings_of_asimd(name: str) -> None:
    assert parse_sysctl(f"hw.optional.arm64: 1\n{name}: 1\n", "aarch64").flags == {"asimd"}
    assert parse_sysctl(f"hw.optional.arm64: 1\n{name}: 0\n", "aarch64").flags is None


def test_macos_denies_under_any_of_its_names() -> None:
    lines = ["hw.optional.neon: 1", "hw.optional.arm.FEAT_FHM: 0", "hw.optional.armv8_2_fhm: 1"]
    for text in ("\n".join(lines), "\n".join(lines[::-1])):
        assert parse_sysctl(text, "aarch64").flags == {"asimd"}


@given(st.text(max_size=300) | st.lists(st.sampled_from(list("flags:Features\n\t 0")), max_size=60))
def test_parsers_never_raise(text: str | list[str]) -> None:
    text = "".join(text)
    for cpu in (parse_proc_cpuinfo(text, "x86_64"), parse_sysctl(text, "aarch64")):
        assert (cpu.flags is None) == bool(cpu.reason)
        assert cpu.identity


@pytest.mark.parametrize("name", ["zen5", "graviton3", "empty_flags"])
def test_py_cpuinfo_may_be_missing_or_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_cpu(name)
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    assert read_cpu(name) == expected
    monkeypatch.setitem(sys.modules, "cpuinfo", types.SimpleNamespace(cpuinfo=object()))
    assert read_cpu(name) == expected


@pytest.mark.parametrize("name", ["zen5", "graviton3"])
def test_py_cpuinfo_is_asked(name: str) -> None:
    assert hardware._py_cpuinfo(cpu_text(name)) == [read_cpu(name).flags]


def test_py_cpuinfo_is_left_as_it_was() -> None:
    cpuinfo = pytest.importorskip("cpuinfo.cpuinfo")
    before = cpuinfo.DataSource.has_proc_cpuinfo, cpuinfo.DataSource.cat_proc_cpuinfo
    read_cpu("zen4")
    assert (cpuinfo.DataSource.has_proc_cpuinfo, cpuinfo.DataSource.cat_proc_cpuinfo) == before
    if sys.platform == "linux":
        assert (
            "flags" in cpuinfo._get_cpu_info_from_proc_cpuinfo() or platform.machine() != "x86_64"
        )


def test_only_hardware_imports_py_cpuinfo() -> None:
    importers = set()
    for path in Path(hardware.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "cpuinfo" for name in names):
                importers.add(path.name)
    assert importers == {"hardware.py"}


def test_identity() -> None:
    zen4 = read_cpu("zen4")
    same = dataclasses.replace(zen4, brand="another name")
    assert zen4.identity == same.identity
    assert zen4.flags is not None
    assert zen4.identity != dataclasses.replace(zen4, flags=zen4.flags - {"avx2"}).identity
    assert read_cpu("empty_flags").identity == "x86_64-GenuineIntel-6-85-7-unknown"
    assert len({read_cpu(name).identity for name in CPUS}) == len(CPUS)


# --- What torch says of the registers ------------------------------------------------------------

_NAMES = {
    "2.4": ("_is_cpu_support_avx2", "_is_cpu_support_avx512"),
    "newer": ("_is_avx2_supported", "_is_avx512_supported"),
}


def _fail() -> bool:
    raise RuntimeError("no detection")


@pytest.mark.parametrize("names", _NAMES.values(), ids=_NAMES)
@pytest.mark.parametrize(
    ("avx2", "avx512", "kept"),
    [
        (lambda: True, lambda: True, True),
        (lambda: True, lambda: False, False),  # the hypervisor does not enable the registers
        (lambda: False, lambda: False, True),  # torch's detection did not work at all
        (lambda: True, _fail, True),
        (_fail, lambda: False, True),
        (None, lambda: False, True),
        (lambda: True, None, True),
    ],
)
def test_avx512_that_torch_denies_is_not_believed(
    names: tuple[str, str],
    avx2: Callable[[], bool] | None,
    avx512: Callable[[], bool] | None,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*_NAMES["2.4"], *_NAMES["newer"]):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    for name, function in zip(names, (avx2, avx512)):
        if function is not None:
            monkeypatch.setattr(torch.cpu, name, function, raising=False)
    cpu = read_cpu("sapphire_rapids")
    assert cpu.flags is not None
    without = frozenset(flag for flag in cpu.flags if not flag.startswith("avx512"))
    assert {"avx2", "avx_vnni"} <= without
    assert hardware._as_torch_sees(cpu, cpu.flags).flags == (cpu.flags if kept else without)


def test_torch_agrees_on_this_machine() -> None:
    cpu = detect().cpu
    if cpu.machine != "x86_64" or cpu.flags is None:
        pytest.skip("no x86 flags")
    names = [n for n in (_NAMES["newer"][0], _NAMES["2.4"][0]) if hasattr(torch.cpu, n)]
    assert names, "torch has renamed its detection"
    assert getattr(torch.cpu, names[0])() == ("avx2" in cpu.flags)


# --- This machine --------------------------------------------------------------------------------


def test_detect_describes_this_machine() -> None:
    found = detect()
    assert found.system == {"linux": "linux", "darwin": "darwin", "win32": "windows"}[sys.platform]
    assert found.cpu.machine not in ("AMD64", "arm64")
    assert found.python == platform.python_version()
    assert found.torch.version == torch.__version__
    assert found.torch.cuda == torch.version.cuda
    assert found.libc
    assert (found.compiler is None) == bool(found.compiler_reason)
    assert (found.ninja is None) == bool(found.ninja_reason)
    assert (found.nvcc is None) == bool(found.nvcc_reason)
    assert (found.driver is None) == bool(found.driver_reason)
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.python = "4"  # type: ignore[misc]


@linux
def test_flags_of_this_machine_are_those_of_every_core() -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    sets = [set(ln.split(":")[1].split()) for ln in lines if ln.startswith(("flags", "Features"))]
    common = set.intersection(*sets) if sets else set()
    assert (detect().cpu.flags or set()) == common


@linux
def test_unreadable_proc_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_PROC_CPUINFO", str(tmp_path / "missing"))
    cpu = detect(tmp_path).cpu
    assert cpu.flags is None
    assert cpu.reason.startswith(f"{tmp_path}/missing cannot be read: ")


@pytest.mark.parametrize("system", ["windows", "freebsd"])
def test_other_systems_have_unknown_flags(system: str) -> None:
    cpu = hardware._cpu(system, hardware._Memory(None))
    assert cpu.flags is None
    assert cpu.reason == f"CPU flags are not determined on {system}"


@pytest.mark.parametrize(("reported", "name"), [("AMD64", "x86_64"), ("arm64", "aarch64")])
def test_machine_has_one_name(reported: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: reported)
    assert hardware._cpu("windows", hardware._Memory(None)).machine == name


@pytest.mark.parametrize(("value", "reason"), [(None, ""), ("something", "and a reason")])
def test_a_probe_is_a_value_or_a_reason(value: str | None, reason: str) -> None:
    with pytest.raises(ValueError, match="a value or a reason"):
        Probe(value, reason)


# --- Compilers and ninja -------------------------------------------------------------------------


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory on PATH, still empty; nothing else names a compiler."""
    path = tmp_path / "bin"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return path


GCC = "echo 'g++ (Debian) 12.2.0'; echo 'Copyright (C) 2022 Free Software Foundation, Inc.'"
CLANG = "echo 'Debian clang version 14.0.6'"


def test_no_compiler(bin_dir: Path) -> None:
    found = detect()
    assert found.compiler is None
    assert found.compiler_reason == "none of c++, g++, clang++ is on PATH"


@pytest.mark.parametrize(
    ("installed", "expected", "family"),
    [
        ({"c++": GCC, "g++": CLANG, "clang++": CLANG}, "c++", "gcc"),
        ({"g++": GCC, "clang++": CLANG}, "g++", "gcc"),
        ({"clang++": CLANG}, "clang++", "clang"),
        ({"c++": "echo 'Some C++ 1.0'"}, "c++", "unknown"),
    ],
)
def test_compiler_on_path(
    installed: dict[str, str], expected: str, family: str, bin_dir: Path
) -> None:
    for name, text in installed.items():
        program(bin_dir / name, text)
    compiler = detect().compiler
    assert compiler is not None
    assert compiler.path == str(bin_dir / expected)
    assert compiler.family == family
    assert "\n" not in compiler.version


def test_cxx_is_honoured_with_its_arguments(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bin_dir / "g++", "exit 1")
    program(bin_dir / "ccache", 'exec "$@"')
    real = program(bin_dir / "real" / "clang++-14", CLANG)
    (bin_dir / "clang").symlink_to(real)
    monkeypatch.setenv("CXX", "ccache clang --target=x86_64")
    compiler = detect().compiler
    assert compiler is not None
    assert compiler.path == "ccache clang --target=x86_64"
    assert compiler.realpath == str(real)
    assert compiler.version == "Debian clang version 14.0.6"
    assert compiler.family == "clang"


@pytest.mark.parametrize("value", ["missing-compiler", "ccache missing-compiler", "''"])
def test_cxx_that_does_not_exist_is_not_replaced(
    value: str, bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(bin_dir / "g++", GCC)
    program(bin_dir / "ccache", 'exec "$@"')
    monkeypatch.setenv("CXX", value)
    assert detect().compiler_reason == f"CXX={value!r} is not an executable on PATH"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo 'no licence' >&2; exit 3", "--version failed with 3: no licence"),
        ("exit 1", "--version failed with 1: no message"),
        ("exit 0", "--version printed nothing"),
        ("kill -9 $$", "--version failed with -9: no message"),
    ],
)
def test_compiler_that_does_not_work(text: str, reason: str, bin_dir: Path) -> None:
    path = program(bin_dir / "c++", text)
    found = detect()
    assert found.compiler is None
    assert found.compiler_reason == f"{path} {reason}".replace(str(path), "c++")


def test_cxx_with_unbalanced_quotes(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ 'oops")
    assert "cannot be split into words" in detect().compiler_reason


def test_scripts_are_asked_again(bin_dir: Path, tmp_path: Path) -> None:
    # Same name, size and time: the compiler behind a wrapper has changed.
    path = program(bin_dir / "c++", "echo compiler 1")
    status = path.stat()
    assert detect(tmp_path).compiler.version == "compiler 1"  # type: ignore[union-attr]
    program(path, "echo compiler 2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert detect(tmp_path).compiler.version == "compiler 2"  # type: ignore[union-attr]


def test_failures_are_asked_again(bin_dir: Path, tmp_path: Path) -> None:
    path = program(bin_dir / "c++", "exit 1")
    assert detect(tmp_path).compiler is None
    program(path, GCC)
    assert detect(tmp_path).compiler is not None


NVCC = "echo 'nvcc: NVIDIA (R) Cuda compiler driver'; echo 'tools, release 13.0, V13.0.88'"


def toolkit(home: Path) -> Path:
    """What makes a directory a CUDA toolkit; its nvcc."""
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime_api.h").touch()
    return program(home / "bin" / "nvcc", NVCC)


def test_nvcc(bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert detect().nvcc_reason == "not looked for: torch is built without CUDA"
    home = tmp_path / "cuda"
    monkeypatch.setenv("CUDA_HOME", str(home))
    reason = f"no bin/nvcc and include/cuda_runtime_api.h in CUDA_HOME={str(home)!r}"
    assert detect(everything=True).nvcc_reason == reason
    path = str(toolkit(home))
    assert detect().nvcc is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for found in (detect(), detect(everything=True)):
        expected = hardware.Compiler(path, path, "tools, release 13.0, V13.0.88", "nvcc")
        assert found.nvcc == expected
        assert expected.release == "13.0"


def test_nvcc_on_path_and_elsewhere(
    bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> str:
        nvcc = detect(everything=True).nvcc
        return nvcc.path if nvcc else ""

    usual, packages = tmp_path / "usual", tmp_path / "site-packages"
    monkeypatch.setattr(hardware, "_CUDA_HOME", str(usual))
    monkeypatch.setattr(sys, "path", [str(packages)])
    assert detect(everything=True).nvcc_reason.endswith(f"cuda_runtime_api.h in {usual}")
    packaged = str(toolkit(packages / "nvidia" / "cu13"))
    importlib.invalidate_caches()
    assert found() == packaged
    script = program(bin_dir / "nvcc", f"exec {tmp_path}/somewhere/nvcc")
    assert found() == packaged  # the script lies in no toolkit
    assert str(toolkit(usual)) == found()
    script.unlink()
    script.symlink_to(linked := toolkit(tmp_path / "linked"))
    assert found() == str(linked)
    monkeypatch.setenv("PATH", str(toolkit(tmp_path / "on path").parent))
    assert found() == str(tmp_path / "on path" / "bin" / "nvcc")


def test_ninja_of_the_package_is_found_off_path(bin_dir: Path) -> None:
    ninja = pytest.importorskip("ninja")
    found = detect().ninja
    assert found is not None
    assert Path(found).parent == Path(ninja.BIN_DIR)


def test_ninja_on_path_and_beside_python(
    bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    python = tmp_path / "venv" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    found = detect()
    assert found.ninja is None
    assert found.ninja_reason == "the package ninja is not installed, and ninja is not on PATH"
    beside = program(python.parent / "ninja", "echo 1.11")
    assert detect().ninja == str(beside)
    on_path = program(bin_dir / "ninja", "echo 1.11")
    assert detect().ninja == str(on_path)


# --- GPUs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stand_in_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return libcuda(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(stand_in_driver: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hardware]:
    """Detects what a CUDA build of torch would meet beside a driver with these GPUs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(hardware, "_NVIDIA_DRIVER", (str(stand_in_driver),))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(stand_in_driver.parent))

    def detect_with(gpus: str, init: int = 0, cache_dir: Path | None = None) -> Hardware:
        monkeypatch.setenv("STAND_IN_GPUS", gpus)
        monkeypatch.setenv("STAND_IN_INIT", str(init))
        return detect(cache_dir)

    return detect_with


H100, OLD = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 1 << 36), Gpu("Quadro M4000", (5, 2), 1 << 36)


@linux
@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("NVIDIA H100 80GB HBM3:9.0;", (H100,)),
        ("NVIDIA H100 80GB HBM3:9.0;Quadro M4000:5.2;", (H100, OLD)),
        ("Quadro M4000:5.2;NVIDIA H100 80GB HBM3:9.0;", (OLD, H100)),
        ("", ()),
    ],
)
def test_gpus(text: str, gpus: tuple[Gpu, ...], driver: Callable[..., Hardware]) -> None:
    found = driver(text)
    assert found.driver == Driver("13.2", gpus)
    assert found.driver_reason == ""


@linux
def test_a_driver_that_shows_no_gpu_is_an_answer(driver: Callable[..., Hardware]) -> None:
    """As with CUDA_VISIBLE_DEVICES="" on a machine with GPUs."""
    assert driver("NVIDIA H100:9.0;", init=100).driver == Driver("13.2", ())


@linux
@pytest.mark.parametrize(
    ("init", "reason"),
    [
        (999, "the NVIDIA driver does not answer: cuInit: unknown error (999)"),
        (-1, "gpu_probe.py failed with -6: no message"),
    ],
)
def test_a_driver_that_fails_has_a_reason_and_is_asked_again(
    init: int, reason: str, driver: Callable[..., Hardware], tmp_path: Path
) -> None:
    for _ in range(2):
        found = driver("NVIDIA H100:9.0;", init, tmp_path)
        assert found.driver is None
        assert found.driver_reason.endswith(reason)
    assert driver("NVIDIA H100:9.0;", 0, tmp_path).driver is not None


@linux
def test_no_driver(
    driver: Callable[..., Hardware], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "")
    assert "no Python interpreter" in driver("").driver_reason
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(hardware, "_NVIDIA_DRIVER", (str(tmp_path),))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    (tmp_path / "libcuda.so.1").touch()
    assert "does not answer: " in detect().driver_reason
    monkeypatch.setattr(hardware, "_NVIDIA_DRIVER", (str(tmp_path / "missing"),))
    assert detect().driver_reason == "no NVIDIA driver is loaded"
    monkeypatch.setattr(torch.version, "cuda", None)  # of ROCm's builds, too
    assert detect().driver_reason == "not looked for: torch is built without CUDA"


@linux
def test_the_drivers_answer_is_remembered(
    driver: Callable[..., Hardware], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    ask = hardware._ask_driver
    monkeypatch.setattr(hardware, "_ask_driver", lambda: asked.append(1) or ask())

    def count(gpus: str = "NVIDIA H100 80GB HBM3:9.0;") -> int:
        assert driver(gpus, 0, tmp_path).driver is not None
        return len(asked)

    assert [count(), count()] == [1, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [count(""), count("")] == [2, 2]  # that there is none is remembered as well
    real = hardware._read
    change = {"/boot_id": 3, "nvidia/version": 4}  # and with them the number of questions
    for part, expected in change.items():
        monkeypatch.setattr(
            hardware,
            "_read",
            lambda path, part=part: Probe("new") if path.endswith(part) else real(path),
        )
        assert [count(), count()] == [expected, expected]


# --- What is remembered --------------------------------------------------------------------------


def remembered(directory: Path) -> Path:
    return directory / "hardware.json"


@linux
def test_second_detection_needs_no_py_cpuinfo(tmp_path: Path) -> None:
    script = (
        "import sys; from bitlinear.runtime import hardware; "
        "sys.modules['cpuinfo'] = None; hardware._output = None; "
        "print(hardware._linux_cpu(sys.argv[2], hardware._Memory(sys.argv[1])).identity)"
    )
    cpu = detect(tmp_path).cpu
    assert cpu.flags
    command = [sys.executable, "-c", script, str(tmp_path), cpu.machine]
    environment = {**os.environ, "BITLINEAR_BUILD": "off", "BITLINEAR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == cpu.identity


def test_remembered_answers_equal_new_ones(tmp_path: Path) -> None:
    new = detect()
    assert detect(tmp_path) == new
    assert remembered(tmp_path).is_file()
    assert detect(tmp_path) == new
    assert [path.name for path in tmp_path.iterdir()] == ["hardware.json"]
    assert stat.S_IMODE(remembered(tmp_path).stat().st_mode) == 0o600


def _with_every_answer(change: Callable[[object], object]) -> Callable[[str], str]:
    return lambda text: json.dumps({key: change(v) for key, v in json.loads(text).items()})


def _of_the_cpu(**changes: object) -> Callable[[object], object]:
    return lambda answer: {**answer, **changes} if isinstance(answer, dict) else answer


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\0" * 100,
        lambda text: "[]",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: '{"a": 1e999999, "b": NaN}',
        _with_every_answer(lambda answer: None),
        _with_every_answer(lambda answer: 7),
        _with_every_answer(lambda answer: []),
        _with_every_answer(lambda answer: {}),
        _with_every_answer(_of_the_cpu(flags=["avx2"])),
        _with_every_answer(_of_the_cpu(flags="")),
        _with_every_answer(_of_the_cpu(flags=None)),
        _with_every_answer(_of_the_cpu(brand=7)),
        _with_every_answer(_of_the_cpu(surprise="")),
    ],
)
def test_damaged_memory_is_replaced(damage: Callable[[str], str], tmp_path: Path) -> None:
    new = detect(tmp_path)
    sound = json.loads(remembered(tmp_path).read_text(encoding="utf-8"))
    damaged = damage(remembered(tmp_path).read_text(encoding="utf-8"))
    remembered(tmp_path).write_text(damaged, encoding="utf-8")
    assert detect(tmp_path) == new
    repaired = json.loads(remembered(tmp_path).read_text(encoding="utf-8"))
    assert {key: repaired[key] for key in sound} == sound


def test_binary_memory(tmp_path: Path) -> None:
    remembered(tmp_path).write_bytes(b"\xff\xfe\x00junk")
    assert detect(tmp_path) == detect()


@pytest.mark.parametrize("kind", ["missing", "a file", "memory is a directory"])
def test_memory_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    if kind == "a file":
        directory.write_text("")
    if kind == "memory is a directory":
        remembered(directory).mkdir(parents=True)
    assert detect(directory) == detect()
    left = [path.name for path in tmp_path.rglob("*")]
    assert not [name for name in left if name.startswith(".hardware-")]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert detect(tmp_path) == detect()
    finally:
        tmp_path.chmod(0o700)


@linux
def test_another_cpu_or_boot_is_probed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "_PROC_CPUINFO", str(source))
    parsed = []

    def parse(text: str, machine: str) -> Cpu:
        parsed.append(text)
        return parse_proc_cpuinfo(text, machine)

    monkeypatch.setattr(hardware, "parse_proc_cpuinfo", parse)

    def probe(text: str) -> Cpu:
        source.write_text(text, encoding="utf-8")
        memory = hardware._Memory(tmp_path)
        cpu = hardware._linux_cpu("x86_64", memory)
        memory.save()
        return cpu

    zen4, zen5 = cpu_text("zen4"), cpu_text("zen5")
    assert probe(zen4) == read_cpu("zen4")
    assert probe(f"cpu MHz\t: 1234.5\n{zen4}") == read_cpu("zen4")
    assert len(parsed) == 1, "the clock is not part of what a CPU is"
    assert probe(zen5) == read_cpu("zen5")
    assert len(parsed) == 2
    assert probe(zen4) == read_cpu("zen4")
    assert len(parsed) == 2, "both are remembered"

    real = hardware._read

    def pretend(part: str, answer: Probe[str]) -> None:
        monkeypatch.setattr(
            hardware, "_read", lambda path: answer if path.endswith(part) else real(path)
        )

    pretend("/boot_id", Probe("another"))
    assert probe(zen4) == read_cpu("zen4")
    assert len(parsed) == 3
    pretend("/cpu/online", Probe("0-63,65"))  # a core that may be of another kind was switched on
    assert probe(zen4) == read_cpu("zen4")
    assert len(parsed) == 4
    pretend("/boot_id", Probe(reason="not there"))
    for count in (5, 6):
        assert probe(zen4) == read_cpu("zen4")
        assert len(parsed) == count, "without the name of the boot nothing is remembered"


def test_memory_is_bounded(tmp_path: Path) -> None:
    for number in range(100):
        memory = hardware._Memory(tmp_path)
        memory.recall(str(number), lambda n=number: Probe(str(n)), hardware._text)  # type: ignore[misc]
        memory.save()
    answers = json.loads(remembered(tmp_path).read_text(encoding="utf-8"))
    assert list(answers.values()) == [str(n) for n in range(100)][-hardware._Memory.LIMIT :]


def test_many_at_once(tmp_path: Path) -> None:
    new = detect(tmp_path)

    def again(_: int) -> Hardware:
        remembered(tmp_path).write_bytes(b"")  # so that every one of them writes
        return detect(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        assert all(found == new for found in pool.map(again, range(40)))
    assert [path.name for path in tmp_path.iterdir()] == ["hardware.json"]
