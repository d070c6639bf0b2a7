"""The libraries that can be compiled: CPU kernel variants, the operator, and the CUDA kernels.

A variant is one ``.cpp`` file. It is compiled with exactly the instruction-set flags of its row in
:data:`VARIANTS` into a library without torch that exports ``bitlinear_kernels()`` (see ``abi.h``).
Tests, doctor and benchmark iterate :data:`VARIANTS`, so each variant is tested and reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

DIRECTORY = Path(__file__).parent

# The first flag makes variants bit-exact: a fused multiply-add would round once where the numerics
# specify two roundings.
_COMMON = ("-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-DNDEBUG")


@dataclass(frozen=True)
class Library:
    """A shared library that one call of ``cpp_extension.load`` builds from kernel sources.

    Attributes:
        name: The name of the library, of its file, and of its folder in the cache.
        sources: Paths inside ``bitlinear/kernels``, with forward slashes.
        cflags: All compiler flags except those that torch adds, as GCC and clang spell them
            (``flags.py`` has other spellings).
        ldflags: All linker flags except those that torch adds, for GNU ld.
    """

    name: str
    sources: tuple[str, ...]
    cflags: tuple[str, ...]
    ldflags: tuple[str, ...] = ()

    self_test: ClassVar[str] = "operator"  # a self-test of runtime/build_worker.py
    starts_threads: ClassVar[bool] = True

    def __str__(self) -> str:
        return "the operator"


@dataclass(frozen=True)
class Variant(Library):
    """A CPU kernel variant: a library, the hardware that it requires, and its priority.

    Attributes:
        arch: ``"x86_64"``, ``"aarch64"`` or ``"any"``.
        requires: All CPU flags (in the spelling of Linux) that ``cflags`` lets the compiler use.
        priority: Of the variants that the CPU can run, the one with the highest priority is chosen.
            Only variants of different architectures can have equal priorities.
    """

    arch: str = "any"
    requires: frozenset[str] = frozenset()
    priority: int = 0

    self_test: ClassVar[str] = "kernels"
    starts_threads: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"the {self.name} kernel"


@dataclass(frozen=True)
class CudaLibrary(Library):
    """The operator's kernels for NVIDIA GPUs, and the architectures to compile them for.

    Attributes:
        cuda_cflags: All flags of nvcc except those that torch adds.
        architectures: Machine code (``"sm_90a"``) or PTX (``"compute_90"``), in nvcc's spelling.
        devices: Indices of the GPUs on which the library must pass its self-test.
    """

    cuda_cflags: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    devices: tuple[int, ...] = ()

    self_test: ClassVar[str] = "cuda"
    starts_threads: ClassVar[bool] = False

    @property
    def nvcc_flags(self) -> tuple[str, ...]:
        """``cuda_cflags`` and the architectures. Torch then adds no architectures of its own."""
        codes = ((code.replace("sm_", "compute_"), code) for code in self.architectures)
        gencode = (f"-gencode=arch={virtual},code={code}" for virtual, code in codes)
        return (*self.cuda_cflags, *gencode)

    def __str__(self) -> str:
        return f"the CUDA kernels for {', '.join(self.architectures)}"


# The kernels use nothing of torch, so the library should not depend on libtorch. The linkers of
# macOS and Windows lack the flag; there the dependency is harmless, because torch is loaded first.
_LDFLAGS = ("-Wl,--as-needed",)

# The flags that -mavx2 -mf16c lets a compiler use, with implied extensions.
_AVX2_FLAGS = "pni ssse3 sse4_1 sse4_2 popcnt xsave avx f16c avx2"


def _variant(
    name: str, priority: int, arch: str = "any", isa: tuple[str, ...] = (), requires: str = ""
) -> Variant:
    return Variant(
        name=name,
        sources=(f"cpu/{name}.cpp", "cpu/decode.cpp", "cpu/selftest.cpp"),
        cflags=("-O3", *_COMMON, *isa),
        ldflags=_LDFLAGS,
        arch=arch,
        requires=frozenset(requires.split()),
        priority=priority,
    )


_AVX512_ISA = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mf16c")
# clang: -mavx512f implies FMA.
_AVX512_FLAGS = f"{_AVX2_FLAGS} fma avx512f avx512bw avx512dq avx512vl avx512_vnni"

# +dotprod and its base, Armv8.2: g++ has the dot product only from there on.
_DOTPROD_FLAGS = "asimd asimdrdm atomics crc32 asimddp"

VARIANTS: tuple[Variant, ...] = (
    _variant(
        "amx_int8",
        priority=50,
        arch="x86_64",
        isa=(*_AVX512_ISA, "-mamx-tile", "-mamx-int8"),
        requires=f"{_AVX512_FLAGS} amx_tile amx_int8",
    ),
    _variant(
        "avx512_vnni",
        priority=40,
        arch="x86_64",
        isa=_AVX512_ISA,
        requires=_AVX512_FLAGS,
    ),
    _variant(
        "avx_vnni",
        priority=30,
        arch="x86_64",
        isa=("-mavx2", "-mf16c", "-mavxvnni"),
        requires=f"{_AVX2_FLAGS} avx_vnni",
    ),
    _variant(
        "avx2",
        priority=20,
        arch="x86_64",
        isa=("-mavx2", "-mf16c"),
        requires=_AVX2_FLAGS,
    ),
    _variant(
        "neon_i8mm",
        priority=40,
        arch="aarch64",
        isa=("-march=armv8.2-a+dotprod+i8mm",),
        requires=f"{_DOTPROD_FLAGS} i8mm",
    ),
    _variant(
        "neon_dotprod",
        priority=30,
        arch="aarch64",
        isa=("-march=armv8.2-a+dotprod",),
        requires=_DOTPROD_FLAGS,
    ),
    _variant(
        "neon",
        priority=20,
        arch="aarch64",
        isa=("-march=armv8-a",),
        requires="asimd",
    ),
    _variant("scalar", priority=0),
)

# The operator. Of the CPU libraries, only this one includes torch's headers and starts threads.
OPS = Library(
    name="ops",
    sources=("cpu/ops.cpp", "training.cpp"),
    # Parsing torch's headers takes most of a cold import. -O1 costs nothing: no hot loop is here.
    # No -fopenmp: parallel.h explains how it uses torch's own OpenMP runtime.
    cflags=("-O1", *_COMMON),
)

# The operator on NVIDIA GPUs. Only its ops.cpp includes torch's headers.
CUDA = CudaLibrary(
    name="cuda",
    sources=(
        "cuda/ops.cpp",
        "cuda/wgmma_general.cu",  # slowest to compile first
        "cuda/wgmma.cu",
        "cuda/wgmma_groups.cu",
        "cuda/wgmma_many.cu",
        "cuda/wgmma_short.cu",
        "cuda/small_layer.cu",
        "cuda/small_batch.cu",
        "cuda/gemv.cu",
        "cuda/gemv_groups.cu",
        "cuda/attention.cu",
        "cuda/mma.cu",
        "cuda/mma_groups.cu",
        "cuda/dp4a.cu",
        "cuda/groups.cu",
        "cuda/quantize.cu",
        "cuda/train.cu",
        "cuda/in_order.cu",
        "cuda/launch.cu",
        "cuda/selftest.cu",
    ),
    cflags=("-O1", *_COMMON),
    cuda_cflags=(
        *("-O3", "-std=c++17", "-DNDEBUG", "-Xcompiler=-fvisibility=hidden"),
        "--fmad=false",  # as -ffp-contract=off
        "--expt-relaxed-constexpr",  # device code calls heuristics.h and integers.h
        "-diag-suppress=177",  # some functions are unused on older architectures
    ),
)
