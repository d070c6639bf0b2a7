"""What other users can change: a cache holds code that runs as this user."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_ROOT = 0  # the user who builds images and installs software
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
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written to by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def is_own_folder(path: Path) -> bool:
    """Whether it is a directory, no link to one, which only this user or root can change."""
    return path.is_dir() and not path.is_symlink() and not why_unsafe(path)


def why_replaceable(path: Path) -> str:
    """Say who else can put something in the place of a path; empty if only this user and root can.

    Args:
        path: An absolute path to what exists.
    """
    if not hasattr(os, "geteuid"):
        return ""
    try:
        for directory, status in _on_the_way(path):
            if status.st_uid not in (os.geteuid(), _ROOT):
                return f"{directory} belongs to user {status.st_uid}"
            # In a sticky directory, only the owner of an entry can rename it.
            is_open = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if stat.S_ISDIR(status.st_mode) and is_open and not status.st_mode & stat.S_ISVTX:
                mode = stat.S_IMODE(status.st_mode)
                return f"{directory} can be written to by others (mode {mode:04o})"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return ""


def _on_the_way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The directories and symbolic links that a path leads through, without its end.

    What one of them says does not change while everything before it is safe.
    """
    links = 0
    here, rest = Path(path.anchor), [*path.parts[1:]]
    while rest:
        yield here, os.lstat(here)
        name, *rest = rest
        entry = here.parent if name == ".." else here / name
        if not entry.is_symlink():
            here = entry
            continue
        yield entry, os.lstat(entry)
        links += 1
        if links > _LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = here / os.readlink(entry)
        here, rest = Path(target.anchor), [*target.parts[1:], *rest]
