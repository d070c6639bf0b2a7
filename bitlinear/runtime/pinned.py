"""Directories that others could replace: opened once, then used through the open descriptor.

Whoever owns a parent of a directory, or can write to it, can put another directory in its place at
any moment, also between the check of a file and its use. A descriptor stays with the directory that
was checked. File operations go through it, by way of ``/proc``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_pinned: dict[Path, tuple[int, object]] = {}  # a descriptor, and what it must lead to


def others_can_replace(path: Path) -> bool:
    """Tell whether a user other than this one and root can rename a directory, or a parent of it.

    Args:
        path: An absolute path without symbolic links, to a directory of this user or of root.
    """
    return hasattr(os, "geteuid") and any(map(_others_control, path.parents))


def _others_control(directory: Path) -> bool:
    try:
        status = directory.stat()
    except OSError:
        return True
    if status.st_uid not in (os.geteuid(), 0):
        return True
    # In a sticky directory, only the owner of an entry can rename it.
    is_open = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return bool(is_open) and not status.st_mode & stat.S_ISVTX


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a directory; the last part of its path is no symbolic link.

    Raises:
        OSError: It cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def pin(path: Path, descriptor: int) -> None:
    """From now on :func:`at` leads to this open directory, whatever happens to its name.

    Args:
        path: Its name.
        descriptor: What :func:`opened` gave; a copy is kept.

    Raises:
        OSError: This system has no path to an open directory, or not for child processes.
    """
    # The links of a process that has changed its user belong to root, and its children fail there.
    if os.stat("/proc/self/fd").st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "/proc/self/fd belongs to another user")
    os.stat(f"{_link(descriptor)}/.")
    identity = _identity(descriptor)
    earlier, known = _pinned.get(path, (-1, None))
    if known == identity == _identity(earlier):
        return
    _pinned[path] = os.dup(descriptor), identity


def at(root: Path) -> Path:
    """Return the path that file operations in a directory of the cache must take.

    It leads to the same directory in this process and in its children, while this process lives.

    Raises:
        OSError: This process has closed the descriptor.
    """
    if root not in _pinned:
        return root
    descriptor, identity = _pinned[root]
    if _identity(descriptor) != identity:
        raise OSError(errno.EBADF, f"the descriptor of {root} was closed")
    return Path(_link(descriptor))


def shown(text: object) -> str:
    """Return a text with the names of directories instead of the paths to them."""
    result = str(text)
    for root, (descriptor, _) in _pinned.items():
        result = result.replace(f"{_link(descriptor)}/", f"{root}/")
    return result


def _link(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino
