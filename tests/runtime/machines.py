"""Recorded CPUs (``cpus/README.md`` describes each), and machines around them."""

from __future__ import annotations

from pathlib import Path

from bitlinear.runtime.cpu import Cpu, parse_proc_cpuinfo, parse_sysctl
from bitlinear.runtime.gpus import Driver
from bitlinear.runtime.hardware import Hardware, Torch
from bitlinear.runtime.rejection import Probe, rejected
from bitlinear.runtime.toolchain import Compiler

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


def with_release(release: str) -> Compiler:
    """The nvcc of a CUDA release."""
    return Compiler("/cuda/bin/nvcc", "/cuda/bin/nvcc", f"release {release}, V{release}.1", "nvcc")


def machine(
    cpu: Cpu, cuda: str | None = None, driver: Driver | None = None, nvcc: str = ""
) -> Hardware:
    return Hardware(
        system="linux",
        cpu=cpu,
        compiler=rejected("no-compiler", "not part of the fixture"),
        ninja=rejected("no-compiler", "not part of the fixture"),
        nvcc=Probe(with_release(nvcc)) if nvcc else rejected("no-compiler", "not there"),
        driver=Probe(driver) if driver else rejected("no-gpu", "no NVIDIA driver is loaded"),
        torch=Torch("2.13.0", "0" * 40, cuda, True),
        libc="glibc 2.36",
        python="3.11.0",
    )


def with_flags(flags: frozenset[str] | None, arch: str = "x86_64") -> Hardware:
    known = rejected("cpu-flag", "not listed") if flags is None else Probe(flags)
    return machine(Cpu(arch, "a CPU", "", "", "", "", known))
