"""The NVIDIA driver and the GPUs that it shows this process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .probe_cache import ProbeCache, decode_text
from .rejection import Probe, rejected
from .system import ProbeError, boot_id, file_text

# One of these exists if an NVIDIA driver is loaded.
_NVIDIA_DRIVER = (
    "/dev/nvidiactl",
    "/dev/nvhost-gpu",  # Jetson
    "/dev/dxg",  # WSL
    r"C:\Windows\System32\nvcuda.dll",
)
_GPU_PROBE = Path(__file__).with_name("gpu_probe.py")

# Environment variables that decide which GPUs a process sees, and through which driver.
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
        """A text for cache keys, equal for GPUs of one model."""
        return "{} {}.{}".format(self.name, *self.capability)


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver, as this process sees it.

    Attributes:
        cuda: The newest CUDA that the driver runs, such as ``"13.0"``.
        gpus: The GPUs that CUDA_VISIBLE_DEVICES leaves, in the order of torch's device numbers.
    """

    cuda: str
    gpus: tuple[Gpu, ...]


def probe_driver(cache: ProbeCache) -> Probe[Driver]:
    """Ask the driver, in a child process, which GPUs it shows this process."""
    if not any(os.path.exists(path) for path in _NVIDIA_DRIVER):
        return rejected("no-gpu", "no NVIDIA driver is loaded")
    boot = boot_id()
    parts = [boot, file_text("/proc/driver/nvidia/version"), *_nvidia_devices()]
    parts += [f"{name}={os.environ.get(name)}" for name in _VISIBILITY]
    digest = hashlib.sha256("\n".join(parts).encode(errors="replace")).hexdigest()
    if not boot:
        cache = ProbeCache(None)
    try:
        return Probe(cache.recall(f"driver {digest}", _ask_driver, _decode_driver))
    except ProbeError as error:
        return rejected("cuda-mismatch", str(error))  # there may be GPUs that torch can use


def _nvidia_devices() -> list[str]:
    # A container may have been given only some of the GPUs.
    with contextlib.suppress(OSError):
        return sorted(name for name in os.listdir("/dev") if name.startswith("nvidia"))
    return []


def _ask_driver() -> dict[str, Any]:
    from .children import output_of

    output = output_of(_GPU_PROBE)
    try:
        answer: dict[str, Any] = json.loads(output)
    except ValueError:
        answer = {"reason": output.strip().splitlines()[0]}
    if "reason" in answer:
        raise ProbeError(f"the NVIDIA driver does not answer: {answer['reason']}")
    return answer


def _decode_driver(answer: dict[str, Any]) -> Driver:
    gpus = []
    for gpu in answer["gpus"]:
        major, minor = map(int, gpu["capability"])
        gpus.append(Gpu(decode_text(gpu["name"]), (major, minor), int(gpu["memory"])))
    return Driver(decode_text(answer["cuda"]), tuple(gpus))
