"""What a probe of the machine finds, and the two ways to probe: a file and a command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True)
class Probe(Generic[T]):
    """What a probe found: a value, or the reason why there is none; never both.

    Raises:
        ValueError: Both or neither were given.
    """

    value: T | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) == (not self.reason):
            raise ValueError(
                f"a probe has a value or a reason, got {self.value!r}, {self.reason!r}"
            )


def file_text(path: str) -> Probe[str]:
    """Read a file."""
    try:
        return Probe(Path(path).read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        return Probe(reason=f"{path} cannot be read: {error}")


def command_output(command: list[str]) -> Probe[str]:
    """Standard output of a command that succeeds."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Probe(reason=f"{shlex.join(command)}: {error}")
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        return Probe(reason=f"{shlex.join(command)} failed with {done.returncode}: {lines[0]}")
    if not done.stdout.strip():
        return Probe(reason=f"{shlex.join(command)} printed nothing")
    return Probe(done.stdout.decode(errors="replace"))


def has_interpreter() -> bool:
    """Whether this Python can be started again (not if it is part of a program)."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)
