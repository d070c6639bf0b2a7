"""Why a build or a self-test failed, and whether it would fail again."""

from __future__ import annotations

import posixpath
import re
import signal
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .build_environment import COMPILER_WRAPPER
from .keys import search_paths
from .rejection import Rejection

REBUILD_FIX = (
    "python -m bitlinear.doctor --rebuild tries again, with --verbose it shows the commands"
)

_ERROR = re.compile(
    r"\b(error|fatal|undefined|unrecognized|not found|failed|cannot|can't|killed)\b", re.IGNORECASE
)
# An error at a place in our sources, or a flag that the compiler lacks. An error in a header of
# torch, or a header that is missing, can be mended. So can whatever a "fatal error" names.
# "cpu/x.cpp:1:2: error" of g++ and clang++, "cuda/x.cu(1): error" of nvcc and cl
_PLACE = re.compile(r"(\S+?)(?:\(\d+(?:,\d+)?\)|:\d+(?::\d+)?)\s*:?\s*error\b")
# These lines come before an error, and may contain the word.
_NO_ERROR = re.compile(
    r": (warning|note)\b|In file included"
    r"|\bIn (\w+ )?(function|instantiation|constructor|destructor)"
)
_BINUTILS = re.compile(r"(\S*/)?(as|ld)(\.\w+)?: ")  # their version is not in the key
_BY_COMPILER = re.compile(
    r"internal compiler error: in |unrecognized (command[- ]line )?option"
    r"|unknown (argument|option|target CPU)|unsupported option|bad value .* for .*-m"
    r"|unknown value .* for '-m|does not support '-m|unsupported argument .* to option '-m"
    r"|^ptxas .*; error|invalid (arch|feature|value)"
    r"|Unsupported gpu architecture",
    re.IGNORECASE,
)
_SENT_FROM_OUTSIDE = {
    getattr(signal, name, 0) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGXCPU")
}
_WINDOWS_EXCEPTION = 0xC0000000  # and above
_ILLEGAL_INSTRUCTION = (-getattr(signal, "SIGILL", 4), 0xC000001D)  # POSIX, Windows
_NINJA = ("FAILED:", "[", "ninja:")  # its own lines


def first_error(log: str) -> str:
    """Return the first line that says what failed: no command, and no comment of ninja."""
    lines = [line for line in _messages(log) if not _NO_ERROR.search(line)]
    return next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "")


def is_repeatable(log: str, sources: Collection[str]) -> bool:
    """Tell whether the same sources and compiler would give the same compile error again.

    Args:
        log: The output of the build, with the sources under their names in the package.
        sources: Those names.
    """
    if search_paths():  # of folders whose contents may change
        return False
    error = first_error(log)
    place = _PLACE.match(error)
    if place is not None and posixpath.normpath(place.group(1).replace("\\", "/")) in sources:
        return True
    return bool(_BY_COMPILER.search(error)) and not _BINUTILS.match(error)


def explain_build(
    code: int | None,
    report: Mapping[str, Any],
    log: str,
    sources: Collection[str],
    seconds: float,
) -> Rejection:
    """Explain a child that was to compile and load a library, and did not.

    Args:
        code: Its exit status; None if it was still running.
        report: What it reported, see ``build_worker.py``.
        log: The output of the build.
        sources: The names of the sources.
        seconds: How long it may run.
    """
    stage = report.get("stage")
    error = report.get("error") or first_error(log) or _end(code)
    if code is None:
        return _momentary(f"the compiler did not finish within {seconds:.0f} s")
    if code < 0:
        return _momentary(f"the build was killed by {_signal(code)}")
    if stage == "compile":
        reason = first_error(log) or error
        is_momentary = not is_repeatable(log, sources)
        return Rejection("compile-failed", reason, REBUILD_FIX, momentary=is_momentary)
    if stage == "load":
        return _momentary(f"cannot be loaded: {error}")
    return _momentary(f"the build could not start: {error}", "pip install setuptools")


def explain_self_test(code: int | None, report: Mapping[str, Any]) -> Rejection:
    """Explain a child that was to run the self-test of a library, and did not pass it.

    Args:
        code: Its exit status; None if it did not start or was still running.
        report: What it reported, see ``build_worker.py``.
    """
    stage, error = report.get("stage"), report.get("error") or _end(code)
    if code in _ILLEGAL_INSTRUCTION:
        reason = "illegal instruction: the CPU, or a hypervisor, lacks a feature that it reports"
        return Rejection("illegal-instruction", reason, REBUILD_FIX)
    if code is not None and code < 0 and -code in _SENT_FROM_OUTSIDE:
        error = f"it was killed by {_signal(code)}"
    elif code is not None and not 0 <= code < _WINDOWS_EXCEPTION:
        reason = f"self-test failed: crashed with {_signal(code)}"
        return Rejection("self-test-failed", reason, REBUILD_FIX, momentary=True)
    elif stage == "self-test":
        return Rejection("self-test-failed", f"self-test failed: {error}", REBUILD_FIX)
    elif stage == "load":
        return _momentary(f"cannot be loaded: {error}")
    fix = "see whether other programs occupy the GPU" if stage == "device" else REBUILD_FIX
    return _momentary(f"the self-test could not be run: {error}", fix)


def _momentary(reason: str, fix: str = REBUILD_FIX) -> Rejection:
    return Rejection("compile-failed", reason, fix, momentary=True)


def _end(code: int | None) -> str:
    return "it did not finish in time" if code is None else f"exit code {code} and no message"


def _signal(code: int) -> str:
    if code >= 0:
        return f"exception {code:#x}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


def _messages(log: str) -> Iterator[str]:
    # ninja prints the output of a command behind the line that says that it failed.
    _, _, failed = log.partition("\nFAILED:")
    for line in map(str.strip, (failed.partition("\n")[2] or log).splitlines()):
        is_command = COMPILER_WRAPPER in line or line.startswith(("cl ", "cl.exe "))
        if line and not is_command and not line.startswith(_NINJA):
            yield line
