"""Time work on a GPU: CUDA graphs of many calls, and the timers of their replays."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch

from scripts.bench.timing import Call

# So long that the gap between two replays of a graph, some 2 us, makes no difference.
GRAPH_SECONDS = 1e-3
# Some 0.3 ms, in which the host launches the first graph of a sample.
LEAD_CYCLES = 500_000


def stream_timer(call: Call, count: int) -> float:
    """Time calls that queue work on the current CUDA stream.

    The result is the rate at which calls in a row go through. If the GPU waits for Python to launch
    the next call, the wait is part of the time.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in itertools.repeat(None, count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / count


def graph_timer(call: Call, count: int) -> float:
    """Time replays of a CUDA graph, without the time in which the host launches the first one."""
    torch.cuda._sleep(LEAD_CYCLES)
    return stream_timer(call, count)


def graph(calls: Sequence[Call]) -> tuple[Call, int]:
    """Capture the calls one after the other, repeated until a replay takes ``GRAPH_SECONDS``.

    Returns:
        The replay, and how many calls it makes.
    """
    replay = capture(calls)
    graph_timer(replay, 1)  # the first one also uploads the graph to the GPU
    passes = math.ceil(GRAPH_SECONDS / graph_timer(replay, 1))
    if passes > 1:
        replay = capture([*calls] * passes)
    return replay, len(calls) * passes


def capture(calls: Sequence[Call]) -> Call:
    """Capture the calls, in their order, as one CUDA graph.

    Returns:
        The replay on the current stream.

    Raises:
        RuntimeError: A graph cannot hold one of the calls: it waits for the GPU, for example.
    """
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    recorded = torch.cuda.CUDAGraph()
    # torch.cuda.graph switches streams by itself, but not back if the capture fails.
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):  # the graph must not hold the set-up of a first call
            call()
        with torch.cuda.graph(recorded, stream=stream):
            for call in calls:
                call()

    def replay(_kept: Sequence[Call] = tuple(calls)) -> None:  # keeps the tensors that it reads
        recorded.replay()

    return replay


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """Return the one stream of all graphs: cuBLAS keeps a workspace for every stream it meets."""
    return torch.cuda.Stream()
