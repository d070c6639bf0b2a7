"""Compiling one library in a child process, and making sure that one process at a time does.

Compilers fail, get killed and hang, and a kernel for another CPU ends in a signal: the child
(``build_worker.py``) takes all that, and what became of it is an :class:`~.artifacts.Artifact`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..kernels import CudaLibrary, Library
from . import artifacts
from .artifacts import Artifact
from .hardware import Hardware

BUILD_SECONDS = 1800.0  # a small Arm board needs minutes
LOCK_SECONDS = BUILD_SECONDS
FIX = "python -m bitlinear.doctor --rebuild tries again, with --verbose it shows the commands"

_POLL_SECONDS = 0.05
_GIB = 1 << 30

# The machine failed, not the source: worth another try next time.
_TRANSIENT = re.compile(
    r"Killed|[Nn]o space left|out of memory|[Cc]annot allocate|memory exhausted"
    r"|Input/output error|Stale file handle|died due to signal"
)
_WRAPPER = "bitlinear-c++"
_ERROR_LINE = re.compile(r"\berror\b|\bfatal\b|\bundefined\b|unrecognized|not found", re.IGNORECASE)


def say(text: str) -> None:
    """One line for whoever waits for the import."""
    if sys.stderr is not None:  # pythonw has none
        print(f"bitlinear: {text}", file=sys.stderr, flush=True)


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
        self._artifact = Artifact(library.name, artifacts.key(parts), None, "failed")
        self._began = time.monotonic()
        self._staging = artifacts.new_staging(root)
        self._links = self._staging
        try:
            self._links = _plain_directory(self._staging)
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
        for name in artifacts.source_files(library, directory):
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
                [sys.executable, "-c", run, str(artifacts.BUILDER), str(spec_file)],
                cwd=build_directory,
                env=_environment(hardware, self._links),
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
        if _WRAPPER not in line and not line.startswith(("FAILED:", "[", "ninja: build"))
    )
    return next((line for line in messages if _ERROR_LINE.search(line)), _last_line(log))


def _last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")


# --------------------------------------------------------------------------------- surroundings


def _plain_directory(staging: Path) -> Path:
    """A private directory whose path has nothing to quote, in `staging` if that will do.

    Raises:
        OSError: there is none.
    """
    reasons = []
    for parent in (str(staging), tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if os.name == "posix" and not _is_plain(parent):
            reasons.append(f"{parent} has characters that ninja cannot digest")
        elif reason := artifacts.unusable(Path(parent)):
            reasons.append(f"{parent} {reason}")
        else:
            return Path(tempfile.mkdtemp(prefix="bitlinear-", dir=parent))
    raise OSError("; ".join(reasons))


def _is_plain(path: str) -> bool:
    return re.fullmatch(r"[\w@%+=:,./-]*", path, re.ASCII) is not None


def _environment(hardware: Hardware, links: Path) -> dict[str, str]:
    """The child's environment: the same Python, compiler and ninja, under plain names."""
    # The self-test must not depend on OMP_*, nor the build on another nvcc than that in the key.
    dropped = ("OMP_", "KMP_", "GOMP_", "PYTORCH_NVCC")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    environment.update(
        PYTHONPATH=os.pathsep.join(_python_path(links)),
        BITLINEAR_BUILD="off",  # should a .pth file or sitecustomize import this package
        LC_ALL="C",  # the compiler's line goes into bug reports
        PYTHONWARNINGS="ignore",  # what torch's imports warn about is not that line
        TORCH_DONT_CHECK_COMPILER_ABI="1",  # torch 2.4 cannot do it with arguments in CXX,
        TORCH_NO_COMPILER_WRAPPER="1",  # and torch 2.13 takes them for a part of the name
    )
    environment.setdefault("MAX_JOBS", str(_max_jobs()))
    if os.name == "posix":
        tools = links / "bin"
        tools.mkdir()
        compiler = tools / _WRAPPER
        command = shlex.join(_compiler_command(hardware))
        compiler.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        compiler.chmod(0o700)
        if hardware.ninja is not None:
            (tools / "ninja").symlink_to(os.path.abspath(hardware.ninja))
        environment["CXX"] = environment["CC"] = str(compiler)  # CC: nvcc's host compiler
        environment["PATH"] = os.pathsep.join([str(tools), os.environ.get("PATH", os.defpath)])
    if hardware.nvcc is not None:
        home = Path(os.path.abspath(hardware.nvcc.path)).parents[1]
        environment["CUDA_HOME"] = _plain_path(str(home), links / "cuda")
        environment["LIBRARY_PATH"] = _library_path(home, links / "lib")
    return environment


def _library_path(cuda_home: Path, directory: Path) -> str:
    """Where the linker looks last: NVIDIA's packages lack the name that it looks for."""
    directory.mkdir()
    runtime = min((cuda_home / "lib").glob("libcudart.so.*"), default=None)
    if runtime is not None:
        (directory / "libcudart.so").symlink_to(runtime)
    return os.pathsep.join(filter(None, [str(directory), os.environ.get("LIBRARY_PATH")]))


def _compiler_command(hardware: Hardware) -> list[str]:
    if not (command := shlex.split(os.environ.get("CXX", ""))):
        command = [hardware.compiler.path] if hardware.compiler else ["c++"]
    if os.path.dirname(command[0]):  # relative to here, and not to where the child will be
        command[0] = os.path.abspath(command[0])
    return command


def _python_path(links: Path) -> Iterator[str]:
    for number, entry in enumerate(map(os.path.abspath, sys.path)):
        yield _plain_path(entry, links / f"path{number}")


def _plain_path(path: str, link: Path) -> str:
    """The path, or if it has something to quote that of a link to it."""
    if os.name != "posix" or _is_plain(path.replace(os.pathsep, " ")):
        return path
    link.symlink_to(path)
    return str(link)


def available_cpus() -> int:
    """How many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _max_jobs() -> int:
    """As many compilers as we have CPUs and 2 GB of memory for each, at most 4."""
    limits = []
    for file, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable:\s+(\d+)", 1024),
        ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", r"(\d+)", 1),
    ):
        with contextlib.suppress(OSError):
            found = re.search(pattern, Path(file).read_text(encoding="ascii"))
            limits += [int(found.group(1)) * unit] if found else []
    return max(1, min(available_cpus(), min(limits, default=2 * _GIB) // (2 * _GIB), 4))


# --------------------------------------------------------------------------------- lock


@contextlib.contextmanager
def lock(root: Path | None, seconds: float = LOCK_SECONDS) -> Iterator[None]:
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
                say(f"waiting for process {holder[0]} on host {holder[1]}, which is compiling")
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
