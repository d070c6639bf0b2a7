"""Which kernels the test suite has run on which machines: the doctor prints it."""

from __future__ import annotations

_XEON = "Intel Xeon with AMX"
_ZEN = "AMD EPYC (Zen 4, Zen 5)"
_ZEN_3 = "AMD EPYC (Zen 3, Zen 4, Zen 5)"
_EMULATED = "under an emulator only: the results are tested, the speed is not"

# By system and kernel. A kernel that is not here has never run there.
_TESTED = {
    ("linux", "amx_int8"): f"on {_XEON}",
    ("linux", "avx512_vnni"): f"on {_XEON} and {_ZEN}",
    ("linux", "avx_vnni"): f"on {_XEON}",
    ("linux", "avx2"): f"on {_XEON} and {_ZEN_3}",
    ("linux", "scalar"): f"on {_XEON} and {_ZEN_3}",
    ("linux", "neon"): _EMULATED,
    ("linux", "neon_dotprod"): _EMULATED,
    ("linux", "neon_i8mm"): _EMULATED,
}

# By the compute capability of the GPU.
_TESTED_GPUS = {(9, 0): "on NVIDIA H100"}


def where_tested(kernel: str, system: str) -> str:
    """Say where a CPU kernel has been tested, for one system, in one line.

    Args:
        kernel: Its name in ``VARIANTS``.
        system: ``"linux"``, ``"darwin"`` or ``"windows"``.
    """
    return _TESTED.get((system, kernel), f"never on {system}: reports are welcome")


def where_gpu_tested(capability: tuple[int, int], system: str) -> str:
    """Say where the CUDA kernels have been tested, for one compute capability, in one line."""
    number = "{}.{}".format(*capability)
    found = _TESTED_GPUS.get(capability) if system == "linux" else None
    return found or f"never on compute capability {number}, {system}: reports are welcome"
