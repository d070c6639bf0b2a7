"""From a choice to a loaded kernel: find it in the cache or have it built, load it, plug it in.

The warm path computes a key, checks a hash and loads two libraries; it imports neither
``torch.utils.cpp_extension`` nor anything else that only a build needs. Whatever happens, the
result is a :class:`Runtime` that says what is in use and why.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch

from ..kernels import CUDA, DIRECTORY, OPS, VARIANTS, CudaLibrary, Library, Variant
from . import artifacts, build
from .artifacts import Artifact
from .build_lock import build_lock
from .cache_directory import CacheDirectory, open_cache, with_temporary
from .cuda_arch import targets, toolkit, version
from .hardware import Hardware, detect
from .keys import ingredients
from .probe import has_interpreter
from .progress import announce
from .verdicts import Verdict, select


@dataclass(frozen=True)
class Runtime:
    """What this process computes with, and why.

    Attributes:
        kernel: The CPU variant in use; None: the reference implementation.
        verdicts: One for each variant and for CUDA, by priority.
        cache: Where compiled libraries lie.
        artifacts: By library name, whatever was looked up in the cache or built.
        problem: Why the reference implementation is in use, in one line; empty if it is not.
        hardware: What the choice was made for.
    """

    kernel: str | None
    verdicts: tuple[Verdict, ...]
    cache: CacheDirectory
    artifacts: Mapping[str, Artifact]
    problem: str
    hardware: Hardware

    @property
    def cuda(self) -> Verdict:
        """The verdict on CUDA's kernels."""
        return self.verdicts[-1]

    @property
    def cuda_problem(self) -> str:
        """Why CUDA tensors, where there can be any, are left to the reference implementation.

        In one line; empty if they are not, or if that is what was asked for.
        """
        wanted = self.hardware.torch.cuda and self.cuda.code not in ("", "no-gpu", "forced-off")
        return _line(self.cuda) if wanted else ""

    def with_cuda(self, verdict: Verdict) -> Runtime:
        """The same with another verdict on CUDA's kernels."""
        return replace(self, verdicts=(*self.verdicts[:-1], verdict))


@dataclass(frozen=True)
class _Request:
    """What to choose from, for which machine.

    Attributes:
        forced: ``BITLINEAR_KERNEL``.
        arch_list: ``TORCH_CUDA_ARCH_LIST``.
        settled: The verdict on CUDA's kernels, once there is nothing left to do about them.
    """

    hardware: Hardware
    variants: tuple[Variant, ...]
    operator: Library
    cuda: CudaLibrary
    directory: Path
    forced: str | None
    arch_list: str
    settled: Verdict | None = None

    def select(self, rejected: Mapping[str, Verdict] = MappingProxyType({})) -> list[Verdict]:
        settled = {"cuda": self.settled} if self.settled else {}
        return select(
            self.hardware,
            self.variants,
            forced=self.forced,
            rejected={**rejected, **settled},
            arch_list=self.arch_list,
        )

    def cuda_libraries(self) -> list[CudaLibrary]:
        """CUDA's kernels for the GPUs here, as a list of one; empty if there is nothing to do."""
        if self.settled or not self.select()[-1].ok:
            return []
        found = targets(self.hardware, self.arch_list)
        architectures = tuple(sorted({t.architecture for t in found if t.architecture}))
        devices = tuple(number for number, t in enumerate(found) if t.architecture)
        return [replace(self.cuda, architectures=architectures, devices=devices)]


@dataclass(frozen=True)
class _Obstacle:
    """Why nothing can be built."""

    code: str
    reason: str
    fix: str = ""


@dataclass
class _State:
    """What this process has loaded. Nothing is ever unloaded, and the operator is loaded once."""

    request: _Request | None = None
    imported: Runtime | None = None
    runtime: Runtime | None = None
    operator: ctypes.CDLL | None = None
    kernels: dict[str, ctypes.CDLL] = field(default_factory=dict)


_state = _State()


