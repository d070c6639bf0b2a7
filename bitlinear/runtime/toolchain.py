"""The tools that a build needs: C++ compiler, ninja and nvcc."""

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

from .cuda_arch import version
from .probe_cache import ProbeCache, decode_text, file_version
from .rejection import Probe, rejected
from .system import ProbeError, command_output

_CUDA_HOME = "/usr/local/cuda"  # where NVIDIA's packages put a toolkit
_LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
_COMPILER_FIX = "install a C++ compiler (Debian and Ubuntu: apt install g++) or set CXX"
_MSVC_FIX = (
    "install the Visual Studio Build Tools with their C++ tools, or set CXX to the path of cl"
)
_VSWHERE = ("Microsoft Visual Studio", "Installer", "vswhere.exe")  # under %PROGRAMFILES(X86)%
_MSVC_TOOLS = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"


@dataclass(frozen=True)
class Compiler:
    """A compiler driver.

    Attributes:
        path: The path as found; the value of ``$CXX`` with its arguments if that is set.
        realpath: The executable, with links resolved and launchers such as ``ccache`` stripped.
        version: The line of ``--version`` that holds the version; for MSVC its banner.
        family: ``"gcc"``, ``"clang"``, ``"msvc"``, ``"nvcc"`` or ``"unknown"``.
    """

    path: str
    realpath: str
    version: str
    family: str

    @property
    def release(self) -> str:
        """The CUDA release of nvcc, such as ``"13.0"``; empty for any other compiler."""
        found = re.search(r"release (\d+\.\d+)", self.version)
        return found.group(1) if found else ""


def probe_compiler(cache: ProbeCache) -> Probe[Compiler]:
    """Find the C++ compiler: ``$CXX``, else the first of the usual names on PATH.

    On Windows torch compiles with MSVC only: ``$CXX`` is the path of ``cl``, which is else looked
    for on PATH and in the latest Visual Studio.
    """
    if sys.platform == "win32":
        return _probe_msvc(cache)
    chosen = os.environ.get("CXX", "").strip()
    candidates = (chosen,) if chosen else ("c++", "g++", "clang++")
    problem = f"none of {', '.join(candidates)} is on PATH"
    if chosen:
        problem = f"CXX={chosen!r} is not an executable on PATH"
    try:
        for candidate in candidates:
            command = shlex.split(candidate)
            launched = len(command) > 1 and os.path.basename(command[0]) in _LAUNCHERS
            found = shutil.which(command[1 if launched else 0])
            if found and (not launched or shutil.which(command[0])):
                command.append("--version")
                return Probe(_identify(chosen or found, command, found, cache))
    except ValueError as error:
        problem = f"CXX={chosen!r} cannot be split into words: {error}"
    except ProbeError as error:
        problem = str(error)
    return rejected("no-compiler", f"no C++ compiler: {problem}", _COMPILER_FIX)


def _probe_msvc(cache: ProbeCache) -> Probe[Compiler]:
    chosen = os.environ.get("CXX", "").strip().strip('"')
    found = shutil.which(chosen or "cl") or (None if chosen else _cl_of_visual_studio())
    problem = "cl is neither on PATH nor in a Visual Studio"
    if chosen:
        problem = f"CXX={chosen!r} is not an executable on PATH"
    if found:
        try:
            return Probe(_identify(found, [found], found, cache))  # alone, cl prints its banner
        except ProbeError as error:
            problem = str(error)
    return rejected("no-compiler", f"no C++ compiler: {problem}", _MSVC_FIX)


def _cl_of_visual_studio() -> str | None:
    """Ask Microsoft's locator for the latest Visual Studio, and find the compiler in it."""
    vswhere = os.path.join(os.environ.get("PROGRAMFILES(X86)", ""), *_VSWHERE)
    wanted = ["-latest", "-products", "*", "-requires", _MSVC_TOOLS, "-utf8"]
    try:
        output = command_output([vswhere, *wanted, "-property", "installationPath"])
        vc = Path(output.strip().splitlines()[0], "VC")
        default = vc / "Auxiliary" / "Build" / "Microsoft.VCToolsVersion.default.txt"
        tools = vc / "Tools" / "MSVC" / default.read_text(encoding="utf-8").strip()
    except (ProbeError, OSError):
        return None
    return shutil.which("cl", path=str(tools / "bin" / "Hostx64" / "x64"))


