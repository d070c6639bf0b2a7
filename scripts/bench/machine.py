"""The machine and the versions that a result depends on, without host names and paths."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitlinear
from bitlinear.kernels import VARIANTS
from bitlinear.runtime.build_environment import available_cpus
from bitlinear.runtime.hardware import Hardware

# Other layers use these flags, and our kernels do not need them.
_FLAGS_OF_OTHERS = frozenset({"amx_int8", "amx_bf16", "avx512_bf16", "avx512_fp16", "bf16", "i8mm"})
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

# The generation of a CPU by its vendor, family and model, as Linux prints them (Arm: implementer,
# architecture and part). Virtual machines often hide the brand, but not these numbers.
_GENERATIONS = {
    ("GenuineIntel", "6", "85"): "Skylake, Cascade Lake or Cooper Lake",
    ("GenuineIntel", "6", "106"): "Ice Lake",
    ("GenuineIntel", "6", "108"): "Ice Lake",
    ("GenuineIntel", "6", "143"): "Sapphire Rapids",
    ("GenuineIntel", "6", "207"): "Emerald Rapids",
    ("GenuineIntel", "6", "173"): "Granite Rapids",
    ("GenuineIntel", "6", "174"): "Granite Rapids",
    ("AuthenticAMD", "25", "1"): "Zen 3, Milan",
    ("AuthenticAMD", "25", "17"): "Zen 4, Genoa",
    ("AuthenticAMD", "25", "160"): "Zen 4, Bergamo",
    ("AuthenticAMD", "26", "2"): "Zen 5, Turin",
    ("AuthenticAMD", "26", "17"): "Zen 5, Turin",
    ("0x41", "8", "0xd03"): "Cortex-A53",
    ("0x41", "8", "0xd0b"): "Cortex-A76",
    ("0x41", "8", "0xd0c"): "Neoverse N1",
    ("0x41", "8", "0xd40"): "Neoverse V1",
    ("0x41", "8", "0xd49"): "Neoverse N2",
    ("0x41", "8", "0xd4f"): "Neoverse V2",
}
# The first CPUs that have a flag, for numbers that the table lacks.
_FIRST_WITH_FLAG = {
    "amx_fp16": "Granite Rapids",
    "amx_int8": "Sapphire Rapids",
    "avx512_fp16": "Sapphire Rapids",
}
# The best instructions that a CPU has for products of int8.
_INSTRUCTIONS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    "i8mm": "i8mm",
    "asimddp": "dotprod",
    "asimd": "NEON",
}


def describe(hardware: Hardware, device: str) -> dict[str, Any]:
    """Return the machine's properties, those that it tells; ``name`` is for people."""
    cpu = hardware.cpu
    flags = cpu.flags.value or frozenset()
    relevant = _FLAGS_OF_OTHERS.union(*(variant.requires for variant in VARIANTS))
    compiler = hardware.compiler.value
    machine = {
        "name": cpu_name(cpu.brand, flags, cpu.vendor, cpu.family, cpu.model),
        "cpu": cpu.brand,
        "family": cpu.family,
        "model": cpu.model,
        "architecture": cpu.machine,
        "cores": available_cpus(),
        "flags": sorted(relevant & flags),
        "memory_bytes": _memory(),
        "caches": _caches(),
        "os": f"{platform.system()} {platform.release()}",
        "libc": hardware.libc,
        "compiler": compiler.version if compiler else None,
    }
    if device == "cuda":
        machine["gpu"] = gpu()
    return machine


def cpu_name(
    brand: str, flags: Collection[str], vendor: str = "", family: str = "", model: str = ""
) -> str:
    """Return a name that says which CPU it is.

    A brand without a number, such as "Intel(R) Xeon(R) Processor", names a hundred CPUs: the
    family, the model, the generation and the best instructions are added to it.
    """
    short = " ".join(re.sub(r"\((R|TM)\)", " ", brand).split())
    if re.search(r"\d", short) and not short.startswith("Arm "):
        return short
    generation = _GENERATIONS.get((vendor, family, model))
    if generation is None:
        first = next((name for flag, name in _FIRST_WITH_FLAG.items() if flag in flags), None)
        generation = first and f"{first} or newer, by its flags"
    details = [
        generation,
        family and f"family {family} model {model}",
        next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), None),
    ]
    details = list(filter(None, details))
    return f"{short} ({'; '.join(details)})" if details else short


def display_name(machine: dict[str, Any]) -> str:
    """Return the name of a described machine's GPU or, without one, of its CPU."""
    if "gpu" in machine:
        return str(machine["gpu"]["name"])
    # Older descriptions have no name.
    return machine.get("name") or cpu_name(machine["cpu"], machine.get("flags", ()))


def gpu() -> dict[str, Any]:
    """Return the properties of the current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }


def versions() -> dict[str, str]:
    """Return the versions of everything that computes or measures."""
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
    """Return the first core's data caches: level, size, and how many cores share each."""
    found = []
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, level, size, sharers = (
                (index / name).read_text().strip()
                for name in ("type", "level", "size", "shared_cpu_map")
            )
        except OSError:  # a sandbox may hide some of them
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
