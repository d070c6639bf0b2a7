"""cpu/heuristics.h: the form of a product, and the division of a call among threads."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlinear.kernels import DIRECTORY
from tests.kernels.native import require

SOURCE = Path(__file__).with_name("heuristics.cpp")
# token_unit, row_unit, blocks.rows, blocks.unit, per_row, per_token: as of avx512_vnni, amx_int8
# and avx2
COSTS = [(8, 16, 192, 48, 3, 32), (32, 16, 192, 32, 25, 64), (16, 64, 2048, 64, 8, 131)]

sizes = st.integers(1, 20_000)
thread_counts = st.integers(1, 64)
costs = st.sampled_from(COSTS)


class Heuristics:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.largest_part.restype = ctypes.c_int64
        library.choose_quantize_parts.restype = ctypes.c_int64
        library.choose_pieces.restype = ctypes.c_int64
        library.pays_for_threads.restype = ctypes.c_bool
        library.prefer_gemm.restype = ctypes.c_bool
        library.each_quantizes.restype = ctypes.c_bool

    def call(self, name: str, *arguments: int) -> int:
        return getattr(self._library, name)(*map(ctypes.c_int64, arguments))

    def part_of(self, size: int, unit: int, index: int, parts: int) -> tuple[int, int]:
        out = (ctypes.c_int64 * 2)()
        self._library.part_of(*map(ctypes.c_int64, (size, unit, index, parts)), out)
        return out[0], out[1]

    def shared_parts(self, parts: int, threads: int, slow: int) -> tuple[list[int], ...]:
        runs, thread_of = (ctypes.c_int64 * parts)(), (ctypes.c_int64 * parts)()
        bodies = (ctypes.c_int64 * threads)()
        numbers = map(ctypes.c_int64, (parts, threads, slow))
        self._library.run_shared_parts(*numbers, runs, thread_of, bodies)
        return list(runs), list(thread_of), list(bodies)

    def grid(self, *product: Any) -> tuple[int, int]:
        out = (ctypes.c_int64 * 2)()
        self._library.choose_grid(*self._product(*product), out)
        return out[0], out[1]

    def pieces(self, *product: Any) -> list[tuple[range, range]]:
        """The tokens and rows of each piece."""
        numbers = self._product(*product)
        pieces = []
        for index in range(self._library.choose_pieces(*numbers)):
            out = (ctypes.c_int64 * 4)()
            self._library.piece_of(*numbers, ctypes.c_int64(index), out)
            pieces.append((range(out[0], out[1]), range(out[2], out[3])))
        return pieces

    def each_quantizes(self, *product: Any, is_plain: bool = True) -> bool:
        each: bool = self._library.each_quantizes(*self._product(*product), is_plain)
        return each

    def _product(self, m: int, n: int, k: int, threads: int, cost: tuple[int, ...]) -> list[Any]:
        sizes = map(ctypes.c_int64, (m, n, -(-k // 4), threads))
        return [*sizes, (ctypes.c_int64 * len(cost))(*cost)]


@pytest.fixture(scope="module")
def heuristics(tmp_path_factory):
    output = tmp_path_factory.mktemp("heuristics") / "heuristics.so"
    command = [require("g++"), "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, f"-I{DIRECTORY}", SOURCE, "-o", output], check=True)
    return Heuristics(ctypes.CDLL(str(output)))


@given(vectors=st.integers(1, 2000), tokens=st.integers(2, 40), overhead=st.integers(0, 40))
def test_there_is_one_batch_size_at_which_the_gemm_takes_over(
    heuristics, vectors, tokens, overhead
):
    def gemm(m):
        return heuristics.call("prefer_gemm", m, vectors, tokens, overhead)

    choices = [gemm(m) for m in range(1, tokens + 1)]
    assert not choices[0]  # one token: always a GEMV
    assert choices[-1]
    assert choices == sorted(choices)
    # The longer the rows, the later.
    for m in range(1, tokens + 1):
        assert choices[m - 1] or not heuristics.call(
            "prefer_gemm", m, vectors + 1, tokens, overhead
        )


@given(size=sizes, unit=st.sampled_from([1, 8, 32, 48]), parts=st.integers(1, 64))
def test_parts_cover_everything_once(heuristics, size, unit, parts):
    ranges = [heuristics.part_of(size, unit, index, parts) for index in range(parts)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size
    for (_, end), (begin, _) in zip(ranges, ranges[1:]):
        assert end == begin
        assert end % unit == 0 or end == size
    assert max(end - begin for begin, end in ranges) <= heuristics.call(
        "largest_part", size, unit, parts
    )
    lengths = [-(-(end - begin) // unit) for begin, end in ranges]
    assert max(lengths) - min(lengths) <= 1


@given(m=sizes, n=sizes, k=sizes, threads=thread_counts, cost=costs)
def test_a_grid_has_a_part_for_every_thread_at_most(heuristics, m, n, k, threads, cost):
    tokens, rows = heuristics.grid(m, n, k, threads, cost)
    assert 1 <= tokens * rows <= threads
    # No part is empty.
    assert tokens <= -(-m // cost[0])
    assert rows <= -(-n // cost[1])


@given(m=sizes, n=sizes, k=sizes, threads=thread_counts, cost=costs)
def test_work_is_balanced(heuristics, m, n, k, threads, cost):
    """No other grid would make the largest part cheaper."""

    def ceil(a, b):
        return -(-a // b)

    def price(tokens, rows):
        part_tokens = ceil(ceil(m, cost[0]), tokens) * cost[0]
        part_rows = ceil(ceil(n, cost[1]), rows) * cost[1]
        return (part_tokens + cost[4]) * (part_rows + cost[5])

    grid = heuristics.grid(m, n, k, threads, cost)
    if heuristics.call("pays_for_threads", m * n * ceil(k, 4), threads):
        assert price(*grid) == min(
            price(tokens, min(threads // tokens, ceil(n, cost[1])))
            for tokens in range(1, min(threads, ceil(m, cost[0])) + 1)
        )
    else:
        assert grid == (1, 1)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("threads", [1, 2, 4, 16, 64])
def test_grids_of_typical_layers(heuristics, threads, cost):
    # One token: the weights are divided.
    assert heuristics.grid(1, 14336, 4096, threads, cost) == (1, threads)
    # Many tokens and few rows: the tokens are.
    tokens, rows = heuristics.grid(100_000, 10, 4096, threads, cost)
    assert (tokens, rows) == (threads, 1)
    # Small work stays on one thread.
    assert heuristics.grid(1, 256, 256, threads, cost) == (1, 1)


@pytest.mark.parametrize("threads", [1, 2, 4, 16, 64])
def test_quantising_is_divided_where_it_pays(heuristics, threads):
    def parts(m, k, product_parts):
        return heuristics.call("choose_quantize_parts", m, k, threads, product_parts)

    # A token is quantised by one thread.
    assert parts(1, 1 << 20, threads) == 1
    assert parts(2, 1 << 20, threads) == min(2, threads)
    # Sooner if the product wakes the threads anyway.
    assert parts(64, 1024, threads) == (1 if threads == 1 else threads)
    assert parts(64, 256, 1) == 1
    assert parts(4096, 4096, 1) == threads
    assert parts(4, 16, threads) == 1


def test_more_threads_need_more_work(heuristics):
    """Waking threads costs more, the more there are: the smallest product for n threads grows."""
    assert not heuristics.call("pays_for_threads", 1 << 40, 1)
    smallest = []
    for threads in (2, 4, 8, 16, 32, 64):
        low, high = 1, 1 << 40
        while low < high:
            middle = (low + high) // 2
            if heuristics.call("pays_for_threads", middle, threads):
                high = middle
            else:
                low = middle + 1
        smallest.append(low)
    assert smallest == sorted(smallest)
    assert smallest[0] == 96 * 1024


@pytest.mark.parametrize("slow", [-1, 0, 1])
@pytest.mark.parametrize(("parts", "threads"), [(1, 2), (2, 2), (16, 2), (7, 3), (5, 8), (150, 70)])
def test_parts_of_a_slow_thread_are_taken_by_others(heuristics, parts, threads, slow):
    runs, thread_of, bodies = heuristics.shared_parts(parts, threads, slow)
    assert runs == [1] * parts
    # A thread without a part prepares nothing; those beyond the number of parts have no memory.
    assert bodies == [int(thread in thread_of) for thread in range(threads)]
    assert max(thread_of) < min(parts, threads)
    # The slow thread is stuck in its first part: it cannot have run another one before the others
    # had ended, and they end only when nothing is left.
    assert thread_of.count(slow) <= 1


@given(m=sizes, n=sizes, k=sizes, threads=thread_counts, cost=costs)
def test_pieces_cover_the_output_once(heuristics, m, n, k, threads, cost):
    pieces = heuristics.pieces(m, n, k, threads, cost)
    assert sum(len(tokens) * len(rows) for tokens, rows in pieces) == m * n
    # Within each range of tokens, the rows follow each other: no output is computed twice.
    ends: dict[range, int] = {}
    for tokens, rows in pieces:
        if rows:
            assert rows.start == ends.get(tokens, 0)
            ends[tokens] = rows.stop
    assert set(ends.values()) == {n}
    starts = sorted((tokens.start, tokens.stop) for tokens in ends)
    assert [0, *(stop for _, stop in starts)] == [*(start for start, _ in starts), m]


@given(m=sizes, n=sizes, k=sizes, threads=thread_counts, cost=costs)
def test_pieces_are_about_a_block(heuristics, m, n, k, threads, cost):
    grid = heuristics.grid(m, n, k, threads, cost)
    pieces = heuristics.pieces(m, n, k, threads, cost)
    parts = grid[0] * grid[1]
    assert len(pieces) % parts == 0
    of_part = len(pieces) // parts
    assert of_part <= 16
    if parts == 1:
        assert of_part == 1  # nobody could take one
        return
    for first in range(0, len(pieces), of_part):
        part = [rows for _, rows in pieces[first : first + of_part] if rows]
        assert all(len(rows) % cost[3] == 0 for rows in part[:-1])
        # Not much larger than a block, unless there are as many pieces as there may be.
        assert of_part == 16 or all(len(rows) < cost[2] + cost[3] for rows in part)


def test_threads_can_help_each_other(heuristics):
    """A product of a typical layer has several pieces for each thread."""
    panels, _, tables = COSTS
    assert len(heuristics.pieces(24, 5120, 5120, 2, panels)) == 2 * 14
    assert len(heuristics.pieces(16, 768, 384, 2, panels)) == 2 * 2
    # Tables are built anew for every 2048 rows: shorter pieces would need more of them.
    assert len(heuristics.pieces(64, 14336, 4096, 2, tables)) == 2 * 4
    assert len(heuristics.pieces(64, 2560, 2560, 2, tables)) == 2


@pytest.mark.parametrize("cost", COSTS)
def test_each_thread_quantises_where_nobody_waits(heuristics, cost):
    each = heuristics.each_quantizes
    # One token: the other threads would wait for the one that quantises, with a prologue too.
    for is_plain in (True, False):
        assert each(1, 4096, 4096, 16, cost, is_plain=is_plain)
    # Small batches, or layers with many rows for each thread.
    assert each(16, 768, 384, 2, cost)
    assert each(24, 5120, 5120, 2, cost)
    assert each(24, 28672, 5120, 16, cost)
    # Where it takes too much of the time: few rows for each thread, or a prologue.
    assert not each(24, 5120, 5120, 16, cost)
    assert not each(48, 768, 384, 2, cost)
    assert not each(16, 768, 384, 2, cost, is_plain=False)
    # Where the copies would not fit the caches.
    assert each(64, 28672, 4096, 2, cost)
    assert not each(65, 28672, 4096, 2, cost)
    # Threads that have tokens of their own quantise these; one thread has nobody to wait for.
    assert not each(4096, 512, 4096, 2, cost)
    assert not each(16, 4096, 4096, 1, cost)
