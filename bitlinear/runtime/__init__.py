"""The runtime: from this machine to a loaded kernel.

This module is the door: :func:`load` (called once, by ``import bitlinear``), :func:`activate` and
:func:`current`. ``README.md`` beside it draws the way of an import through the other modules.

The warm path computes a key, checks a hash and loads two libraries. It imports neither
``torch.utils.cpp_extension`` nor anything else that only a build needs. Every import ends with a
:class:`Runtime` that says what is in use and why.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..kernels import CUDA, DIRECTORY, OPS, VARIANTS, CudaLibrary, Library, Variant
from .cache_directory import open_cache
from .hardware import detect
from .loader import Loader
from .progress import announce
from .rejection import Rejection
from .resolution import Request, Runtime, reject_usable, resolve, without_kernel
from .settings import Settings, is_build_postponed, is_doctor_running, read_settings
from .verdicts import Verdict

__all__ = ["Runtime", "activate", "current", "load", "parallel_threads"]


@dataclass
class _Process:
    """What this process has chosen and loaded."""

    loader: Loader = field(default_factory=Loader)
    request: Request | None = None
    imported: Runtime | None = None
    runtime: Runtime | None = None


_process = _Process()


def load(
    variants: tuple[Variant, ...] = VARIANTS,
    operator: Library = OPS,
    directory: Path = DIRECTORY,
    cuda: CudaLibrary = CUDA,
) -> Runtime:
    """Choose the kernels, find or build them, and load them.

    Without a compiled kernel there is one warning, and ``Runtime.problem`` says why.

    Args:
        variants: The CPU kernels to choose from.
        operator: The library that defines the operator.
        directory: Where their sources lie.
        cuda: The library of the kernels for GPUs.

    Raises:
        ValueError: An environment variable has a value without a meaning, or ``BITLINEAR_KERNEL``
            names no kernel that this machine supports. No other problem raises.
    """
    cache = open_cache()
    if cache.override_problem:
        announce(f"BITLINEAR_CACHE_DIR is not used: {cache.override_problem}")
    hardware = detect(cache.readable[0] if cache.readable else None)
    request = Request(hardware, Settings(), variants, operator, cuda, directory)
    try:
        request = replace(request, settings=read_settings())
        verdicts = request.select()
    except ValueError as error:
        if not is_doctor_running():
            raise
        announce(str(error))  # the doctor cannot: this is the import of its package
        raise SystemExit(2) from None
    if not request.settings.cuda:
        off = Rejection("forced-off", "BITLINEAR_CUDA=off")
        request = replace(request, cuda_verdict=Verdict("cuda", rejection=off))
    if request.settings.build:
        runtime = resolve(request, cache, _process.loader)
    else:
        off = Rejection("forced-off", "BITLINEAR_BUILD=off")
        runtime = without_kernel(request, cache, reject_usable(verdicts, off), off)
    _process.request = replace(request, cuda_verdict=runtime.cuda)
    _process.imported = _process.runtime = runtime
    if request.settings.build and not is_build_postponed():
        _warn(runtime)
    return runtime


def activate(name: str | None) -> Runtime:
    """Switch the operator to another variant in this process, and build it if needed.

    Args:
        name: The variant; None goes back to the choice of the import.

    Raises:
        RuntimeError: The variant is unknown, this machine does not support it, it cannot be built,
            or this process has no compiled operator.
    """
    before = current()
    request, imported = _process.request, _process.imported
    if request is None or imported is None or _process.loader.operator is None:
        raise RuntimeError(f"cannot switch to {name}: {before.problem}")
    if name is None:
        assert imported.kernel is not None  # as there is an operator
        _process.loader.use_kernels(imported.kernel)
        _process.runtime = imported
        return imported
    try:
        forced = replace(request, settings=replace(request.settings, kernel=name))
        after = resolve(forced, before.cache, _process.loader)
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    if after.kernel != name:
        raise RuntimeError(f"cannot switch to {name}: {after.problem}")
    _process.runtime = replace(after, libraries={**before.libraries, **after.libraries})
    return _process.runtime


def current() -> Runtime:
    """Return what this process computes with; load it first if nothing is loaded."""
    return _process.runtime or load()


def parallel_threads() -> int | None:
    """Start the operator's threads and count them; None without a compiled operator."""
    return _process.loader.parallel_threads()


def _warn(runtime: Runtime) -> None:
    where, problem = "", runtime.problem
    if not problem:
        where, problem = " for CUDA tensors", runtime.cuda_problem
    if problem:
        warnings.warn(
            f"bitlinear runs its slow reference implementation{where}: {problem}. "
            "More: python -m bitlinear.doctor",
            RuntimeWarning,
            stacklevel=3,
        )
