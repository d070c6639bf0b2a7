"""Counts the instructions that whole calls of the Arm kernels execute, in an emulator.

    python -m scripts.dev.instruction_count [--shapes 1024x1024 64x64] [--tokens 1 4 16]

Needs g++-aarch64-linux-gnu and qemu-user. For every Arm kernel and every number of tokens: what
the GEMV, the GEMM and the quantiser execute per 64 packed bytes and token, and which of the two
forms the kernel chooses. Where it changes over (kGemmTokens, kGemvOverhead) was set by this table,
as there was no Arm machine to time it on.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bitlinear.kernels import DIRECTORY, VARIANTS

HERE = Path(__file__).parent
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = ("qemu-aarch64", "-cpu", "max")

# variant: its vocabulary and its form for many tokens, as its file names them
FORMS = {
    "neon": ("Neon", "LookupGemm<Neon>"),
    "neon_dotprod": ("NeonDotprod", "PanelGemm<NeonDotprod, RegisterTiles<NeonDotprod, LaneTile>>"),
    "neon_i8mm": ("NeonI8mm", "PanelGemm<NeonI8mm, RegisterTiles<NeonI8mm, MatrixTile>>"),
}


@dataclass(frozen=True)
class Counter:
    """Programs that run kernels, and the plugin that counts, in a folder of their own."""

    folder: Path

    def build(self) -> None:
        plugin = ["gcc", "-O2", "-shared", "-fPIC", HERE / "instruction_count_plugin.c"]
        subprocess.run([*plugin, "-o", self.folder / "plugin.so"], check=True)
        for variant in VARIANTS:
            if variant.name not in FORMS:
                continue
            vocabulary, gemm = FORMS[variant.name]
            macros = (
                f'-DKERNEL="{variant.sources[0]}"',
                f"-DVARIANT={vocabulary}",
                f"-DGEMM={gemm}",
            )
            command = [COMPILER, "-std=c++17", "-static", *variant.cflags, *macros]
            source = ["-I", DIRECTORY, HERE / "instruction_count.cpp"]
            subprocess.run([*command, *source, "-o", self.folder / variant.name], check=True)

    def executed(self, variant: str, what: str, M: int, N: int, K: int) -> int:
        """The instructions of one call: those of a program that makes two, less those of one."""
        emulator = [*EMULATOR, "-plugin", self.folder / "plugin.so", self.folder / variant]
        once, twice = (
            subprocess.run(
                [*emulator, what, *map(str, (M, N, K, runs))],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
            for runs in (1, 2)
        )
        return int(twice) - int(once)


def row(counter: Counter, variant: str, M: int, N: int, K: int) -> tuple[list[float], str]:
    """GEMV, GEMM and quantiser per 64 packed bytes and token, and the form that is chosen."""
    gemv, gemm, quantize, call = (
        counter.executed(variant, what, M, N, K) for what in ("gemv", "gemm", "quantize", "call")
    )
    # The choice itself takes a few instructions.
    chosen = "GEMV" if abs(call - gemv) < abs(call - gemm) else "GEMM"
    unit = M * N * K / 256
    return [count / unit for count in (gemv, gemm, quantize)], chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "512x256"], metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 3, 4, 8, 9, 16, 64])
    parser.add_argument("--kernels", nargs="+", default=list(FORMS), choices=list(FORMS))
    arguments = parser.parse_args()
    print("| per 64 packed bytes and token | N x K | M | GEMV | GEMM | quantiser | chosen |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        counter = Counter(Path(folder))
        counter.build()
        for variant in arguments.kernels:
            for shape in arguments.shapes:
                N, K = map(int, shape.split("x"))
                for M in arguments.tokens:
                    counts, chosen = row(counter, variant, M, N, K)
                    cells = " | ".join(f"{count:.1f}" for count in counts)
                    print(f"| `{variant}` | {N} x {K} | {M} | {cells} | {chosen} |", flush=True)


if __name__ == "__main__":
    main()
