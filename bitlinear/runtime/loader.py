"""The libraries that this process has loaded: the operator, its kernels, the CUDA kernels."""

from __future__ import annotations

import ctypes

import torch

from .artifacts import Artifact
from .build import load_failure
from .rejection import Rejection


class Loader:
    """Opens libraries and connects them. It unloads none, and loads the operator once.

    Attributes:
        operator: The library that defines ``torch.ops.bitlinear.*``; None until it is loaded.
    """

    def __init__(self) -> None:
        self.operator: ctypes.CDLL | None = None
        self._kernels: dict[str, ctypes.CDLL] = {}

    def load_kernels(self, artifact: Artifact) -> Rejection | None:
        """Open the library of a CPU variant; return why it cannot be used, if so."""
        try:
            kernels = ctypes.CDLL(str(artifact.path))
            kernels.bitlinear_kernels.argtypes = []
            kernels.bitlinear_kernels.restype = ctypes.c_void_p
            # A process may be denied a feature (AMX tiles) that the self-test was granted.
            if not kernels.bitlinear_kernels():
                raise OSError("the system refuses a CPU feature that it needs")
        except (OSError, AttributeError) as error:
            return load_failure(artifact.name, error)
        self._kernels[artifact.name] = kernels
        return None

    def load_operator(self, artifact: Artifact) -> Rejection | None:
        """Let torch open the library that defines the operator; return why it cannot, if so."""
        try:
            torch.ops.load_library(str(artifact.path))
            self.operator = ctypes.CDLL(str(artifact.path))
        except (OSError, RuntimeError) as error:
            return load_failure(artifact.name, error)
        return None

    def load_cuda(self, artifact: Artifact) -> Rejection | None:
        """Let torch open the CUDA kernels; return why it cannot, if so.

        This initialises no GPU: the library enters its functions into torch's dispatcher, before or
        after the operator is defined.
        """
        try:
            torch.ops.load_library(str(artifact.path))
        except (OSError, RuntimeError) as error:
            return load_failure(artifact.name, error)
        return None

    def use_kernels(self, variant: str) -> None:
        """Make the operator run the kernels of a variant. Both are loaded."""
        assert self.operator is not None
        use_kernels = self.operator.bitlinear_use_kernels
        use_kernels.argtypes = [ctypes.c_void_p]
        use_kernels.restype = ctypes.c_int
        if use_kernels(self._kernels[variant].bitlinear_kernels()) != 0:
            # Both include the same abi.h, or their keys would differ.
            raise AssertionError(f"the kernels of {variant} do not fit the operator")

    def parallel_threads(self) -> int | None:
        """Start the operator's threads and count them; None without an operator."""
        return None if self.operator is None else int(self.operator.bitlinear_parallel_threads())
