"""The cache directory: the first candidate that is safe and can be written to."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .pinned import at, opened, pin
from .trust import leads_through_foreign_link, why_replaceable, why_unsafe

_TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")
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
    ``~/.cache/bitlinear``. In one that other users can write to or could replace, or that belongs
    to another user, only a folder of this user's own serves, and is pinned.
    """
    path: Path | None = None
    problems: list[str] = []
    readable: list[Path] = []
    notes: list[str] = []
    unsafe = False
    override_problem = ""
    for number, candidate in enumerate(_candidates(environ)):
        directory = candidate
        problem = _create(candidate)
        danger = "" if problem else why_not_trusted(candidate)
        if danger:
            directory, problem = _own_folder(candidate, danger)
            unsafe = unsafe or bool(problem)
            if not problem:
                notes.append(f"{candidate} {danger}, so only {directory.name} in it is used")
        elif not problem:
            directory = Path(os.path.realpath(candidate))
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
        path = temporary_directory()
    except OSError as error:
        return replace(cache, reason=f"{cache.reason}; {error}")
    return replace(cache, path=path, temporary=True, readable=(*cache.readable, path))


def temporary_directory() -> Path:
    """Make a private directory, which nobody else can replace and from which code can be loaded.

    It vanishes when this process ends.

    Raises:
        OSError: There is none.
    """
    owner = os.getpid()

    def remove(path: str) -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(path, ignore_errors=True)

    problems = []
    for parent in temporary_parents():
        try:
            problem = why_replaceable(parent, entries=True) or why_unusable(parent)
            if not problem:
                path = tempfile.mkdtemp(prefix="bitlinear-", dir=os.path.realpath(parent))
                atexit.register(remove, path)
                return Path(path)
        except OSError as error:
            problem = str(error.strerror)
        problems.append(f"{parent}: {problem}")
    raise OSError(f"no temporary directory ({'; '.join(problems)})")


def temporary_parents() -> list[Path]:
    """The usual places for temporary files, best first."""
    chosen = os.environ.get("TMPDIR", "")
    # tempfile writes to a directory before it recommends it.
    if os.path.isabs(chosen) and os.path.exists(chosen) and why_replaceable(Path(chosen), True):
        return [Path(chosen), *map(Path, _TEMPORARY)]
    return [*map(Path, dict.fromkeys((tempfile.gettempdir(), *_TEMPORARY)))]


def closed_folder(path: Path) -> Path:
    """Make a folder in the cache that only this user can write to, or close one that is open.

    Raises:
        OSError: It cannot be made or closed, or it is not this user's or root's.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    if why_unsafe(path):
        with opened(path) as descriptor:
            if os.fstat(descriptor).st_uid == os.geteuid():
                os.fchmod(descriptor, 0o700)
        if problem := why_unsafe(path):
            raise PermissionError(errno.EPERM, problem, str(path))
    return path


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
        for parent in reversed(directory.parents):
            with contextlib.suppress(FileExistsError):
                parent.mkdir(mode=0o755)  # whatever the umask allows
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        return f"cannot be created ({error.strerror})"
    return ""


def why_not_trusted(directory: Path) -> str:
    """Say why code in a directory, which is not pinned, cannot be trusted; empty if it can."""
    # The way first: if it is safe, its end stays what it is.
    if problem := why_replaceable(directory):
        return why_unsafe(directory) or f"can be replaced by others ({problem})"
    return why_unsafe(directory)


def _own_folder(directory: Path, danger: str) -> tuple[Path, str]:
    """The folder of this user in a directory that others control, and why it cannot be used."""
    if leads_through_foreign_link(directory):
        return directory, f"{danger}, and a link of another user leads to it"
    own = directory / f"user-{os.geteuid()}"
    is_ours = False
    try:
        directory = Path(os.path.realpath(directory))
        own = directory / own.name
        with opened(directory) as parent:
            with contextlib.suppress(FileExistsError):
                os.mkdir(own.name, mode=0o700, dir_fd=parent)
            with opened(Path(own.name), parent) as descriptor:
                is_ours = os.fstat(descriptor).st_uid == os.geteuid()
                if is_ours:
                    # Some volumes open every folder to a group when they are mounted. Nobody else
                    # can enter from here on, and what was open to others does not count.
                    os.fchmod(descriptor, 0o700)
                    pin(own, descriptor)
                    return own, ""
    except OSError as error:
        if is_ours:
            return own, f"{danger}, and {own.name} in it cannot be pinned ({error})"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return own, danger
    return own, f"{danger}, and {own.name} in it is not this user's own folder"
