"""Compiling one library in a child process, and testing one.

Compilers fail, get killed and hang, and a kernel for another CPU ends in a signal. The child
(``build_worker.py``) takes all that. ``diagnosis.py`` explains its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..kernels import CudaLibrary, Library, Variant
from ..kernels.flags import compiler_flags, linker_flags
from . import artifacts, self_tests
from .artifacts import LIBRARY_SUFFIX, Artifact
from .build_environment import build_environment, plain_directory, plain_import_path
from .cache_directory import CacheVanishedError
from .children import child_environment, import_path, python_command
from .diagnosis import explain_build, explain_self_test
from .hardware import Hardware
from .keys import key_of, self_test_machine, source_files
from .pinned import descriptors
from .progress import write
from .rejection import Probe, Rejection
from .system import ProbeError

BUILD_SECONDS = 1800.0  # a small Arm board needs minutes
SELF_TEST_SECONDS = 120.0  # of a library that is compiled already; it takes 0.1 s, a GPU a few

Report = dict[str, Any]
"""What the child reports; see ``build_worker.py``."""

_WORKER = Path(__file__).with_name("build_worker.py")
_POLL_SECONDS = 0.02


class Build:
    """A child process that compiles, loads and tests one library.

    It works inside the cache if it can, because a temporary directory may be another file system.
    ninja cannot read every path that the cache, torch or Python may lie in, so the
    child sees them through links in a directory with a plain name.

    Args:
        library: The library.
        sources: Where its sources lie.
        root: The cache directory.
        parts: The ingredients of its key.
        hardware: The machine.
        self_test: Whether this machine can run the library.

    Raises:
        CacheVanishedError: Somebody deletes the cache.
        OSError, ProbeError: The child cannot be started.
    """

    def __init__(
        self,
        library: Library,
        sources: Path,
        root: Path,
        parts: Mapping[str, str],
        hardware: Hardware,
        self_test: bool = True,
    ) -> None:
        self._library = library
        self._root = root
        self._parts = parts
        self._hardware = hardware
        self._sources = source_files(library, sources)
        self._began = time.monotonic()
        self._staging = self._links = root
        try:
            self._staging = self._links = artifacts.new_workplace(root)
            self._links = plain_directory(self._staging)
            self._process = self._start(sources, self_test)
        except BaseException as error:
            is_gone = isinstance(error, OSError) and not self._staging.exists()
            if self._staging != root:
                artifacts.remove(self._links)
                artifacts.remove(self._staging)
            if is_gone:
                raise CacheVanishedError("was deleted") from error
            raise

    def _start(self, sources: Path, self_test: bool) -> subprocess.Popen[bytes]:
        build_directory = self._staging
        if os.name == "posix":  # Windows allows links to administrators only
            build_directory = self._links / "build"
            build_directory.symlink_to(self._staging)
        for name in self._sources:
            copy = self._staging / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(sources / name, copy)
        library = self._library
        spec: Report = {
            **_spec(library, build_directory / f"{library.name}{LIBRARY_SUFFIX}", self_test),
            "sources": [str(build_directory / name) for name in library.sources],
            "cflags": compiler_flags(library, self._hardware.system),
            "cuda_cflags": library.nvcc_flags if isinstance(library, CudaLibrary) else (),
            "ldflags": linker_flags(library, self._hardware.system),
            "build_directory": str(build_directory),
        }
        path = plain_import_path(self._links)
        with open(self._staging / artifacts.LOG, "wb") as log:
            return subprocess.Popen(
                python_command(_WORKER, json.dumps(spec), path=path),
                cwd=build_directory,
                env=build_environment(self._hardware, self._links),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, verbose: bool = False) -> Probe[Artifact]:
        """Wait for the child's end and publish the result.

        Args:
            verbose: Copy the compiler's output to stderr.

        Raises:
            CacheVanishedError: The result is lost, because somebody deleted the cache.
        """
        shown = 0
        while True:
            code = self._process.poll()
            is_over = code is not None or time.monotonic() > self._began + BUILD_SECONDS
            if verbose:
                log = self._log()
                write(log[shown:])
                shown = len(log)
            if is_over:
                break
            time.sleep(_POLL_SECONDS)
        if not self._staging.exists():
            self.stop()
            raise CacheVanishedError("was deleted during the build")
        report = _read_report(self._staging / "result.json")
        if not report.get("compiled"):
            rejection = self._record(
                explain_build(code, report, self._log(), self._sources, BUILD_SECONDS)
            )
            self.stop()
            return Probe(rejection=rejection)
        artifacts.remove(self._links)
        artifact = self._publish()
        if code == 0 and report["self_test"] is None:
            return Probe(artifact)  # for another machine
        return _conclude(
            artifact, self._root, self_test_machine(self._library, self._hardware), code, report
        )

    # If the cache cannot be written to, a full disk say, the result still serves this process.

    def _record(self, rejection: Rejection) -> Rejection:
        with contextlib.suppress(OSError):
            return artifacts.record_failure(self._root, self._staging, rejection, self._parts)
        return rejection

    def _publish(self) -> Artifact:
        seconds = round(time.monotonic() - self._began, 1)
        name, key = self._library.name, key_of(self._parts)
        artifact = Artifact(name, key, self._staging, "built", "", seconds)
        with contextlib.suppress(OSError):
            artifact = artifacts.publish(self._root, artifact, self._parts)
        return artifact

    def stop(self) -> None:
        """End the child and every process that it started, and remove its files."""
        _end_group(self._process)
        artifacts.remove(self._links)
        artifacts.remove(self._staging)

    def _log(self) -> str:
        with contextlib.suppress(OSError):
            text = (self._staging / artifacts.LOG).read_text(encoding="utf-8", errors="replace")
            return text.replace(f"{self._links / 'build'}{os.sep}", "")
        return ""


def test(
    artifact: Artifact, library: Library, root: Path | None, hardware: Hardware
) -> Probe[Artifact]:
    """Run the self-test of a library on this hardware, in a child process.

    Args:
        artifact: The compiled library.
        library: What it was compiled from.
        root: The cache directory that records the result; None: it is not recorded.
        hardware: The machine.
    """
    try:
        # A kernel needs nothing but its library; the others need torch.
        path = () if isinstance(library, Variant) else import_path()
        spec = json.dumps(_spec(library, artifact.path))
        process = subprocess.Popen(
            python_command(_WORKER, spec, path=path),
            pass_fds=descriptors(),
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ProbeError) as error:
        rejection = explain_self_test(None, {"error": f"no child process: {error}"})
        return Probe(rejection=rejection)
    try:
        output, _ = process.communicate(timeout=SELF_TEST_SECONDS)
    except subprocess.TimeoutExpired:
        output = b""
    finally:
        code = process.poll()
        _end_group(process)
    lines = output.decode("utf-8", "replace").splitlines() or [""]
    machine = self_test_machine(library, hardware)
    return _conclude(artifact, root, machine, code, _parse_report(lines[-1]))


def _conclude(
    artifact: Artifact, root: Path | None, machine: str, code: int | None, report: Report
) -> Probe[Artifact]:
    """Turn the end of a self-test into a result, and record it."""
    text = report.get("self_test") if code == 0 else None
    result = Probe(text) if text else Probe[str](rejection=explain_self_test(code, report))
    if root is not None and artifact.sha256:
        self_tests.record(root, artifact.sha256, machine, result)
    return artifact.tested(result)


def _spec(library: Library, file: Path, self_test: bool = True) -> Report:
    """What the child is to test."""
    return {
        "name": library.name,
        "library": str(file),
        "self_test": library.self_test if self_test else None,
        "devices": library.devices if isinstance(library, CudaLibrary) else (),
        "parent": os.getpid(),
    }


def _read_report(file: Path) -> Report:
    with contextlib.suppress(OSError):
        return _parse_report(file.read_text(encoding="utf-8", errors="replace"))
    return {}


def _parse_report(text: str) -> Report:
    with contextlib.suppress(ValueError):
        report = json.loads(text)
        return report if isinstance(report, dict) else {}
    return {}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a child and every process that it started."""
    if os.name == "posix":
        # SIGTERM lets ninja end the compilers; the child itself may be dead already.
        if not _signal_group(process, signal.SIGTERM):
            _signal_group(process, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to the child's process group; return whether it is soon empty."""
    deadline = time.monotonic() + 5.0
    try:
        os.killpg(process.pid, number)
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(_POLL_SECONDS)
    except OSError:  # no such group, or on macOS one of zombies
        return True
    return False
