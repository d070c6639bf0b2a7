"""BitLinear: a hardware-optimised ternary linear layer for PyTorch.

Importing the package chooses the fastest kernel that this machine supports, compiles it if that has
not been done yet, and registers ``torch.ops.bitlinear.linear``. Where nothing can be compiled the
layer works all the same, on a slower reference implementation; ``python -m bitlinear.doctor`` says
what was chosen, and why.
"""

from __future__ import annotations

from typing import Any

from . import integrations, ops, runtime
from .runtime.verdicts import Verdict

_loaded = runtime.load()

HAS_BITLINEAR: bool = any(verdict.status == "chosen" for verdict in _loaded.verdicts)
"""True where a compiled kernel is in use; False on the reference implementation."""

ops.register(compiled=_loaded.kernel is not None)

# These modules resolve the operators, which must be registered first.
from .convert import convert, deploy, set_quantization_strength  # noqa: E402
from .linear import BitLinear  # noqa: E402
from .mapped import load_deployed  # noqa: E402

integrations.watch_imports()

__version__ = "0.1.0"

__all__ = [
    "HAS_BITLINEAR",
    "BitLinear",
    "available_kernels",
    "convert",
    "deploy",
    "load_deployed",
    "set_quantization_strength",
]


def available_kernels() -> list[Verdict]:
    """What was chosen, and why the rest was not: one verdict per kernel variant, best first."""
    return list(runtime.current().verdicts)


def __getattr__(name: str) -> Any:
    # bitlinear.doctor.report() in a notebook, at no cost to an import that does not use it.
    if name == "doctor":
        import importlib

        return importlib.import_module("bitlinear.doctor")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
