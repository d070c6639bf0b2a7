"""The flags of recorded CPUs and of this one, and what py-cpuinfo and torch say of them."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlinear.runtime import cpu as cpu_module
from bitlinear.runtime.cpu import (
    Cpu,
    describe_windows_cpu,
    parse_proc_cpuinfo,
    parse_sysctl,
    probe_cpu,
    without_disabled_avx512,
)
from bitlinear.runtime.hardware import detect
from bitlinear.runtime.probe_cache import ProbeCache
from bitlinear.runtime.rejection import Probe, rejected
from bitlinear.runtime.verdicts import select
from tests.runtime.machines import CPUS, cpu_text, machine, read_cpu

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


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
        # macOS's names become Linux's.
        ("apple_m1", "asimd asimddp asimdhp asimdfhm asimdrdm atomics crc32", "i8mm bf16"),
        ("apple_m1_macos_11", "asimd asimdfhm atomics crc32", "asimddp i8mm bf16"),
        ("apple_m2", "asimd asimddp i8mm bf16", "sme"),
        ("apple_no_dot_product", "asimd asimdhp asimdfhm", "asimddp i8mm"),
        ("intel_mac_haswell", "pni ssse3 sse4_1 sse4_2 popcnt xsave avx f16c fma avx2", "avx512f"),
    ],
)
def test_flags(name: str, has: str, lacks: str) -> None:
    flags = read_cpu(name).flags.value
    assert flags is not None
    assert set(has.split()) <= flags
    assert not set(lacks.split()) & flags


@pytest.mark.parametrize("name", [n for n in CPUS if "machdep.cpu" not in cpu_text(n)])
def test_flags_are_those_of_the_recording(name: str) -> None:
    lines = cpu_text(name).splitlines()
    listed = [set(ln.partition(":")[2].split()) for ln in lines if ln.startswith(("flags", "Feat"))]
    assert (read_cpu(name).flags.value or set()) == set.intersection(*listed)


@pytest.mark.parametrize(
    "text", [cpu_text("empty_flags"), "", "\n", "processor\t: 0\n", "junk\n\n"]
)
def test_no_flags_are_unknown_flags(text: str) -> None:
    cpu = parse_proc_cpuinfo(text, "x86_64")
    assert cpu.flags == rejected("cpu-flag", "/proc/cpuinfo lists no flags")
    assert parse_sysctl("", "aarch64").flags == rejected("cpu-flag", "sysctl lists no flags")


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
        assert parse_proc_cpuinfo(text, "aarch64").flags.value == common
    # One core without any flags leaves nothing that is certain.
    text = cpu_text("zen4") + cpu_text("empty_flags")
    assert parse_proc_cpuinfo(text, "x86_64").flags.value is None


def test_macos_switches_override_cpuid() -> None:
    text = cpu_text("intel_mac_haswell") + "hw.optional.avx2_0: 0\nhw.optional.f16c: 1\n"
    flags = parse_sysctl(text, "x86_64").flags.value
    assert flags is not None
    assert "avx2" not in flags
    assert {"avx", "f16c"} <= flags


@pytest.mark.parametrize(
    "name",
    ["hw.optional.neon", "hw.optional.AdvSIMD", "hw.optional.arm.AdvSIMD"],  # as versions have it
)
def test_macos_spellings_of_asimd(name: str) -> None:
    assert parse_sysctl(f"hw.optional.arm64: 1\n{name}: 1\n", "aarch64").flags.value == {"asimd"}
    assert parse_sysctl(f"hw.optional.arm64: 1\n{name}: 0\n", "aarch64").flags.value is None


def test_macos_denies_under_any_of_its_names() -> None:
    lines = ["hw.optional.neon: 1", "hw.optional.arm.FEAT_FHM: 0", "hw.optional.armv8_2_fhm: 1"]
    for text in ("\n".join(lines), "\n".join(lines[::-1])):
        assert parse_sysctl(text, "aarch64").flags.value == {"asimd"}


@given(st.text(max_size=300) | st.lists(st.sampled_from(list("flags:Features\n\t 0")), max_size=60))
def test_parsers_never_raise(text: str | list[str]) -> None:
    text = "".join(text)
    for cpu in (parse_proc_cpuinfo(text, "x86_64"), parse_sysctl(text, "aarch64")):
        assert cpu.flags.value != frozenset()
        assert cpu.identity


def test_identity() -> None:
    zen4 = read_cpu("zen4")
    same = dataclasses.replace(zen4, brand="another name")
    assert zen4.identity == same.identity
    assert zen4.flags.value is not None
    fewer = dataclasses.replace(zen4, flags=Probe(zen4.flags.value - {"avx2"}))
    assert zen4.identity != fewer.identity
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
    flags = read_cpu("sapphire_rapids").flags.value
    assert flags is not None
    without = frozenset(flag for flag in flags if not flag.startswith("avx512"))
    assert {"avx2", "avx_vnni"} <= without
    assert without_disabled_avx512(flags) == (flags if kept else without)


def test_torch_agrees_on_this_machine() -> None:
    cpu = detect().cpu
    if cpu.machine != "x86_64" or cpu.flags.value is None:
        pytest.skip("no x86 flags")
    names = [n for n in (_NAMES["newer"][0], _NAMES["2.4"][0]) if hasattr(torch.cpu, n)]
    assert names, "torch has renamed its detection"
    assert getattr(torch.cpu, names[0])() == ("avx2" in cpu.flags.value)


# --- This machine --------------------------------------------------------------------------------


@linux
def test_flags_of_this_machine_are_those_of_every_core() -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    sets = [set(ln.split(":")[1].split()) for ln in lines if ln.startswith(("flags", "Features"))]
    common = set.intersection(*sets) if sets else set()
    assert (detect().cpu.flags.value or set()) == common


@linux
def test_unreadable_proc_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_module, "_PROC_CPUINFO", str(tmp_path / "missing"))
    cpu = detect(tmp_path).cpu
    assert cpu.flags.value is None
    assert cpu.flags.reason.startswith(f"{tmp_path}/missing cannot be read: ")


@pytest.mark.parametrize(
    ("system", "machine"), [("windows", "ARM64"), ("freebsd", "amd64"), ("freebsd", "arm64")]
)
def test_other_systems_have_unknown_flags(
    system: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    cpu = probe_cpu(system, ProbeCache(None))
    assert cpu.flags == rejected("cpu-flag", f"CPU flags are not determined on {system}")


@pytest.mark.parametrize(("reported", "name"), [("AMD64", "x86_64"), ("arm64", "aarch64")])
def test_machine_has_one_name(reported: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: reported)
    assert probe_cpu("freebsd", ProbeCache(None)).machine == name


# --- Windows -------------------------------------------------------------------------------------

IDENTIFIER = "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel"
AVX2, AVX512 = 40, 41  # of IsProcessorFeaturePresent
# As py-cpuinfo spells the flags that it finds with CPUID: AVX-VNNI and AMX are missing.
SSE = frozenset(["pni", "ssse3", "sse4_1", "sse4_2", "popcnt", "xsave", "osxsave"])
AVX = SSE | {"avx", "avx2", "f16c", "fma", "vaes"}
CPUID = AVX | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"}


@pytest.mark.parametrize(
    ("granted", "flags", "kernel"),
    [
        ({AVX2, AVX512}, (CPUID - {"avx512vnni"}) | {"avx512_vnni"}, "avx512_vnni"),
        ({AVX2}, AVX, "avx2"),
        ({AVX512}, SSE, "scalar"),
        (set(), SSE, "scalar"),
    ],
)
def test_windows_has_no_flag_that_the_system_does_not_grant(
    granted: set[int],
    flags: frozenset[str],
    kernel: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = json.dumps({"flags": sorted(CPUID)})
    calls = py_cpuinfo(tmp_path, monkeypatch, f"return {answer!r}")
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", IDENTIFIER)
    monkeypatch.setattr(cpu_module, "_windows_grants", granted.__contains__)
    monkeypatch.setattr(cpu_module, "without_disabled_avx512", lambda flags: flags)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for _ in range(2):
        probes = ProbeCache(cache)
        cpu = probe_cpu("windows", probes)
        probes.save()
        assert cpu.flags.value == flags
        parts = (cpu.machine, cpu.vendor, cpu.family, cpu.model, cpu.stepping, cpu.brand)
        assert parts == ("x86_64", "GenuineIntel", "6", "143", "8", IDENTIFIER)
        verdicts = select(machine(cpu))
        assert [verdict.variant for verdict in verdicts if verdict.status == "chosen"] == [kernel]
    assert calls.read_text() == "x", "the answer is remembered"


def test_windows_asks_torch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    py_cpuinfo(tmp_path, monkeypatch, f"return {json.dumps({'flags': sorted(CPUID)})!r}")
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(cpu_module, "_windows_grants", {AVX2, AVX512}.__contains__)
    for name in (*_NAMES["2.4"], *_NAMES["newer"]):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: "avx2" in name, raising=False)
    flags = probe_cpu("windows", ProbeCache(None)).flags.value
    assert flags is not None
    assert "avx2" in flags
    assert "avx512f" not in flags


@pytest.mark.parametrize("body", ["return '{}'", "raise RuntimeError"])
def test_windows_without_an_answer_of_py_cpuinfo(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    py_cpuinfo(tmp_path, monkeypatch, body)
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    cpu = probe_cpu("windows", ProbeCache(None))
    assert cpu.flags.value is None
    assert "py-cpuinfo finds no flags" in cpu.flags.reason or "failed with 1" in cpu.flags.reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert probe_cpu("windows", ProbeCache(None)).flags == rejected(
        "cpu-flag", "py-cpuinfo is not installed"
    )
    assert describe_windows_cpu("", "x86_64", frozenset(), {AVX2}).flags == rejected(
        "cpu-flag", "py-cpuinfo lists no flags"
    )


# --- py-cpuinfo ----------------------------------------------------------------------------------


@pytest.fixture
def haswell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], frozenset[str]]:
    """The flags that a process finds on a Haswell: a new process at each call, with one cache."""
    source, cache = tmp_path / "cpuinfo.txt", tmp_path / "cache"
    source.write_text(cpu_text("haswell"), encoding="utf-8")
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(cpu_module, "_PROC_CPUINFO", str(source))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    def flags() -> frozenset[str]:
        probes = ProbeCache(cache)
        found = probe_cpu("linux", probes).flags.value
        probes.save()
        assert found is not None
        return found

    return flags


def py_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """Install a stand-in of py-cpuinfo; the file that counts its calls."""
    package, calls = tmp_path / "packages" / "cpuinfo", tmp_path / "calls"
    package.mkdir(parents=True, exist_ok=True)
    source = f"""
