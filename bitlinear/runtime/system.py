"""Questions to the operating system: a file, a command, the boot."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path


class ProbeError(Exception):
    """The system gives no answer; the message says why, in one line."""


def file_text(path: str) -> str:
    """Read a file; return an empty text if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def boot_id() -> str:
    """Name the boot of the machine; return an empty text if the system does not tell."""
    return file_text("/proc/sys/kernel/random/boot_id")


def command_output(
    command: list[str],
    timeout: float = 30.0,
    environment: Mapping[str, str] = os.environ,
    *,
    shown: str = "",
    with_errors: bool = False,
) -> str:
    """Run a command and return its standard output.

    Args:
        command: The program and its arguments.
        timeout: In seconds.
        environment: The environment of the command; its messages are in English.
        shown: What error messages call the command; empty: the command itself.
        with_errors: Return its standard error, too, in front.

    Raises:
        ProbeError: The command fails, prints nothing or takes longer than ``timeout`` seconds.
    """
    shown = shown or shlex.join(command)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            env={**environment, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ProbeError(f"{shown}: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise ProbeError(f"{shown} failed with {done.returncode}: {lines[0]}")
    output = done.stderr + done.stdout if with_errors else done.stdout
    if not output.strip():
        raise ProbeError(f"{shown} printed nothing")
    return output.decode(errors="replace")
