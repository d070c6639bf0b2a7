"""Compiled libraries in the cache: how one appears, what makes one valid, how one is pruned.

An entry is a directory that appears by one rename and never changes afterwards::

    <cache>/<library>/<key>/<library>.so    absent if the build failed
                            meta.json       every ingredient of the key in clear, and either the
                                            hash of the library or the failure
                            build.log       the output of the compiler
    <cache>/.self-tests/<digest>.json       results of self-tests, see self_tests.py
    <cache>/.staging/<random>/              an unfinished entry, which only its writer knows
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import self_tests
from .cache_directory import CacheDirectory, closed_folder, temporary_directory
from .failures import Failure
from .keys import COMPILER_INGREDIENTS, differences, key_of, serves
from .pinned import at, is_pinned, shown
from .rejection import Probe, Rejection
from .trust import is_own_folder, why_unsafe

META = "meta.json"
LOG = "build.log"
STAGING = ".staging"
LIBRARY_SUFFIX = ".pyd" if sys.platform == "win32" else ".so"  # cpp_extension.load appends it

_KEY = re.compile(r"[0-9a-f]{32}")
_KEEP = 8  # entries of one library
_KEEP_SECONDS = 24 * 3600.0  # entries used more recently than this stay
_STAGING_SECONDS = 3600.0  # twice the time that a build may take


@dataclass(frozen=True)
class Artifact:
    """A compiled library.

    Attributes:
        name: The library's name.
        key: Its key in the cache.
        directory: Where it lies.
        state: ``"cached"`` (found) or ``"built"`` (by this process).
        self_test: The result of the self-test on this hardware, in one line; empty before it ran.
        seconds: How long the build took.
        sha256: The hash of the library file.
    """

    name: str
    key: str
    directory: Path
    state: str
    self_test: str = ""
    seconds: float = 0.0
    sha256: str = ""

    @property
    def path(self) -> Path:
        """The library file."""
        return self.directory / (self.name + LIBRARY_SUFFIX)

    def tested(self, result: Probe[str]) -> Probe[Artifact]:
        """This artifact with the result of its self-test, or the rejection of a failed one."""
        if result.value is None:
            return Probe(rejection=result.rejection)
        return Probe(replace(self, self_test=result.value))


# --- Lookup --------------------------------------------------------------------------------------


def find(
    cache: CacheDirectory, parts: Mapping[str, str], can_build: bool
) -> Probe[Artifact] | None:
    """Look up an entry that serves where these ingredients are wanted; mark it as used now.

    Args:
        cache: The directories to look in.
        parts: The ingredients of the key.
        can_build: See :func:`bitlinear.runtime.keys.serves`.

    Returns:
        The artifact, or the rejection of a failure that is not to be tried again; None if nothing
        valid is there.
    """
    for root in cache.readable:
        for directory in _candidates(root, parts, can_build):
            entry = _read(directory, parts, can_build)
            if isinstance(entry, Failure):
                if entry.is_due() or directory.name != key_of(parts):
                    continue
                log = Path(shown(directory / LOG))
                return Probe(rejection=replace(entry.described(), log=log))
            if entry is not None:
                with contextlib.suppress(OSError):
                    os.utime(directory)  # prune() goes by this
                return Probe(entry)
    return None


def nearest(cache: CacheDirectory, parts: Mapping[str, str]) -> str:
    """Say why a library that the cache holds does not serve, in one line.

    Returns:
        Such as ``"the cache has ops for torch 2.12.0, not 2.13.0"``; empty if it has none at all.
    """
    name = parts["library"]
    best: tuple[int, str] | None = None
    for root in cache.readable:
        for directory in sorted((at(root) / name).glob("*")):
            if not _is_entry(directory):
                continue
            mismatch = _mismatch(directory, parts)
            if best is None or mismatch < best:
                best = mismatch
    return shown(best[1]) if best else ""


def _mismatch(directory: Path, parts: Mapping[str, str]) -> tuple[int, str]:
    """How far an entry is from serving where nothing can be built, and why it does not serve."""
    name = parts["library"]
    library = directory / (name + LIBRARY_SUFFIX)
    try:
        meta = json.loads((directory / META).read_bytes())
        found = meta["ingredients"]
        if found.keys() != parts.keys():
            return len(parts), f"the cache has {name} of another version of this package"
        different = [part for part in differences(found, parts) if part not in COMPILER_INGREDIENTS]
        if different:
            texts = [
                "other sources" if part == "sources" else f"{part} {found[part]}, not {parts[part]}"
                for part in different
            ]
            return len(different), f"the cache has {name} for {' and '.join(texts)}"
        if "failure" in meta:
            return 1, f"its build in {directory} failed"
        for path in (directory.parent, directory, directory / META, library):
            if problem := why_unsafe(path):
                return 0, f"{path} {problem}"
        if _digest(library) != meta["sha256"]:
            return 0, f"{library} is damaged: copy the directory again"
    except OSError as error:
        return 0, f"{error.filename or directory} cannot be read ({error.strerror})"
    except Exception:
        return 0, f"{directory / META} is damaged: copy the directory again"
    return 0, ""


def _candidates(root: Path, parts: Mapping[str, str], can_build: bool) -> Iterator[Path]:
    library = at(root) / parts["library"]
    yield library / key_of(parts)
    if not can_build or "architectures" in parts:
        yield from sorted(library.glob("*"))


def _read(directory: Path, parts: Mapping[str, str], can_build: bool) -> Artifact | Failure | None:
    # None: the entry is absent, damaged, writable by others, or does not serve.
    name = parts["library"]
    try:
        meta_file = directory / META
        if any(map(why_unsafe, [directory.parent, directory, meta_file])):
            return None
        meta = json.loads(meta_file.read_bytes())
        if not serves(meta["ingredients"], parts, can_build):
            return None
        if "failure" in meta:
            return Failure.from_json(meta["failure"])
        artifact = Artifact(
            name, directory.name, directory, "cached", "", meta["seconds"], meta["sha256"]
        )
        if why_unsafe(artifact.path):
            return None
        return artifact if _digest(artifact.path) == artifact.sha256 else None
    except Exception:  # a damaged file can raise anything
        return None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- Publication ---------------------------------------------------------------------------------


def new_staging(root: Path) -> Path:
    """Make a fresh directory that only this process knows.

    Raises:
        OSError: It cannot be made.
    """
    staging = closed_folder(at(root) / STAGING)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=staging))


def new_workplace(root: Path) -> Path:
    """Make a fresh directory to build in: inside the cache, unless a compiler could not find it.

    Raises:
        OSError: It cannot be made.
    """
    return temporary_directory() if is_pinned(root) else new_staging(root)


def publish(root: Path, artifact: Artifact, parts: Mapping[str, str]) -> Artifact:
    """Move an artifact from its staging directory to its place in the cache.

    If another process has published the same key before, its artifact is used. If the rename is
    impossible, the artifact serves from where it lies.

    Raises:
        OSError: The directory cannot be written to.
    """
    final = _final(root, parts)
    if isinstance(published := _read(final, parts, can_build=True), Artifact):
        remove(artifact.directory)
        return replace(published, state=artifact.state)
    artifact = replace(artifact, sha256=_digest(artifact.path))
    meta = {
        "seconds": artifact.seconds,
        "size": artifact.path.stat().st_size,
        "sha256": artifact.sha256,
    }
    kept = {META, LOG, artifact.path.name}
    directory = _publish(root, artifact.directory, meta, kept, parts)
    return replace(artifact, directory=directory)


def record_failure(
    root: Path, staging: Path, rejection: Rejection, parts: Mapping[str, str]
) -> Rejection:
    """Publish a failed build with the compiler's output, and count it.

    Raises:
        OSError: The directory cannot be written to.
    """
    earlier = _read(_final(root, parts), parts, can_build=True)
    failure = Failure.now(rejection, earlier if isinstance(earlier, Failure) else None)
    directory = _publish(root, staging, {"failure": failure.to_json()}, {META, LOG}, parts)
    return replace(rejection, log=Path(shown(directory / LOG)))


def _final(root: Path, parts: Mapping[str, str]) -> Path:
    return at(root) / parts["library"] / key_of(parts)


def _publish(
    root: Path, staging: Path, meta: dict[str, Any], kept: set[str], parts: Mapping[str, str]
) -> Path:
    built = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    meta = {"ingredients": dict(parts), "built": built, **meta}
    for leftover in staging.iterdir():
        if leftover.name not in kept:
            remove(leftover)
    (staging / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for file in staging.iterdir():
        file.chmod(file.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))  # see why_unsafe

    final = _final(root, parts)
    closed_folder(final.parent)
    remove(_move_away(root, final))  # a damaged entry or an earlier failure, if any
    try:
        if is_pinned(root):
            os.replace(shutil.copytree(staging, new_staging(root) / "entry"), final)
        else:
            os.replace(staging, final)
    except OSError:
        return staging
    return final


def _move_away(root: Path, directory: Path) -> Path:
    # In one step, so that nobody sees half an entry.
    away = new_staging(root)
    with contextlib.suppress(OSError):
        os.replace(directory, away / directory.name)
    return away


# --- Removal -------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Delete a file or a tree as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def entries(root: Path) -> list[Path]:
    """The directories of all entries, the most recently used first."""
    libraries = filter(is_own_folder, at(root).glob("*"))
    found = [entry for library in libraries for entry in library.glob("*") if _is_entry(entry)]
    found = [entry for entry in found if is_own_folder(entry) and (entry / META).is_file()]
    return sorted(found, key=_last_use, reverse=True)


def _is_entry(directory: Path) -> bool:
    return _KEY.fullmatch(directory.name) is not None


def prune(root: Path, now: float | None = None) -> None:
    """Delete entries that have not been used for long, and the remains of killed builds."""
    now = time.time() if now is None else now
    kept: dict[str, int] = {}
    for directory in entries(root):
        library = directory.parent.name
        kept[library] = kept.get(library, 0) + 1
        if kept[library] > _KEEP and now - _last_use(directory) > _KEEP_SECONDS:
            remove(directory)
    self_tests.prune(root)
    staging_folder = at(root) / STAGING
    for staging in staging_folder.glob("*") if is_own_folder(staging_folder) else ():
        if now - _last_use(staging) > _STAGING_SECONDS:
            remove(staging)


def contents(root: Path) -> str:
    """Name the libraries that a cache holds, in one line."""
    names = {entry.parent.name for entry in entries(root) if not _is_failure(entry)}
    return ", ".join(sorted(names)) or "no library"


def _is_failure(entry: Path) -> bool:
    return not (entry / (entry.parent.name + LIBRARY_SUFFIX)).exists()


def clean(root: Path) -> int:
    """Delete every entry, and nothing else that a user may keep there.

    Returns:
        How many are gone; some may stay in a directory that cannot be written to.
    """
    found = entries(root)
    for directory in found:
        remove(directory)
    remove(at(root) / self_tests.FOLDER)
    remove(at(root) / STAGING)
    return len(found) - len(entries(root))


def size(directory: Path) -> int:
    """Sum the bytes of all files below."""
    return sum(file.stat().st_size for file in at(directory).rglob("*") if file.is_file())


def _last_use(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except OSError:
        return 0.0
