"""The key of an artifact: a digest of everything that its bytes, or its self-test, depend on."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shlex
from collections.abc import Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from ..kernels import CudaLibrary, Library, Variant
from ..kernels.flags import compiler_flags, linker_flags
from .hardware import Hardware

COMPILER_INGREDIENTS = frozenset({"compiler", "compiler_arguments", "nvcc"})
"""Ingredients that a machine without a compiler ignores."""

_FORMAT = "2"  # of an artifact's directory
_WORKER = Path(__file__).with_name("build_worker.py")
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


def ingredients(library: Library, directory: Path, hardware: Hardware) -> dict[str, str]:
    """List the ingredients of a library's key, by name.

    Args:
        library: The library.
        directory: Where its sources lie.
        hardware: The machine.

    Raises:
        OSError: A source cannot be read.
    """
    torch, compiler = hardware.torch, hardware.compiler.value
    parts = {
        "format": _FORMAT,
        "library": library.name,
        "sources": _digest_of_sources(library, directory),
        "flags": shlex.join(
            (
                *compiler_flags(library, hardware.system),
                "--",
                *linker_flags(library, hardware.system),
            )
        ),
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
    nvcc, driver = hardware.nvcc.value, hardware.driver.value
    assert driver is not None  # or there would be no GPU to compile for
    gpus = {driver.gpus[device].identity for device in library.devices}
    arguments = [os.environ.get(f"NVCC_{which}_FLAGS", "") for which in ("PREPEND", "APPEND")]
    return {
        "nvcc": " | ".join([nvcc.realpath, nvcc.version, *arguments]) if nvcc else "",
        "nvcc_flags": shlex.join(library.nvcc_flags),
        "gpus": f"{', '.join(sorted(gpus))} | {driver.cuda}",  # its self-test ran on these
    }


def key_of(parts: Mapping[str, str]) -> str:
    """The key, and so the directory name, of the artifact with these ingredients."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def source_files(library: Library, directory: Path) -> list[str]:
    """List the sources of a library and every header that they include, directly or not.

    An ``#include "..."`` line counts wherever it stands, also inside an ``#if``. It is resolved
    from the directory of the file that contains it, and ignored if no such file exists there: then
    it names a header of the system or of torch.

    Args:
        library: The library.
        directory: Where its sources lie.

    Returns:
        Names relative to ``directory``, with forward slashes; the sources come first.

    Raises:
        OSError: A file cannot be read.
    """
    return list(_read_sources(library, directory))


def _read_sources(library: Library, directory: Path) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    pending = list(library.sources)
    for name in pending:  # grows while it is read
        if name in contents:
            continue
        contents[name] = (directory / name).read_bytes()
        for included in _INCLUDE.findall(contents[name]):
            path = posixpath.join(posixpath.dirname(name), included.decode())
            header = posixpath.normpath(path)
            if not header.startswith("..") and (directory / header).is_file():
                pending.append(header)
    headers = sorted(contents.keys() - set(library.sources))
    return {name: contents[name] for name in (*library.sources, *headers)}


def _digest_of_sources(library: Library, directory: Path) -> str:
    # build_worker.py is the recipe that turns the sources into a library.
    contents = {**_read_sources(library, directory), _WORKER.name: _WORKER.read_bytes()}
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
