"""Where compiled kernels lie between processes: the first directory that is safe and writable."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class CacheDirectory:
    """Where artifacts are written to and read from.

    Attributes:
        path: The directory for new artifacts; None: there is none that can be written to.
        reason: Why it is not the first one asked for; empty if it is.
        temporary: It vanishes when this process ends.
        unsafe: A directory was refused because other users could put code into it.
        readable: Every directory to look for artifacts in, best first, read-only ones included.
        refused: Why BITLINEAR_CACHE_DIR is not even read; empty if it is, or is not set.
    """

    path: Path | None
    reason: str = ""
    temporary: bool = False
    unsafe: bool = False
    readable: tuple[Path, ...] = ()
    refused: str = ""


def open_cache(environ: Mapping[str, str] = os.environ) -> CacheDirectory:
    """The first candidate that is safe and can be written to."""
    reasons: list[str] = []
    readable: list[Path] = []
    is_unsafe = False
    refused = ""
    for candidate in _candidates(environ):
        reason = _make(candidate)
        directory = Path(os.path.realpath(candidate))
        if not reason and (reason := unsafe(directory)):
            is_unsafe = True
        elif not reason:
            readable.append(directory)
            if not (reason := unusable(directory)):
                break
        reasons.append(f"{candidate} {reason}")
        if not readable and not refused and environ.get("BITLINEAR_CACHE_DIR"):
            refused = reasons[0]
    else:
        directory = None
    return CacheDirectory(directory, "; ".join(reasons), False, is_unsafe, tuple(readable), refused)


def with_temporary(cache: CacheDirectory) -> CacheDirectory:
    """`cache`, with a private temporary directory if it has none to write to."""
    if cache.path is not None:
        return cache
    try:
        path = Path(tempfile.mkdtemp(prefix="bitlinear-")).resolve()
    except OSError as error:
        return replace(cache, reason=f"{cache.reason}; {error}")
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    if reason := unusable(path):
        return replace(cache, reason=f"{cache.reason}; {path} {reason}")
    return replace(cache, path=path, temporary=True, readable=(*cache.readable, path))


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    if chosen := environ.get("BITLINEAR_CACHE_DIR"):
        yield Path(os.path.abspath(os.path.expanduser(chosen)))
    if os.path.isabs(xdg := environ.get("XDG_CACHE_HOME", "")):  # relative: to be ignored (XDG)
        yield Path(xdg, "bitlinear")
    if os.path.isabs(home := os.path.expanduser("~")):
        yield Path(home, ".cache", "bitlinear")


def _make(directory: Path) -> str:
    """Make sure that it exists; the reason if it cannot."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be created ({error.strerror})"
    return ""


def unsafe(directory: Path) -> str:
    """Why code in `directory` cannot be trusted; empty if it can."""
    if not hasattr(os, "geteuid"):
        return ""
    try:
        status = directory.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to user {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written to by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def unusable(directory: Path) -> str:
    """Why nothing can be built in `directory`; empty if something can."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
        if hasattr(os, "statvfs") and os.statvfs(directory).f_flag & getattr(os, "ST_NOEXEC", 0):
            return "is mounted noexec"
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    return ""
