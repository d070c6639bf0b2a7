"""The key of an artifact: a digest of everything that shaped its bytes.

A machine that did not compile it can use it, too. So its self-test is recorded apart from it, for
each machine (:func:`self_test_machine`).
"""

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
from .cuda_arch import runs_on
from .hardware import Hardware

COMPILER_INGREDIENTS = frozenset({"compiler", "compiler_arguments", "search_paths", "nvcc"})
"""Ingredients that a machine without a compiler ignores."""

_ARCHITECTURES = "architectures"

# Where compilers look for headers and libraries apart from their flags.
_SEARCH_PATHS = (
    "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH",
    "GCC_EXEC_PREFIX", "SDKROOT", "INCLUDE", "LIB",
)  # fmt: skip

_FORMAT = "3"  # of an artifact's directory
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
    flags = compiler_flags(library, hardware.system)
    parts = {
        "format": _FORMAT,
        "library": library.name,
        "sources": _digest_of_sources(library, directory),
        "flags": shlex.join((*flags, "--", *linker_flags(library, hardware.system))),
        "compiler": f"{compiler.realpath} | {compiler.version}" if compiler else "",
        "compiler_arguments": " ".join(os.environ.get("CXX", "").split()[1:]),
        "search_paths": search_paths(),
        "torch": f"{torch.version} {torch.git_version} cuda={torch.cuda}",
        "abi": f"cxx11={torch.cxx11_abi}",
        "system": f"{hardware.system} {hardware.cpu.machine}",
        "libc": hardware.libc,
    }
    if not isinstance(library, Variant):
        parts["python"] = EXTENSION_SUFFIXES[0]
    if isinstance(library, CudaLibrary):
        parts.update(_cuda_ingredients(library, hardware))
    return parts


def _cuda_ingredients(library: CudaLibrary, hardware: Hardware) -> dict[str, str]:
    nvcc = hardware.nvcc.value
    arguments = [os.environ.get(f"NVCC_{which}_FLAGS", "") for which in ("PREPEND", "APPEND")]
    return {
        "nvcc": " | ".join([nvcc.realpath, nvcc.version, *arguments]) if nvcc else "",
        "nvcc_flags": shlex.join(library.cuda_cflags),
        _ARCHITECTURES: " ".join(library.architectures),
    }


def search_paths() -> str:
    """List the variables that add folders to the compiler's own, if they are set."""
    return " ".join(f"{name}={os.environ[name]}" for name in _SEARCH_PATHS if os.environ.get(name))


def serves(found: Mapping[str, str], wanted: Mapping[str, str], can_build: bool) -> bool:
    """Tell whether a library with some ingredients does where others are wanted.

    A library for more GPU architectures than needed does. If nothing can be built, a library of
    any compiler does, and machine code for an older architecture that the GPUs run.

    Args:
        found: The ingredients of the library.
        wanted: The ingredients that this machine would compile with.
        can_build: Whether this machine can compile a better one.
    """
    different = set(differences(found, wanted))
    if can_build:
        needed = {*wanted.get(_ARCHITECTURES, "").split()}
        compiled = {*found.get(_ARCHITECTURES, "").split()}
        return not different and needed <= compiled
    return not different - COMPILER_INGREDIENTS


def differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """List the ingredients in which a library is not what is wanted.

    ``"architectures"`` is none of them if the GPUs run its code.
    """
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    compiled = found.get(_ARCHITECTURES, "").split()
    needed = wanted.get(_ARCHITECTURES, "").split()
    if all(any(runs_on(code, other) for code in compiled) for other in needed):
        names = [name for name in names if name != _ARCHITECTURES]
    return names


def self_test_machine(library: Library, hardware: Hardware) -> str:
    """Name the hardware that a passed self-test of this library vouches for."""
    if isinstance(library, Variant):
        return hardware.cpu.identity
    driver = hardware.driver.value
    if isinstance(library, CudaLibrary) and driver is not None:
        gpus = {driver.gpus[device].identity for device in library.devices}
        return f"{', '.join(sorted(gpus))} | {driver.cuda}"
    return "every machine"


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
