"""Compiled libraries in the cache: how one appears, what makes one valid, how one is pruned.

An entry is a directory that appears by one rename and never changes afterwards::

    <cache>/<library>/<key>/<library>.so    absent if the build failed
                            meta.json       every ingredient of the key in clear, and either the
                                            hash of the library or the rejection
                            build.log       the output of the compiler
    <cache>/.staging/<random>/              an unfinished entry, which only its writer knows
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .cache_directory import CacheDirectory, why_unsafe
from .keys import COMPILER_INGREDIENTS, key_of
from .rejection import Probe, Rejection

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
    """A compiled library that passed its self-test.

    Attributes:
        name: The library's name.
        key: Its key in the cache.
        directory: Where it lies.
        state: ``"cached"`` (found) or ``"built"`` (by this process).
        self_test: The result of the self-test, in one line.
        seconds: How long the build took.
    """

    name: str
    key: str
    directory: Path
    state: str
    self_test: str = ""
    seconds: float = 0.0

    @property
    def path(self) -> Path:
        """The library file."""
        return self.directory / (self.name + LIBRARY_SUFFIX)


# --- Lookup --------------------------------------------------------------------------------------


def find(
    cache: CacheDirectory, parts: Mapping[str, str], any_compiler: bool
) -> Probe[Artifact] | None:
    """Look up the entry with these ingredients, and mark it as used now.

    Args:
        cache: The directories to look in.
        parts: The ingredients of the key.
        any_compiler: Accept an artifact that another compiler built, but not another's failure.

    Returns:
        The artifact, or the rejection of a recorded failure; None if nothing valid is there.
    """
    name = parts["library"]
    for root in cache.readable:
        directory = root / name / key_of(parts)
        entry = _read(directory, parts)
        if entry is None and any_compiler:
            for directory in (root / name).glob("*"):
                entry = _read(directory, parts, COMPILER_INGREDIENTS)
                if entry is not None and entry.value is not None:
                    break
                entry = None
        if entry is not None:
            with contextlib.suppress(OSError):
                os.utime(directory)  # prune() goes by this
            return entry
    return None


def _read(
    directory: Path, parts: Mapping[str, str], ignored: frozenset[str] = frozenset()
) -> Probe[Artifact] | None:
    # None: the entry is absent, damaged, writable by others, or for other ingredients.
    name = parts["library"]
    try:
        meta = json.loads((directory / META).read_bytes())
        found = meta["ingredients"]
        same = all(found[part] == parts[part] for part in parts.keys() - ignored)
        if why_unsafe(directory) or found.keys() != parts.keys() or not same:
            return None
        if "rejection" in meta:
            return Probe(rejection=Rejection(**meta["rejection"], log=directory / LOG))
        artifact = Artifact(name, directory.name, directory, "cached", **meta["result"])
        return Probe(artifact) if _digest(artifact.path) == meta["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- Publication ---------------------------------------------------------------------------------


def new_staging(root: Path) -> Path:
    """Make a fresh directory that only this process knows.

    Raises:
        OSError: It cannot be made.
    """
    (root / STAGING).mkdir(mode=0o700, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root / STAGING))


def publish(root: Path, artifact: Artifact, parts: Mapping[str, str]) -> Artifact:
    """Move an artifact from its staging directory to its place in the cache.

    If another process has published the same key before, its artifact is used. If the rename is
    impossible, the artifact serves from where it lies.

    Raises:
        OSError: The directory cannot be written to.
    """
    meta = {
        "result": {"self_test": artifact.self_test, "seconds": artifact.seconds},
        "size": artifact.path.stat().st_size,
        "sha256": _digest(artifact.path),
    }
    kept = {META, LOG, artifact.path.name}
    return replace(artifact, directory=_publish(root, artifact.directory, meta, kept, parts))


def record_failure(
    root: Path, staging: Path, rejection: Rejection, parts: Mapping[str, str]
) -> Rejection:
    """Publish a failure that the same ingredients would repeat, with the compiler's output.

    Raises:
        OSError: The directory cannot be written to.
    """
    recorded = {"code": rejection.code, "reason": rejection.reason, "fix": rejection.fix}
    directory = _publish(root, staging, {"rejection": recorded}, {META, LOG}, parts)
    return replace(rejection, log=directory / LOG)


def _publish(
    root: Path, staging: Path, meta: dict[str, Any], kept: set[str], parts: Mapping[str, str]
) -> Path:
    built = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    meta = {"ingredients": dict(parts), "built": built, **meta}
    for leftover in staging.iterdir():
        if leftover.name not in kept:
            remove(leftover)
    (staging / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    final = root / parts["library"] / key_of(parts)
    final.parent.mkdir(mode=0o700, exist_ok=True)
    if _read(final, parts) is not None:
        remove(staging)
        return final
    remove(_move_away(root, final))  # a damaged entry, if any
    try:
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
    found = [meta.parent for meta in root.glob(f"*/*/{META}") if _KEY.fullmatch(meta.parent.name)]
    return sorted(found, key=_last_use, reverse=True)


def prune(root: Path, now: float | None = None) -> None:
    """Delete entries that have not been used for long, and the remains of killed builds."""
    now = time.time() if now is None else now
    kept: dict[str, int] = {}
    for directory in entries(root):
        library = directory.parent.name
        kept[library] = kept.get(library, 0) + 1
        if kept[library] > _KEEP and now - _last_use(directory) > _KEEP_SECONDS:
            remove(directory)
    for staging in (root / STAGING).glob("*"):
        if now - _last_use(staging) > _STAGING_SECONDS:
            remove(staging)


def clean(root: Path) -> int:
    """Delete every entry, and nothing else that a user may keep there; return their number."""
    found = entries(root)
    for directory in found:
        remove(directory)
    remove(root / STAGING)
    return len(found)


def size(directory: Path) -> int:
    """Sum the bytes of all files below."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _last_use(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except OSError:
        return 0.0
