"""The libraries for one choice: each from the cache, or else built."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..kernels import CudaLibrary, Library, Variant
from . import artifacts, self_tests
from .artifacts import Artifact
from .cache_directory import CacheDirectory, CacheVanishedError
from .cuda_arch import toolkit
from .hardware import Hardware
from .keys import ingredients, self_test_machine
from .progress import announce
from .rejection import Probe, Rejection
from .settings import is_build_postponed
from .system import ProbeError
from .toolchain import toolkit_fix

if TYPE_CHECKING:
    from .build import Build


class CacheUnusableError(Exception):
    """A directory of the cache cannot be used after all.

    Attributes:
        root: The directory.
        problem: Why not, in one line.
        deleted: Whether somebody has deleted what was there.
    """

    def __init__(self, root: Path, problem: str, deleted: bool = False) -> None:
        super().__init__(f"{root} {problem}")
        self.root = root
        self.problem = problem
        self.deleted = deleted


class LibraryProvider:
    """Provides libraries: :meth:`prepare` starts all builds at once, :meth:`get` waits for one.

    As a context manager it stops the builds that nobody waited for, and prunes the cache.

    Args:
        sources: Where the sources of the libraries lie.
        hardware: The machine.
        cache: The directories to read from and to write to.
        obstacle: Why this process can build nothing; None if it can.
        may_build: Build missing libraries; else :meth:`prepare` only says that some are missing.
        verbose: Copy the compilers' output to stderr.

    Attributes:
        cache: As passed.
        results: The artifact or the rejection of each library so far, by name.
    """

    def __init__(
        self,
        sources: Path,
        hardware: Hardware,
        cache: CacheDirectory,
        obstacle: Rejection | None = None,
        *,
        may_build: bool = False,
        verbose: bool = False,
    ) -> None:
        self.cache = cache
        self.results: dict[str, Probe[Artifact]] = {}
        self._sources = sources
        self._hardware = hardware
        self._obstacle = obstacle
        self._may_build = may_build
        self._verbose = verbose
        self._builds: dict[str, Build] = {}
        self._began = time.monotonic()

    def prepare(self, *libraries: Library) -> bool:
        """Look the libraries up and start to build those that are missing.

        Returns:
            False if some are missing and this provider may not build.
        """
        missing = []
        for library in libraries:
            if library.name in self.results or library.name in self._builds:
                continue
            try:
                parts = ingredients(library, self._sources, self._hardware)
            except OSError as error:
                reason = f"a source cannot be read: {error}"
                self._reject(library, Rejection("compile-failed", reason))
                continue
            obstacle = self._obstacle
            if obstacle is None and isinstance(library, CudaLibrary):
                obstacle = cuda_obstacle(self._hardware)
            found = artifacts.find(self.cache, parts, can_build=obstacle is None)
            if found is not None:
                if found.value is not None:
                    found = tested(found.value, library, self.cache, self._hardware)
                else:
                    self._give_up(found.rejection)
                self.results[library.name] = found
                if found.rejection is not None:
                    break  # the libraries after it may never be needed
            elif obstacle is not None:
                nearest = artifacts.nearest(self.cache, parts)
                reason = "; ".join(filter(None, [obstacle.reason, nearest]))
                self._reject(library, replace(obstacle, reason=reason))
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

    def get(self, library: Library) -> Probe[Artifact]:
        """Wait for a library that was prepared.

        Raises:
            CacheUnusableError: Somebody deleted the cache during the build.
        """
        if library.name not in self.results:
            try:
                result = self._builds[library.name].wait(self._verbose)
            except CacheVanishedError as error:
                raise self._vanished(error) from error
            if result.rejection is not None and result.rejection.code == "compile-failed":
                self._give_up(result.rejection)
            self.results[library.name] = result
            del self._builds[library.name]
            if result.rejection is not None:
                announce(f"{library} is not available: {result.reason}")
            elif not self._builds:
                announce(f"compiled in {time.monotonic() - self._began:.1f} s")
        return self.results[library.name]

    def _give_up(self, rejection: Rejection | None) -> None:
        """Build nothing more if the machine has failed: the next build would end the same way."""
        if rejection is not None and rejection.momentary:
            self._obstacle = rejection

    def _start(self, library: Library, parts: Mapping[str, str]) -> None:
        assert self.cache.path is not None  # or there would be an obstacle
        from .build import Build

        try:
            self._builds[library.name] = Build(
                library, self._sources, self.cache.path, parts, self._hardware
            )
        except CacheVanishedError as error:
            raise self._vanished(error) from error
        except ProbeError as error:
            self._reject(library, Rejection("no-compiler", str(error)))
        except OSError as error:
            reason = f"the build cannot start: {error}"
            self._reject(library, Rejection("compile-failed", reason))

    def _vanished(self, error: CacheVanishedError) -> CacheUnusableError:
        assert self.cache.path is not None  # it was built there
        return CacheUnusableError(self.cache.path, str(error), deleted=True)

    def _reject(self, library: Library, rejection: Rejection) -> None:
        self.results[library.name] = Probe(rejection=rejection)

    def __enter__(self) -> LibraryProvider:
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


def tested(
    artifact: Artifact, library: Library, cache: CacheDirectory, hardware: Hardware
) -> Probe[Artifact]:
    """Return a library with the result of its self-test on this hardware.

    The result of an earlier process serves. If there is none, the test runs now.
    """
    known = self_tests.find(cache, artifact.sha256, self_test_machine(library, hardware))
    if known is not None:
        return artifact.tested(known)
    from . import build

    if isinstance(library, CudaLibrary):
        announce(f"testing {library} on this machine: happens once, takes a few seconds")
    return build.test(artifact, library, cache.path, hardware)


def build_obstacle(hardware: Hardware) -> Rejection | None:
    """Say why this process can build nothing; None if it can."""
    if is_build_postponed():
        fix = "python -m bitlinear.doctor compiles it"
        return Rejection("not-cached", "not compiled yet", fix)
    return toolchain_obstacle(hardware)


def toolchain_obstacle(hardware: Hardware) -> Rejection | None:
    """Say which tool is missing that every build needs; None if there is none."""
    return hardware.compiler.rejection or hardware.ninja.rejection


def cuda_obstacle(hardware: Hardware) -> Rejection | None:
    """Say why the CUDA kernels cannot be compiled; None if they can."""
    nvcc, torch = hardware.nvcc.value, hardware.torch.cuda or ""
    if nvcc is not None and nvcc.release and nvcc.release != toolkit(hardware):
        reason = f"nvcc is of CUDA {nvcc.release}, torch is built for CUDA {torch}"
        return Rejection("cuda-mismatch", reason, toolkit_fix(torch))
    return hardware.nvcc.rejection


def _enumerate(libraries: Sequence[Library]) -> str:
    *names, last = map(str, libraries)
    return f"{', '.join(names)} and {last}" if names else last


def _duration(libraries: Sequence[Library]) -> str:
    if any(isinstance(library, CudaLibrary) for library in libraries):
        return "about a minute"
    if all(isinstance(library, Variant) for library in libraries):
        return "a few seconds"
    return "10 to 20 s, for torch's C++ headers"
