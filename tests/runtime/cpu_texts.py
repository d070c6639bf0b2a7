"""Recorded inputs of the tests; what each one is stands in the README.md beside it."""

from __future__ import annotations

from pathlib import Path

from bitlinear.runtime.hardware import Cpu, parse_proc_cpuinfo, parse_sysctl

_DIRECTORY = Path(__file__).parent / "cpus"

CPUS = sorted(p.stem for p in _DIRECTORY.iterdir() if p.suffix in (".cpuinfo", ".sysctl"))


def cpu_text(name: str) -> str:
    return next(_DIRECTORY.glob(f"{name}.*")).read_text(encoding="utf-8")


def read_cpu(name: str) -> Cpu:
    text = cpu_text(name)
    if "CPU implementer" in text:
        return parse_proc_cpuinfo(text, "aarch64")
    if "vendor_id" in text:
        return parse_proc_cpuinfo(text, "x86_64")
    return parse_sysctl(text, "aarch64" if "hw.optional.arm64: 1" in text else "x86_64")