# --------------------------------------------------------------------------------- entry points


def load(
    variants: tuple[Variant, ...] = VARIANTS,
    operator: Library = OPS,
    directory: Path = DIRECTORY,
    cuda: CudaLibrary = CUDA,
) -> Runtime:
    """Choose, find or build, and load the kernels; called once, by ``import bitlinear``.

    Args:
        variants: The kernels to choose from.
        operator: The library that defines the operator.
        directory: Where their sources lie.
        cuda: The library of the kernels for GPUs.

    Raises:
        ValueError: An environment variable has a value that means nothing, or ``BITLINEAR_KERNEL``
            names no kernel that this machine supports. Nothing else raises: without a compiled
            kernel there is one warning, and ``Runtime.problem``.
    """
    found = open_cache()
    if found.refused:
        announce(f"BITLINEAR_CACHE_DIR is not used: {found.refused}")
    request = _Request(
        hardware=detect(found.readable[0] if found.readable else None),
        variants=variants,
        operator=operator,
        cuda=cuda,
        directory=directory,
        forced=os.environ.get("BITLINEAR_KERNEL") or None,
        arch_list=os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
    )
    try:
        build_off, cuda_off = _is_off("BITLINEAR_BUILD"), _is_off("BITLINEAR_CUDA")
        verdicts = request.select()
    except ValueError as error:
        if not _is_for_doctor():
            raise
        announce(str(error))  # it could not say so itself: this is the import of its package
        raise SystemExit(2) from None
    if cuda_off:
        off = _cannot(cuda, _Obstacle("forced-off", "BITLINEAR_CUDA=off"))
        request = replace(request, settled=_verdict("cuda", off))
    if build_off:
        off = _cannot(operator, _Obstacle("forced-off", "BITLINEAR_BUILD=off"))
        runtime = _without_kernel(request, found, _reject_usable(verdicts, off), {}, off)
    else:
        runtime = _load(request, found)
    _state.request = replace(request, settled=runtime.cuda)
    _state.imported = _state.runtime = runtime
    if not build_off and not _asked_not_to_build():
        _warn(runtime)
    return runtime


def _warn(runtime: Runtime) -> None:
    """Say it, once, if something is slower than it has to be."""
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


def activate(name: str | None) -> Runtime:
    """Switch the operator to another variant in this process, building it if need be.

    Args:
        name: The variant; None goes back to what the import chose.

    Raises:
        RuntimeError: it is unknown, this machine does not support it, it could not be built, or
            this process has no compiled operator.
    """
    before = current()
    if _state.request is None or _state.operator is None:
        raise RuntimeError(f"cannot switch to {name}: {before.problem}")
    if name is None:
        imported = _state.imported
        assert imported is not None
        assert imported.kernel is not None  # as there is an operator
        _plug_in(imported.kernel, None)
        _state.runtime = imported
        return imported
    try:
        after = _load(replace(_state.request, forced=name), before.cache)
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    if after.kernel != name:
        raise RuntimeError(f"cannot switch to {name}: {after.problem}")
    _state.runtime = replace(after, artifacts={**before.artifacts, **after.artifacts})
    return _state.runtime


def current() -> Runtime:
    """What this process computes with."""
    return _state.runtime or load()


def parallel_threads() -> int | None:
    """How many threads the operator really runs on (it starts them); None without an operator."""
    return None if _state.operator is None else int(_state.operator.bitlinear_parallel_threads())


# --------------------------------------------------------------------------------- choosing


def _load(request: _Request, directory: CacheDirectory) -> Runtime:
    obstacle = _obstacle(request.hardware)
    warm = _resolve(request, _Workshop(request, directory, obstacle))
    if warm is not None:
        return warm
    # Nothing stands in the way of building what is missing, except perhaps a place for it.
    directory = with_temporary(directory)
    if directory.path is None:
        fix = "set BITLINEAR_CACHE_DIR to a directory that can be written to"
        obstacle = _Obstacle("compile-failed", f"no place to compile: {directory.reason}", fix)
    if directory.temporary:
        announce(
            f"no cache directory ({directory.reason}): what is compiled now is lost when this "
            "process ends; set BITLINEAR_CACHE_DIR to a directory of your own"
        )
    with build_lock(directory.path), _Workshop(request, directory, obstacle, True) as workshop:
        cold = _resolve(request, workshop)
    assert cold is not None
    return cold