def probe_nvcc(cache: ProbeCache, torch_cuda: str | None) -> Probe[Compiler]:
    """Find the nvcc of the first CUDA toolkit, in the order of ``torch.utils.cpp_extension``.

    Args:
        cache: Where the compiler's version is remembered.
        torch_cuda: The CUDA release that torch is built for; the fix names it.
    """
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [chosen] if chosen else [_CUDA_HOME, *_packaged_toolkits()]
    if not chosen and (on_path := shutil.which("nvcc")):
        # It may be a link into a toolkit, or a script that lies in none.
        candidates = (on_path, os.path.realpath(on_path))
        homes = [*(os.path.dirname(os.path.dirname(path)) for path in candidates), *homes]
    where = f"CUDA_HOME={chosen!r}" if chosen else " or ".join(dict.fromkeys(homes))
    problem = f"no bin/nvcc and include/cuda_runtime_api.h in {where}"
    for home in homes:
        found = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if found and os.path.isfile(os.path.join(home, "include", "cuda_runtime_api.h")):
            try:
                return Probe(_identify(found, [found, "--version"], found, cache))
            except ProbeError as error:
                problem = str(error)
                break
    fix = toolkit_fix(torch_cuda) if torch_cuda else ""
    # Since CUDA 13, packages from PyPI make up a toolkit.
    if torch_cuda and version(torch_cuda) >= (13, 0):
        fix = f'pip install "cuda-toolkit[nvcc,cccl]=={torch_cuda}.*", or {fix}'
    return rejected("no-compiler", f"no nvcc: {problem}", fix)


def toolkit_fix(torch_cuda: str) -> str:
    """Say how to get the CUDA toolkit that torch is built for."""
    return f"install the CUDA {torch_cuda} toolkit, or set CUDA_HOME to where it is"


def probe_ninja(cache: ProbeCache) -> Probe[str]:
    """Find the executable: of the package from PyPI, on PATH, or beside Python."""
    name = "ninja.exe" if sys.platform == "win32" else "ninja"
    directories = [os.path.dirname(sys.executable)]
    on_path = shutil.which("ninja")
    if on_path:
        directories.insert(0, os.path.dirname(on_path))
    # The package knows a directory that may not be on PATH.
    with contextlib.suppress(Exception):
        spec = importlib.util.find_spec("ninja")
        if spec is not None and spec.origin is not None:
            key = f"ninja {sys.prefix} {spec.origin} {file_version(spec.origin)}"
            directories.insert(0, cache.recall(key, _ninja_of_package, decode_text))
    for directory in directories:
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return Probe(path)
    reason = "no ninja: the package ninja is not installed, and ninja is not on PATH"
    return rejected("no-compiler", reason, "pip install ninja")


def _ninja_of_package() -> str:
    import ninja

    return str(ninja.BIN_DIR)


def _packaged_toolkits() -> list[str]:
    # The package nvidia-cuda-nvcc puts a toolkit beside the libraries that torch brings.
    with contextlib.suppress(Exception):
        spec = importlib.util.find_spec("nvidia")
        roots = (spec and spec.submodule_search_locations) or ()
        return [str(home) for root in roots for home in Path(root).glob("cu[0-9]*")]
    return []


def _identify(path: str, command: list[str], found: str, cache: ProbeCache) -> Compiler:
    realpath = os.path.realpath(found)
    try:
        # A launcher or a script stays the same file when the compiler behind it changes.
        with open(realpath, "rb") as file:
            if os.path.basename(realpath) in _LAUNCHERS or file.read(2) == b"#!":
                cache = ProbeCache(None)
        key = " ".join((*command, realpath, file_version(realpath)))
    except OSError as error:
        raise ProbeError(f"{path} cannot be examined: {error}") from error
    # cl prints its banner on stderr, and its usage on stdout.
    with_errors = len(command) == 1
    output = cache.recall(
        key, lambda: command_output(command, with_errors=with_errors), decode_text
    )
    lower = output.lower()
    lines = output.strip().splitlines()
    marks = (
        ("nvcc", "nvidia"),
        ("clang", "clang"),
        ("gcc", "free software foundation"),
        ("msvc", "microsoft (r)"),
    )
    family = next((family for family, mark in marks if mark in lower), "unknown")
    # The first line of nvcc is its name.
    line = next((line for line in lines if "release" in line and family == "nvcc"), lines[0])
    return Compiler(path=path, realpath=realpath, version=line.strip(), family=family)
