"""The environment variables that steer the runtime, and the doctor's wish not to build.

``BITLINEAR_CACHE_DIR`` is read in ``cache_directory.py``, and the tools' own variables (``CXX``,
``CUDA_HOME``) in ``toolchain.py``. A new variable also belongs into ``REPORTED`` and into the table
of the README beside this file.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

REPORTED = (
    "BITLINEAR_KERNEL", "BITLINEAR_CACHE_DIR", "BITLINEAR_BUILD", "BITLINEAR_CUDA",
    "BITLINEAR_VERBOSE", "XDG_CACHE_HOME", "CXX", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS",
    "OMP_NUM_THREADS",
)  # fmt: skip
"""The variables that the doctor shows, if they are set."""


@dataclass(frozen=True)
class Settings:
    """The user's wishes.

    Attributes:
        kernel: ``BITLINEAR_KERNEL``: the only CPU variant to use; None: choose.
        build: ``BITLINEAR_BUILD``: use compiled kernels at all.
        cuda: ``BITLINEAR_CUDA``: use the kernels for GPUs.
        verbose: ``BITLINEAR_VERBOSE``: show the compiler's output.
        arch_list: ``TORCH_CUDA_ARCH_LIST``: the GPU architectures that may be compiled.
    """

    kernel: str | None = None
    build: bool = True
    cuda: bool = True
    verbose: bool = False
    arch_list: str = ""


def read_settings() -> Settings:
    """Read the environment.

    Raises:
        ValueError: A variable has a value without a meaning.
    """
    return Settings(
        kernel=os.environ.get("BITLINEAR_KERNEL") or None,
        build=_is_on("BITLINEAR_BUILD"),
        cuda=_is_on("BITLINEAR_CUDA"),
        verbose=os.environ.get("BITLINEAR_VERBOSE") == "1",
        arch_list=os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
    )


def _is_on(variable: str) -> bool:
    value = os.environ.get(variable) or "auto"
    if value.lower() not in ("auto", "off"):
        raise ValueError(
            f"{variable}={value!r} is not a setting; set it to auto or off, or unset it"
        )
    return value.lower() == "auto"


def is_doctor_running() -> bool:
    """Tell whether this import belongs to ``python -m bitlinear.doctor``.

    The doctor has not read its options yet; ``argv[0]`` is ``-m`` only then.
    """
    arguments = getattr(sys, "argv", [])
    command = getattr(sys, "orig_argv", ["bitlinear.doctor"])  # Python 3.9 has none
    return arguments[:1] == ["-m"] and "bitlinear.doctor" in command


def is_build_postponed() -> bool:
    """Tell whether this import serves a doctor that only looks, or deletes first."""
    options = {"--no-build", "--clean", "--rebuild"}
    return is_doctor_running() and not options.isdisjoint(sys.argv)