def _resolve(request: _Request, workshop: _Workshop) -> Runtime | None:
    """Load the best that can be had; None if that takes a build and this one may not."""
    cuda = request.cuda_libraries()
    runtime = _resolve_cpu(request, workshop, cuda)
    for library in cuda:
        if runtime is None or not workshop.begin(library):
            return None
        failure = _load_cuda(workshop.get(library))
        if failure is not None:
            runtime = runtime.with_cuda(_verdict("cuda", failure))
    return runtime


def _resolve_cpu(
    request: _Request, workshop: _Workshop, others: Sequence[Library]
) -> Runtime | None:
    """The same for the CPU alone; what must be built is, beside `others`."""
    by_name = {variant.name: variant for variant in request.variants}
    operator = [] if _state.operator else [request.operator]
    rejected: dict[str, Verdict] = {}
    while True:
        *verdicts, cuda = request.select(rejected)
        chosen = next((v.variant for v in verdicts if v.status == "chosen"), None)
        if chosen is None:
            first = next((workshop.done[name] for name in rejected), None)
            verdicts = [*verdicts, cuda]
            return _without_kernel(request, workshop.cache, verdicts, workshop.done, first)
        if not workshop.begin(by_name[chosen], *operator, *others):
            return None
        kernels = _open(workshop.get(by_name[chosen]))
        if kernels.state != "failed":
            break
        rejected[chosen] = _verdict(chosen, kernels)

    failure = _plug_in(chosen, workshop.get(operator[0]) if operator else None)
    if failure is not None:
        verdicts = [*_reject_usable(verdicts, failure), cuda]
        return _without_kernel(request, workshop.cache, verdicts, workshop.done, failure)
    every = (*verdicts, cuda)
    return Runtime(chosen, every, workshop.cache, workshop.done, "", request.hardware)


def _without_kernel(
    request: _Request,
    directory: CacheDirectory,
    verdicts: list[Verdict],
    artifacts: Mapping[str, Artifact],
    failure: Artifact | None,
) -> Runtime:
    problem = "no kernel supports this machine"
    if failure is not None:
        problem = _line(failure)
    return Runtime(None, tuple(verdicts), directory, artifacts, problem, request.hardware)


def _line(failure: Artifact | Verdict) -> str:
    return failure.reason + (f" ({failure.fix})" if failure.fix else "")


def _verdict(variant: str, failure: Artifact) -> Verdict:
    return Verdict(
        variant=variant,
        ok=False,
        reason=failure.reason,
        fix=failure.fix,
        code=failure.code,
        status="rejected",
    )


def _reject_usable(verdicts: list[Verdict], failure: Artifact) -> list[Verdict]:
    return [_verdict(v.variant, failure) if v.ok else v for v in verdicts]


def _obstacle(hardware: Hardware) -> _Obstacle | None:
    """What keeps this process from building anything."""
    if _asked_not_to_build():
        return _Obstacle("forced-off", "not compiled yet", "python -m bitlinear.doctor compiles it")
    if hardware.compiler is None:
        fix = "install a C++ compiler (Debian and Ubuntu: apt install g++) or set CXX"
        return _Obstacle("no-compiler", f"no C++ compiler: {hardware.compiler_reason}", fix)
    if hardware.ninja is None:
        return _Obstacle("no-compiler", f"no ninja: {hardware.ninja_reason}", "pip install ninja")
    if not has_interpreter():
        return _Obstacle("no-compiler", "there is no Python interpreter to run the build with")
    return None


