"""One process at a time builds in a cache directory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import artifacts
from .progress import announce

LOCK_SECONDS = 1800.0  # as long as a build may take

_POLL_SECONDS = 0.05


@contextlib.contextmanager
def build_lock(root: Path | None, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """One process at a time builds in `root`, as far as possible: an optimisation, no more.

    Whoever finds the owner dead, or has waited for `seconds`, goes ahead: what is published appears
    at once and complete, whoever does it.
    """
    release = None if root is None else _acquire(root, time.monotonic() + seconds)
    try:
        yield
    finally:
        if release is not None:
            release()


def _acquire(root: Path, deadline: float) -> Callable[[], None] | None:
    """Wait for the lock; how to release it, or None if it was not to be had."""
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        return None
    file_lock, owner = FileLock(root / ".lock"), root / ".lock.owner"

    def release() -> None:
        artifacts.remove(owner)
        file_lock.release()

    announced = dead_before = False
    while True:
        try:
            file_lock.acquire(timeout=0.5, poll_interval=_POLL_SECONDS)
        except Timeout:
            holder = _holder(owner)
            dead = holder is not None and _is_dead(holder)
            if time.monotonic() > deadline or (dead and dead_before):
                return None
            dead_before = dead  # twice: the next owner may be about to write its name
            if holder is not None and not announced:
                announced = True
                announce(f"waiting for process {holder[0]} on host {holder[1]}, which is compiling")
        except (OSError, NotImplementedError):  # this file system knows no locks
            return None
        else:
            with contextlib.suppress(OSError):
                owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            return release


def _holder(owner: Path) -> tuple[int, str] | None:
    try:
        found = json.loads(owner.read_bytes())
        return int(found["pid"]), str(found["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_dead(holder: tuple[int, str]) -> bool:
    pid, host = holder
    if os.name != "posix" or host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
