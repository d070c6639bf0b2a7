"""BitLinear: a hardware-optimised ternary linear layer for PyTorch.

Importing the package chooses the fastest kernel that this machine supports, compiles it if it is
not in the cache, and registers ``torch.ops.bitlinear.linear``. Without a compiled kernel the layer
runs on a slower reference implementation. ``python -m bitlinear.doctor`` shows the choice and its
reasons.
"""

from __future__ import annotations

from typing import Any

from . import integrations, ops, runtime
from .runtime.verdicts import Verdict

ops.unregister()
_loaded = runtime.load()

HAS_BITLINEAR: bool = any(verdict.status == "chosen" for verdict in _loaded.verdicts)
"""Whether a compiled kernel is in use; if not, the reference implementation is."""

ops.register(compiled=_loaded.kernel is not None)

# These modules resolve the operators, which must be registered first.
from .convert import convert, deploy, set_quantization_strength  # noqa: E402
from .embedding import Embedding  # noqa: E402
from .half_scales import halve_scales  # noqa: E402
from .linear import BitLinear  # noqa: E402
from .linear_group import LinearGroup  # noqa: E402
from .loading import load_deployed  # noqa: E402
from .pack_dense import pack  # noqa: E402

integrations.watch_imports()

__version__ = "0.2.0"

__all__ = [
    "HAS_BITLINEAR",
    "BitLinear",
    "Embedding",
    "LinearGroup",
    "available_kernels",
    "convert",
    "deploy",
    "halve_scales",
    "load_deployed",
    "pack",
    "set_quantization_strength",
]


def available_kernels() -> list[Verdict]:
    """Return one verdict per kernel variant, best first: chosen, available or rejected, and why."""
    return list(runtime.current().verdicts)


def __getattr__(name: str) -> Any:
    # Lazy, so that bitlinear.doctor.report() costs nothing until it is used.
    if name == "doctor":
        import importlib

        return importlib.import_module("bitlinear.doctor")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
