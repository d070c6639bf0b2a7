"""cuda/heuristics.h: the choice of the CUDA kernel and its plan. Needs no CUDA."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlinear.kernels import DIRECTORY
from tests.kernels.native import require

SOURCE = Path(__file__).with_name("cuda_heuristics.cpp")
AUTO, DP4A, GEMV, SMALL_BATCH, MMA, WGMMA, SMALL_LAYER = range(7)  # as in task.h
CAPABILITIES = (61, 70, 75, 80, 86, 89, 90, 100, 120)
IMAGINARY = 999  # cuda_heuristics.cpp: a device with more shared memory than any has

sizes = st.integers(1, 500_000)
shapes = st.tuples(
    *(st.one_of(st.integers(1, 20), sizes), sizes, sizes, st.booleans(), st.booleans()),
    *(st.integers(1, 4), st.booleans()),
)


class Heuristics:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.supports.restype = ctypes.c_bool
        library.padded_tokens.restype = library.short_bytes.restype = ctypes.c_int64

    def supports(self, kernel: int, capability: int, shape: tuple[int, ...]) -> bool:
        return self._library.supports(kernel, capability, self._shape(shape))

    def choose(self, capability: int, shape: tuple[int, ...]) -> int:
        return self._library.choose_kernel(capability, self._shape(shape))

    def plan_gemv(self, shape: tuple[int, ...], multiprocessors: int = 132, capability: int = 90):
        return self._plan("plan_gemv", 6, capability, multiprocessors, self._shape(shape))

    def plan_small_batch(self, shape, multiprocessors: int = 132, capability: int = 90):
        return self._plan("plan_small_batch", 6, capability, multiprocessors, self._shape(shape))

    def plan_small_layer(self, shape, multiprocessors: int = 132, capability: int = 90):
        return self._plan("plan_small_layer", 4, capability, multiprocessors, self._shape(shape))

    def plan_wgmma(self, shape: tuple[int, ...], multiprocessors: int = 132, cluster: int = 8):
        *plan, is_short = self._plan("plan_wgmma", 5, multiprocessors, cluster, self._shape(shape))
        return [*plan, "short"] if is_short else plan

    def short_bytes(self, rows: int, tokens: int, k: int) -> int:
        return self._library.short_bytes(*map(ctypes.c_int64, (rows, tokens, k)))

    def _plan(self, name: str, fields: int, *arguments):
        out = (ctypes.c_int * fields)()
        getattr(self._library, name)(*arguments, out)
        return list(out)

    def plan_quantizer(
        self, m: int, k: int, multiprocessors: int = 132, has_prologue: bool = False
    ):
        m, k = ctypes.c_int64(m), ctypes.c_int64(k)
        return self._plan("plan_quantizer", 2, multiprocessors, m, k, ctypes.c_bool(has_prologue))

    def row_pitch(self, row_bytes: int) -> int:
        return self._library.row_pitch(row_bytes)

    def padded_tokens(self, m: int) -> int:
        return self._library.padded_tokens(ctypes.c_int64(m))

    @staticmethod
    def _shape(shape: tuple[int, ...]) -> ctypes.Array:
        # One weight, no prologue, activations of 8 bits, which are not quantised yet; no groups;
        # neither wgmma_many.cu nor wgmma_short.cu serves it.
        defaults = (1, False, 1, False, False, 0, False, False)
        return (ctypes.c_int64 * 13)(*shape, *defaults[len(shape) - 5 :])


@pytest.fixture(scope="module")
def heuristics(tmp_path_factory):
    output = tmp_path_factory.mktemp("heuristics") / "cuda_heuristics.so"
    command = [require("g++"), "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra"]
    command += ["-Werror", f"-I{DIRECTORY}", str(SOURCE), "-o", str(output)]
    subprocess.run(command, check=True)
    return Heuristics(ctypes.CDLL(str(output)))


@given(shape=shapes, capability=st.sampled_from(CAPABILITIES))
def test_every_shape_gets_a_kernel_that_admits_it(heuristics, shape, capability):
    kernel = heuristics.choose(capability, shape)
    assert heuristics.supports(kernel, capability, shape)
    # A caller can force either of these for any shape.
    assert heuristics.supports(DP4A, capability, shape)
    assert heuristics.supports(MMA, capability, shape) == (capability >= 80)


@given(shape=shapes, capability=st.sampled_from(CAPABILITIES), q_aligned=st.booleans())
def test_tokens_that_are_quantised_go_to_kernels_that_read_them(
    heuristics, shape, capability, q_aligned
):
    m, n, k, x_aligned, w_aligned, *_ = shape
    shape = (m, n, k, x_aligned, w_aligned, 1, False, 1, True, q_aligned)
    kernel = heuristics.choose(capability, shape)
    assert heuristics.supports(kernel, capability, shape)
    assert kernel not in (GEMV, SMALL_LAYER)
    # Only wgmma rewrites weights that are not aligned.
    assert w_aligned or kernel != SMALL_BATCH
    assert w_aligned or q_aligned or kernel != WGMMA


def with_groups(m, n, k, group_size=128, aligned=True, act_bits=8):
    return (m, n, k, aligned, aligned, 1, False, act_bits // 8, False, False, group_size)


def test_choices_for_scales_of_groups(heuristics):
    for group_size in (64, 128, 192, 2**40):
        for m, kernel in ((1, GEMV), (2, SMALL_BATCH)):
            assert heuristics.choose(90, with_groups(m, 4096, 4096, group_size)) == kernel
            assert heuristics.choose(80, with_groups(m, 4096, 4096, group_size)) == GEMV
        for m, kernel in ((3, SMALL_BATCH), (32, SMALL_BATCH), (33, WGMMA), (300, WGMMA)):
            assert heuristics.choose(90, with_groups(m, 4096, 4096, group_size)) == kernel
            assert heuristics.choose(80, with_groups(m, 4096, 4096, group_size)) == MMA
    assert heuristics.choose(90, with_groups(2, 4096, 4096, act_bits=16)) == GEMV
    assert heuristics.choose(90, with_groups(4, 4096, 4096, act_bits=16)) == SMALL_BATCH
    assert heuristics.choose(90, with_groups(2, 64 * 132, 4096, act_bits=16)) == GEMV
    assert heuristics.choose(90, with_groups(2, 64 * 132 + 1, 4096, act_bits=16)) == SMALL_BATCH
    # With many rows, 17 tokens take wgmma.
    for m, kernel in ((1, GEMV), (2, SMALL_BATCH), (16, SMALL_BATCH), (17, WGMMA)):
        assert heuristics.choose(90, with_groups(m, 14336, 4096)) == kernel
    # Groups of 96 weights.
    for m, kernel in ((1, MMA), (16, MMA), (17, WGMMA)):
        assert heuristics.choose(90, with_groups(m, 4096, 4096, 96)) == kernel
    assert heuristics.choose(90, with_groups(16, 14336, 4096, 96)) == WGMMA
    assert heuristics.choose(90, with_groups(1, 4096, 4096, aligned=False)) == MMA
    assert heuristics.choose(75, with_groups(1, 4096, 4096)) == DP4A
    # The sums of the bytes of multipliers end at 65,536 inputs.
    assert heuristics.choose(90, with_groups(99, 64, 65_536)) == WGMMA
    assert heuristics.choose(90, with_groups(99, 64, 65_792)) == DP4A


@given(
    m=st.integers(1, 300),
    n=sizes,
    k=st.integers(1, 70_000),
    aligned=st.booleans(),
    group_size=st.integers(1, 300).map(lambda units: 32 * units),
    capability=st.sampled_from(CAPABILITIES),
    multiprocessors=st.integers(1, 200),
)
def test_any_groups(heuristics, m, n, k, aligned, group_size, capability, multiprocessors):
    shape = with_groups(m, n, k, group_size, aligned)
    kernel = heuristics.choose(capability, shape)
    assert heuristics.supports(kernel, capability, shape)
    assert kernel != SMALL_LAYER
    assert k <= 65_536 or kernel in (DP4A, GEMV, SMALL_BATCH)
    assert (group_size % 64 == 0 and m <= 2) or kernel != GEMV
    assert (group_size % 64 == 0 and m <= 32) or kernel != SMALL_BATCH
    if heuristics.supports(GEMV, capability, shape):
        blocks, _, ring, room, stage, _ = heuristics.plan_gemv(shape, 132, capability)
        assert 1 <= blocks <= n
        assert 2 * stage <= ring <= room
    rows, _, halves, _ = heuristics.plan_wgmma(shape, multiprocessors)
    assert rows >= 128
    assert halves == 1


@given(shape=shapes)
def test_what_a_device_lacks_is_not_chosen(heuristics, shape):
    assert heuristics.choose(52, shape) == AUTO
    assert heuristics.choose(61, shape) == DP4A
    assert heuristics.choose(75, shape) == DP4A
    kernels = [
        kernel for kernel in (SMALL_LAYER, GEMV, MMA) if heuristics.supports(kernel, 80, shape)
    ]
    assert heuristics.choose(80, shape) in kernels
    assert not heuristics.supports(GEMV, 75, shape)
    # wgmma is an instruction of this one generation.
    for capability in (89, 100, 120):
        assert not heuristics.supports(WGMMA, capability, shape)
    for kernel in (AUTO, 7, -1):
        assert not heuristics.supports(kernel, 90, shape)


def test_choices_for_fused_products(heuristics):
    """Whatever reads a prologue through registers, or knows one weight alone, has its limits."""
    for weights in (1, 3):
        aligned = (True, True, weights, True)
        for m, k in ((1, 8192), (2, 4096), (3, 2048), (4, 2048)):
            assert heuristics.choose(90, (m, 4096, k, *aligned)) == GEMV
            beyond = GEMV if m == 1 else SMALL_BATCH
            assert heuristics.choose(90, (m, 4096, k + 64, *aligned)) == beyond
            assert heuristics.choose(80, (m, 4096, 2 * k, *aligned)) == GEMV
            assert heuristics.choose(80, (m, 4096, 2 * k + 64, *aligned)) == (
                GEMV if m == 1 else MMA
            )
        # Their values lie in shared memory, as long as it has room.
        assert heuristics.choose(90, (1, 8192, 28672, *aligned)) == GEMV
        assert heuristics.choose(90, (1, 8192, 40960, *aligned)) == SMALL_BATCH
        assert heuristics.choose(89, (1, 8192, 28672, *aligned)) == MMA
    assert heuristics.choose(90, (4, 512, 256, True, True, 1, False)) == SMALL_LAYER
    assert heuristics.choose(90, (4, 512, 256, True, True, 1, True)) == GEMV
    assert heuristics.choose(90, (4, 512, 256, True, True, 2, False)) == GEMV
    assert heuristics.choose(90, (4, 4096, 3072, True, True, 3, False)) == GEMV


def test_choices_for_typical_layers(heuristics):
    for m, k in ((1, 4096), (2, 8192), (3, 3072), (4, 3072)):
        assert heuristics.choose(90, (m, 4096, k, True, True)) == GEMV
        beyond = GEMV if m == 1 else SMALL_BATCH
        assert heuristics.choose(90, (m, 4096, k + 64, True, True)) == beyond
    assert heuristics.choose(90, (1, 4096, 14336, True, True)) == GEMV
    assert heuristics.choose(120, (1, 4096, 4096, True, True)) == GEMV
    for n, k in ((8192, 28672), (64, 131072)):
        assert heuristics.choose(90, (1, n, k, True, True)) == GEMV  # beyond the registers
    assert heuristics.choose(90, (1, 64, 200_000, True, True)) == SMALL_BATCH
    assert heuristics.choose(90, (1, 4096, 4096, False, True)) == SMALL_BATCH  # x not aligned
    assert heuristics.choose(90, (1, 4096, 4096, True, False)) == MMA  # rows not aligned
    for m in (8, 16, 32):
        assert heuristics.choose(90, (m, 4096, 4096, True, True)) == SMALL_BATCH
    assert heuristics.choose(90, (16, 28672, 8192, True, True)) == SMALL_BATCH
    assert heuristics.choose(90, (32, 28672, 8192, True, True)) == WGMMA  # several tiles a block
    assert heuristics.choose(120, (32, 28672, 8192, True, True)) == SMALL_BATCH
    assert heuristics.choose(90, (64, 4096, 4096, True, True)) == WGMMA
    assert heuristics.choose(120, (64, 4096, 4096, True, True)) == MMA
    for capability in (80, 86, 89):
        for m, n, k in ((1, 4096, 4096), (1, 8192, 28672), (2, 8192, 28672), (4, 4096, 8192)):
            assert heuristics.choose(capability, (m, n, k, True, True)) == GEMV
        for m, k, *aligned in (
            (16, 4096, True, True),
            (1, 4096, False, True),
            (1, 4096, True, False),
        ):
            assert heuristics.choose(capability, (m, 4096, k, *aligned)) == MMA
    assert heuristics.choose(80, (32, 1024, 1024, True, True)) == SMALL_LAYER
    assert heuristics.choose(80, (4, 4096, 14336, True, True)) == GEMV
    assert heuristics.choose(89, (4, 4096, 14336, True, True)) == GEMV
    assert heuristics.choose(89, (4, 4096, 15360, True, True)) == MMA  # no room for a ring
    assert heuristics.choose(75, (1, 4096, 4096, True, True)) == DP4A


# On an H100 the fastest, or within a few per cent of it.
@pytest.mark.parametrize(
    ("m", "n", "k", "kernel"),
    [
        (1, 512, 256, GEMV),
        (4, 512, 256, SMALL_LAYER),
        (4, 256, 512, GEMV),
        (8, 256, 512, SMALL_LAYER),
        (4096, 64, 64, SMALL_LAYER),
        (4096, 512, 256, SMALL_LAYER),
        (4096, 256, 512, SMALL_LAYER),
        (4096, 1024, 512, WGMMA),
        (512, 4096, 256, SMALL_LAYER),
        (16, 1024, 1024, SMALL_BATCH),
        (32, 1024, 1024, SMALL_BATCH),
        (32, 2112, 1024, SMALL_BATCH),
        (32, 2176, 1024, SMALL_LAYER),
        (64, 1024, 1024, SMALL_LAYER),
        (256, 1024, 1024, SMALL_LAYER),
        (512, 1024, 1024, WGMMA),
        (1024, 256, 768, SMALL_LAYER),
        (64, 2560, 640, SMALL_LAYER),
        (128, 2560, 640, WGMMA),
    ],
)
def test_choices_for_small_layers(heuristics, m, n, k, kernel):
    assert heuristics.choose(90, (m, n, k, True, True)) == kernel
    assert heuristics.choose(90, (m, n, k, True, False)) == MMA
    assert heuristics.choose(80, (m, n, k, False, True)) == MMA


# The largest K of a GEMV whose rows are aligned, by the KB of shared memory, by whether there is a
# prologue, and by the rows of q and the rows of a token. Beyond it there is no room for the tokens
# (and their fp32 values) with a ring of two stages. 1024 KB: the sums for the norm end first.
GEMV_MAX_K = {
    (memory, has_prologue): dict(zip(((1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2)), limits))
    for memory, has_prologue, *limits in (
        (99, False, 60672, 30208, 20224, 15104, 30208, 15104),
        (99, True, 8192, 4096, 2304, 2304, 8192, 4096),
        (163, False, 126208, 62976, 41984, 31488, 62976, 31488),
        (163, True, 24576, 12288, 6144, 6144, 16384, 8192),
        (227, False, 191744, 95744, 63744, 47872, 95744, 47872),
        (227, True, 32768, 16384, 9216, 8192, 30208, 15104),
        (1024, True, 65536, 32768, 16384, 16384, 65536, 32768),
    )
}


@pytest.mark.parametrize(
    ("capability", "memory"), [(80, 163), (86, 99), (90, 227), (120, 99), (IMAGINARY, 1024)]
)
@pytest.mark.parametrize("has_prologue", [False, True])
def test_the_longest_rows_of_a_gemv(heuristics, capability, memory, has_prologue):
    for (m, rows_per_token), limit in GEMV_MAX_K.get((memory, has_prologue), {}).items():
        for k, fits in ((limit, True), (limit + 64, False)):
            shape = (m, 64, k, True, True, 1, has_prologue, rows_per_token)
            assert heuristics.supports(GEMV, capability, shape) == fits


def test_a_token_of_16_bits_has_as_many_values_as_one_of_8(heuristics):
    """It is two rows of q, but its values are read, gated and kept in registers once."""
    for has_prologue, held in ((False, 16_384), (True, 8192)):
        for tokens in (1, 2):
            for k, resident in ((held // tokens, True), (held // tokens + 64, False)):
                of_16_bits = (2 * tokens, 4096, k, True, True, 1, has_prologue, 2)
                of_8_bits = (tokens, 4096, k, True, True, 1, has_prologue)
                assert heuristics.plan_gemv(of_16_bits)[5] == resident
                assert heuristics.choose(90, of_16_bits) == heuristics.choose(90, of_8_bits)


@given(
    shape=st.tuples(
        *(st.integers(1, 4), sizes, st.integers(1, 4000), st.booleans(), st.just(True)),
        *(st.integers(1, 4), st.booleans(), st.sampled_from([1, 2])),
    ),
    multiprocessors=st.integers(1, 200),
    capability=st.sampled_from([80, 86, 89, 90, 100, 120]),
)
def test_the_plan_of_a_gemv(heuristics, shape, multiprocessors, capability):
    m, n, slices, x_aligned, _, weights, has_prologue, rows_per_token = shape
    if m % rows_per_token != 0:
        return
    k = 64 * slices
    shape = (m, n, k, x_aligned, True, weights, has_prologue, rows_per_token)
    values = {1: 1, 2: 2, 3: 4, 4: 4}[m // rows_per_token] * k
    held = values <= (8192 if has_prologue else 16_384)
    memory = {80: 163, 90: 227, 100: 227}.get(capability, 99)
    fits = k <= GEMV_MAX_K[memory, has_prologue][m, rows_per_token]
    assert heuristics.supports(GEMV, capability, shape) == (x_aligned and fits)
    if not (x_aligned and fits):
        return
    blocks, log_split, ring, room, stage, resident = heuristics.plan_gemv(
        shape, multiprocessors, capability
    )
    assert resident == held
    most_blocks = 2 if capability >= 90 and held else 1
    assert 1 <= blocks <= min(most_blocks * multiprocessors, n)
    assert log_split in (1, 2, 3)
    assert 2 * stage <= ring <= room


@given(
    shape=st.tuples(st.integers(1, 32), sizes, st.integers(1, 7800), st.booleans(), st.just(True)),
    multiprocessors=st.integers(1, 200),
    capability=st.sampled_from([90, 100, 120]),
)
def test_the_plan_of_a_small_batch(heuristics, shape, multiprocessors, capability):
    m, n, slices, x_aligned, _ = shape
    shape = (m, n, 64 * slices, x_aligned, True)
    assert heuristics.supports(SMALL_BATCH, capability, shape)
    row_parts, token_parts, blocks, stages, shared, limit = heuristics.plan_small_batch(
        shape, multiprocessors, capability
    )
    assert 1 <= blocks <= min(2 * multiprocessors, n)
    assert (row_parts, token_parts) in {(r, t) for r in (1, 2) for t in (1, 2, 4)}
    assert m <= 8 * token_parts <= 2 * max(m, 4)
    # A block waits for all parts of a tile at once, except those beyond its last row.
    most_rows = -(-n // blocks)
    assert min(row_parts, -(-most_rows // 16)) <= stages <= 16
    assert shared <= limit
    if blocks > multiprocessors:
        assert 2 * (shared + 1024) <= limit + 1024


@given(
    m=st.integers(1, 32),
    n=sizes,
    slices=st.integers(1, 7800),
    group_size=st.sampled_from([64, 128, 192, 4096, 2**19]),
    multiprocessors=st.integers(1, 200) | st.just(132),
    capability=st.sampled_from([90, 100, 120]),
)
def test_the_plan_of_a_small_batch_with_groups(
    heuristics, m, n, slices, group_size, multiprocessors, capability
):
    shape = with_groups(m, n, 64 * slices, group_size)
    row_parts, token_parts, blocks, stages, shared, limit = heuristics.plan_small_batch(
        shape, multiprocessors, capability
    )
    assert (row_parts, token_parts) in {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)}
    assert m <= 8 * token_parts <= 2 * max(m, 4)
    assert 1 <= blocks <= n
    if multiprocessors == 132:
        assert heuristics.supports(SMALL_BATCH, capability, shape) == (stages >= row_parts)
    if stages >= row_parts:
        assert stages <= 16
        assert shared <= limit
    else:  # The multipliers and units of eight long rows, a stage, the sums and barriers.
        multipliers = min(n, 8) * 4 * ((-(-64 * slices // group_size) | 1) + 1)
        sums = 8 * 8 * token_parts * (16 + 4) * 8
        assert multipliers + 16 * (1024 + 16) + sums + 1024 > limit


@given(
    shape=st.tuples(sizes, sizes, st.integers(1, 20), st.booleans(), st.booleans()),
    multiprocessors=st.integers(1, 200),
    capability=st.sampled_from([75, 80, 86, 90, 120]),
)
def test_the_plan_of_a_small_layer(heuristics, shape, multiprocessors, capability):
    m, n, slices, *aligned = shape
    k = 64 * slices
    shape = (m, n, k, *aligned)
    fits = capability >= 80 and k <= 1024 and all(aligned)
    assert heuristics.supports(SMALL_LAYER, capability, shape) == fits
    if fits:
        rows, tokens, shared, limit = heuristics.plan_small_layer(
            shape, multiprocessors, capability
        )
        assert (rows, tokens) in {(64, 16), (128, 16), (64, 32), (128, 32), (256, 32), (512, 32)}
        assert shared <= limit


@given(row=st.integers(1, 125_000))
def test_rows_in_shared_memory_meet_all_banks(heuristics, row):
    pitch = heuristics.row_pitch(row)
    assert pitch >= min(row, 1024)
    assert pitch % 128 == 64


# Measured on an H100 to be the best, or within a few per cent of it.
@pytest.mark.parametrize(
    ("n", "k", "blocks", "split"),
    [
        (1024, 1024, 128, 8),
        (2560, 2560, 132, 4),
        (2560, 6912, 132, 4),
        (4096, 4096, 132, 4),
        (6912, 2560, 132, 2),
        (13824, 2560, 132, 2),
        (8192, 8192, 264, 4),
        (4096, 14336, 264, 8),
        (28672, 8192, 264, 8),
        (8192, 28672, 132, 4),
    ],
)
def test_the_plan_of_a_gemv_on_an_h100(heuristics, n, k, blocks, split):
    plan = heuristics.plan_gemv((1, n, k, True, True))
    assert plan[:2] == [blocks, split.bit_length() - 1]


# By the times of its code for sm_80 on an H100, with the shared memory of these devices.
@pytest.mark.parametrize(
    ("capability", "n", "k", "split"),
    [
        (80, 4096, 4096, 4),
        (80, 28672, 8192, 4),
        (80, 13824, 2560, 2),
        (80, 8192, 28672, 4),
        (89, 4096, 4096, 4),
        (89, 28672, 8192, 4),
        (89, 13824, 2560, 2),
        (89, 8192, 28672, 8),
    ],
)
def test_the_plan_of_a_gemv_before_sm_90(heuristics, capability, n, k, split):
    blocks, log_split, ring, room, *_ = heuristics.plan_gemv(
        (1, n, k, True, True), capability=capability
    )
    assert [blocks, log_split] == [132, split.bit_length() - 1]
    assert ring == room  # no successor shares the multiprocessor


# Measured on an H200 to be the best, or within a few per cent of it.
@pytest.mark.parametrize(
    ("m", "n", "k", "plan"),
    [
        (8, 1024, 1024, [1, 1, 64]),
        (8, 4096, 4096, [1, 1, 256]),
        (8, 4160, 4096, [1, 1, 260]),
        (8, 4224, 4096, [2, 1, 132]),
        (8, 4096, 14336, [1, 1, 256]),
        (8, 8192, 2048, [2, 1, 256]),
        (8, 8192, 8192, [2, 1, 256]),
        (8, 13824, 2560, [2, 1, 216]),
        (8, 14336, 4096, [2, 1, 224]),
        (16, 2560, 6912, [1, 2, 160]),
        (16, 4096, 4096, [1, 2, 256]),
        (16, 6144, 4096, [2, 2, 192]),
        (16, 13824, 2560, [2, 2, 216]),
        (16, 14336, 4096, [2, 2, 224]),
        (16, 28672, 8192, [2, 2, 224]),
        (32, 1024, 4096, [1, 4, 64]),
        (32, 1920, 2048, [1, 4, 120]),
        (32, 2048, 2048, [1, 4, 132]),
        (32, 2560, 2560, [2, 4, 80]),
        (32, 8192, 8192, [2, 4, 128]),
    ],
)
def test_the_plan_of_a_small_batch_on_an_h200(heuristics, m, n, k, plan):
    assert heuristics.plan_small_batch((m, n, k, True, True))[:3] == plan


@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "plan", "two_fit"),
    [
        (8, 4096, 4096, 128, [1, 1, 256, 1], True),
        (8, 5120, 5120, 128, [2, 1, 160, 4], True),
        (16, 2560, 2560, 128, [2, 2, 80, 2], True),
        (32, 2048, 2048, 128, [1, 4, 128, 1], True),
        # Fewer of the long rows, so that their multipliers fit.
        (8, 28672, 8192, 64, [2, 1, 448, 3], True),
        (8, 8192, 16384, 64, [1, 1, 512, 4], True),
        (8, 4096, 32768, 64, [1, 1, 293, 4], True),
        (8, 4096, 65536, 64, [1, 1, 512, 4], True),
        (8, 4096, 262144, 64, [1, 1, 512, 5], False),
        (8, 2, 491520, 64, [1, 1, 1, 2], True),
    ],
)
def test_the_plan_of_a_small_batch_with_groups_on_an_h200(
    heuristics, m, n, k, group_size, plan, two_fit
):
    *found, shared, limit = heuristics.plan_small_batch(with_groups(m, n, k, group_size))
    assert found == plan
    assert (2 * (shared + 1024) <= limit + 1024) == two_fit
    assert heuristics.supports(SMALL_BATCH, 90, with_groups(m, n, k, group_size))
    longer = with_groups(m, 8 * n, 7680 * group_size, group_size)
    assert not heuristics.supports(SMALL_BATCH, 90, longer)


@given(shape=shapes, multiprocessors=st.integers(1, 200))
def test_the_plan_of_wgmma(heuristics, shape, multiprocessors):
    rows, tokens, halves, splits = heuristics.plan_wgmma(shape, multiprocessors)
    assert (rows, tokens, halves) in {
        *((64, tokens, 1) for tokens in (32, 64)),
        *((64, tokens, 2) for tokens in (64, 128)),
        *((rows, tokens, 1) for rows in (128, 256) for tokens in (32, 64, 96, 128)),
    }
    assert splits in (1, 2, 4, 8)
    assert splits == 1 or 2 * splits * 256 < shape[2] + 256  # each has something to do
    # Whole tiles are copied.
    assert heuristics.padded_tokens(shape[0]) >= -(-shape[0] // tokens) * tokens


@given(shape=shapes, multiprocessors=st.integers(1, 200), cluster=st.sampled_from([0, 1, 2, 4, 8]))
def test_the_plan_of_wgmma_where_the_device_refuses_clusters(
    heuristics, shape, multiprocessors, cluster
):
    """As a part of a device (MIG), or a share of it (MPS), does."""
    best = heuristics.plan_wgmma(shape, multiprocessors)
    plan = heuristics.plan_wgmma(shape, multiprocessors, cluster)
    if best[3] == 1 or best[3] <= cluster:
        assert plan == best
    else:
        assert plan[3] == 1
        assert heuristics.padded_tokens(shape[0]) >= -(-shape[0] // plan[1]) * plan[1]


def test_the_plan_of_wgmma_without_clusters_on_an_h100(heuristics):
    assert heuristics.plan_wgmma((64, 2560, 6912, True, True)) == [128, 64, 1, 4]
    assert heuristics.plan_wgmma((64, 2560, 6912, True, True), cluster=0)[3] == 1


@pytest.mark.parametrize(
    ("m", "n", "k", "plan"),
    [
        (64, 1024, 1024, [64, 32, 1, 1]),
        (64, 2560, 2560, [64, 64, 2, 1]),
        (64, 2560, 6912, [128, 64, 1, 4]),
        (64, 4096, 4096, [64, 64, 2, 2]),
        (64, 8192, 8192, [128, 64, 1, 2]),
        (64, 13824, 2560, [128, 64, 1, 1]),
        (64, 28672, 8192, [256, 64, 1, 1]),
        (32, 28672, 8192, [256, 32, 1, 1]),
        (256, 4096, 4096, [64, 128, 2, 1]),
        (512, 1024, 1024, [64, 64, 2, 1]),
        (512, 4096, 4096, [128, 128, 1, 1]),
        (512, 2560, 2560, [128, 96, 1, 1]),
        (1024, 2560, 6912, [256, 96, 1, 1]),
        (1024, 4096, 4096, [256, 128, 1, 1]),
        (4096, 1024, 1024, [128, 128, 1, 1]),
        (4096, 8192, 8192, [256, 128, 1, 1]),
    ],
)
def test_the_plan_of_wgmma_on_an_h100(heuristics, m, n, k, plan):
    assert heuristics.plan_wgmma((m, n, k, True, True)) == plan


def for_many(m, n, k):
    return (m, n, k, True, True, 1, False, 1, False, False, 0, True)


@pytest.mark.parametrize(
    ("m", "n", "k", "plan"),
    [
        (512, 4096, 4096, [128, 128, 1, 1]),
        (1024, 2560, 6912, [256, 96, 1, 1]),
        (1024, 5120, 5120, [256, 96, 1, 1]),  # two rounds
        (1500, 4096, 4096, [256, 96, 1, 1]),
        (2048, 2560, 2560, [256, 96, 1, 1]),
        (4096, 2560, 2560, [256, 128, 1, 1]),  # whose last round is cut
        (4096, 2560, 6912, [256, 128, 1, 1]),
        (1024, 13824, 2560, [256, 128, 1, 1]),
        (16384, 768, 768, [256, 128, 1, 1]),
    ],
)
def test_the_plan_of_wgmma_for_many_tokens_on_an_h100(heuristics, m, n, k, plan):
    assert heuristics.plan_wgmma(for_many(m, n, k)) == plan


def for_short(m, n, k):
    return (*for_many(m, n, k), True)


@pytest.mark.parametrize(
    ("m", "n", "k", "plan"),
    [
        (256, 1024, 1024, [64, 64, 1, 1, "short"]),
        (512, 1024, 1024, [64, 64, 1, 1, "short"]),
        (513, 1024, 1024, [128, 64, 1, 1, "short"]),
        (1024, 1024, 1024, [128, 64, 1, 1, "short"]),
        (1025, 1024, 1024, [128, 96, 1, 1]),
        (512, 3072, 768, [128, 128, 1, 1, "short"]),
        (512, 2048, 1024, [128, 64, 1, 1, "short"]),
        (512, 1024, 1025, [64, 64, 2, 1]),
        (64, 512, 256, [128, 64, 1, 1, "short"]),
        (32, 512, 1024, [64, 32, 1, 1]),
    ],
)
def test_the_plan_of_wgmma_for_short_rows_on_an_h100(heuristics, m, n, k, plan):
    assert heuristics.plan_wgmma(for_short(m, n, k)) == plan


@given(m=sizes, n=sizes, k=st.integers(1, 1300), multiprocessors=st.integers(1, 200))
def test_short_rows_are_computed_at_once(heuristics, m, n, k, multiprocessors):
    rows, tokens, _, splits, *short = heuristics.plan_wgmma(for_short(m, n, k), multiprocessors)
    if short:
        assert k <= 1024
        assert splits == 1
        assert -(-n // rows) * -(-m // tokens) <= multiprocessors
        # One block of a multiprocessor's 228 KB, of which the system reserves 1 KB for each.
        assert 114 * 1024 < heuristics.short_bytes(rows, tokens, k) <= 227 * 1024
        # Whole tiles are copied, and each warpgroup that shares K has something to do.
        assert heuristics.padded_tokens(m) >= -(-m // tokens) * tokens
        assert 4 * 64 * 64 // (rows * tokens) <= 2 * -(-k // 256)


@given(
    m=st.integers(1, 1_000_000),
    k=sizes,
    multiprocessors=st.integers(1, 200),
    has_prologue=st.booleans(),
)
def test_the_plan_of_the_quantiser(heuristics, m, k, multiprocessors, has_prologue):
    warps, tokens = heuristics.plan_quantizer(m, k, multiprocessors, has_prologue)
    max_warps = 16 if has_prologue else 32
    assert 1 <= warps * tokens <= max_warps
    # Of a row that is not too long, a thread keeps all that it reads.
    assert warps * 2 * 16 * 32 >= min(k, 1024 * max_warps)
    assert tokens == 1 or tokens * multiprocessors <= m
    # It writes whole blocks, into room for a multiple of 32 tokens.
    assert heuristics.padded_tokens(m) % tokens == 0


@pytest.mark.parametrize(
    ("m", "k", "plan"),
    [
        (1, 64, [1, 1]),
        (64, 1024, [2, 1]),
        (64, 4096, [8, 1]),
        (512, 4096, [8, 1]),  # all at once
        (1024, 4096, [4, 2]),
        (1024, 6912, [7, 1]),
        (4096, 64, [1, 8]),
        (4096, 1024, [1, 8]),
        (4096, 4096, [4, 2]),
        (4096, 6912, [7, 1]),
        (4096, 8192, [8, 1]),
    ],
)
def test_the_plan_of_the_quantiser_on_an_h100(heuristics, m, k, plan):
    assert heuristics.plan_quantizer(m, k) == plan


@given(m=st.integers(1, 1_000_000))
def test_room_for_whole_tiles_of_tokens(heuristics, m):
    padded = heuristics.padded_tokens(m)
    assert padded % 32 == 0
    if m > 64:
        assert padded == max(-(-m // tokens) * tokens for tokens in (96, 128))
    else:
        assert padded == (32 if m <= 32 else 64)
