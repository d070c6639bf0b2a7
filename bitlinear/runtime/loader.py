"""The libraries that this process has loaded: the operator, its kernels, the CUDA kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch

from .artifacts import Artifact
from .rejection import Rejection

_NAME = "_bitlinear_libraries"


@dataclass
class _Libraries:
    """What this process has opened; no library is ever closed.

    It outlives this package: a notebook may delete its modules and import it again, and a second
    library that defines the operator would end the process.
    """

    operator: ctypes.CDLL | None = None
    active: str | None = None
    kernels: dict[str, ctypes.CDLL] = field(default_factory=dict)
    cuda: bool = False


class Loader:
    """Opens libraries and connects them. It unloads none, and loads the operator once.

    Its methods return the rejection of a library that this process cannot use, if so, and raise an
    OSError if the file cannot be loaded from where it lies. ``torch.ops.load_library`` would follow
    links to another path, which others may have changed (see ``pinned.py``).
    """

    def __init__(self) -> None:
        self._libraries: _Libraries = vars(torch.library).setdefault(_NAME, _Libraries())

    @property
    def operator(self) -> ctypes.CDLL | None:
        """The library that defines ``torch.ops.bitlinear.*``; None until it is loaded."""
        return self._libraries.operator

    @property
    def active(self) -> str | None:
        """The CPU variant that the operator runs; None until it has one."""
        return self._libraries.active

    def load_kernels(self, artifact: Artifact) -> Rejection | None:
        """Open the library of a CPU variant."""
        kernels = ctypes.CDLL(str(artifact.path))
        kernels.bitlinear_kernels.argtypes = []
        kernels.bitlinear_kernels.restype = ctypes.c_void_p
        # A process may be denied a feature (AMX tiles) that the self-test was granted.
        if not kernels.bitlinear_kernels():
            reason = f"the system refuses this process a CPU feature that {artifact.name} needs"
            return Rejection("illegal-instruction", reason)
        self._libraries.kernels[artifact.name] = kernels
        return None

    def load_operator(self, artifact: Artifact) -> None:
        """Open the library that defines the operator, which enters it into torch's dispatcher."""
        self._libraries.operator = ctypes.CDLL(str(artifact.path))

    def load_cuda(self, artifact: Artifact) -> None:
        """Open the CUDA kernels.

        This initialises no GPU: the library enters its functions into torch's dispatcher, before or
        after the operator is defined.
        """
        if not self._libraries.cuda:
            ctypes.CDLL(str(artifact.path))
            self._libraries.cuda = True

    def use_kernels(self, variant: str) -> Rejection | None:
        """Make the operator run the kernels of a variant. Both are loaded."""
        assert self.operator is not None
        use_kernels = self.operator.bitlinear_use_kernels
        use_kernels.argtypes = [ctypes.c_void_p]
        use_kernels.restype = ctypes.c_int
        if use_kernels(self._libraries.kernels[variant].bitlinear_kernels()) != 0:
            # An operator and kernels that are compiled from the same sources fit.
            reason = "this process has loaded the operator of other sources"
            return Rejection("compile-failed", reason, "start a new process")
        self._libraries.active = variant
        return None

    def parallel_threads(self) -> int | None:
        """Start the operator's threads and count them; None without an operator."""
        return None if self.operator is None else int(self.operator.bitlinear_parallel_threads())
