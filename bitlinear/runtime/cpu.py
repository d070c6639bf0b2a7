"""The CPU of this machine, and which of its features every core has and the system enables."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile
from pathlib import Path
from typing import Any

from .probe_cache import ProbeCache, decode_text, file_version
from .rejection import Probe, rejected
from .system import ProbeError, boot_id, command_output, file_text

Flags = frozenset[str]

_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
_PROC_CPUINFO = "/proc/cpuinfo"

# Lines of /proc/cpuinfo that stay the same from one read to the next, and tell CPUs apart.
_STABLE = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features",
)  # fmt: skip

# macOS's names: CPUID features under machdep.cpu, switches under hw.optional.
_FROM_SYSCTL = {
    "avx1.0": "avx", "avx1_0": "avx", "avx2_0": "avx2", "sse3": "pni", "sse4.1": "sse4_1",
    "sse4.2": "sse4_2", "avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni",
    "advsimd": "asimd", "neon": "asimd", "feat_dotprod": "asimddp", "feat_i8mm": "i8mm",
    "feat_bf16": "bf16", "feat_fp16": "asimdhp", "feat_fhm": "asimdfhm", "feat_rdm": "asimdrdm",
    "feat_lse": "atomics", "feat_crc32": "crc32", "armv8_crc32": "crc32",
    "armv8_1_atomics": "atomics", "armv8_2_fhm": "asimdfhm",
}  # fmt: skip

# Windows' numbers of features that it grants, and py-cpuinfo's spellings that are not Linux's.
_PF_AVX2_INSTRUCTIONS_AVAILABLE = 40
_PF_AVX512F_INSTRUCTIONS_AVAILABLE = 41
_FROM_CPUID = {"avx512vnni": "avx512_vnni"}
_NEED_AVX = frozenset({"f16c", "fma", "fma4", "xop", "vaes", "vpclmulqdq"})

_PY_CPUINFO_SECONDS = 20.0  # it takes 1.2 s on an idle machine
_PY_CPUINFO = Path(__file__).with_name("py_cpuinfo_probe.py")


@dataclass(frozen=True)
class Cpu:
    """A CPU as every one of its cores can be used.

    Attributes:
        machine: ``"x86_64"``, ``"aarch64"``, or the system's name for any other architecture.
        brand: The name for people, such as ``"AMD EPYC 9R14"``.
        vendor, family, model, stepping: As the system prints them; empty if it does not.
        flags: Features in the spelling of Linux that the operating system has enabled on all cores.
            A rejection means that they are unknown, which is not "has none".
    """

    machine: str
    brand: str
    vendor: str
    family: str
    model: str
    stepping: str
    flags: Probe[Flags]

    @property
    def identity(self) -> str:
        """A short text for cache keys, equal on CPUs that compiled code cannot tell apart."""
        flags = "unknown"
        if self.flags.value is not None:
            flags = hashlib.sha256(" ".join(sorted(self.flags.value)).encode()).hexdigest()[:12]
        return "-".join((self.machine, self.vendor, self.family, self.model, self.stepping, flags))


def probe_cpu(system: str, cache: ProbeCache) -> Cpu:
    """Describe the CPU of this machine.

    py-cpuinfo is the source of the flags, with what the system says of them:

    - **Linux**: the flags of py-cpuinfo that ``/proc/cpuinfo`` lists for every core. py-cpuinfo
      reads one core and adds the flags of CPUID, which a hypervisor or the kernel may not have
      enabled. It takes more than a second, so it is asked once for each model of CPU and
      its answer is remembered. ``/proc/cpuinfo`` alone serves if py-cpuinfo is missing, fails
      or finds no flags, and if its answer could not be remembered (a read-only cache).
    - **macOS**: ``sysctl`` alone. py-cpuinfo reads the same lines except ``hw.optional``, so it
      finds no flags of Apple silicon, and spells the others as macOS does.
    - **Windows** on x86: the flags of py-cpuinfo that Windows grants. py-cpuinfo reads CPUID there,
      which does not say what the system has enabled, and ``IsProcessorFeaturePresent`` does, for
      AVX2 and AVX-512. py-cpuinfo does not know AVX-VNNI and AMX, so their kernels never run.
    - Others: unknown.

    On x86, AVX-512 also needs the consent of torch (:func:`without_disabled_avx512`).
    """
    machine = _MACHINES.get(platform.machine().lower(), platform.machine())
    if system == "linux":
        cpu = _linux_cpu(machine, cache)
    elif system == "darwin":
        try:
            # By its full path: /usr/sbin is often missing from the PATH of services.
            text = command_output(
                ["/usr/sbin/sysctl", "machdep.cpu", "hw.cpufamily", "hw.optional"]
            )
        except ProbeError as error:
            return _unknown_cpu(machine, str(error))
        cpu = parse_sysctl(text, machine)
    elif system == "windows" and machine == "x86_64":
        cpu = _windows_cpu(machine, cache)
    else:
        brand = os.environ.get("PROCESSOR_IDENTIFIER", "")
        cpu = _unknown_cpu(machine, f"CPU flags are not determined on {system}", brand)
    if cpu.flags.value is None:
        return cpu
    return replace(cpu, flags=Probe(without_disabled_avx512(cpu.flags.value)))


def without_disabled_avx512(flags: Flags) -> Flags:
    """Remove AVX-512 if torch found that its registers are not enabled (XGETBV).

    A hypervisor can announce the instructions without enabling their registers, which Linux does
    not notice. The detection of torch can fail as a whole, for example if a sandbox has no /sys,
    and then it denies everything. So its "no" counts only beside a "yes" for AVX2.
    """
    from torch import cpu as torch_cpu

    def supported(*names: str) -> bool | None:  # the second name is the one of torch 2.4
        functions = (getattr(torch_cpu, name, None) for name in names)
        function = next(filter(callable, functions), None)
        try:
            return bool(function()) if function is not None else None
        except Exception:
            return None

    if any(flag.startswith("avx512") for flag in flags) and (
        supported("_is_avx2_supported", "_is_cpu_support_avx2") is True
        and supported("_is_avx512_supported", "_is_cpu_support_avx512") is False
    ):
        return frozenset(flag for flag in flags if not flag.startswith("avx512"))
    return flags


# --- Linux ---------------------------------------------------------------------------------------


def _linux_cpu(machine: str, cache: ProbeCache) -> Cpu:
    def describe() -> dict[str, str]:
        with open(_PROC_CPUINFO, encoding="utf-8", errors="replace") as file:
            return _encode(parse_proc_cpuinfo(file.read(), machine))

    try:
        # Reading the blocks of all cores is slow on large machines. One block, the boot and the set
        # of active cores identify the answer.
        with open(_PROC_CPUINFO, encoding="utf-8", errors="replace") as file:
            block = list(takewhile(str.strip, file))
        model = "".join(line for line in block if line.partition(":")[0].strip() in _STABLE)
        boot = boot_id()
        online = file_text("/sys/devices/system/cpu/online")
        # Without the name of the boot, nothing says how long the answer holds.
        per_boot = cache if boot else ProbeCache(None)
        key = f"cpu {_digest(machine, boot, online, model)}"
        cpu = per_boot.recall(key, describe, _decode)
    except OSError as error:
        return _unknown_cpu(machine, f"{_PROC_CPUINFO} cannot be read: {error}")
    except ProbeError as error:
        first = parse_proc_cpuinfo("".join(block), machine)
        return replace(first, flags=rejected("cpu-flag", str(error)))
    assert cpu.flags.value is not None  # or _encode had raised
    return replace(cpu, flags=Probe(_confirmed(cpu.flags.value, _digest(machine, model), cache)))


def _confirmed(listed: Flags, model: str, cache: ProbeCache) -> Flags:
    """The flags of py-cpuinfo that Linux lists; all that Linux lists if it has no answer."""
    if not cache.keeps_answers:
        return listed
    try:
        return listed & _flags_of_py_cpuinfo(model, cache)
    except ProbeError:
        return listed


def _flags_of_py_cpuinfo(model: str, cache: ProbeCache) -> Flags:
    try:
        spec = importlib.util.find_spec("cpuinfo")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        raise ProbeError("py-cpuinfo is not installed")
    origin = spec.origin
    key = f"py-cpuinfo {model} {origin} {file_version(origin)}"
    answer = cache.recall(key, lambda: _ask_py_cpuinfo(origin), decode_text)
    return frozenset(answer.split())


def _ask_py_cpuinfo(package: str) -> str:
    # In a child, so that a crash, a hang or an import that starts processes stays outside.
    from .children import output_of

    output = output_of(_PY_CPUINFO, [str(Path(package).parents[1])], _PY_CPUINFO_SECONDS)
    try:
        flags = " ".join(json.loads(output)["flags"])
    except (ValueError, KeyError, TypeError):
        flags = ""
    if not flags:
        raise ProbeError("py-cpuinfo finds no flags")
    return flags


def parse_proc_cpuinfo(text: str, machine: str) -> Cpu:
    """Describe the CPU of the text of Linux's ``/proc/cpuinfo``.

    The kernel lists a flag only if it has enabled the feature. Cores may differ (big.LITTLE, a
    hypervisor's mix of hosts), and a thread may move between them, so only common flags count.
    """
    blocks = [dict(_fields(block)) for block in text.split("\n\n")]
    listed = [b.get("flags", b.get("Features")) for b in blocks]
    sets = [frozenset(flags.split()) for flags in listed if flags is not None]
    flags = reduce(frozenset.intersection, sets) if sets else frozenset()

    first, last = blocks[0], blocks[-1]
    part, implementer = first.get("CPU part", ""), first.get("CPU implementer", "")
    cores = dict.fromkeys(
        f"{b.get('CPU implementer', '')} part {b['CPU part']}" for b in blocks if b.get("CPU part")
    )
    brands = (first.get("model name"), last.get("Model"), last.get("Hardware"))
    revision = f"r{first.get('CPU variant', '')}p{first.get('CPU revision', '')}" if part else ""
    return Cpu(
        machine=machine,
        brand=next(filter(None, brands), f"Arm {' and '.join(cores)}" if cores else "unknown"),
        vendor=first.get("vendor_id", implementer),
        family=first.get("cpu family", first.get("CPU architecture", "")),
        model=first.get("model", part),
        stepping=first.get("stepping", revision),
        flags=_known(flags, "/proc/cpuinfo"),
    )


def _encode(cpu: Cpu) -> dict[str, str]:
    if cpu.flags.value is None:
        raise ProbeError(cpu.flags.reason)  # not remembered
    return {**vars(cpu), "flags": " ".join(sorted(cpu.flags.value))}


def _decode(values: dict[str, Any]) -> Cpu:
    texts = {name: decode_text(value) for name, value in values.items()}
    flags = frozenset(texts.pop("flags").split())
    if not flags:
        raise ValueError(f"no flags in {values!r}")
    return Cpu(**texts, flags=Probe(flags))


# --- macOS ---------------------------------------------------------------------------------------


def parse_sysctl(text: str, machine: str) -> Cpu:
    """Describe the CPU of the text of macOS's ``sysctl machdep.cpu hw.cpufamily hw.optional``."""
    fields = dict(_fields(text))
    names: list[str] = []
    for group in ("features", "leaf7_features", "extfeatures"):
        names += fields.get(f"machdep.cpu.{group}", "").lower().split()
    flags = {_FROM_SYSCTL.get(name, name) for name in names}
    denied = set()  # not enabled by the system, even if CPUID or another name of it says so
    for key, value in fields.items():
        if key.startswith("hw.optional."):
            name = key.rpartition(".")[2].lower()
            if value == "0":
                denied.add(_FROM_SYSCTL.get(name, name))
            elif machine == "aarch64" and name in _FROM_SYSCTL:
                flags.add(_FROM_SYSCTL[name])
    return Cpu(
        machine=machine,
        brand=fields.get("machdep.cpu.brand_string", "unknown"),
        vendor=fields.get("machdep.cpu.vendor", "Apple" if machine == "aarch64" else ""),
        family=fields.get("machdep.cpu.family", fields.get("hw.cpufamily", "")),
        model=fields.get("machdep.cpu.model", ""),
        stepping=fields.get("machdep.cpu.stepping", ""),
        flags=_known(frozenset(flags - denied), "sysctl"),
    )


# --- Windows -------------------------------------------------------------------------------------


def _windows_cpu(machine: str, cache: ProbeCache) -> Cpu:
    identifier = os.environ.get("PROCESSOR_IDENTIFIER", "")
    model = _digest(machine, identifier, platform.version())
    try:
        # Asked even if the answer cannot be remembered: nothing else knows the flags.
        listed = _flags_of_py_cpuinfo(model, cache)
    except ProbeError as error:
        return _unknown_cpu(machine, str(error), identifier)
    granted = {
        number
        for number in (_PF_AVX2_INSTRUCTIONS_AVAILABLE, _PF_AVX512F_INSTRUCTIONS_AVAILABLE)
        if _windows_grants(number)
    }
    return describe_windows_cpu(identifier, machine, listed, granted)


def _windows_grants(feature: int) -> bool:
    return bool(ctypes.WinDLL("kernel32").IsProcessorFeaturePresent(feature))  # type: ignore[attr-defined, unused-ignore]


def describe_windows_cpu(
    identifier: str, machine: str, listed: Flags, granted: Collection[int]
) -> Cpu:
    """Describe the CPU of Windows' ``PROCESSOR_IDENTIFIER``.

    Args:
        identifier: Such as ``"Intel64 Family 6 Model 143 Stepping 8, GenuineIntel"``.
        machine: As in :class:`Cpu`.
        listed: The flags of py-cpuinfo.
        granted: The features of which ``IsProcessorFeaturePresent`` says that they are available.
    """
    flags = {_FROM_CPUID.get(flag, flag) for flag in listed}
    if _PF_AVX512F_INSTRUCTIONS_AVAILABLE not in granted:
        flags = {flag for flag in flags if not flag.startswith("avx512")}
    if _PF_AVX2_INSTRUCTIONS_AVAILABLE not in granted:
        flags = {flag for flag in flags if not flag.startswith("avx") and flag not in _NEED_AVX}
    found = re.search(r"Family (\d+) Model (\d+) Stepping (\d+), (\w+)", identifier)
    family, model, stepping, vendor = found.groups() if found else ("", "", "", "")
    known = _known(frozenset(flags), "py-cpuinfo")
    return Cpu(machine, identifier or "unknown", vendor, family, model, stepping, known)


# --- Helpers -------------------------------------------------------------------------------------


def _known(flags: Flags, source: str) -> Probe[Flags]:
    return Probe(flags) if flags else rejected("cpu-flag", f"{source} lists no flags")


def _unknown_cpu(machine: str, reason: str, brand: str = "") -> Cpu:
    return Cpu(machine, brand, "", "", "", "", rejected("cpu-flag", reason))


def _fields(text: str) -> list[tuple[str, str]]:
    pairs = (line.partition(":") for line in text.splitlines())
    return [(key.strip(), value.strip()) for key, colon, value in pairs if colon]


def _digest(*parts: str) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()
