"""The runtime: from this machine to a loaded kernel.

This module is the door: :func:`load` (called once, by ``import bitlinear``), :func:`activate` and
:func:`current`. ``README.md`` beside it draws the way of an import through the other modules.

The warm path computes a key, checks a hash and loads two libraries. It imports neither
``torch.utils.cpp_extension`` nor anything else that only a build needs. Every import ends with a
:class:`Runtime` that says what is in use and why, whatever happens on the way.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..kernels import CUDA, DIRECTORY, OPS, VARIANTS, CudaLibrary, Library, Variant
from . import artifacts
from .cache_directory import CacheDirectory, open_cache
from .hardware import UNKNOWN, detect
from .loader import Loader
from .progress import announce
from .rejection import Rejection, SettingError
from .resolution import (
    Request,
    Runtime,
    keep_loaded,
    reject_usable,
    resolve,
    unexpected,
    without_kernel,
)
from .settings import Settings, is_build_postponed, is_doctor_running, read_settings
from .verdicts import Verdict

__all__ = [
    "MissingKernelError",
    "Runtime",
    "activate",
    "current",
    "load",
    "parallel_threads",
]


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
            names no kernel that this machine supports.
        MissingKernelError: The cache lacks a kernel, and ``BITLINEAR_BUILD=cached``.
    """
    request = Request(UNKNOWN, Settings(), variants, operator, cuda, directory)
    try:
        request = replace(request, settings=read_settings())
        request, runtime = _load(request)
    except SettingError as error:
        if not is_doctor_running():
            raise ValueError(str(error)) from None
        announce(str(error))  # the doctor cannot: this is the import of its package
        raise SystemExit(2) from None
    _process.request = replace(request, cuda_verdict=runtime.cuda)
    _process.imported = _process.runtime = runtime
    if is_build_postponed() or (runtime.required and is_doctor_running()):
        return runtime  # the doctor reports it
    if runtime.required:
        _require_kernels(runtime)
    if request.settings.build:
        _warn(runtime)
    return runtime


class MissingKernelError(ImportError):
    """``BITLINEAR_BUILD=cached``, and the cache has no kernel that runs here."""


def _load(request: Request) -> tuple[Request, Runtime]:
    """Detect, choose, build and load. Anything unexpected ends in the reference implementation."""
    loader, cache = _process.loader, CacheDirectory(None)
    try:
        cache = open_cache()
        if cache.override_problem:
            announce(f"BITLINEAR_CACHE_DIR is not used: {cache.override_problem}")
        request = replace(request, hardware=detect(cache.path or next(iter(cache.readable), None)))
        verdicts = request.select()
        if not request.settings.cuda:
            off = Rejection("forced-off", "BITLINEAR_CUDA=off")
            request = replace(request, cuda_verdict=Verdict("cuda", rejection=off))
        if request.settings.build:
            runtime = resolve(request, cache, loader)
        else:
            off = Rejection("forced-off", "BITLINEAR_BUILD=off")
            runtime = without_kernel(request, cache, reject_usable(verdicts, off), off)
    except SettingError:
        raise
    except Exception as error:
        problem = unexpected(error)
        names = [*(variant.name for variant in request.variants), "cuda"]
        rejected = [Verdict(name, rejection=problem) for name in names]
        runtime = without_kernel(request, cache, rejected, problem)
    runtime = replace(runtime, required=request.settings.cached)
    return request, keep_loaded(runtime, loader)


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
        _process.loader.use_kernels(imported.kernel)  # it fitted before
        _process.runtime = imported
        return imported
    try:
        forced = replace(request, settings=replace(request.settings, kernel=name))
        after = resolve(forced, before.cache, _process.loader)
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    if after.kernel != name or after.problem:
        raise RuntimeError(f"cannot switch to {name}: {after.problem}")
    _process.runtime = replace(after, libraries={**before.libraries, **after.libraries})
    return _process.runtime


def current() -> Runtime:
    """Return what this process computes with; load it first if nothing is loaded."""
    return _process.runtime or load()


def parallel_threads() -> int | None:
    """Start the operator's threads and count them; None without a compiled operator."""
    return _process.loader.parallel_threads()


def _require_kernels(runtime: Runtime) -> None:
    if not runtime.missing:
        return
    cache = runtime.cache
    held = "; ".join(f"{root} holds {artifacts.contents(root)}" for root in cache.readable)
    raise MissingKernelError(
        f"BITLINEAR_BUILD=cached, but {runtime.missing}. "
        f"{'. '.join(filter(None, [held, cache.note, cache.reason]))}. "
        "Set BITLINEAR_CACHE_DIR to a directory that python -m bitlinear.doctor --prebuild has "
        "filled for this machine, or unset BITLINEAR_BUILD."
    )


def _warn(runtime: Runtime) -> None:
    where, problem = "", runtime.problem
    if not problem:
        where, problem = " for CUDA tensors", runtime.cuda_problem
    if not problem:
        return
    try:
        warnings.warn(
            f"bitlinear runs its slow reference implementation{where}: {problem}. "
            "More: python -m bitlinear.doctor",
            RuntimeWarning,
            stacklevel=3,
        )
    except Warning:
        raise  # the user's filter makes errors of warnings
    except Exception:  # nothing can be written to stderr
        return
