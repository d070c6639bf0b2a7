"""Compile kernels for other machines, which then need no compiler."""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..kernels import CUDA, DIRECTORY, OPS, VARIANTS, CudaLibrary, Library, Variant
from . import artifacts, self_tests
from .artifacts import Artifact
from .build import Build
from .build_lock import build_lock
from .cache_directory import CacheDirectory
from .cuda_arch import parse_architectures
from .hardware import Hardware
from .keys import ingredients
from .pinned import at
from .progress import announce
from .provider import cuda_obstacle, tested, toolchain_obstacle
from .rejection import Probe, Rejection, SettingError
from .system import ProbeError
from .trust import is_own_folder
from .verdicts import select

_CUDA_PREFIX = "cuda:"


@dataclass(frozen=True)
class Prebuilt:
    """What :func:`prebuild` has done.

    Attributes:
        directory: Where the libraries lie. Every user can read it.
        libraries: The artifact or the rejection of each library, by name.
    """

    directory: Path
    libraries: dict[str, Probe[Artifact]]


def parse(text: str, machine: str, variants: Sequence[Variant] = VARIANTS) -> list[Library]:
    """Return the libraries that a list such as ``"avx2,amx_int8,cuda:8.0,9.0a"`` names.

    Args:
        text: Names of CPU kernels, or ``all`` of them; then the GPU architectures, as torch spells
            them in ``TORCH_CUDA_ARCH_LIST``.
        machine: The architecture that the compiler compiles for, such as ``"x86_64"``.
        variants: The CPU kernels.

    Raises:
        SettingError: A name means nothing, or is for another architecture.
    """
    names, _, gpus = text.partition(_CUDA_PREFIX)
    by_name = {v.name: v for v in variants if v.arch in ("any", machine)}
    chosen: list[Library] = []
    for name in filter(None, re.split(r"[,\s]+", names)):
        if name == "all":
            chosen += by_name.values()
        elif name in by_name:
            chosen.append(by_name[name])
        else:
            raise SettingError(
                f"{name!r} is no kernel for {machine}: choose of all, {', '.join(by_name)}, "
                f"and at the end {_CUDA_PREFIX}8.0,9.0 for GPUs"
            )
    if _CUDA_PREFIX in text:
        chosen.append(replace(CUDA, architectures=parse_architectures(gpus)))
    if not chosen:
        raise SettingError(f"{text!r} names no kernel: choose of all, {', '.join(by_name)}")
    return list(dict.fromkeys(chosen))


def prebuild(
    libraries: Sequence[Library],
    hardware: Hardware,
    cache: CacheDirectory,
    operator: Library = OPS,
    sources: Path = DIRECTORY,
    verbose: bool = False,
) -> Prebuilt:
    """Compile the operator and these libraries into the cache, and open it to every reader.

    A library that this machine can run is tested here. Any other machine tests it once more, at its
    first import. What the cache holds already is not compiled again.

    Args:
        libraries: See :func:`parse`.
        hardware: This machine.
        cache: Where to.
        operator: The library that defines the operator.
        sources: Where the sources of all of them lie.
        verbose: Show the compilers' output.

    Raises:
        SettingError: There is no directory that can be written to, or others can write to it.
    """
    if cache.path is None or cache.reason:  # not into another one than was asked for
        raise SettingError(
            f"no directory to compile into: {cache.reason}; "
            "set BITLINEAR_CACHE_DIR to one that can be written to"
        )
    if cache.note:
        raise SettingError(
            f"{cache.note}, where other users do not look; "
            "set BITLINEAR_CACHE_DIR to a directory that only you can write to"
        )
    variants = [library for library in libraries if isinstance(library, Variant)]
    *verdicts, _ = select(hardware, variants)
    usable = {verdict.variant for verdict in verdicts if verdict.ok}
    results: dict[str, Probe[Artifact]] = {}
    with build_lock(cache.path):
        for library in (operator, *libraries):
            runs_here = library.name in usable or library is operator
            results[library.name] = _provide(library, hardware, cache, sources, runs_here, verbose)
    _open_to_readers(cache.path)
    return Prebuilt(cache.path, results)


def _provide(
    library: Library,
    hardware: Hardware,
    cache: CacheDirectory,
    sources: Path,
    runs_here: bool,
    verbose: bool,
) -> Probe[Artifact]:
    assert cache.path is not None
    is_cuda = isinstance(library, CudaLibrary)
    obstacle = toolchain_obstacle(hardware) or (cuda_obstacle(hardware) if is_cuda else None)
    if obstacle is not None:
        return Probe(rejection=obstacle)
    try:
        parts = ingredients(library, sources, hardware)
        own = replace(cache, readable=(cache.path,))
        found = artifacts.find(own, parts, can_build=True)
        if found is not None and found.value is not None:
            return tested(found.value, library, own, hardware) if runs_here else found
        announce(f"compiling {library} into {cache.path}")
        build = Build(library, sources, cache.path, parts, hardware, runs_here)
    except (OSError, ProbeError) as error:
        return Probe(rejection=Rejection("compile-failed", f"the build cannot start: {error}"))
    try:
        return build.wait(verbose)
    except BaseException:
        build.stop()
        raise


def _open_to_readers(root: Path) -> None:
    """Let every user read what this package keeps in a cache, as with installed software.

    Nothing else is touched: somebody may set BITLINEAR_CACHE_DIR to their home directory.
    """
    entries = artifacts.entries(root)
    root = at(root)
    folders = {root, root / self_tests.FOLDER, *entries, *(entry.parent for entry in entries)}
    folders = {root, *filter(is_own_folder, folders)}
    files = [file for folder in folders - {root} for file in folder.iterdir()]
    for path in (*folders, *files):
        if path.is_symlink() or not path.exists():
            continue
        mode = stat.S_IMODE(path.stat().st_mode) | stat.S_IRGRP | stat.S_IROTH
        path.chmod(mode | stat.S_IXGRP | stat.S_IXOTH if path.is_dir() else mode)