def _cuda_obstacle(library: Library, hardware: Hardware) -> _Obstacle | None:
    """What keeps this process from building CUDA's kernels, if that is what `library` is."""
    torch, nvcc = hardware.torch.cuda, hardware.nvcc
    if not isinstance(library, CudaLibrary):
        return None
    fix = f"install the CUDA {torch} toolkit, or set CUDA_HOME to where it is"
    if nvcc is None:
        if torch and version(torch) >= (13, 0):  # since then NVIDIA's packages make up a toolkit
            fix = f'pip install "cuda-toolkit[nvcc,cccl]=={torch}.*", or {fix}'
        return _Obstacle("no-compiler", f"no nvcc: {hardware.nvcc_reason}", fix)
    if nvcc.release and nvcc.release != toolkit(hardware):
        reason = f"nvcc is of CUDA {nvcc.release}, torch is built for CUDA {torch}"
        return _Obstacle("cuda-mismatch", reason, fix)
    return None


def _asked_not_to_build() -> bool:
    """Whether this import happens for a doctor that only looks, or deletes first."""
    options = {"--no-build", "--clean", "--rebuild"}
    return _is_for_doctor() and not options.isdisjoint(sys.argv)


def _is_for_doctor() -> bool:
    """Whether ``python -m bitlinear.doctor`` imports this package: before it sees its options.

    ``argv[0]`` is ``-m`` just then.
    """
    arguments = getattr(sys, "argv", [])
    command = getattr(sys, "orig_argv", ["bitlinear.doctor"])  # Python 3.9 has none
    return arguments[:1] == ["-m"] and "bitlinear.doctor" in command


def _is_off(variable: str) -> bool:
    """Whether an environment variable that is "auto" or "off" says "off".

    Raises:
        ValueError: It says something else.
    """
    value = os.environ.get(variable) or "auto"
    if value.lower() not in ("auto", "off"):
        raise ValueError(f"{variable}={value!r} means nothing. Set it to auto or off, or unset it.")
    return value.lower() == "off"


# --------------------------------------------------------------------------------- libraries


class _Workshop:
    """Hands out the libraries of one request: from the cache, or else built.

    Attributes:
        cache: Where they come from and go to.
        done: What has been handed out so far, by name.
    """

    def __init__(
        self,
        request: _Request,
        directory: CacheDirectory,
        obstacle: _Obstacle | None,
        may_build: bool = False,
    ) -> None:
        self.cache = directory
        self.done: dict[str, Artifact] = {}
        self._request = request
        self._obstacle = obstacle
        self._may_build = may_build
        self._builds: dict[str, build.Build] = {}
        self._began = time.monotonic()

    def begin(self, *libraries: Library) -> bool:
        """Start to build whatever is missing, all at once; False if this workshop may not."""
        missing = []
        for library in libraries:
            if library.name in self.done or library.name in self._builds:
                continue
            try:
                parts = ingredients(library, self._request.directory, self._request.hardware)
            except OSError as error:
                unreadable = _Obstacle("compile-failed", f"a source cannot be read: {error}")
                self.done[library.name] = _cannot(library, unreadable)
                continue
            obstacle = self._obstacle or _cuda_obstacle(library, self._request.hardware)
            found = artifacts.find(self.cache, parts, any_compiler=obstacle is not None)
            if found is not None:
                self.done[library.name] = found
                if found.state == "failed":
                    break  # what comes after it may never be needed
            elif obstacle is not None:
                self.done[library.name] = _cannot(library, obstacle)
            else:
                missing.append((library, parts))
        if missing and not self._may_build:
            return False
        if missing:
            wanted = [library for library, _ in missing]
            announce(
                f"compiling {_enumerate(wanted)} for this machine into {self.cache.path}: "
                f"happens once, takes {_duration(wanted)}"
            )
        for library, parts in missing:
            self._start(library, parts)
        return True

    def _start(self, library: Library, parts: Mapping[str, str]) -> None:
        request, root = self._request, self.cache.path
        assert root is not None
        try:
            self._builds[library.name] = build.Build(
                library, request.directory, root, parts, request.hardware
            )
        except OSError as error:
            obstacle = _Obstacle("compile-failed", f"cannot start to compile: {error}")
            self.done[library.name] = _cannot(library, obstacle)

    def get(self, library: Library) -> Artifact:
        """What became of a library that was begun."""
        if library.name not in self.done:
            verbose = os.environ.get("BITLINEAR_VERBOSE") == "1"
            artifact = self.done[library.name] = self._builds[library.name].wait(verbose)
            del self._builds[library.name]
            if artifact.state == "failed":
                announce(f"{library} cannot be had: {artifact.reason}")
            elif not self._builds:
                announce(f"compiled in {time.monotonic() - self._began:.1f} s")
        return self.done[library.name]

    def __enter__(self) -> _Workshop:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for unneeded in self._builds.values():  # also after an interrupt
            unneeded.stop()
        if self.cache.path is not None:
            artifacts.prune(self.cache.path)


