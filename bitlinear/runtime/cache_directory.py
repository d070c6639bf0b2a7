"""The cache directory: the first candidate that is safe and can be written to."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .pinned import at, opened, others_can_replace, pin

_ROOT = 0  # the user who builds images and installs software
_FILES = 8  # as many as are open at once; a process may be limited
_FILE = 2 << 20  # larger than any file of a build for CPUs


class CacheVanishedError(OSError):
    """Somebody has deleted the cache, or the part of it that a build works in."""


@dataclass(frozen=True)
class CacheDirectory:
    """Where artifacts are written to and read from.

    Attributes:
        path: The directory for new artifacts; None: no candidate can be written to.
        reason: Why it is not the first candidate; empty if it is.
        temporary: Whether it vanishes when this process ends.
        unsafe: Whether a candidate was skipped because other users could put code into it.
        readable: Every directory to look for artifacts in, best first, read-only ones included.
        override_problem: Why BITLINEAR_CACHE_DIR is not even read; empty if it is, or is not set.
        note: Which directories serve only with a folder in them, and why; usually empty.
    """

    path: Path | None
    reason: str = ""
    temporary: bool = False
    unsafe: bool = False
    readable: tuple[Path, ...] = ()
    override_problem: str = ""
    note: str = ""

    def without(self, root: Path, problem: str) -> CacheDirectory:
        """Give up a directory that turned out to be of no use."""
        readable = tuple(path for path in self.readable if path != root)
        reason = "; ".join(filter(None, [self.reason, f"{root} {problem}"]))
        if root != self.path:
            return replace(self, readable=readable, reason=reason)
        return replace(self, path=None, readable=readable, reason=reason, temporary=False)


def open_cache(environ: Mapping[str, str] = os.environ) -> CacheDirectory:
    """Open the first candidate that is safe and can be written to, and create it if needed.

    The candidates are ``BITLINEAR_CACHE_DIR``, ``$XDG_CACHE_HOME/bitlinear`` and
    ``~/.cache/bitlinear``. In one that other users can write to, or that belongs to another user,
    only a folder of this user's own serves. A directory that others could replace is pinned.
    """
    path: Path | None = None
    problems: list[str] = []
    readable: list[Path] = []
    notes: list[str] = []
    unsafe = False
    override_problem = ""
    for number, candidate in enumerate(_candidates(environ)):
        directory = Path(os.path.realpath(candidate))
        problem = _create(candidate)
        if not problem and (danger := why_unsafe(directory)):
            directory, problem = _own_folder(directory)
            unsafe = unsafe or bool(problem)
            if not problem:
                notes.append(f"{candidate} {danger}, so only {directory.name} in it is used")
        if not problem and (problem := _pin(directory)):
            unsafe = True
        problem = problem or _why_unreadable(directory)
        if number == 0 and problem and environ.get("BITLINEAR_CACHE_DIR"):
            override_problem = f"{candidate} {problem}"
        if not problem:
            readable.append(directory)
            problem = why_unusable(directory)
        if not problem:
            path = directory
            break
        problems.append(f"{candidate} {problem}")
    return CacheDirectory(
        path=path,
        reason="; ".join(problems),
        unsafe=unsafe,
        readable=tuple(readable),
        override_problem=override_problem,
        note="; ".join(notes),
    )


def with_temporary(cache: CacheDirectory) -> CacheDirectory:
    """Add a private temporary directory to a cache that cannot be written to."""
    if cache.path is not None:
        return cache
    try:
        path = Path(tempfile.mkdtemp(prefix="bitlinear-")).resolve()
    except OSError as error:
        return replace(cache, reason=f"{cache.reason}; {error}")
    problem = _pin(path)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(at(path), ignore_errors=True)
            with contextlib.suppress(OSError):
                path.rmdir()

    atexit.register(remove)
    if problem := problem or why_unusable(path):
        return replace(cache, reason=f"{cache.reason}; {path} {problem}")
    return replace(cache, path=path, temporary=True, readable=(*cache.readable, path))


def closed_folder(path: Path) -> Path:
    """Make a folder in the cache that only this user can write to, or close one that is open.

    Raises:
        OSError: It cannot be made or closed.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    if why_unsafe(path):
        path.chmod(0o700)
        if problem := why_unsafe(path):  # root can close what belongs to others
            raise PermissionError(errno.EPERM, problem, str(path))
    return path


def why_unsafe(path: Path | int) -> str:
    """Say why code in a directory, or a file, cannot be trusted; empty if it can.

    It can if only this user or root can change it. A symbolic link must be theirs as well.

    Args:
        path: The path, or the descriptor of what is open.
    """
    if not hasattr(os, "geteuid"):
        return ""
    try:
        status = os.stat(path)
        owners = {status.st_uid, status.st_uid if isinstance(path, int) else os.lstat(path).st_uid}
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    for owner in owners - {os.geteuid(), _ROOT}:
        return f"belongs to user {owner}, not to user {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written to by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _why_unreadable(directory: Path) -> str:
    effective = os.access in os.supports_effective_ids
    if os.access(at(directory), os.R_OK | os.X_OK, effective_ids=effective):
        return ""
    return "cannot be read (Permission denied)"


def why_unusable(directory: Path, size: int = 1) -> str:
    """Say why nothing can be built in a directory; empty if something can.

    Args:
        directory: An existing directory.
        size: How many bytes must fit, also into the user's quota.
    """
    try:
        directory = at(directory)
        with contextlib.ExitStack() as files:
            step = max(_FILE, size // _FILES)
            for begin in range(0, size, step):
                file = files.enter_context(tempfile.TemporaryFile(dir=directory, buffering=0))
                rest = bytes(min(step, size - begin))
                while rest:  # a short write is followed by the reason
                    rest = rest[file.write(rest) :]
        if hasattr(os, "statvfs") and os.statvfs(directory).f_flag & getattr(os, "ST_NOEXEC", 0):
            return "is mounted noexec"
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    return ""


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    if chosen := environ.get("BITLINEAR_CACHE_DIR"):
        yield Path(os.path.abspath(os.path.expanduser(chosen)))
    if os.path.isabs(xdg := environ.get("XDG_CACHE_HOME", "")):  # XDG: ignore a relative path
        yield Path(xdg, "bitlinear")
    if os.path.isabs(home := os.path.expanduser("~")):
        yield Path(home, ".cache", "bitlinear")


def _create(directory: Path) -> str:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be created ({error.strerror})"
    return ""


def _own_folder(directory: Path) -> tuple[Path, str]:
    """The folder of this user in a directory that others control, and why it cannot be used."""
    problem = why_unsafe(directory)
    own = directory / f"user-{os.geteuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        pass  # a file, and refused as such
    except OSError:
        return directory, problem
    try:
        with opened(own) as descriptor:
            if os.fstat(descriptor).st_uid != os.geteuid():
                raise PermissionError
            # Some volumes open every folder to a group when they are mounted. Nobody else can enter
            # from here on, and an entry that was open to others does not count (see why_unsafe).
            os.fchmod(descriptor, 0o700)
    except OSError:
        return directory, f"{problem}, and {own.name} in it is not this user's own folder"
    return own, ""


def _pin(directory: Path) -> str:
    """Pin a directory if others could replace it; say why it cannot be trusted, if so."""
    if not others_can_replace(directory):
        return ""
    try:
        with opened(directory) as descriptor:
            problem = why_unsafe(descriptor)
            if not problem:
                pin(directory, descriptor)
            return problem
    except OSError as error:
        return f"can be replaced by others, and cannot be pinned ({error.strerror})"
