"""Compiling one library in a child process.

Compilers fail, get killed and hang, and a kernel for another CPU ends in a signal: the child
(``build_worker.py``) takes all that, and what became of it is an :class:`~.artifacts.Artifact`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..kernels import CudaLibrary, Library
from . import artifacts
from .artifacts import Artifact
from .build_environment import COMPILER_WRAPPER, child_environment, plain_directory
from .hardware import Hardware
from .keys import key, source_files

BUILD_SECONDS = 1800.0  # a small Arm board needs minutes
FIX = "python -m bitlinear.doctor --rebuild tries again, with --verbose it shows the commands"

_WORKER = Path(__file__).with_name("build_worker.py")
_POLL_SECONDS = 0.05
# The machine failed, not the source: worth another try next time.
_TRANSIENT = re.compile(
    r"Killed|[Nn]o space left|out of memory|[Cc]annot allocate|memory exhausted"
    r"|Input/output error|Stale file handle|died due to signal"
)


_ERROR_LINE = re.compile(r"\berror\b|\bfatal\b|\bundefined\b|unrecognized|not found", re.IGNORECASE)


class Build:
    """A child process that compiles, loads and tests one library.

    The directory is inside the cache, because a temporary directory may be mounted noexec or be
    another file system. ninja cannot digest every path that it, torch or Python may lie in, so the
    child sees them through links in a directory with a plain name.

    Raises:
        OSError: the child cannot be started.
    """

    def __init__(
        self,
        library: Library,
        sources: Path,
        root: Path,
        parts: Mapping[str, str],
        hardware: Hardware,
    ) -> None:
        self._root = root
        self._parts = parts
        self._artifact = Artifact(library.name, key(parts), None, "failed")
        self._began = time.monotonic()
        self._staging = artifacts.new_staging(root)
        self._links = self._staging
        try:
            self._links = plain_directory(self._staging)
            self._process = self._start(library, sources, hardware)
        except BaseException:
            artifacts.remove(self._links)
            artifacts.remove(self._staging)
            raise

    def _start(
        self, library: Library, directory: Path, hardware: Hardware
    ) -> subprocess.Popen[bytes]:
        build_directory = self._staging
        if os.name == "posix":  # Windows allows links to administrators only
            build_directory = self._links / "build"
            build_directory.symlink_to(self._staging)
        for name in source_files(library, directory):
            copy = self._staging / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(directory / name, copy)
        cuda = library if isinstance(library, CudaLibrary) else None
        spec: dict[str, Any] = {
            "name": library.name,
            "sources": [str(build_directory / name) for name in library.sources],
            "cflags": library.cflags,
            "cuda_cflags": cuda.nvcc_flags if cuda else (),
            "ldflags": library.ldflags,
            "build_directory": str(build_directory),
            "self_test": library.self_test,
            "devices": cuda.devices if cuda else (),
            "parent": os.getpid(),
        }
        spec_file = build_directory / "spec.json"
        spec_file.write_text(json.dumps(spec), encoding="utf-8")
        # Neither -m nor a script: then this package's select.py would hide the standard library's.
        run = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        with open(self._staging / artifacts.LOG, "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", run, str(_WORKER), str(spec_file)],
                cwd=build_directory,
                env=child_environment(hardware, self._links),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, verbose: bool = False) -> Artifact:
        """Wait for the end and publish what came of it; `verbose` copies the log to stderr."""
        deadline = self._began + BUILD_SECONDS
        with open(self._staging / artifacts.LOG, encoding="utf-8", errors="replace") as log:
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                if verbose:
                    print(log.read(), end="", file=sys.stderr)
            if verbose:
                print(log.read(), file=sys.stderr)
        artifact, deterministic = self._outcome()
        artifact = replace(artifact, seconds=round(time.monotonic() - self._began, 1))
        if not deterministic:
            self.stop()
            return artifact
        artifacts.remove(self._links)
        try:
            return artifacts.publish(self._root, self._staging, artifact, self._parts)
        except OSError:  # the disk is full, say: it still serves this process
            return replace(artifact, directory=self._staging)

    def stop(self) -> None:
        """End the child and whatever it started, and leave nothing behind."""
        if os.name == "posix":
            # SIGTERM lets ninja end the compilers; the child itself may be dead already.
            if not self._end_group(signal.SIGTERM):
                self._end_group(signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()
        artifacts.remove(self._links)
        artifacts.remove(self._staging)

    def _end_group(self, number: int) -> bool:
        """Send a signal to the child's process group; whether that is empty soon after."""
        deadline = time.monotonic() + 5.0
        try:
            os.killpg(self._process.pid, number)
            while time.monotonic() < deadline:
                self._process.poll()
                os.killpg(self._process.pid, 0)
                time.sleep(_POLL_SECONDS)
        except OSError:  # no such group, or on macOS one of zombies
            return True
        return False

    def _outcome(self) -> tuple[Artifact, bool]:
        """What the child's end means, and whether it would end the same way again."""
        code = self._process.poll()
        log = (self._staging / artifacts.LOG).read_text(encoding="utf-8", errors="replace")
        log = log.replace(f"{self._links / 'build'}{os.sep}", "")
        try:
            result = json.loads((self._staging / "result.json").read_bytes())
        except (OSError, ValueError):
            result = {"stage": "set-up"}
        stage, error = result["stage"], result.get("error", "") or _last_line(log)

        if code is None:
            return self._failed("compile-failed", "the compiler did not come to an end"), False
        if code == 0 and stage == "done":
            return replace(self._artifact, state="built", self_test=result["self_test"]), True
        if code == -getattr(signal, "SIGILL", 4):
            reason = "illegal instruction: the CPU, or a hypervisor, lacks what it reports"
            return self._failed("illegal-instruction", reason), True
        if code < 0 and -code in _FROM_OUTSIDE:
            reason = f"the build was killed by {_name_of_signal(-code)} (out of memory?)"
            return self._failed("compile-failed", reason), False
        if code < 0:
            error = f"crashed with {_name_of_signal(-code)}"
        if stage == "self-test":
            return self._failed("self-test-failed", f"self-test failed: {error}"), True
        if stage == "device":
            reason = f"the self-test could not be run: {error}"
            fix = "see whether other programs occupy the GPU; the next import tries again"
            return self._failed("compile-failed", reason, fix), False
        if stage == "load":
            return self._failed("compile-failed", f"cannot be loaded: {error}"), True
        if stage == "compile":
            deterministic = not _TRANSIENT.search(log + error)
            return self._failed("compile-failed", _compiler_line(log) or error), deterministic
        reason = f"the build could not start: {error}"
        return self._failed("compile-failed", reason, "pip install setuptools"), False

    def _failed(self, code: str, reason: str, fix: str = FIX) -> Artifact:
        return replace(self._artifact, state="failed", code=code, reason=reason, fix=fix)


_FROM_OUTSIDE = {
    getattr(signal, name, 0) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGXCPU")
}


def _name_of_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _compiler_line(log: str) -> str:
    """The line that says what is wrong: not the command, and not what ninja makes of it."""
    lines = [line.strip() for line in log.splitlines()]
    messages = (
        line
        for line in lines
        if COMPILER_WRAPPER not in line and not line.startswith(("FAILED:", "[", "ninja: build"))
    )
    return next((line for line in messages if _ERROR_LINE.search(line)), _last_line(log))


def _last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")