def get_cpu_info_json():
    with open({str(calls)!r}, "a") as file:
        file.write("x")
    {body}
"""
    (package / "__init__.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "cpuinfo", raising=False)
    calls.touch()
    return calls


HASWELL = read_cpu("haswell").flags.value
assert HASWELL is not None


@linux
def test_flags_are_those_of_py_cpuinfo_that_linux_enables(
    haswell: Callable[[], frozenset[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = json.dumps({"flags": ["avx512f", "avx2", "f16c"]})
    calls = py_cpuinfo(tmp_path, monkeypatch, f"return {answer!r}")
    assert haswell() == {"avx2", "f16c"}
    assert haswell() == {"avx2", "f16c"}
    assert calls.read_text() == "x", "the answer is remembered"
    real = cpu_module.boot_id
    monkeypatch.setattr(cpu_module, "boot_id", lambda: "another" + real())
    assert haswell() == {"avx2", "f16c"}
    assert calls.read_text() == "x", "a boot does not change the model of the CPU"
    answer = json.dumps({"flags": ["pni"], "of": "another version"})
    py_cpuinfo(tmp_path, monkeypatch, f"return {answer!r}")
    assert haswell() == {"pni"}
    assert calls.read_text() == "xx"


@linux
@pytest.mark.parametrize(
    "body",
    [
        "return '{}'",  # its own child failed
        "return '{\"flags\": []}'",
        "return 'junk'",
        "raise RuntimeError",
        "import os; os.abort()",
        'import time; time.sleep(20); return \'{"flags": ["pni"]}\'',  # nobody waits for it
    ],
)
def test_proc_cpuinfo_alone_serves_if_py_cpuinfo_fails(
    body: str,
    haswell: Callable[[], frozenset[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_module, "_PY_CPUINFO_SECONDS", 1.0 if "sleep" in body else 20.0)
    calls = py_cpuinfo(tmp_path, monkeypatch, body)
    assert haswell() == HASWELL
    assert haswell() == HASWELL
    if "sleep" not in body:
        assert calls.read_text() == "xx", "a failure is not remembered"


@linux
def test_proc_cpuinfo_alone_serves_without_py_cpuinfo(
    haswell: Callable[[], frozenset[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    assert haswell() == HASWELL
    monkeypatch.delitem(sys.modules, "cpuinfo")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert haswell() == HASWELL


@linux
def test_py_cpuinfo_is_not_asked_if_its_answer_would_be_lost(
    haswell: Callable[[], frozenset[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = py_cpuinfo(tmp_path, monkeypatch, "return '{}'")
    assert probe_cpu("linux", ProbeCache(None)).flags.value == HASWELL
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a read-only cache
    assert haswell() == HASWELL
    assert calls.read_text() == ""


@linux
def test_py_cpuinfo_itself_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("cpuinfo")
    if spec is None:
        pytest.skip("py-cpuinfo is not installed")
    asked = []
    ask = cpu_module._ask_py_cpuinfo

    def note(package: str) -> str:
        asked.append(ask(package))
        return asked[-1]

    monkeypatch.setattr(cpu_module, "_ask_py_cpuinfo", note)
    with_it, alone = detect(tmp_path).cpu, detect().cpu
    assert with_it == alone
    assert with_it.flags.value is None or with_it.flags.value <= set(asked[0].split())


@pytest.mark.skipif(sys.platform != "linux", reason="py-cpuinfo reads /proc/cpuinfo there")
@pytest.mark.parametrize("has_cat", [True, False])
def test_py_cpuinfo_is_asked_only_if_it_can_read(
    has_cat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the command cat it guesses, and denies features that the CPU has."""
    monkeypatch.setenv("PATH", "/nonexistent")
    if not has_cat:
        probe = tmp_path / "probe.py"
        text = cpu_module._PY_CPUINFO.read_text().replace("os.defpath", "'/nonexistent'")
        probe.write_text(text)
        monkeypatch.setattr(cpu_module, "_PY_CPUINFO", probe)
    with_it, alone = detect(tmp_path).cpu, detect().cpu
    assert with_it == alone
    assert ("py-cpuinfo" in (tmp_path / "hardware.json").read_text()) == has_cat


