"""The CPU of this machine and its flags."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile
from typing import Any

from .probe import BOOT_ID, Probe, command_output, file_text
from .probe_cache import ProbeCache, decode_text

_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


_PROC_CPUINFO = "/proc/cpuinfo"

# Lines of it that stay the same from one read to the next, and tell CPUs apart.
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


@dataclass(frozen=True)
class Cpu:
    """A CPU as every one of its cores can be used.

    Attributes:
        machine: ``"x86_64"``, ``"aarch64"``, or what the system calls anything else.
        brand: For people, such as ``"AMD EPYC 9R14"``.
        vendor, family, model, stepping: As the system prints them, empty where it does not.
        flags: Features in the spelling of Linux, enabled by the operating system, that all cores
            have. None means that they could not be determined, which is not "has none".
        reason: Why ``flags`` is None.
    """

    machine: str
    brand: str
    vendor: str
    family: str
    model: str
    stepping: str
    flags: frozenset[str] | None
    reason: str = ""

    @property
    def identity(self) -> str:
        """A short string, equal on CPUs that compiled code cannot tell apart; for cache keys."""
        flags = "unknown"
        if self.flags is not None:
            flags = hashlib.sha256(" ".join(sorted(self.flags)).encode()).hexdigest()[:12]
        return "-".join((self.machine, self.vendor, self.family, self.model, self.stepping, flags))


def probe_cpu(system: str, memory: ProbeCache) -> Cpu:
    """Describe the CPU; its flags are unknown where the system does not tell them."""
    machine = _MACHINES.get(platform.machine().lower(), platform.machine())
    if system == "linux":
        cpu = _linux_cpu(machine, memory)
    elif system == "darwin":
        # By its full path: /usr/sbin is often missing from the PATH of services.
        text = command_output(["/usr/sbin/sysctl", "machdep.cpu", "hw.cpufamily", "hw.optional"])
        if text.value is None:
            return _unknown(machine, text.reason)
        cpu = parse_sysctl(text.value, machine)
    else:
        brand = os.environ.get("PROCESSOR_IDENTIFIER", "")
        cpu = _unknown(machine, f"CPU flags are not determined on {system}", brand)
    return cpu if cpu.flags is None else _as_torch_sees(cpu, cpu.flags)


def _unknown(machine: str, reason: str, brand: str = "") -> Cpu:
    return Cpu(machine, brand, "", "", "", "", None, reason)


def _linux_cpu(machine: str, memory: ProbeCache) -> Cpu:
    def parse() -> Probe[dict[str, Any]]:
        text = file_text(_PROC_CPUINFO)
        if text.value is None:
            return Probe(reason=text.reason)
        return Probe(_to_json(parse_proc_cpuinfo(text.value, machine)))

    try:
        # One block, the boot and the cores that are switched on say which CPUs these are; reading
        # all blocks is slow on large machines.
        with open(_PROC_CPUINFO, encoding="utf-8", errors="replace") as file:
            block = list(takewhile(str.strip, file))
    except OSError as error:
        return _unknown(machine, f"{_PROC_CPUINFO} cannot be read: {error}")
    boot = file_text(BOOT_ID)
    online = file_text("/sys/devices/system/cpu/online")
    stable = [line for line in block if line.partition(":")[0].strip() in _STABLE]
    key = hashlib.sha256("".join((machine, str(boot), str(online), *stable)).encode()).hexdigest()
    # Without a boot's name there is no telling for how long the answer holds.
    cpu = (memory if boot.value else ProbeCache(None)).recall(f"cpu {key}", parse, _from_json)
    return cpu.value or _unknown(machine, cpu.reason)


def parse_proc_cpuinfo(text: str, machine: str) -> Cpu:
    """The CPU that the text of Linux's ``/proc/cpuinfo`` describes.

    The kernel lists a flag only if it has enabled the feature. Cores may differ (big.LITTLE, a
    hypervisor's mix of hosts), and a thread may move between them: only common flags count.
    """
    blocks = [dict(_fields(block)) for block in text.split("\n\n")]
    listed = [b.get("flags", b.get("Features")) for b in blocks]
    sets = [frozenset(flags.split()) for flags in listed if flags is not None]
    sets += _py_cpuinfo(text)
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
        flags=flags or None,
        reason="" if flags else "/proc/cpuinfo lists no flags",
    )


def parse_sysctl(text: str, machine: str) -> Cpu:
    """The CPU that macOS's ``sysctl machdep.cpu hw.cpufamily hw.optional`` describes."""
    fields = dict(_fields(text))
    names: list[str] = []
    for group in ("features", "leaf7_features", "extfeatures"):
        names += fields.get(f"machdep.cpu.{group}", "").lower().split()
    flags = {_FROM_SYSCTL.get(name, name) for name in names}
    denied = set()  # the system has not enabled it, whatever CPUID or another name of it says
    for key, value in fields.items():
        if key.startswith("hw.optional."):
            name = key.rpartition(".")[2].lower()
            if value == "0":
                denied.add(_FROM_SYSCTL.get(name, name))
            elif machine == "aarch64" and name in _FROM_SYSCTL:
                flags.add(_FROM_SYSCTL[name])
    flags -= denied
    return Cpu(
        machine=machine,
        brand=fields.get("machdep.cpu.brand_string", "unknown"),
        vendor=fields.get("machdep.cpu.vendor", "Apple" if machine == "aarch64" else ""),
        family=fields.get("machdep.cpu.family", fields.get("hw.cpufamily", "")),
        model=fields.get("machdep.cpu.model", ""),
        stepping=fields.get("machdep.cpu.stepping", ""),
        flags=frozenset(flags) or None,
        reason="" if flags else "sysctl lists no flags",
    )


def _fields(text: str) -> list[tuple[str, str]]:
    pairs = (line.partition(":") for line in text.splitlines())
    return [(key.strip(), value.strip()) for key, colon, value in pairs if colon]


def _py_cpuinfo(text: str) -> list[frozenset[str]]:
    """The flags that py-cpuinfo finds in the text of /proc/cpuinfo; none if it cannot."""
    # get_cpu_info() measures the clock for a second: call its parser of this one source instead,
    # which is private, so that any release may break it.
    try:
        from cpuinfo import cpuinfo

        source = cpuinfo.DataSource
        kept = source.has_proc_cpuinfo, source.cat_proc_cpuinfo
        if cpuinfo.g_trace is None:
            cpuinfo.g_trace = cpuinfo.Trace(False, False)
        source.has_proc_cpuinfo = staticmethod(lambda: True)
        source.cat_proc_cpuinfo = staticmethod(lambda: (0, text))
        try:
            return [frozenset(cpuinfo._get_cpu_info_from_proc_cpuinfo()["flags"])]
        finally:
            source.has_proc_cpuinfo, source.cat_proc_cpuinfo = map(staticmethod, kept)
    except Exception:
        return []


def _as_torch_sees(cpu: Cpu, flags: frozenset[str]) -> Cpu:
    """Without AVX-512 if torch found that the registers for it are not enabled (XGETBV).

    A hypervisor can announce the instructions and not enable their registers, which Linux does not
    notice. Torch's detection can fail as a whole (no /sys in a sandbox), and then denies
    everything: its "no" counts only beside a "yes" for AVX2.
    """
    from torch import cpu as torch_cpu

    def supported(*names: str) -> bool | None:  # the second name is that of torch 2.4
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
        flags = frozenset(flag for flag in flags if not flag.startswith("avx512"))
    return replace(cpu, flags=flags)


def _to_json(cpu: Cpu) -> dict[str, str | None]:
    return {**vars(cpu), "flags": None if cpu.flags is None else " ".join(sorted(cpu.flags))}


def _from_json(values: dict[str, Any]) -> Cpu:
    flags = values["flags"]
    found = None if flags is None else frozenset(decode_text(flags).split())
    cpu = Cpu(**{**values, "flags": found})
    if (not cpu.flags) != bool(cpu.reason):
        raise ValueError(f"flags or a reason, got {values!r}")
    for name in values.keys() - {"flags"}:
        decode_text(values[name])
    return cpu
