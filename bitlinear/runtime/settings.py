"""The environment variables that steer the runtime, and the doctor's wish not to build.

``BITLINEAR_CACHE_DIR`` is read in ``cache_directory.py``, and the tools' own variables (``CXX``,
``CUDA_HOME``, ``MAX_JOBS``) in ``toolchain.py`` and ``build_environment.py``. The README beside
this file says what a new variable needs.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from .rejection import SettingError

REPORTED = (
    "BITLINEAR_KERNEL", "BITLINEAR_CACHE_DIR", "BITLINEAR_BUILD", "BITLINEAR_CUDA",
    "BITLINEAR_VERBOSE", "XDG_CACHE_HOME", "CXX", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS",
    "CPATH", "LIBRARY_PATH", "OMP_NUM_THREADS",
)  # fmt: skip
"""The variables that ``doctor --verbose`` shows, if they are set."""


@dataclass(frozen=True)
class Settings:
    """The user's wishes.

    Attributes:
        kernel: ``BITLINEAR_KERNEL``: the only CPU variant to use; None: choose.
        build: ``BITLINEAR_BUILD`` is not ``off``: use compiled kernels at all.
        cached: ``BITLINEAR_BUILD=cached``: compile nothing, and raise if the cache lacks a kernel.
        cuda: ``BITLINEAR_CUDA``: use the kernels for GPUs.
        verbose: ``BITLINEAR_VERBOSE``: show the compiler's output.
        arch_list: ``TORCH_CUDA_ARCH_LIST``: the GPU architectures that may be compiled.
    """

    kernel: str | None = None
    build: bool = True
    cached: bool = False
    cuda: bool = True
    verbose: bool = False
    arch_list: str = ""


def read_settings() -> Settings:
    """Read the environment.

    Raises:
        SettingError: A variable has a value without a meaning.
    """
    build = _read("BITLINEAR_BUILD", "auto", "off", "cached")
    return Settings(
        kernel=os.environ.get("BITLINEAR_KERNEL") or None,
        build=build != "off",
        cached=build == "cached",
        cuda=_read("BITLINEAR_CUDA", "auto", "off") == "auto",
        verbose=_read("BITLINEAR_VERBOSE", "0", "1") == "1",
        arch_list=os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
    )


def _read(variable: str, default: str, *others: str) -> str:
    """Read a variable that has a few values."""
    value = (os.environ.get(variable) or default).lower()
    if value not in (default, *others):
        raise SettingError(
            f"{variable}={os.environ[variable]!r} is not a setting; "
            f"set it to {', '.join((default, *others[:-1]))} or {others[-1]}, or unset it"
        )
    return value


def is_doctor_running() -> bool:
    """Tell whether this import belongs to ``python -m bitlinear.doctor``.

    The doctor has not read its options yet; ``argv[0]`` is ``-m`` only then.
    """
    arguments = getattr(sys, "argv", [])
    command = getattr(sys, "orig_argv", ["bitlinear.doctor"])  # Python 3.9 has none
    return arguments[:1] == ["-m"] and "bitlinear.doctor" in command


def is_build_postponed() -> bool:
    """Tell whether this import serves a doctor that only looks, or does something else first.

    An option that does not exist is an error, and nothing is compiled before it is shown.
    """
    return is_doctor_running() and not {*sys.argv[1:]} <= {"--json", "--verbose"}
