"""The key of an artifact: a digest of everything that its bytes depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from ..kernels import CudaLibrary, Library, Variant
from .hardware import Hardware

COMPILER_INGREDIENTS = frozenset({"compiler", "compiler_arguments", "nvcc"})

_BUILDER = Path(__file__).with_name("build_worker.py")
_FORMAT = "1"


def ingredients(library: Library, directory: Path, hardware: Hardware) -> dict[str, str]:
    """Everything that the bytes of the library, or its self-test's result, depend on.

    Raises:
        OSError: a source cannot be read.
    """
    torch, compiler = hardware.torch, hardware.compiler
    parts = {
        "format": _FORMAT,
        "library": library.name,
        "sources": _digest_of_sources(library, directory),
        "flags": shlex.join((*library.cflags, "--", *library.ldflags)),
        "compiler": f"{compiler.realpath} | {compiler.version}" if compiler else "",
        "compiler_arguments": " ".join(os.environ.get("CXX", "").split()[1:]),
        "torch": f"{torch.version} {torch.git_version} cuda={torch.cuda}",
        "abi": f"cxx11={torch.cxx11_abi}",
        "system": f"{hardware.system} {hardware.cpu.machine}",
        "libc": hardware.libc,
    }
    if isinstance(library, Variant):
        parts["cpu"] = hardware.cpu.identity  # its self-test ran on this CPU, for this CPU
    else:
        parts["python"] = EXTENSION_SUFFIXES[0]
    if isinstance(library, CudaLibrary):
        parts.update(_cuda_ingredients(library, hardware))
    return parts


def _cuda_ingredients(library: CudaLibrary, hardware: Hardware) -> dict[str, str]:
    nvcc, driver = hardware.nvcc, hardware.driver
    assert driver is not None  # or there would be no GPU to compile for
    gpus = {driver.gpus[device].identity for device in library.devices}
    arguments = [os.environ.get(f"NVCC_{which}_FLAGS", "") for which in ("PREPEND", "APPEND")]
    return {
        "nvcc": " | ".join([nvcc.realpath, nvcc.version, *arguments]) if nvcc else "",
        "nvcc_flags": shlex.join(library.nvcc_flags),
        "gpus": f"{', '.join(sorted(gpus))} | {driver.cuda}",  # its self-test ran on these
    }


def key(parts: Mapping[str, str]) -> str:
    """The name of the artifact that these ingredients make."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _digest_of_sources(library: Library, directory: Path) -> str:
    """Of the sources, of every header beside them, and of the recipe in build_worker.py."""
    digest = hashlib.sha256()
    files = {name: directory / name for name in source_files(library, directory)}
    for name, file in {**files, _BUILDER.name: _BUILDER}.items():
        content = file.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def source_files(library: Library, directory: Path) -> list[str]:
    """The sources in `directory`, and every header that they may include, relative to it."""
    folders = {directory, *((directory / name).parent for name in library.sources)}
    files = (file for folder in folders for file in folder.iterdir())
    headers = (file for file in files if file.suffix in (".h", ".cuh"))
    return [*library.sources, *sorted(file.relative_to(directory).as_posix() for file in headers)]
