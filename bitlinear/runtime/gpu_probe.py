"""The child process of ``gpus.py``: ask the NVIDIA driver which GPUs this environment shows.

A process that has initialised the driver cannot use it in a fork, so the user's process never asks.
This file is started by path, with the standard library alone. It prints one JSON object: the driver
and its GPUs, or the reason why there is none.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

_NO_DEVICE = 100
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


class _DriverError(Exception):
    pass


def main() -> dict[str, Any]:
    """Return the newest CUDA that the driver runs, and the GPUs in the order of CUDA's numbers."""
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        code = getattr(cuda, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            cuda.cuGetErrorString(code, ctypes.byref(text))
            raise _DriverError(f"{name}: {(text.value or b'no message').decode()} ({code})", code)

    def number(name: str, *arguments: Any) -> int:
        value = ctypes.c_int()
        call(name, ctypes.byref(value), *arguments)
        return value.value

    version = number("cuDriverGetVersion")
    found: dict[str, Any] = {"cuda": f"{version // 1000}.{version % 1000 // 10}", "gpus": []}
    try:
        call("cuInit", 0)
    except _DriverError as error:
        if error.args[1] == _NO_DEVICE:
            return found
        raise
    for index in range(number("cuDeviceGetCount")):
        device = number("cuDeviceGet", index)
        name = ctypes.create_string_buffer(256)
        call("cuDeviceGetName", name, len(name), device)
        memory = ctypes.c_size_t()
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        capability = [
            number("cuDeviceGetAttribute", attribute, device)
            for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
        ]
        text = name.value.decode(errors="replace")
        found["gpus"].append({"name": text, "capability": capability, "memory": memory.value})
    return found


if __name__ == "__main__":
    try:
        answer = main()
    except (OSError, AttributeError, _DriverError) as error:
        answer = {"reason": str(error.args[0])}
    print(json.dumps(answer))
