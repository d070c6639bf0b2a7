"""From a choice to loaded kernels: choose, provide, load, and choose again if that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from ..kernels import CudaLibrary, Library, Variant
from .artifacts import Artifact
from .build_lock import build_lock
from .cache_directory import CacheDirectory, why_not_trusted, why_unusable, with_temporary
from .cuda_arch import targets
from .hardware import Hardware
from .loader import Loader
from .pinned import at, is_pinned, shown
from .progress import announce
from .provider import CacheUnusableError, LibraryProvider, build_obstacle
from .rejection import Probe, Rejection
from .settings import Settings
from .system import ProbeError
from .verdicts import Verdict, select

_CPU_BYTES = 16 << 20  # measured while the operator and a kernel compile: 3 MB
_CUDA_BYTES = 128 << 20
_ATTEMPTS = 3


@dataclass(frozen=True)
class Runtime:
    """What this process computes with, and why.

    Attributes:
        kernel: The CPU variant in use; None: the reference implementation.
        verdicts: One for each variant by priority, then one for CUDA.
        cache: Where compiled libraries lie.
        libraries: The artifact or the rejection of each library that was looked up, by name.
        problem: Why the reference implementation is in use, in one line; empty if it is not.
        hardware: The machine.
        arch_list: ``TORCH_CUDA_ARCH_LIST``, as it was when the choice was made.
        required: ``BITLINEAR_BUILD=cached``: the import fails if a kernel is missing.
    """

    kernel: str | None
    verdicts: tuple[Verdict, ...]
    cache: CacheDirectory
    libraries: Mapping[str, Probe[Artifact]]
    problem: str
    hardware: Hardware
    arch_list: str = ""
    required: bool = False

    @property
    def missing(self) -> str:
        """Why an import fails that requires kernels, in one line; empty if it does not."""
        kernels = {"this CPU": self.problem, "this machine's GPUs": self.cuda_problem}
        lacking = {which: problem for which, problem in kernels.items() if problem}
        if not self.required:
            return ""
        return "; ".join(f"no kernel for {which} can be used: {p}" for which, p in lacking.items())

    @property
    def artifacts(self) -> dict[str, Artifact]:
        """The libraries that are available, by name."""
        found = {name: probe.value for name, probe in self.libraries.items()}
        return {name: artifact for name, artifact in found.items() if artifact is not None}

    @property
    def cuda(self) -> Verdict:
        """The verdict on the CUDA kernels."""
        return self.verdicts[-1]

    @property
    def cuda_problem(self) -> str:
        """Why CUDA tensors take the reference implementation, in one line.

        Empty if they do not, if there can be no CUDA tensors, or if the user asked for it.
        """
        rejection, driver = self.cuda.rejection, self.hardware.driver
        if rejection is None or rejection.code == "forced-off" or not self.hardware.torch.cuda:
            return ""
        has_no_gpu = not driver.value.gpus if driver.value else rejection.code == "no-gpu"
        return "" if has_no_gpu else rejection.line

    @property
    def cuda_devices(self) -> tuple[int, ...]:
        """The numbers of the GPUs that run the CUDA kernels."""
        if self.cuda.status != "chosen":
            return ()
        judged = targets(self.hardware, self.arch_list)
        return tuple(number for number, target in enumerate(judged) if target.architecture)

    def with_cuda(self, verdict: Verdict) -> Runtime:
        """Replace the verdict on the CUDA kernels."""
        return replace(self, verdicts=(*self.verdicts[:-1], verdict))


@dataclass(frozen=True)
class Request:
    """What to choose from, and for which machine.

    Attributes:
        hardware: The machine.
        settings: The user's wishes.
        variants: The CPU kernels to choose from.
        operator: The library that defines the operator.
        cuda: The library of the kernels for GPUs.
        directory: Where the sources of all of them lie.
        cuda_verdict: The verdict on the CUDA kernels, once it is final.
    """

    hardware: Hardware
    settings: Settings
    variants: tuple[Variant, ...]
    operator: Library
    cuda: CudaLibrary
    directory: Path
    cuda_verdict: Verdict | None = None

    def select(self, rejected: Mapping[str, Rejection] = MappingProxyType({})) -> list[Verdict]:
        """Judge the variants; ``rejected`` holds those that failed on this machine.

        Raises:
            SettingError: ``BITLINEAR_KERNEL`` names no variant that this CPU can run.
        """
        *verdicts, cuda = select(
            self.hardware,
            self.variants,
            forced=self.settings.kernel,
            rejected=rejected,
            arch_list=self.settings.arch_list,
        )
        return [*verdicts, self.cuda_verdict or cuda]

    def cuda_libraries(self) -> list[CudaLibrary]:
        """The CUDA kernels for the GPUs of this machine, if they are to be loaded; at most one."""
        if self.cuda_verdict or not self.select()[-1].ok:
            return []
        found = targets(self.hardware, self.settings.arch_list)
        architectures = tuple(sorted({t.architecture for t in found if t.architecture}))
        devices = tuple(number for number, t in enumerate(found) if t.architecture)
        return [replace(self.cuda, architectures=architectures, devices=devices)]


def resolve(request: Request, cache: CacheDirectory, loader: Loader) -> Runtime:
    """Load the best kernels that this machine can have.

    A directory of the cache that turns out to be unusable is given up, and the others serve: in the
    end a temporary directory, or nothing.
    """
    problems: list[str] = []
    while True:
        try:
            runtime = _resolve_in(request, cache, loader)
        except CacheUnusableError as error:
            problems.append(str(error))
            # What somebody deleted meanwhile can be built again in the same place.
            if error.deleted and error.root.exists() and len(problems) < _ATTEMPTS:
                announce(f"{error}; looking again")
            else:
                announce(f"{error}; going on without it")
                cache = cache.without(error.root, error.problem)
            continue
        if runtime.problem and problems:
            return replace(runtime, problem="; ".join([*problems, runtime.problem]))
        return runtime


def _resolve_in(request: Request, cache: CacheDirectory, loader: Loader) -> Runtime:
    # The warm path looks everything up without a lock. If something is missing, the cold path takes
    # the lock, looks again and builds the rest.
    obstacle = _forbidden(request) or build_obstacle(request.hardware)
    for root in cache.readable:
        # Somebody may have taken its place since an earlier call.
        if not is_pinned(root) and root.exists() and (problem := why_not_trusted(root)):
            cache = cache.without(root, problem)
    lookup = LibraryProvider(request.directory, request.hardware, cache, obstacle)
    warm = _try_resolve(request, lookup, loader)
    if warm is not None:
        return warm
    cache = _with_space(with_temporary(cache), request)
    if cache.path is None:
        fix = "set BITLINEAR_CACHE_DIR to a directory that can be written to"
        reason = f"no place to compile: {cache.reason}"
        obstacle = Rejection("compile-failed", reason, fix)
    if cache.temporary:
        announce(
            f"no cache directory ({cache.reason}): kernels compiled now are lost when this process "
            "ends; set BITLINEAR_CACHE_DIR to a directory of your own"
        )
    provider = LibraryProvider(
        request.directory,
        request.hardware,
        cache,
        obstacle or _no_interpreter(),
        may_build=True,
        verbose=request.settings.verbose,
    )
    with build_lock(cache.path), provider:
        cold = _try_resolve(request, provider, loader)
    assert cold is not None  # as the provider may build
    return cold


def _forbidden(request: Request) -> Rejection | None:
    if not request.settings.cached:
        return None
    return Rejection("not-cached", "not in the cache")


def _no_interpreter() -> Rejection | None:
    from .children import interpreter

    try:
        interpreter()
    except ProbeError as error:
        return Rejection("no-compiler", str(error))
    return None


def _with_space(cache: CacheDirectory, request: Request) -> CacheDirectory:
    """The cache, or a temporary directory if the cache has no room for a build."""
    size = _CPU_BYTES + (_CUDA_BYTES if request.cuda_libraries() else 0)
    for _ in range(2):
        problem = why_unusable(cache.path, size) if cache.path else ""
        if not problem or cache.path is None:
            break
        full = cache.without(cache.path, f"{problem} ({size >> 20} MB are needed)")
        cache = full if cache.temporary else with_temporary(full)
    return cache


def without_kernel(
    request: Request,
    cache: CacheDirectory,
    verdicts: Sequence[Verdict],
    rejection: Rejection | None,
    libraries: Mapping[str, Probe[Artifact]] = MappingProxyType({}),
) -> Runtime:
    """Fall back to the reference implementation.

    Args:
        request: What was asked for.
        cache: Where compiled libraries lie.
        verdicts: The verdicts so far.
        rejection: Why no kernel is used; None: no variant supports this machine.
        libraries: The results of the libraries that were looked up.
    """
    problem = rejection.line if rejection else "no kernel supports this machine"
    return Runtime(
        kernel=None,
        verdicts=tuple(verdicts),
        cache=cache,
        libraries=libraries,
        problem=problem,
        hardware=request.hardware,
        arch_list=request.settings.arch_list,
    )


def keep_loaded(runtime: Runtime, loader: Loader) -> Runtime:
    """Go on with the kernels of an earlier import in this process, if this one found none.

    They cannot be unloaded, and they compute the same bits as the reference implementation.
    """
    if runtime.kernel is not None or loader.active is None:
        return runtime
    announce(f"this process keeps the kernels of its first import, {loader.active}")
    kept = Verdict(loader.active, "chosen", summary="loaded by an earlier import in this process")
    verdicts = tuple(kept if v.variant == kept.variant else v for v in runtime.verdicts)
    return replace(runtime, kernel=loader.active, verdicts=verdicts, problem="")


def unexpected(error: Exception) -> Rejection:
    """Make the rejection of what nobody has thought of."""
    reason = f"unexpected {type(error).__name__}: {error}"
    return Rejection("compile-failed", reason, "please report it with the doctor's output")


def reject_usable(verdicts: Sequence[Verdict], rejection: Rejection) -> list[Verdict]:
    """Reject every variant that this CPU could run."""
    return [Verdict(v.variant, rejection=rejection) if v.ok else v for v in verdicts]


def _try_resolve(request: Request, provider: LibraryProvider, loader: Loader) -> Runtime | None:
    # None: something has to be built, and this provider may not build.
    cuda = request.cuda_libraries()
    runtime = _resolve_cpu(request, provider, loader, cuda)
    for library in cuda:
        if runtime is None or not provider.prepare(library):
            return None
        try:
            failure = _load(library, provider, loader.load_cuda)
        except CacheUnusableError:
            raise
        except Exception as error:  # the CPU kernels are loaded
            failure = unexpected(error)
        if failure is not None:
            runtime = runtime.with_cuda(Verdict("cuda", rejection=failure))
    return runtime


def _resolve_cpu(
    request: Request, provider: LibraryProvider, loader: Loader, others: Sequence[Library]
) -> Runtime | None:
    # The libraries in `others` are built beside those for the CPU.
    by_name = {variant.name: variant for variant in request.variants}
    operator = [] if loader.operator else [request.operator]
    rejected: dict[str, Rejection] = {}
    while True:
        *verdicts, cuda = request.select(rejected)
        chosen = next((v.variant for v in verdicts if v.status == "chosen"), None)
        if chosen is None:
            first = next(iter(rejected.values()), None)
            return without_kernel(
                request, provider.cache, [*verdicts, cuda], first, provider.results
            )
        if not provider.prepare(by_name[chosen], *operator, *others):
            return None
        failure = _load(by_name[chosen], provider, loader.load_kernels)
        if failure is None and loader.operator is not None:
            failure = loader.use_kernels(chosen)
        if failure is None:
            break
        rejected[chosen] = failure

    for library in operator:
        failure = _load(library, provider, loader.load_operator)
        if failure is not None:
            failure = replace(failure, reason=f"the operator: {failure.reason}")
            every = [*reject_usable(verdicts, failure), cuda]
            return without_kernel(request, provider.cache, every, failure, provider.results)
    if operator:
        loader.use_kernels(chosen)
    return Runtime(
        kernel=chosen,
        verdicts=(*verdicts, cuda),
        cache=provider.cache,
        libraries=provider.results,
        problem="",
        hardware=request.hardware,
        arch_list=request.settings.arch_list,
    )


def _load(
    library: Library,
    provider: LibraryProvider,
    load: Callable[[Artifact], Rejection | None],
) -> Rejection | None:
    """Load a prepared library; return why it cannot be used, if so.

    Raises:
        CacheUnusableError: A file in the cache cannot be loaded. Built elsewhere, it may be.
    """
    result = provider.get(library)
    if result.value is None:
        return result.rejection
    artifact = result.value
    try:
        return load(artifact)
    except OSError as error:
        deleted = not artifact.path.exists()
        roots = [r for r in provider.cache.readable if at(r) == artifact.directory.parents[1]]
        if roots and (artifact.state == "cached" or deleted):
            problem = f"holds what cannot be loaded: {shown(error)}"
            raise CacheUnusableError(roots[0], problem, deleted=deleted) from error
        reason = f"{artifact.name} cannot be loaded: {shown(error)}"
        return Rejection(
            "compile-failed", reason, "python -m bitlinear.doctor --rebuild tries again"
        )
