"""Count the instructions that whole calls of the Arm kernels execute, in an emulator.

    python -m scripts.dev.instruction_count [--shapes 1024x1024 64x64] [--tokens 1 4 16]
        [--group-size 128]

Needs gcc, g++-aarch64-linux-gnu and qemu-user with plugins. For every Arm kernel and every number
of tokens, the table has the instructions of the GEMV, the GEMM and the quantiser per 64 packed
bytes and token, and the form that the kernel chooses. This table set the threshold between the two
forms (kGemmTokens, kGemvOverhead), because no Arm machine was available to time them.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitlinear.kernels import DIRECTORY, VARIANTS
from scripts import tools
from scripts.bench.arguments import parse_count, parse_shape

HERE = Path(__file__).parent
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = ("qemu-aarch64", "-cpu", "max")

# The vocabulary of each variant and its forms for many tokens, with one scale and with scales of
# groups, as its source file names them.
FORMS = {
    "neon": ("Neon", "LookupGemm<Neon>", "GroupLookupGemm<Neon>"),
    "neon_dotprod": (
        "NeonDotprod",
        "PanelGemm<NeonDotprod, RegisterTiles<NeonDotprod, LaneTile>>",
        "GroupGemm<NeonDot>",
    ),
    "neon_i8mm": (
        "NeonI8mm",
        "PanelGemm<NeonI8mm, RegisterTiles<NeonI8mm, MatrixTile>>",
        "GroupGemm<NeonDot>",
    ),
}


@dataclass(frozen=True)
class Counter:
    """Programs that run kernels, and the plugin that counts instructions, in one folder."""

    folder: Path

    def build(self) -> None:
        plugin = ["gcc", "-O2", "-shared", "-fPIC", HERE / "instruction_count_plugin.c"]
        subprocess.run([*plugin, "-o", self.folder / "plugin.so"], check=True)
        for variant in VARIANTS:
            if variant.name not in FORMS:
                continue
            vocabulary, gemm, group_gemm = FORMS[variant.name]
            macros = (
                f'-DKERNEL="{variant.sources[0]}"',
                f"-DVARIANT={vocabulary}",
                f"-DGEMM={gemm}",
                f"-DGROUP_GEMM={group_gemm}",
            )
            command = [COMPILER, "-std=c++17", "-static", *variant.cflags, *macros]
            others = [DIRECTORY / source for source in variant.sources[1:]]
            source = ["-I", DIRECTORY, HERE / "instruction_count.cpp", *others]
            subprocess.run([*command, *source, "-o", self.folder / variant.name], check=True)

    def executed(self, variant: str, form: str, *sizes: int) -> int:
        """Return the instructions of one call: a program makes two calls, another makes one.

        ``sizes``: M, N, K and the size of the groups.
        """
        emulator = [*EMULATOR, "-plugin", self.folder / "plugin.so", self.folder / variant]
        one_call, two_calls = (
            subprocess.run(
                [*emulator, form, *map(str, (*sizes, runs))],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
            for runs in (1, 2)
        )
        return int(two_calls) - int(one_call)


def row(
    counter: Counter, variant: str, M: int, N: int, K: int, group_size: int
) -> tuple[list[float], str]:
    """Return GEMV, GEMM and quantiser per 64 packed bytes and token, and the chosen form."""
    gemv, gemm, quantize, call = (
        counter.executed(variant, form, M, N, K, group_size)
        for form in ("gemv", "gemm", "quantize", "call")
    )
    # The choice itself takes a few instructions, so neither form has exactly the call's count.
    chosen = "GEMV" if abs(call - gemv) < abs(call - gemm) else "GEMM"
    unit = M * N * K / 256
    return [count / unit for count in (gemv, gemm, quantize)], chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes, tokens = [(1024, 1024), (512, 256)], [1, 2, 3, 4, 8, 9, 16, 64]
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=shapes, metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=parse_count, default=tokens, metavar="M")
    parser.add_argument("--kernels", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--group-size", type=int, default=0, help="0: one scale of the weights")
    arguments = parser.parse_args(argv)
    for program, package in (
        ("gcc", "gcc"),
        (COMPILER, "g++-aarch64-linux-gnu"),
        (EMULATOR[0], "qemu-user"),
    ):
        tools.require_program(program, f"run apt-get install {package}")
    print("| per 64 packed bytes and token | N x K | M | GEMV | GEMM | quantiser | chosen |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        counter = Counter(Path(folder))
        counter.build()
        for variant in arguments.kernels:
            for N, K in arguments.shapes:
                for M in arguments.tokens:
                    counts, chosen = row(counter, variant, M, N, K, arguments.group_size)
                    cells = " | ".join(f"{count:.1f}" for count in counts)
                    print(f"| `{variant}` | {N} x {K} | {M} | {cells} | {chosen} |", flush=True)


if __name__ == "__main__":
    main()
