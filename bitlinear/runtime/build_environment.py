"""The surroundings of a build: a directory with a plain name, and the child's environment."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import tempfile
from pathlib import Path

from .cache_directory import temporary_parents, why_unusable
from .children import child_environment, import_path
from .hardware import Hardware
from .trust import why_replaceable

COMPILER_WRAPPER = "bitlinear-c++"

_GIB = 1 << 30


def plain_directory(staging: Path) -> Path:
    """Make a private directory whose path needs no quotes, inside ``staging`` if possible.

    Raises:
        OSError: No directory will do.
    """
    problems = []
    for parent in map(str, (staging, *temporary_parents())):
        if os.name == "posix" and not _is_plain(parent):
            problems.append(f"{parent} has characters that ninja cannot read")
        elif problem := why_replaceable(Path(parent), entries=True):
            problems.append(f"{parent} can be changed by others: {problem}")
        elif problem := why_unusable(Path(parent)):
            problems.append(f"{parent} {problem}")
        else:
            return Path(tempfile.mkdtemp(prefix="bitlinear-", dir=parent))
    raise OSError("; ".join(problems))


def build_environment(hardware: Hardware, links: Path) -> dict[str, str]:
    """Give the child the same compiler, ninja and nvcc, all under plain names.

    Args:
        hardware: The machine.
        links: A directory with a plain name, for links to paths that need quotes.
    """
    environment = child_environment()
    environment.pop("PYTORCH_NVCC", None)  # the build must not use another nvcc than the key names
    environment.update(
        LC_ALL="C",  # the compiler's line goes into bug reports
        TORCH_DONT_CHECK_COMPILER_ABI="1",  # torch 2.4 fails if CXX has arguments,
        TORCH_NO_COMPILER_WRAPPER="1",  # and torch 2.13 takes them for a part of the name
    )
    environment.setdefault("MAX_JOBS", str(_max_jobs()))
    # Where compilers put what they read again: others may be able to change the usual place.
    environment["TMPDIR"] = str(links)
    if os.name == "posix":
        tools = links / "bin"
        tools.mkdir()
        compiler = tools / COMPILER_WRAPPER
        command = shlex.join(_compiler_command(hardware))
        compiler.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        compiler.chmod(0o700)
        if hardware.ninja.value is not None:
            (tools / "ninja").symlink_to(os.path.abspath(hardware.ninja.value))
        environment["CXX"] = environment["CC"] = str(compiler)  # CC: nvcc's host compiler
        environment["PATH"] = os.pathsep.join([str(tools), os.environ.get("PATH", os.defpath)])
    else:
        environment["PATH"] = _windows_path(hardware)
        environment.pop("CXX", None)  # cl is on PATH; a path with spaces would need quotes
        environment["VSLANG"] = "1033"  # as LC_ALL
    if hardware.nvcc.value is not None:
        home = Path(os.path.abspath(hardware.nvcc.value.path)).parents[1]
        environment["CUDA_HOME"] = _plain_path(str(home), links / "cuda")
        environment["LIBRARY_PATH"] = _library_path(home, links / "lib")
    return environment


def plain_import_path(links: Path) -> list[str]:
    """List the folders that the child imports from, under plain names.

    Args:
        links: As for :func:`build_environment`.
    """
    # torch writes the paths of its headers and libraries into the file for ninja.
    return [_plain_path(p, links / f"path{number}") for number, p in enumerate(import_path())]


def available_cpus() -> int:
    """Count the CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_plain(path: str) -> bool:
    return re.fullmatch(r"[\w@%+=:,./-]*", path, re.ASCII) is not None


def _plain_path(path: str, link: Path) -> str:
    # The path itself, or a link to it if it needs quotes.
    if os.name != "posix" or _is_plain(path.replace(os.pathsep, " ")):
        return path
    link.symlink_to(path)
    return str(link)


def _library_path(cuda_home: Path, directory: Path) -> str:
    # NVIDIA's packages lack libcudart.so, the name that the linker looks for.
    directory.mkdir()
    runtime = min((cuda_home / "lib").glob("libcudart.so.*"), default=None)
    if runtime is not None:
        (directory / "libcudart.so").symlink_to(runtime)
    return os.pathsep.join(filter(None, [str(directory), os.environ.get("LIBRARY_PATH")]))


def _windows_path(hardware: Hardware) -> str:
    # cpp_extension looks for ninja and cl on PATH only. It sets the other variables of MSVC itself.
    compiler = hardware.compiler.value
    tools = (hardware.ninja.value, compiler and compiler.realpath)
    directories = [os.path.dirname(os.path.abspath(tool)) for tool in tools if tool]
    return os.pathsep.join([*directories, os.environ.get("PATH", os.defpath)])


def _compiler_command(hardware: Hardware) -> list[str]:
    compiler = hardware.compiler.value
    if not (command := shlex.split(os.environ.get("CXX", ""))):
        command = [compiler.path] if compiler else ["c++"]
    if os.path.dirname(command[0]):  # relative to here, and not to the child's directory
        command[0] = os.path.abspath(command[0])
    return command


def _max_jobs() -> int:
    # One compiler for each CPU and each 2 GB of memory, at most 4.
    limits = []
    for file, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable:\s+(\d+)", 1024),
        ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", r"(\d+)", 1),
    ):
        with contextlib.suppress(OSError):
            found = re.search(pattern, Path(file).read_text(encoding="ascii"))
            limits += [int(found.group(1)) * unit] if found else []
    return max(1, min(available_cpus(), min(limits, default=2 * _GIB) // (2 * _GIB), 4))
