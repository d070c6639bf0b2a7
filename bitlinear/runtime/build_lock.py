"""The lock of a cache directory: one process at a time compiles, as far as possible."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from .pinned import at
from .progress import announce

LOCK_SECONDS = 1800.0  # as long as a build may take

_SILENT_SECONDS = 0.5  # a wait shorter than this needs no message
_POLL_SECONDS = 0.05
_FILE = ".lock"


@contextlib.contextmanager
def build_lock(root: Path | None, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock of a cache directory.

    The lock is an optimisation: it keeps several processes from compiling the same library. An
    artifact appears at once and complete, so a process may always go ahead without the lock. It
    does so without ``filelock``, on a file system without locks, and after ``seconds``. The
    operating system releases the lock of a process that dies.

    Args:
        root: The cache directory; None: there is nothing to lock.
        seconds: How long to wait for another process.
    """
    with contextlib.ExitStack() as held:
        if root is not None:
            _acquire(root, seconds, held)
        yield


def _acquire(root: Path, seconds: float, held: contextlib.ExitStack) -> None:
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        return
    file = at(root) / _FILE
    if file.is_symlink():  # opening it would empty another file
        with contextlib.suppress(OSError):
            file.unlink()
    lock = FileLock(file, mode=0o600)  # who can open it can hold it
    try:
        try:
            held.enter_context(lock.acquire(min(_SILENT_SECONDS, seconds), _POLL_SECONDS))
        except Timeout:
            # The lock does not name its owner, who may be on another host or in another container.
            announce(f"waiting for another process that compiles into {root}")
            held.enter_context(lock.acquire(seconds, _POLL_SECONDS))
    except (Timeout, OSError, NotImplementedError):
        return