def test_no_module_imports_py_cpuinfo() -> None:
    importers = set()
    for path in Path(cpu_module.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "cpuinfo" for name in names):
                importers.add(path.name)
    assert importers == {"py_cpuinfo_probe.py"}, "it starts processes when it is imported"


# --- Between processes ---------------------------------------------------------------------------


@linux
def test_the_second_detection_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = detect(tmp_path).cpu
    assert first.flags.value

    def refuse(*arguments: object, **options: object) -> str:
        raise AssertionError(arguments)

    monkeypatch.setattr(cpu_module, "command_output", refuse)
    monkeypatch.setattr(cpu_module, "parse_proc_cpuinfo", refuse)
    assert probe_cpu("linux", ProbeCache(tmp_path)) == first


@linux
def test_another_cpu_or_boot_is_probed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu_module, "_PROC_CPUINFO", str(source))
    parsed = []

    def parse(text: str, machine: str) -> Cpu:
        parsed.append(text)
        return parse_proc_cpuinfo(text, machine)

    monkeypatch.setattr(cpu_module, "parse_proc_cpuinfo", parse)
    monkeypatch.setattr(cpu_module, "without_disabled_avx512", lambda flags: flags)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setitem(sys.modules, "cpuinfo", None)

    def probe(text: str) -> Cpu:
        source.write_text(text, encoding="utf-8")
        probes = ProbeCache(tmp_path)
        cpu = probe_cpu("linux", probes)
        probes.save()
        return cpu

    zen4, zen5 = cpu_text("zen4"), cpu_text("zen5")
    assert probe(zen4) == read_cpu("zen4")
    assert probe(f"cpu MHz\t: 1234.5\n{zen4}") == read_cpu("zen4")
    assert len(parsed) == 1, "the clock is not part of what a CPU is"
    assert probe(zen5) == read_cpu("zen5")
    assert len(parsed) == 2
    assert probe(zen4) == read_cpu("zen4")
    assert len(parsed) == 2, "both are remembered"

    monkeypatch.setattr(cpu_module, "boot_id", lambda: "another")
    assert probe(zen4) == read_cpu("zen4")
    assert len(parsed) == 3
    # A core that may be of another kind was switched on.
    monkeypatch.setattr(cpu_module, "file_text", lambda path: "0-63,65")
    assert probe(zen4) == read_cpu("zen4")
    assert len(parsed) == 4
    monkeypatch.setattr(cpu_module, "boot_id", lambda: "")
    for count in (5, 6):
        assert probe(zen4) == read_cpu("zen4")
        assert len(parsed) == count, "without the name of the boot nothing is remembered"
