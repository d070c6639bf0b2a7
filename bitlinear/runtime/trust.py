"""What other users can change: a cache holds code that runs as this user."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_ROOT = 0  # the user who builds images and installs software
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_LINKS = 40  # as many as Linux follows


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
        owners = (
            {status.st_uid} if isinstance(path, int) else {status.st_uid, os.lstat(path).st_uid}
        )
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    for owner in owners - {os.geteuid(), _ROOT}:
        return f"belongs to user {owner}, not to user {os.geteuid()}"
    if status.st_mode & _OTHERS_WRITE:
        return f"can be written to by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def belongs_to_others(path: str) -> bool:
    """Whether a path leads to what another user owns, and root does not."""
    try:
        return hasattr(os, "geteuid") and os.stat(path).st_uid not in (os.geteuid(), _ROOT)
    except OSError:
        return False


def is_own_folder(path: Path) -> bool:
    """Whether it is a directory, no link to one, which only this user or root can change."""
    return path.is_dir() and not path.is_symlink() and not why_unsafe(path)


def why_replaceable(path: Path, entries: bool = False) -> str:
    """Say who else can put something in the place of a path; empty if only this user and root can.

    Args:
        path: An absolute path to what exists.
        entries: Judge the place of the entries of that directory too.
    """
    return _judge(path, entries)[0]


def leads_through_foreign_link(path: Path) -> bool:
    """Whether another user has laid a symbolic link on the way, and so chosen where it leads."""
    return _judge(path)[1]


def _judge(path: Path, entries: bool = False) -> tuple[str, bool]:
    if not hasattr(os, "geteuid"):
        return "", False
    owners = {os.geteuid(), _ROOT, *_unmapped_owner()}
    problem, has_foreign_link = "", False
    try:
        for entry, status, is_end in _on_the_way(path):
            is_foreign = status.st_uid not in owners
            is_link = stat.S_ISLNK(status.st_mode)
            has_foreign_link = has_foreign_link or (is_foreign and is_link)
            # In a sticky directory, only the owner of an entry can rename it.
            is_open, is_sticky = status.st_mode & _OTHERS_WRITE, status.st_mode & stat.S_ISVTX
            if problem:
                continue
            if is_foreign:
                problem = f"{entry} belongs to user {status.st_uid}"
            elif (entries or not is_end) and is_open and not (is_link or is_sticky):
                mode = stat.S_IMODE(status.st_mode)
                problem = f"{entry} can be written to by others (mode {mode:04o})"
    except OSError as error:
        problem = problem or f"{error.filename} cannot be read ({error.strerror})"
    return problem, has_foreign_link


def _on_the_way(path: Path) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """The directories and symbolic links that a path leads through, and at last its end.

    What one of them says does not change while everything before it is safe.
    """
    links = 0
    here, rest = Path(path.anchor), [*path.parts[1:]]
    while rest:
        yield here, os.lstat(here), False
        name, *rest = rest
        entry = here.parent if name == ".." else here / name
        if not entry.is_symlink():
            here = entry
            continue
        yield entry, os.lstat(entry), False
        links += 1
        if links > _LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = here / os.readlink(entry)
        here, rest = Path(target.anchor), [*target.parts[1:], *rest]
    yield here, os.lstat(here), True


@functools.cache
def _unmapped_owner() -> tuple[int, ...]:
    """The owner that the system shows for users outside of this user namespace; root is one.

    Rootless containers show it for ``/`` and ``/tmp``. It does not tell root from other users, so
    it counts on the way to a file only, and not for the file itself.
    """
    with contextlib.suppress(OSError, ValueError):
        inside, _, count = Path("/proc/self/uid_map").read_text(encoding="ascii").split()[:3]
        if (int(inside), int(count)) != (0, 2**32 - 1):
            return (int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii")),)
    return ()
