"""The NVIDIA driver and the GPUs that it shows this process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .probe import BOOT_ID, Probe, command_output, file_text, has_interpreter
from .probe_cache import ProbeCache, decode_text

_NVIDIA_DRIVER = (
    "/dev/nvidiactl",
    "/dev/nvhost-gpu",  # Jetson
    "/dev/dxg",  # WSL
    r"C:\Windows\System32\nvcuda.dll",
)
_ASK_DRIVER = Path(__file__).with_name("gpu_probe.py")

# What decides, besides the machine, which GPUs a process sees and through which driver.
_VISIBILITY = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "SLURM_JOB_GPUS",
    "LD_LIBRARY_PATH",
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        name: For people, such as ``"NVIDIA H100 80GB HBM3"``.
        capability: Its compute capability: (9, 0).
        memory: In bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def identity(self) -> str:
        """Equal for GPUs of one model; for cache keys."""
        return "{} {}.{}".format(self.name, *self.capability)


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver grants this process.

    Attributes:
        cuda: The newest CUDA that it runs, such as ``"13.0"``.
        gpus: Those that it lets this process see (CUDA_VISIBLE_DEVICES has had its say), in the
            order of torch's device numbers.
    """

    cuda: str
    gpus: tuple[Gpu, ...]


def probe_driver(memory: ProbeCache) -> Probe[Driver]:
    """Ask the driver, in a child process, which GPUs it shows."""
    if not any(os.path.exists(path) for path in _NVIDIA_DRIVER):
        return Probe(reason="no NVIDIA driver is loaded")
    if not has_interpreter():
        return Probe(reason="there is no Python interpreter to ask the driver with")
    boot = file_text(BOOT_ID)
    key = [str(boot), str(file_text("/proc/driver/nvidia/version")), *_nvidia_devices()]
    key += [f"{name}={os.environ.get(name)}" for name in _VISIBILITY]
    digest = hashlib.sha256("\n".join(key).encode(errors="replace")).hexdigest()
    memory = memory if boot.value else ProbeCache(None)
    return memory.recall(f"driver {digest}", _ask_driver, _driver_from_json)


def _nvidia_devices() -> list[str]:
    """A container may have been given some of the GPUs only."""
    with contextlib.suppress(OSError):
        return sorted(name for name in os.listdir("/dev") if name.startswith("nvidia"))
    return []


def _ask_driver() -> Probe[dict[str, Any]]:
    # Without the user's site-packages, which could import this package again.
    output = command_output([sys.executable, "-I", "-S", str(_ASK_DRIVER)])
    if output.value is None:
        return Probe(reason=output.reason)
    try:
        answer = json.loads(output.value)
    except ValueError:
        answer = {"reason": output.value.strip().splitlines()[0]}
    if "reason" in answer:
        return Probe(reason=f"the NVIDIA driver does not answer: {answer['reason']}")
    return Probe(answer)


def _driver_from_json(answer: dict[str, Any]) -> Driver:
    gpus = []
    for gpu in answer["gpus"]:
        major, minor = map(int, gpu["capability"])
        gpus.append(Gpu(decode_text(gpu["name"]), (major, minor), int(gpu["memory"])))
    return Driver(decode_text(answer["cuda"]), tuple(gpus))
