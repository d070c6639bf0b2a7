"""The host's side of generation: reads tokens while the GPU computes the next ones."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from .token_choice import TokenChoice


class Reader:
    """Copies the report of each choice to the host, and hands its tokens to a streamer.

    While a step runs by itself on a GPU, the host reads the report of the step before. So it
    learns one step late that all sequences are finished; :meth:`undo` then takes the last step
    back.

    Args:
        choice: It has made the first choice.
        streamer: A streamer of transformers, or None.

    Attributes:
        tokens: What the host has read: for each step int64, ``(batch,)``.
    """

    def __init__(self, choice: TokenChoice, streamer: Any) -> None:
        self._choice, self._streamer = choice, streamer
        self._pending: deque[_Copy] = deque()
        self._free: list[_Copy] = []
        self._random_state: Any = None
        self._is_finished = False
        self.tokens: list[Tensor] = []

    def begin_step(self) -> None:
        """Note what :meth:`undo` needs; call it before each step."""
        if self._choice.do_sample:
            self._random_state = _random_state(self._choice.report.device)

    def read(self, left: int, is_running: bool = False) -> bool:
        """Queue a copy of the report, and read those that are due.

        Args:
            left: How many steps can follow.
            is_running: Whether the step still runs, so that its report is due after the next one.

        Returns:
            Whether another step must follow.
        """
        copy = self._free.pop() if self._free else _Copy(self._choice.report)
        copy.start(self._choice.report)
        self._pending.append(copy)
        late = 1 if is_running and left > 0 else 0
        while len(self._pending) > late and not self._is_finished:
            copy = self._pending.popleft()
            tokens, unfinished = copy.wait()
            self._free.append(copy)
            self.tokens.append(tokens)
            if self._streamer is not None:
                self._streamer.put(tokens)
            self._is_finished = not unfinished.any()
        return left > 0 and not self._is_finished

    def undo(self) -> int:
        """Undo the steps that ran after the end; return how many, 0 or 1."""
        count = len(self._pending)
        self._choice.forget(count)
        if count and self._random_state is not None:
            _set_random_state(self._choice.report.device, self._random_state)
        return count


class _Copy:
    """A report on its way to the host."""

    def __init__(self, report: Tensor) -> None:
        self._host = torch.empty(report.shape, dtype=report.dtype, pin_memory=report.is_cuda)
        self._done = torch.cuda.Event() if report.is_cuda else None

    def start(self, report: Tensor) -> None:
        self._host.copy_(report, non_blocking=True)
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(report.device))

    def wait(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._host.clone()


def _random_state(device: torch.device) -> Any:
    if device.type == "cuda":
        return torch.cuda.default_generators[_index(device)].get_offset()
    return torch.get_rng_state()


def _set_random_state(device: torch.device, state: Any) -> None:
    if device.type == "cuda":
        torch.cuda.default_generators[_index(device)].set_offset(state)
    else:
        torch.set_rng_state(state)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
