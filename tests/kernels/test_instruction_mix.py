"""Instruction counts: of an invented listing, of the kernels against the record, of whole calls."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest

from bitlinear.kernels import VARIANTS
from scripts.dev import instruction_count
from scripts.dev import instruction_mix as mix
from tests.kernels.native import compiler_command, emulator, objdump

LISTING = """
0000000000000000 <f>:
   0:	mov	x2, #0x0                   	// #0
   4:	ldr	q1, [x0], #16
   8:	ldr	q2, [sp, #16]
   c:	and	v3.16b, v1.16b, v2.16b
  10:	sdot	v0.4s, v3.16b, v2.16b
  14:	cmp	x2, #0x4
  18:	b.ne	4 <f+0x4>  // b.any
  1c:	cbnz	x3, 0 <f>
  20:	b	24 <f+0x24>
  24:	ret
"""


def test_only_loops_without_a_branch_inside_are_inner():
    (loop,) = mix.inner_loops(LISTING)
    assert [line.split("\t")[0] for line in loop] == ["ldr", "ldr", "and", "sdot", "cmp", "b.ne"]
    assert mix.count(r"sdot\t.*\.16b$", loop) == 1
    assert mix.count(r".*\[sp", loop) == 1


def test_a_kernel_without_the_loop_is_an_error():
    with pytest.raises(ValueError, match="neon_i8mm: no loop of the GEMM"):
        mix.find(mix.LOOPS[-1], LISTING)


def test_more_instructions_than_recorded_are_reported():
    recorded = [{"variant": "neon", "form": "GEMV", "counts": {"total": 60.0}}]
    same = mix.Mix("neon", "GEMV", "a compiler", {"total": 63.0}, 60, 0)
    more = mix.Mix("neon", "GEMV", "a compiler", {"total": 64.0}, 60, 0)
    assert mix.worse([same], recorded) == []
    assert mix.worse([more], recorded) == ["neon GEMV: 64 instructions, 60 recorded"]


@pytest.mark.slow
def test_the_kernels_take_no_more_instructions_than_recorded():
    variant = next(variant for variant in VARIANTS if variant.arch == "aarch64")
    compiler = compiler_command("g++", variant)
    mixes = [mix.measure(loop, compiler, objdump(variant)) for loop in mix.LOOPS]
    assert {entry.variant for entry in mixes} == {v.name for v in VARIANTS if v.arch == "aarch64"}
    assert not mix.worse(mixes, json.loads(mix.RESULTS.read_text()))


def test_the_record_is_below_the_sequence_of_bitnet():
    recorded = json.loads(mix.RESULTS.read_text())
    assert [(entry["variant"], entry["form"]) for entry in recorded] == [
        (loop.variant, loop.form) for loop in mix.LOOPS
    ]
    for entry in recorded:
        if entry["variant"] != "neon":  # NEON without a dot product; bitnet.cpp uses one
            assert entry["counts"]["total"] < mix.BITNET["total"]


@pytest.mark.slow
def test_the_form_that_is_chosen_executes_fewer_instructions(tmp_path):
    """Up to a tenth more is accepted."""
    variants = [variant for variant in VARIANTS if variant.arch == "aarch64"]
    assert set(instruction_count.FORMS) == {variant.name for variant in variants}
    compiler_command("g++", variants[0])
    emulator("max")
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("only the qemu-aarch64 that is linked dynamically has plugins")
    counter = instruction_count.Counter(tmp_path)
    counter.build()
    for variant, M, group_size in itertools.product(variants, (1, 4, 16), (0, 128)):
        (gemv, gemm, quantize), chosen = instruction_count.row(
            counter, variant.name, M, 256, 512, group_size
        )
        assert quantize < min(gemv, gemm)
        assert (gemv if chosen == "GEMV" else gemm) < 1.1 * min(gemv, gemm), (variant.name, M)
