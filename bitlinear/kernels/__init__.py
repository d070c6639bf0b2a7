"""What can be compiled: one row per CPU kernel variant, the operator library they plug into, and
the library of CUDA's kernels.

A variant is one ``.cpp`` file, compiled with exactly the instruction-set flags of its row into a
torch-free library that exports ``bitlinear_kernels()`` (see ``abi.h``). Tests, doctor and bench
iterate :data:`VARIANTS`, so a variant cannot exist untested or unreported.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

DIRECTORY = Path(__file__).parent

# Bit-exactness across variants rests on the first flag: no fused multiply-add where the numerics
# ask for two roundings.
_COMMON = ("-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-DNDEBUG")


@dataclass(frozen=True)
class Library:
    """A shared library built from kernel sources by one call of ``cpp_extension.load``.

    Attributes:
        name: Also the name of the library file and of its folder in the cache.
        sources: Files inside ``bitlinear/kernels``, with forward slashes.
        cflags: Every compiler flag beyond those that torch adds.
        ldflags: Every linker flag beyond those that torch adds.
    """

    name: str
    sources: tuple[str, ...]
    cflags: tuple[str, ...]
    ldflags: tuple[str, ...] = ()

    self_test: ClassVar[str] = "operator"  # which one of runtime/build_worker.py

    def __str__(self) -> str:
        return "the operator"


@dataclass(frozen=True)
class Variant(Library):
    """A CPU kernel variant: a library, the hardware it needs, and its rank.

    Attributes:
        arch: ``"x86_64"``, ``"aarch64"`` or ``"any"``.
        requires: Every CPU flag (Linux spelling) that ``cflags`` lets the compiler use.
        priority: The usable variant with the highest priority is chosen. Variants of different
            architectures may share one.
    """

    arch: str = "any"
    requires: frozenset[str] = frozenset()
    priority: int = 0

    self_test: ClassVar[str] = "kernels"

    def __str__(self) -> str:
        return f"the {self.name} kernel"


@dataclass(frozen=True)
class CudaLibrary(Library):
    """The operator's kernels for NVIDIA GPUs, and for which of them to compile.

    Attributes:
        cuda_cflags: Every flag of nvcc beyond those that torch adds.
        architectures: As nvcc spells them, machine code (``"sm_90a"``) or PTX (``"compute_90"``).
        devices: The numbers of the GPUs that it has to pass its self-test on.
    """

    cuda_cflags: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    devices: tuple[int, ...] = ()

    self_test: ClassVar[str] = "cuda"

    @property
    def nvcc_flags(self) -> tuple[str, ...]:
        """``cuda_cflags`` and the architectures; with any of these, torch adds none of its own."""
        codes = ((code.replace("sm_", "compute_"), code) for code in self.architectures)
        gencode = (f"-gencode=arch={virtual},code={code}" for virtual, code in codes)
        return (*self.cuda_cflags, *gencode)

    def __str__(self) -> str:
        return f"the CUDA kernels for {', '.join(self.architectures)}"


# The kernels use nothing of torch: do not tie the library to libtorch. The linkers of macOS and
# Windows do not know the flag; there the library is tied, which is harmless: torch is loaded first.
_LDFLAGS = ("-Wl,--as-needed",) if sys.platform == "linux" else ()

# What -mavx2 -mf16c lets a compiler use, implied extensions included.
_AVX2_FLAGS = "pni ssse3 sse4_1 sse4_2 popcnt xsave avx f16c avx2"


def _variant(
    name: str, priority: int, arch: str = "any", isa: tuple[str, ...] = (), requires: str = ""
) -> Variant:
    return Variant(
        name=name,
        sources=(f"cpu/{name}.cpp", "cpu/selftest.cpp"),
        cflags=("-O3", *_COMMON, *isa),
        ldflags=_LDFLAGS,
        arch=arch,
        requires=frozenset(requires.split()),
        priority=priority,
    )


_AVX512_ISA = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mf16c")
# clang takes -mavx512f to include FMA
_AVX512_FLAGS = f"{_AVX2_FLAGS} fma avx512f avx512bw avx512dq avx512vl avx512_vnni"

# What +dotprod needs for its base: g++ knows the dot product from Armv8.2 on only.
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

# The operator: the only library that includes torch's headers and the only one with threads.
OPS = Library(
    name="ops",
    sources=("cpu/ops.cpp",),
    # Reading torch's headers is most of a cold import; -O1 costs nothing, the loops are elsewhere.
    # No -fopenmp: parallel.h says how the threads come from torch's own runtime.
    cflags=("-O1", *_COMMON),
)

# The operator on NVIDIA GPUs. Only its ops.cpp includes torch's headers.
CUDA = CudaLibrary(
    name="cuda",
    sources=(
        "cuda/ops.cpp",
        "cuda/wgmma.cu",  # the slowest to compile come first
        "cuda/small_layer.cu",
        "cuda/small_batch.cu",
        "cuda/gemv.cu",
        "cuda/mma.cu",
        "cuda/dp4a.cu",
        "cuda/quantize.cu",
        "cuda/train.cu",
        "cuda/launch.cu",
        "cuda/selftest.cu",
    ),
    cflags=("-O1", *_COMMON),
    cuda_cflags=(
        *("-O3", "-std=c++17", "-DNDEBUG", "-Xcompiler=-fvisibility=hidden"),
        "--fmad=false",  # as for the CPU
        "--expt-relaxed-constexpr",  # heuristics.h serves both sides
        "-diag-suppress=177",  # what only newer architectures call is unused on older ones
    ),
)
