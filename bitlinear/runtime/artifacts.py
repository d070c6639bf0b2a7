"""Compiled libraries in the cache: what makes one valid, how one appears, how one goes.

An artifact is a directory that appears by one rename and is never changed afterwards::

    <cache>/<library>/<key>/<library>.so    absent where the result is that it cannot be had
                            meta.json       every ingredient of the key in clear, the .so's hash
                            build.log       what the compiler printed
    <cache>/.staging/<random>/              being built, seen by nobody else
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache_directory import CacheDirectory, unsafe
from .keys import COMPILER_INGREDIENTS, key

META = "meta.json"
LOG = "build.log"
STAGING = ".staging"
LIBRARY_SUFFIX = ".pyd" if sys.platform == "win32" else ".so"  # what cpp_extension.load appends


_KEY = re.compile(r"[0-9a-f]{32}")
_KEEP = 8  # artifacts of one library
_KEEP_SECONDS = 24 * 3600.0  # whatever was used more recently than this stays
_STAGING_SECONDS = 3600.0  # twice as long as any build is allowed to take


@dataclass(frozen=True)
class Artifact:
    """A library in the cache, or the recorded fact that it cannot be had.

    Attributes:
        name: The library's name.
        key: Its key; also the name of its directory.
        directory: Where it lies; None for a result that is not kept.
        state: "cached" (found), "built" (by this process) or "failed" (there is no library).
        self_test: What the self-test found.
        reason, fix, code: As in a Verdict; empty unless failed.
        seconds: How long the build took.
    """

    name: str
    key: str
    directory: Path | None
    state: str
    self_test: str = ""
    reason: str = ""
    fix: str = ""
    code: str = ""
    seconds: float = 0.0

    @property
    def path(self) -> Path:
        """The library file. Raises ValueError for a failed artifact."""
        if self.directory is None or self.state == "failed":
            raise ValueError(f"{self.name} is not available: {self.reason}")
        return self.directory / (self.name + LIBRARY_SUFFIX)


def find(cache: CacheDirectory, parts: Mapping[str, str], any_compiler: bool) -> Artifact | None:
    """The valid artifact for these ingredients, marked as used now; None if there is none.

    With `any_compiler`, one that another compiler built will do, but not another's failure.
    """
    name = parts["library"]
    for root in cache.readable:
        artifact = _read(root / name / key(parts), parts)
        if artifact is None and any_compiler:
            found = (_read(directory, parts, any_compiler) for directory in (root / name).glob("*"))
            artifact = next((a for a in found if a is not None and a.state == "cached"), None)
        if artifact is not None and artifact.directory is not None:
            with contextlib.suppress(OSError):
                os.utime(artifact.directory)  # pruning goes by this
            return artifact
    return None


def _read(directory: Path, parts: Mapping[str, str], any_compiler: bool = False) -> Artifact | None:
    """The artifact in `directory`; None if it is absent, damaged, foreign or for something else."""
    try:
        meta = json.loads((directory / META).read_bytes())
        if unsafe(directory) or not _same(meta["ingredients"], parts, any_compiler):
            return None
        artifact = Artifact(
            name=parts["library"],
            key=directory.name,
            directory=directory,
            state="failed" if meta["result"]["code"] else "cached",
            **meta["result"],
        )
        if artifact.state == "cached" and _digest(artifact.path) != meta["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return artifact


def _same(found: Mapping[str, str], wanted: Mapping[str, str], any_compiler: bool) -> bool:
    ignored = COMPILER_INGREDIENTS if any_compiler else frozenset()
    return found.keys() == wanted.keys() and all(
        found[name] == wanted[name] for name in wanted.keys() - ignored
    )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def new_staging(root: Path) -> Path:
    """A fresh directory that only this process knows.

    Raises:
        OSError: it cannot be made.
    """
    (root / STAGING).mkdir(mode=0o700, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root / STAGING))


def publish(root: Path, staging: Path, artifact: Artifact, parts: Mapping[str, str]) -> Artifact:
    """Turn `staging`, with the library and the log in it, into an artifact.

    Whoever comes second uses what the first one published, or, should that be impossible, its own
    copy where it lies.

    Raises:
        OSError: the directory cannot be written to.
    """
    library = staging / (artifact.name + LIBRARY_SUFFIX)
    meta: dict[str, Any] = {
        "ingredients": dict(parts),
        "result": {
            "self_test": artifact.self_test,
            "reason": artifact.reason,
            "fix": artifact.fix,
            "code": artifact.code,
            "seconds": artifact.seconds,
        },
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    kept = {META, LOG}
    if artifact.state != "failed":
        meta.update(size=library.stat().st_size, sha256=_digest(library))
        kept.add(library.name)
    for leftover in staging.iterdir():
        if leftover.name not in kept:
            remove(leftover)
    (staging / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    (root / artifact.name).mkdir(mode=0o700, exist_ok=True)
    final = root / artifact.name / artifact.key
    directory = staging
    if _read(final, parts) is None:
        remove(_moved_away(root, final))  # a damaged one, if any
        with contextlib.suppress(OSError):
            os.replace(staging, final)
            directory = final
    else:
        remove(staging)
        directory = final
    return Artifact(**{**vars(artifact), "directory": directory})


def _moved_away(root: Path, directory: Path) -> Path:
    """Take `directory` out of sight in one step; where it is now."""
    away = new_staging(root)
    with contextlib.suppress(OSError):
        os.replace(directory, away / directory.name)
    return away


def remove(path: Path) -> None:
    """Delete a file or a tree as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def artifacts(root: Path) -> list[Path]:
    """The directories of all artifacts, the most recently used first."""
    found = [meta.parent for meta in root.glob(f"*/*/{META}") if _KEY.fullmatch(meta.parent.name)]
    return sorted(found, key=_last_use, reverse=True)


def prune(root: Path, now: float | None = None) -> None:
    """Delete what has not been used for long, and what killed builds left behind."""
    now = time.time() if now is None else now
    kept: dict[str, int] = {}
    for directory in artifacts(root):
        kept[directory.parent.name] = kept.get(directory.parent.name, 0) + 1
        if kept[directory.parent.name] > _KEEP and now - _last_use(directory) > _KEEP_SECONDS:
            remove(directory)
    for staging in (root / STAGING).glob("*"):
        if now - _last_use(staging) > _STAGING_SECONDS:
            remove(staging)


def clean(root: Path) -> int:
    """Delete every artifact, and nothing else that a user may keep there; how many there were."""
    found = artifacts(root)
    for directory in found:
        remove(directory)
    remove(root / STAGING)
    return len(found)


def size(directory: Path) -> int:
    """Bytes of the files below."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _last_use(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except OSError:
        return 0.0
