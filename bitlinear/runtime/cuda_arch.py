"""The GPU architectures to compile the CUDA kernels for. Pure, like ``verdicts``, which uses it.

An architecture is written as nvcc writes it: ``sm_90a`` is machine code for one architecture,
``compute_90`` is PTX, which the driver translates for that architecture or any later one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .rejection import Rejection, SettingError

if TYPE_CHECKING:
    from .gpus import Gpu
    from .hardware import Hardware

Version = tuple[int, int]

_OLDEST: Version = (6, 1)  # the first with the dot product of bytes (dp4a)

# Since a CUDA release: the oldest and the newest capability that its nvcc compiles for.
_SPANS: tuple[tuple[Version, Version, Version], ...] = (
    ((11, 0), (3, 5), (8, 0)),
    ((11, 8), (3, 5), (8, 9)),  # knows 9.0, but not its matrix instructions
    ((12, 0), (5, 0), (9, 0)),
    ((12, 8), (5, 0), (12, 0)),
    ((12, 9), (5, 0), (12, 1)),
    ((13, 0), (7, 5), (12, 1)),
)


@dataclass(frozen=True)
class Target:
    """What to compile for one GPU.

    Attributes:
        gpu: The GPU.
        architecture: As nvcc spells it; empty if nothing can be compiled for this GPU.
        rejection: Why nothing can be compiled for it.
    """

    gpu: Gpu
    architecture: str = ""
    rejection: Rejection | None = None


@dataclass(frozen=True)
class _Architecture:
    capability: Version
    ptx: bool = False

    def __str__(self) -> str:
        major, minor = self.capability
        # Only "90a" has the matrix instructions of 9.0, and no other GPU runs "90".
        suffix = "a" if self.capability == (9, 0) and not self.ptx else ""
        return f"{'compute' if self.ptx else 'sm'}_{major}{minor}{suffix}"

    def runs_on(self, capability: Version) -> bool:
        related = self.ptx or self.capability[0] == capability[0]
        return related and self.capability <= capability


def version(text: str) -> Version:
    """Parse major and minor of ``"13.0"``."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def parse_architectures(arch_list: str) -> tuple[str, ...]:
    """Return the architectures of a list such as ``"8.0,9.0a"``, in nvcc's spelling.

    Raises:
        SettingError: An entry is no architecture, or is older than the kernels.
    """
    names = [name for name in re.split(r"[;,\s]+", arch_list) if name]
    for name in names:
        parsed = list(_parse(name))
        if not parsed or parsed[0].capability < _OLDEST:
            oldest = "{}.{}".format(*_OLDEST)
            raise SettingError(f"{name!r} is no GPU architecture from {oldest} on, such as 9.0")
    if not names:
        raise SettingError("cuda: names no architecture, such as cuda:8.0,9.0")
    return tuple(dict.fromkeys(map(str, _parse(arch_list))))


def runs_on(architecture: str, other: str) -> bool:
    """Tell whether a GPU for which ``other`` is compiled runs code for ``architecture``."""
    return _read(architecture).runs_on(_read(other).capability)


def toolkit(hardware: Hardware) -> str:
    """The CUDA release that kernels are compiled with, such as ``"13.0"``; empty without CUDA.

    If nvcc is missing or does not fit, it is the release of torch: another machine may have
    compiled the kernels.
    """
    torch, nvcc = hardware.torch.cuda or "", hardware.nvcc.value
    if torch and nvcc and nvcc.release and version(nvcc.release)[0] == version(torch)[0]:
        return nvcc.release
    return torch


def targets(hardware: Hardware, arch_list: str = "") -> list[Target]:
    """Choose the architecture to compile for each GPU that torch can see.

    Args:
        hardware: The machine.
        arch_list: ``TORCH_CUDA_ARCH_LIST``: the architectures that may be compiled, as torch spells
            them (``"8.0;8.6+PTX"``). Each GPU gets the best of them. Empty or ``"native"``: any
            that the toolkit knows.
    """
    cuda, driver = toolkit(hardware), hardware.driver.value
    if driver is None or not cuda:
        return []
    return [_target(gpu, cuda, arch_list) for gpu in driver.gpus]


def _target(gpu: Gpu, cuda: str, arch_list: str) -> Target:
    capability = "{}.{}".format(*gpu.capability)
    if gpu.capability < _OLDEST:
        reason = "requires compute capability {}.{} or newer".format(*_OLDEST)
        return Target(gpu, rejection=Rejection("no-gpu", reason))
    if arch_list.lower() in ("", "native"):
        candidates = [_newest(gpu.capability, cuda)]
        reason = f"CUDA {cuda} no longer compiles for compute capability {capability}"
        fix = "install an older CUDA toolkit, and a torch that is built for it"
    else:
        candidates = list(_parse(arch_list))
        reason = (
            f"TORCH_CUDA_ARCH_LIST={arch_list!r} has nothing for compute capability {capability}"
        )
        fix = f"add {capability} to TORCH_CUDA_ARCH_LIST, or unset it"
    usable = [candidate for candidate in candidates if candidate.runs_on(gpu.capability)]
    if not usable:
        return Target(gpu, rejection=Rejection("cuda-mismatch", reason, fix))
    best = max(usable, key=lambda candidate: (not candidate.ptx, candidate.capability))
    return Target(gpu, str(best))


def _read(architecture: str) -> _Architecture:
    kind, _, number = architecture.rstrip("a").partition("_")
    return _Architecture((int(number[:-1]), int(number[-1])), ptx=kind == "compute")


def _newest(capability: Version, cuda: str) -> _Architecture:
    # A GPU newer than the toolkit gets PTX of the newest architecture that the toolkit knows.
    rows = [row for row in _SPANS if row[0] <= version(cuda)]
    _, oldest, newest = rows[-1] if rows else _SPANS[0]
    inside = oldest <= capability <= newest
    return _Architecture(capability) if inside else _Architecture(newest, ptx=True)


def _parse(arch_list: str) -> Iterator[_Architecture]:
    # Names such as "Ampere" are skipped.
    for name in re.split(r"[;,\s]+", arch_list):
        match = re.fullmatch(r"(\d+)\.(\d+)[af]?(\+PTX)?", name)
        if match:
            capability = int(match.group(1)), int(match.group(2))
            yield _Architecture(capability)
            if match.group(3):
                yield _Architecture(capability, ptx=True)
