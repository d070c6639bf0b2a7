"""Directories that others could replace: opened once, then used through the open descriptor.

Whoever owns a directory above another one, or can write to it, can put something else in its place
at any moment, also between the check of a file and its use. A descriptor stays with the directory
that was checked. File operations go through it, by way of ``/proc``. Only this process has that
path, and children that inherit the descriptor; a compiler, which starts others, works elsewhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_pinned: dict[Path, tuple[int, os.stat_result]] = {}  # a descriptor, and what it must lead to


@contextlib.contextmanager
def opened(path: Path, parent: int | None = None) -> Iterator[int]:
    """Open a directory; the last part of its path is no symbolic link.

    Args:
        path: Its path, relative to ``parent`` if that is given.
        parent: The descriptor of an open directory.

    Raises:
        OSError: It cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
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
        OSError: This system has no path to an open directory.
    """
    status = os.fstat(descriptor)
    if not os.path.samestat(os.stat(f"{_link(descriptor)}/."), status):
        raise OSError("/proc shows other processes than this one's")  # of another namespace
    if not _is_pinned(path, status):
        _pinned[path] = os.dup(descriptor), status


def at(root: Path) -> Path:
    """Return the path that file operations in a directory of the cache must take.

    Raises:
        OSError: This process has closed the descriptor.
    """
    if root not in _pinned:
        return root
    descriptor, status = _pinned[root]
    if not _is_pinned(root, status):
        raise OSError(f"the descriptor of {root} was closed")
    return Path(_link(descriptor))


def is_pinned(root: Path) -> bool:
    """Whether a directory is used through its descriptor."""
    return root in _pinned


def descriptors() -> list[int]:
    """The descriptors that a child must inherit to follow the paths."""
    return [descriptor for descriptor, _ in _pinned.values()]


def shown(text: object) -> str:
    """Return a text with the names of directories instead of the paths to them."""
    result = str(text)
    for root, (descriptor, _) in _pinned.items():
        result = result.replace(f"{_link(descriptor)}/", f"{root}/")
    return result


def _link(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _is_pinned(path: Path, status: os.stat_result) -> bool:
    # If the program has closed the descriptor, the next file that it opens gets the number.
    with contextlib.suppress(KeyError, OSError):
        return os.path.samestat(os.fstat(_pinned[path][0]), status)
    return False
