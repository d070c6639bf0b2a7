"""The child process of ``build.py``: compile one library if need be, load it, run its self-test.

It is started by path and never imported, so a crash here (an illegal instruction, say) is a result
and not the end of the user's program. It imports only the standard library, and torch if it
compiles. It keeps its progress as JSON in ``result.json`` of the build directory, or prints it if
it only tests:

- ``stage``: ``"set-up"``, ``"compile"``, ``"load"``, ``"self-test"``, ``"device"`` (a GPU could not
  be used) or ``"done"``.
- ``compiled``: whether the library is there and can be loaded.
- ``self_test``: its result in one line; None if it was not asked for.
- ``error``: what stopped it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULT = "result.json"
_PR_SET_PDEATHSIG = 1
_LAST_SECONDS = 10
_DEVICE_FAILED = 2  # bitlinear_cuda_selftest returns it if the CUDA runtime fails


def main(text: str) -> None:
    """Do what the JSON text describes; exit with 1 if that fails."""
    spec: dict[str, Any] = json.loads(text)
    _end_with_parent(spec["parent"])
    builds = "sources" in spec
    progress: dict[str, Any] = {"stage": "set-up", "compiled": not builds}

    def report(**changes: Any) -> None:
        progress.update(changes)
        text = json.dumps(progress)
        if builds:
            Path(spec["build_directory"], RESULT).write_text(text, encoding="utf-8")
        else:
            print(text, flush=True)

    report()
    try:
        if builds:
            from torch.utils import cpp_extension

            report(stage="compile")
            _compile(cpp_extension, spec)
        elif spec["self_test"] != "kernels":
            import torch  # noqa: F401  the library needs its libraries
        result = None
        if spec["self_test"]:
            report(stage="self-test", compiled=True)
            result = _SELF_TESTS[spec["self_test"]](spec["library"], spec["devices"])
    except Exception as caught:
        # The loader and ninja say why; torch only names the library.
        error = caught.__cause__ or caught
        if isinstance(error, _DeviceError):
            report(stage="device")
        elif isinstance(error, _SelfTestError):
            pass
        elif progress["stage"] == "self-test" or Path(spec["library"]).exists():
            report(stage="load")
        kind = "" if isinstance(error, _SelfTestError) else f"{type(error).__name__}: "
        report(error=f"{kind}{error}")
        sys.exit(1)
    report(stage="done", compiled=True, self_test=result)


class _SelfTestError(Exception):
    """The self-test found a wrong result."""


class _DeviceError(_SelfTestError):
    """The self-test could not use a GPU; the library may be right."""


def _compile(cpp_extension: Any, spec: dict[str, Any]) -> None:
    cpp_extension.load(
        name=spec["name"],
        sources=spec["sources"],
        extra_cflags=spec["cflags"],
        extra_cuda_cflags=spec["cuda_cflags"],
        extra_ldflags=[*spec["ldflags"], *_shared_libstdcxx()],
        build_directory=spec["build_directory"],
        is_python_module=False,
        verbose=True,  # the parent writes it into the log
    )


def _shared_libstdcxx() -> list[str]:
    """The flag that links to the libstdc++ of torch; none if the compiler has no such file."""
    # If libstdc++.so is missing or a dangling link, the linker silently takes libstdc++.a. Two
    # copies in one process crash: formatting a number for an exception is enough.
    if not sys.platform.startswith("linux"):
        return []
    name = "libstdc++.so.6"
    path = subprocess.run(
        [os.environ["CXX"], f"-print-file-name={name}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the log holds errors that stop a build
        check=False,
    ).stdout
    # By name, because the path may need quotes. A compiler that finds no file repeats the name.
    return [f"-l:{name}"] if os.path.isabs(path) else []


def _test_kernels(path: str, devices: list[int]) -> str:
    _run_self_test(ctypes.CDLL(path).bitlinear_selftest)
    return "bit-exact with scalar"


def _test_cuda(path: str, devices: list[int]) -> str:
    for device in devices:
        _run_self_test(ctypes.CDLL(path).bitlinear_cuda_selftest, device)
    return f"bit-exact with the reference on {len(devices)} GPU{'s' if len(devices) > 1 else ''}"


def _run_self_test(function: Any, *device: int) -> None:
    message = ctypes.create_string_buffer(1024)
    function.argtypes = [*[ctypes.c_int for _ in device], ctypes.c_char_p, ctypes.c_int64]
    function.restype = ctypes.c_int
    result = function(*device, message, len(message))
    if result != 0:
        kind = _DeviceError if device and result == _DEVICE_FAILED else _SelfTestError
        prefix = f"GPU {device[0]}: " if device else ""
        raise kind(prefix + (message.value.decode("utf-8", "replace") or "no message"))


def _test_operator(path: str, devices: list[int]) -> str:
    import torch

    available = torch.get_num_threads()
    used = ctypes.CDLL(path).bitlinear_parallel_threads()
    if available > 1 and used < 2:
        raise _SelfTestError(f"ran on {used} of {available} threads (built without OpenMP?)")
    return f"ran on {used} of {available} threads"


_SELF_TESTS = {"kernels": _test_kernels, "operator": _test_operator, "cuda": _test_cuda}


def _end_with_parent(parent: int) -> None:
    """Stop compiling when the parent is killed: the result has no reader."""

    def forward(signum: int, frame: object) -> None:
        # ninja puts each compiler into a process group of its own, so only ninja can end it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        signal.alarm(_LAST_SECONDS)  # ninja may not have started yet

    if sys.platform.startswith("linux"):
        signal.signal(signal.SIGTERM, forward)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit("the parent is gone")


if __name__ == "__main__":
    main(sys.argv[1])
