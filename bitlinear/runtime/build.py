"""Compiling one library in a child process.

Compilers fail, get killed and hang, and a kernel for another CPU ends in a signal. The child
(``build_worker.py``) takes all that. :class:`Build` turns its end into an artifact or a rejection.
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
from pathlib import Path
from typing import Any

from ..kernels import CudaLibrary, Library
from ..kernels.flags import compiler_flags, linker_flags
from . import artifacts
from .artifacts import Artifact
from .build_environment import COMPILER_WRAPPER, child_environment, plain_directory
from .hardware import Hardware
from .keys import key_of, source_files
from .rejection import Probe, Rejection, rejected

BUILD_SECONDS = 1800.0  # a small Arm board needs minutes
REBUILD_FIX = (
    "python -m bitlinear.doctor --rebuild tries again, with --verbose it shows the commands"
)

_WORKER = Path(__file__).with_name("build_worker.py")
_POLL_SECONDS = 0.05

# The machine failed, not the source: the next import tries again.
_TRANSIENT = re.compile(
    r"Killed|[Nn]o space left|out of memory|[Cc]annot allocate|memory exhausted"
    r"|Input/output error|Stale file handle|died due to signal"
)
_ERROR_LINE = re.compile(r"\berror\b|\bfatal\b|\bundefined\b|unrecognized|not found", re.IGNORECASE)
_SENT_FROM_OUTSIDE = {
    getattr(signal, name, 0) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGXCPU")
}


class Build:
    """A child process that compiles, loads and tests one library.

    It works inside the cache, because a temporary directory may be mounted noexec or be another
    file system. ninja cannot read every path that the cache, torch or Python may lie in, so the
    child sees them through links in a directory with a plain name.

    Args:
        library: The library.
        sources: Where its sources lie.
        root: The cache directory.
        parts: The ingredients of its key.
        hardware: The machine.

    Raises:
        OSError: The child cannot be started.
    """

    def __init__(
        self,
        library: Library,
        sources: Path,
        root: Path,
        parts: Mapping[str, str],
        hardware: Hardware,
    ) -> None:
        self._name = library.name
        self._root = root
        self._parts = parts
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
        self, library: Library, sources: Path, hardware: Hardware
    ) -> subprocess.Popen[bytes]:
        build_directory = self._staging
        if os.name == "posix":  # Windows allows links to administrators only
            build_directory = self._links / "build"
            build_directory.symlink_to(self._staging)
        for name in source_files(library, sources):
            copy = self._staging / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(sources / name, copy)
        cuda = library if isinstance(library, CudaLibrary) else None
        spec: dict[str, Any] = {
            "name": library.name,
            "sources": [str(build_directory / name) for name in library.sources],
            "cflags": compiler_flags(library, hardware.system),
            "cuda_cflags": cuda.nvcc_flags if cuda else (),
            "ldflags": linker_flags(library, hardware.system),
            "build_directory": str(build_directory),
            "self_test": library.self_test,
            "devices": cuda.devices if cuda else (),
            "parent": os.getpid(),
        }
        spec_file = build_directory / "spec.json"
        spec_file.write_text(json.dumps(spec), encoding="utf-8")
        # Neither -m nor the path of a script: then modules of this folder would be importable under
        # their bare names and could shadow the standard library's.
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

    def wait(self, verbose: bool = False) -> Probe[Artifact]:
        """Wait for the child's end and publish the result.

        Args:
            verbose: Copy the compiler's output to stderr.
        """
        deadline = self._began + BUILD_SECONDS
        with open(self._staging / artifacts.LOG, encoding="utf-8", errors="replace") as log:
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                if verbose:
                    print(log.read(), end="", file=sys.stderr)
            if verbose:
                print(log.read(), file=sys.stderr)
        outcome, is_repeatable = self._outcome()
        if not is_repeatable:
            self.stop()
            return Probe(rejection=outcome.rejection)
        artifacts.remove(self._links)
        return self._publish(outcome)

    def _publish(self, outcome: Probe[str]) -> Probe[Artifact]:
        # If the cache cannot be written to, a full disk say, the result still serves this process.
        if outcome.rejection is not None:
            try:
                recorded = artifacts.record_failure(
                    self._root, self._staging, outcome.rejection, self._parts
                )
            except OSError:
                recorded = outcome.rejection
            return Probe(rejection=recorded)
        seconds = round(time.monotonic() - self._began, 1)
        key = key_of(self._parts)
        built = Artifact(self._name, key, self._staging, "built", outcome.value or "", seconds)
        try:
            return Probe(artifacts.publish(self._root, built, self._parts))
        except OSError:
            return Probe(built)

    def stop(self) -> None:
        """End the child and every process that it started, and remove its files."""
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
        """Send a signal to the child's process group; return whether it is soon empty."""
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

    def _outcome(self) -> tuple[Probe[str], bool]:
        """The self-test's result or a rejection, and whether a second build would end the same."""
        code = self._process.poll()
        log = (self._staging / artifacts.LOG).read_text(encoding="utf-8", errors="replace")
        log = log.replace(f"{self._links / 'build'}{os.sep}", "")
        try:
            result = json.loads((self._staging / "result.json").read_bytes())
        except (OSError, ValueError):
            result = {"stage": "set-up"}
        stage, error = result["stage"], result.get("error", "") or _last_line(log)

        if code == 0 and stage == "done":
            return Probe(result["self_test"]), True
        if code is None:
            reason = f"the compiler did not finish within {BUILD_SECONDS:.0f} s"
            return _failed("compile-failed", reason), False
        if code == -getattr(signal, "SIGILL", 4):
            reason = (
                "illegal instruction: the CPU, or a hypervisor, lacks a feature that it reports"
            )
            return _failed("illegal-instruction", reason), True
        if code < 0 and -code in _SENT_FROM_OUTSIDE:
            reason = f"the build was killed by {_signal_name(-code)} (out of memory?)"
            return _failed("compile-failed", reason), False
        if code < 0:
            error = f"crashed with {_signal_name(-code)}"
        if stage == "self-test":
            return _failed("self-test-failed", f"self-test failed: {error}"), True
        if stage == "device":
            reason = f"the self-test could not be run: {error}"
            fix = "see whether other programs occupy the GPU; the next import tries again"
            return _failed("compile-failed", reason, fix), False
        if stage == "load":
            return _failed("compile-failed", f"cannot be loaded: {error}"), True
        if stage == "compile":
            is_repeatable = not _TRANSIENT.search(log + error)
            return _failed("compile-failed", _compiler_line(log) or error), is_repeatable
        reason = f"the build could not start: {error}"
        return _failed("compile-failed", reason, "pip install setuptools"), False


def load_failure(name: str, error: Exception) -> Rejection:
    """Make the rejection of a library that was built but cannot be loaded into this process."""
    return Rejection("compile-failed", f"{name} cannot be loaded: {error}", REBUILD_FIX)


def _failed(code: str, reason: str, fix: str = REBUILD_FIX) -> Probe[str]:
    return rejected(code, reason, fix)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _compiler_line(log: str) -> str:
    """The line with the error: not the command, and not ninja's comment on it."""
    lines = [line.strip() for line in log.splitlines()]
    messages = (
        line
        for line in lines
        if COMPILER_WRAPPER not in line and not line.startswith(("FAILED:", "[", "ninja: build"))
    )
    return next((line for line in messages if _ERROR_LINE.search(line)), _last_line(log))


def _last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")
