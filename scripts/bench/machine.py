"""What a result depends on besides the code: the machine and the versions. No names, no paths."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitlinear
from bitlinear.kernels import VARIANTS
from bitlinear.runtime.build_environment import available_cpus
from bitlinear.runtime.hardware import Hardware

# Besides those that our kernels need: what the peers profit from.
_PEERS_FLAGS = frozenset({"amx_int8", "amx_bf16", "avx512_bf16", "avx512_fp16", "bf16", "i8mm"})
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe(hardware: Hardware, device: str) -> dict[str, Any]:
    """The machine, as far as it tells."""
    interesting = _PEERS_FLAGS.union(*(variant.requires for variant in VARIANTS))
    compiler = hardware.compiler.value
    machine = {
        "cpu": hardware.cpu.brand,
        "architecture": hardware.cpu.machine,
        "cores": available_cpus(),
        "flags": sorted(interesting & (hardware.cpu.flags.value or frozenset())),
        "memory_bytes": _memory(),
        "caches": _caches(),
        "os": f"{platform.system()} {platform.release()}",
        "libc": hardware.libc,
        "compiler": compiler.version if compiler else None,
    }
    if device == "cuda":
        machine["gpu"] = gpu()
    return machine


def gpu() -> dict[str, Any]:
    """The current GPU."""
    its = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": its.name,
        "capability": f"{its.major}.{its.minor}",
        "multiprocessors": its.multi_processor_count,
        "memory_bytes": its.total_memory,
        "l2_bytes": its.L2_cache_size,
    }


def versions() -> dict[str, str]:
    """Of everything that computes or measures."""
    return {
        "bitlinear": bitlinear.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _caches() -> list[dict[str, int]]:
    """The first core's caches for data: their level, their size, how many cores share each."""
    found = []
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, level, size, sharers = (
                (index / name).read_text().strip()
                for name in ("type", "level", "size", "shared_cpu_map")
            )
        except OSError:  # a sandbox may show only some of them
            continue
        if kind != "Instruction":
            found.append(
                {
                    "level": int(level),
                    "bytes": int(size.rstrip("K")) * 1024,
                    "cores": f"{int(sharers.replace(',', ''), 16):b}".count("1"),
                }
            )
    return found
