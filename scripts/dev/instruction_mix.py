"""Count the instructions of the Arm kernels' inner loops, in place of times on an Arm machine.

    python -m scripts.dev.instruction_mix [--write] [--compiler COMMAND]

Needs g++-aarch64-linux-gnu. Compiles every Arm kernel with the flags of its row, disassembles it,
and finds the inner loops of the GEMV for one token and of the GEMM. Counts are per 64 packed bytes
of one weight row and one token, which is 256 products; a load of a register pair counts once. The
table also has the minimum of the method, and the sequence of bitnet.cpp's NEON kernel (I2_S). Exits
with 1 if a total is more than 5 % above scripts/bench/results/instructions.json; --write replaces
that file. Another compiler is, for example, "clang++ --target=aarch64-linux-gnu".
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bitlinear.kernels import DIRECTORY, VARIANTS
from scripts import tools

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "instructions.json"
PRODUCTS = 256  # 64 packed bytes, one token

# The extraction of 16 of 64 bits.
INDEX = r"ubfx\tx|and\tx\d+, x\d+, #0xffff|lsr\t[wx]\d+, [wx]\d+, #(?:16|48)$"


@dataclass(frozen=True)
class Loop:
    """An inner loop of a kernel.

    Attributes:
        work: The instruction that multiplies, and the number of its products.
        decodes: Whether the loop decodes packed bytes.
        minimum: The instructions that the method needs, per 256 products: loads, masks and shifts,
            arithmetic. A load of two registers counts twice; a load that rows share is a fraction.
    """

    variant: str
    form: str
    work: tuple[str, int]
    decodes: bool
    minimum: tuple[float, float, float]


LOOPS = (
    # Four rows share the 16 vectors of activations.
    Loop("neon", "GEMV", (r"smlal2?\t", 8), True, (4 + 16 / 4, 20, 32)),
    # An index serves 16 tokens: 4 weights x 16 products. One load has four of them.
    Loop("neon", "GEMM", (INDEX, 64), False, (4 / 4 + 8 + 4 / 8, 4, 8)),
    Loop("neon_dotprod", "GEMV", (r"sdot\t.*\.16b$", 16), True, (4 + 16 / 4, 16, 16)),
    # 24 rows and 4 tokens share their loads.
    Loop("neon_dotprod", "GEMM", (r"sdot\t.*\.4b\[", 16), False, (16 / 4 + 16 / 24, 0, 16)),
    Loop("neon_i8mm", "GEMV", (r"sdot\t.*\.16b$", 16), True, (4 + 16 / 4, 16, 16)),
    # The activations of two tokens are interleaved first, with as many instructions as loads.
    Loop("neon_i8mm", "GEMM", (r"smmla\t", 32), False, (16 / 4 + 16 / 24, 16 / 24, 8)),
)
# Without its 16 loads of activations and without the loop.
BITNET = {"loads": 4, "masks and shifts": 28, "arithmetic": 16, "other": 0, "total": 48}

CLASSES = {
    "loads": r"ld(u?r|p|ur[hb]|rh|1)\t",
    "masks and shifts": rf"(and|bic|ushr|sshr|zip[12]|trn[12]|uzp[12])\tv|{INDEX}",
    "arithmetic": r"(smlal2?|sdot|smmla)\t|add\tv",
}


@dataclass(frozen=True)
class Mix:
    variant: str
    form: str
    compiler: str
    counts: dict[str, float]
    minimum: float
    spills: int  # accesses of the stack in the loop


def inner_loops(listing: str) -> Iterator[list[str]]:
    """Yield the instructions of every loop that contains no other branch."""
    lines = [
        line.split("\t", 1) for line in listing.splitlines() if re.match(r" *[0-9a-f]+:\t", line)
    ]
    index = {int(address.strip(" :"), 16): i for i, (address, _) in enumerate(lines)}
    branch = re.compile(r"(?:b\.\w+|cbn?z|tbn?z|b)\t(?:.*, )?([0-9a-f]+) <")
    targets = [branch.match(text) for _, text in lines]
    for end, target in enumerate(targets):
        begin = index.get(int(target[1], 16), end + 1) if target else end + 1
        if begin <= end and not any(targets[begin:end]):
            yield [text.split("//")[0].strip() for _, text in lines[begin : end + 1]]


def count(pattern: str, loop: list[str]) -> int:
    return sum(bool(re.match(pattern, line)) for line in loop)


def find(wanted: Loop, listing: str) -> list[str]:
    """Return the loop with the most work.

    Of the GEMV's loops, the one for one token decodes most. Of the GEMM's loops, which start,
    continue and end sums, the one that continues them counts.
    """
    decoded = CLASSES["masks and shifts"]
    loops = [
        loop
        for loop in inner_loops(listing)
        if count(wanted.work[0], loop) and (count(decoded, loop) > 2) >= wanted.decodes
    ]
    if not loops:
        raise ValueError(f"{wanted.variant}: no loop of the {wanted.form} found")
    return max(
        (loop for loop in loops if not count(r"saddw", loop)),
        key=lambda loop: (
            count(decoded, loop) if wanted.decodes else 0,
            count(wanted.work[0], loop),
            len(loop),
        ),
    )


def output_of(command: list[str | Path]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def measure(wanted: Loop, compiler: list[str], objdump: list[str]) -> Mix:
    variant = next(variant for variant in VARIANTS if variant.name == wanted.variant)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel.o"
        sources = ["-c", DIRECTORY / variant.sources[0], "-o", output]
        subprocess.run([*compiler, "-std=c++17", "-fPIC", *variant.cflags, *sources], check=True)
        listing = output_of([*objdump, "-d", "--no-show-raw-insn", output])
    loop = find(wanted, listing)
    scale = PRODUCTS / (count(wanted.work[0], loop) * wanted.work[1])
    counts = {name: count(pattern, loop) * scale for name, pattern in CLASSES.items()}
    total = len(loop) * scale
    counts |= {"other": total - sum(counts.values()), "total": total}
    return Mix(
        wanted.variant,
        wanted.form,
        output_of([*compiler, "--version"]).splitlines()[0],
        {name: round(value, 1) for name, value in counts.items()},
        round(sum(wanted.minimum), 1),
        count(r".*\[sp", loop),
    )


def table(mixes: list[Mix]) -> str:
    columns = list(BITNET)
    lines = [
        f"| per 64 packed bytes and token | {' | '.join(columns)} | minimum | spills |",
        f"|---|{'---|' * (len(columns) + 2)}",
    ]
    for mix in mixes:
        cells = [f"{mix.counts[column]:g}" for column in columns]
        lines.append(
            f"| `{mix.variant}` {mix.form} | {' | '.join(cells)} | {mix.minimum:g} | {mix.spills} |"
        )
    lines.append(f"| bitnet.cpp, GEMV | {' | '.join(str(BITNET[name]) for name in columns)} | | |")
    return "\n".join(lines)


def worse(mixes: list[Mix], recorded: list[dict[str, object]]) -> list[str]:
    """Return the loops whose total is more than 5 % above the record."""
    totals = {(loop["variant"], loop["form"]): loop["counts"]["total"] for loop in recorded}
    return [
        f"{mix.variant} {mix.form}: {mix.counts['total']:g} instructions, {total:g} recorded"
        for mix in mixes
        if mix.counts["total"] > 1.05 * (total := totals[mix.variant, mix.form])
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    parser.add_argument("--objdump", default="aarch64-linux-gnu-objdump")
    arguments = parser.parse_args(argv)
    compiler, objdump = shlex.split(arguments.compiler), shlex.split(arguments.objdump)
    for program in (compiler[0], objdump[0]):
        tools.require_program(program, "run apt-get install g++-aarch64-linux-gnu")
    mixes = [measure(wanted, compiler, objdump) for wanted in LOOPS]
    print(table(mixes))
    if arguments.write:
        RESULTS.write_text(json.dumps([asdict(mix) for mix in mixes], indent=1) + "\n")
    problems = worse(mixes, json.loads(RESULTS.read_text()))
    print("\n".join(problems))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
