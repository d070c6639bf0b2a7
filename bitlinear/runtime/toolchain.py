"""The C++ compiler, ninja and nvcc."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .probe import Probe, command_output
from .probe_cache import ProbeCache, decode_text, file_version

_CUDA_HOME = "/usr/local/cuda"  # where NVIDIA's packages put it
_LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")


@dataclass(frozen=True)
class Compiler:
    """A compiler driver.

    Attributes:
        path: As found; the value of ``$CXX`` with its arguments if that is set.
        realpath: The file behind it, with links resolved and ``ccache`` and the like stripped.
        version: The line of ``--version`` that holds the version.
        family: ``"gcc"``, ``"clang"``, ``"nvcc"`` or ``"unknown"``.
    """

    path: str
    realpath: str
    version: str
    family: str

    @property
    def release(self) -> str:
        """The CUDA release that nvcc is part of, such as ``"13.0"``; empty for any other."""
        found = re.search(r"release (\d+\.\d+)", self.version)
        return found.group(1) if found else ""


def probe_compiler(memory: ProbeCache) -> Probe[Compiler]:
    """$CXX, else the first of the usual names on PATH."""
    chosen = os.environ.get("CXX", "").strip()
    candidates = (chosen,) if chosen else ("c++", "g++", "clang++")
    for candidate in candidates:
        try:
            command = shlex.split(candidate)
        except ValueError as error:
            return Probe(reason=f"CXX={candidate!r} cannot be split into words: {error}")
        launched = len(command) > 1 and os.path.basename(command[0]) in _LAUNCHERS
        found = shutil.which(command[1 if launched else 0])
        if found and (not launched or shutil.which(command[0])):
            return _ask_version(chosen or found, [*command, "--version"], found, memory)
    if chosen:
        return Probe(reason=f"CXX={chosen!r} is not an executable on PATH")
    return Probe(reason=f"none of {', '.join(candidates)} is on PATH")


def probe_nvcc(memory: ProbeCache) -> Probe[Compiler]:
    """That of the first toolkit, looked for in the order of torch.utils.cpp_extension."""
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [chosen] if chosen else [_CUDA_HOME, *_packaged_toolkits()]
    if not chosen and (on_path := shutil.which("nvcc")):
        # It may be a link into a toolkit, or a script that lies in none.
        places = (on_path, os.path.realpath(on_path))
        homes = [*(os.path.dirname(os.path.dirname(place)) for place in places), *homes]
    for home in homes:
        found = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if found and os.path.isfile(os.path.join(home, "include", "cuda_runtime_api.h")):
            return _ask_version(found, [found, "--version"], found, memory)
    where = f"CUDA_HOME={chosen!r}" if chosen else " or ".join(dict.fromkeys(homes))
    return Probe(reason=f"no bin/nvcc and include/cuda_runtime_api.h in {where}")


def _packaged_toolkits() -> list[str]:
    """Where the package nvidia-cuda-nvcc puts one, beside the libraries that torch brings."""
    with contextlib.suppress(Exception):
        spec = importlib.util.find_spec("nvidia")
        places = (spec and spec.submodule_search_locations) or ()
        return [str(home) for place in places for home in Path(place).glob("cu[0-9]*")]
    return []


def _ask_version(path: str, command: list[str], found: str, memory: ProbeCache) -> Probe[Compiler]:
    realpath = os.path.realpath(found)
    try:
        # A launcher or a script stays the same file when the compiler behind it changes.
        with open(realpath, "rb") as file:
            if os.path.basename(realpath) in _LAUNCHERS or file.read(2) == b"#!":
                memory = ProbeCache(None)
        key = " ".join((*command, realpath, file_version(realpath)))
    except OSError as error:
        return Probe(reason=f"{path} cannot be examined: {error}")
    output = memory.recall(key, lambda: command_output(command), decode_text)
    if output.value is None:
        return Probe(reason=output.reason)
    lower = output.value.lower()
    lines = output.value.strip().splitlines()
    marks = (("nvcc", "nvidia"), ("clang", "clang"), ("gcc", "free software foundation"))
    family = next((family for family, mark in marks if mark in lower), "unknown")
    # nvcc's first line is its name.
    version = next((line for line in lines if "release" in line and family == "nvcc"), lines[0])
    return Probe(Compiler(path=path, realpath=realpath, version=version.strip(), family=family))


def probe_ninja(memory: ProbeCache) -> Probe[str]:
    """The executable of the package, else the one on PATH or beside Python."""
    name = "ninja.exe" if sys.platform == "win32" else "ninja"
    directories = [os.path.dirname(sys.executable)]
    on_path = shutil.which("ninja")
    if on_path:
        directories.insert(0, os.path.dirname(on_path))
    # The package on PyPI knows a directory that need not be on PATH.
    with contextlib.suppress(Exception):
        spec = importlib.util.find_spec("ninja")
        if spec is not None and spec.origin is not None:
            key = f"ninja {sys.prefix} {spec.origin} {file_version(spec.origin)}"
            directories.insert(0, memory.recall(key, _ninja_package, decode_text).value or "")
    for directory in directories:
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return Probe(path)
    return Probe(reason="the package ninja is not installed, and ninja is not on PATH")


def _ninja_package() -> Probe[str]:
    import ninja

    return Probe(str(ninja.BIN_DIR))
