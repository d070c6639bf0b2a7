"""What this machine is: CPU and its flags, GPUs, compilers, torch, libc.

Every probe returns a value or a rejection, and none raises. :func:`detect` runs during
``import bitlinear``, so the answers of slow probes (a compiler's version, the GPUs, py-cpuinfo) are
remembered in the cache directory that the caller passes.
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
from .probe_cache import ProbeCache
from .rejection import Probe, Rejection, rejected
from .toolchain import Compiler, probe_compiler, probe_ninja, probe_nvcc

_NOT_PROBED = Rejection("cuda-mismatch", "not looked for: torch is built without CUDA")


@dataclass(frozen=True)
class Torch:
    """The installed torch; ``cuda`` is None for a build without CUDA, and for a build for ROCm."""

    version: str
    git_version: str
    cuda: str | None
    cxx11_abi: bool


@dataclass(frozen=True)
class Hardware:
    """Everything that selection, building and reporting know about the machine.

    Attributes:
        system: ``"linux"``, ``"darwin"`` or ``"windows"``.
        cpu: The CPU and its flags.
        compiler: The C++ compiler.
        ninja: The path of the executable.
        nvcc: The compiler of a CUDA toolkit. Its path ends in ``bin/nvcc``, and the toolkit is the
            directory above.
        driver: The NVIDIA driver and its GPUs. This process did not initialise the driver.
        torch: The installed torch.
        libc: Name and version of the C library.
        python: The version of Python.
    """

    system: str
    cpu: Cpu
    compiler: Probe[Compiler]
    ninja: Probe[str]
    nvcc: Probe[Compiler]
    driver: Probe[Driver]
    torch: Torch
    libc: str
    python: str


UNKNOWN = Hardware(
    system="windows" if sys.platform == "win32" else sys.platform,
    cpu=Cpu(platform.machine(), "", "", "", "", "", rejected("cpu-flag", "not probed")),
    compiler=rejected("no-compiler", "not probed"),
    ninja=rejected("no-compiler", "not probed"),
    nvcc=rejected("no-compiler", "not probed"),
    driver=rejected("no-gpu", "not probed"),
    torch=Torch("", "", None, True),
    libc="",
    python=platform.python_version(),
)
"""A machine that has not been probed."""


def detect(cache_dir: Path | None = None, *, everything: bool = False) -> Hardware:
    """Probe the machine.

    Args:
        cache_dir: An existing directory, safe to trust, where the answers of slow probes are
            remembered. None, or one that cannot be read or written, only costs time.
        everything: Look for GPUs and nvcc even if torch cannot use them, as the doctor does.
    """
    cache = ProbeCache(cache_dir)
    system = "windows" if sys.platform == "win32" else sys.platform
    torch = _torch()
    nvcc: Probe[Compiler] = Probe(rejection=_NOT_PROBED)
    driver: Probe[Driver] = Probe(rejection=_NOT_PROBED)
    if torch.cuda or everything:
        nvcc, driver = probe_nvcc(cache, torch.cuda), probe_driver(cache)
    hardware = Hardware(
        system=system,
        cpu=probe_cpu(system, cache),
        compiler=probe_compiler(cache),
        ninja=probe_ninja(cache),
        nvcc=nvcc,
        driver=driver,
        torch=torch,
        libc=_libc(),
        python=platform.python_version(),
    )
    cache.save()
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
