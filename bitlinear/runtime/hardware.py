"""What this machine is: CPU and its flags, GPUs, compilers, torch, libc.

Every probe returns a value or a reason and none raises. The one entry point, :func:`detect`, runs
during ``import bitlinear``, so what is slow (py-cpuinfo starts processes when it is imported, a
compiler is started for its version, a child asks the driver for the GPUs) is remembered in the
cache directory that the caller passes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from .cpu import Cpu, probe_cpu
from .gpus import Driver, probe_driver
from .probe import Probe
from .probe_cache import ProbeCache
from .toolchain import Compiler, probe_compiler, probe_ninja, probe_nvcc

NOT_LOOKED_FOR = "not looked for: torch is built without CUDA"


@dataclass(frozen=True)
class Torch:
    """The installed torch; ``cuda`` is None for a build without CUDA (for ROCm, too)."""

    version: str
    git_version: str
    cuda: str | None
    cxx11_abi: bool


@dataclass(frozen=True)
class Hardware:
    """Everything that selection, building and reporting know about the machine.

    Attributes:
        system: ``"linux"``, ``"darwin"`` or ``"windows"``.
        ninja: Path of the executable.
        nvcc: That of a toolkit that torch can use: its path ends in ``bin/nvcc``, and the toolkit
            is what lies above.
        driver: Of NVIDIA. It was not initialised in this process to find out.
    """

    system: str
    cpu: Cpu
    compiler: Compiler | None
    compiler_reason: str
    ninja: str | None
    ninja_reason: str
    nvcc: Compiler | None
    nvcc_reason: str
    driver: Driver | None
    driver_reason: str
    torch: Torch
    libc: str
    python: str


def detect(cache_dir: Path | None = None, *, everything: bool = False) -> Hardware:
    """Probe the machine.

    Args:
        cache_dir: An existing directory, safe to trust, where answers of slow probes are
            remembered. None, or one that cannot be read or written, only costs time.
        everything: Look for GPUs and nvcc even if torch cannot use them (the doctor does).
    """
    memory = ProbeCache(cache_dir)
    system = "windows" if sys.platform == "win32" else sys.platform
    torch = _torch()
    compiler = probe_compiler(memory)
    ninja = probe_ninja(memory)
    nvcc = Probe[Compiler](reason=NOT_LOOKED_FOR)
    driver = Probe[Driver](reason=NOT_LOOKED_FOR)
    if torch.cuda or everything:
        nvcc, driver = probe_nvcc(memory), probe_driver(memory)
    hardware = Hardware(
        system=system,
        cpu=probe_cpu(system, memory),
        compiler=compiler.value,
        compiler_reason=compiler.reason,
        ninja=ninja.value,
        ninja_reason=ninja.reason,
        nvcc=nvcc.value,
        nvcc_reason=nvcc.reason,
        driver=driver.value,
        driver_reason=driver.reason,
        torch=torch,
        libc=_libc(),
        python=platform.python_version(),
    )
    memory.save()
    return hardware


def _torch() -> Torch:
    import torch

    return Torch(
        version=str(torch.__version__),
        git_version=str(getattr(torch.version, "git_version", "")),
        cuda=torch.version.cuda,
        cxx11_abi=bool(torch.compiled_with_cxx11_abi()),
    )


def _libc() -> str:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        glibc = os.confstr("CS_GNU_LIBC_VERSION")
        if glibc:
            return glibc
    name, version = platform.libc_ver()
    return f"{name or sys.platform} {version or platform.release()}"