def _enumerate(libraries: Sequence[Library]) -> str:
    *names, last = map(str, libraries)
    return f"{', '.join(names)} and {last}" if names else last


def _duration(libraries: Sequence[Library]) -> str:
    if any(isinstance(library, CudaLibrary) for library in libraries):
        return "about a minute"
    if all(isinstance(library, Variant) for library in libraries):
        return "a few seconds"
    return "10 to 20 s, for torch's C++ headers"


def _cannot(library: Library, obstacle: _Obstacle) -> Artifact:
    return Artifact(
        name=library.name,
        key="",
        directory=None,
        state="failed",
        reason=obstacle.reason,
        fix=obstacle.fix,
        code=obstacle.code,
    )


def _open(artifact: Artifact) -> Artifact:
    """Load a variant's library; a failed artifact if that is impossible."""
    if artifact.state == "failed":
        return artifact
    try:
        kernels = ctypes.CDLL(str(artifact.path))
        kernels.bitlinear_kernels.argtypes = []
        kernels.bitlinear_kernels.restype = ctypes.c_void_p
        if not kernels.bitlinear_kernels():  # it passed its self-test where the system allowed it
            raise OSError("the system refuses what it needs")
    except (OSError, AttributeError) as error:
        return _unloadable(artifact, error)
    _state.kernels[artifact.name] = kernels
    return artifact


def _plug_in(variant: str, operator: Artifact | None) -> Artifact | None:
    """Load the operator, if one is given, and hand it the kernels; what failed, if anything."""
    if operator is not None:
        if operator.state == "failed":
            return replace(operator, reason=f"the operator: {operator.reason}")
        try:
            torch.ops.load_library(str(operator.path))
            _state.operator = ctypes.CDLL(str(operator.path))
        except (OSError, RuntimeError) as error:
            return _unloadable(operator, error)
    assert _state.operator is not None
    use_kernels = _state.operator.bitlinear_use_kernels
    use_kernels.argtypes = [ctypes.c_void_p]
    use_kernels.restype = ctypes.c_int
    if use_kernels(_state.kernels[variant].bitlinear_kernels()) != 0:
        # Both were built from the same headers, or their keys would differ.
        raise AssertionError(f"the kernels of {variant} do not fit the operator")
    return None


def _load_cuda(artifact: Artifact) -> Artifact | None:
    """Give the operator its CUDA kernels, before or after it is defined; what failed, if anything.

    Nothing is initialised: the library only enters its functions into torch's dispatcher.
    """
    if artifact.state == "failed":
        return artifact
    try:
        torch.ops.load_library(str(artifact.path))
    except (OSError, RuntimeError) as error:
        return _unloadable(artifact, error)
    return None


def _unloadable(artifact: Artifact, error: Exception) -> Artifact:
    reason = f"{artifact.name} cannot be loaded: {error}"
    return replace(artifact, state="failed", reason=reason, fix=build.FIX, code="compile-failed")
