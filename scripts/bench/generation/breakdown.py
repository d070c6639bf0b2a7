"""Where the time of a token goes: head, linear layers, attention, norms, the rest.

Hooks stamp the beginning and the end of each module that belongs to a part. The time of a module
inside another counts for the inner one alone, so "attention" is the rotation, the cache and the
products of queries, keys and values; "rest" is everything else, such as gates, residuals, the
choice of the token, and Python. In a fused decoder layer, norms, gates and residuals count for the
linear layers whose products they are a part of, and everything else for the attention. Each pair of
hooks adds about 2 us. On a GPU the stamps are those
of its stream, waits for Python included.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from bitlinear import fusable
from bitlinear.fused import fused_linear
from bitlinear.integrations.transformers.decoder_layers import FusedDecoderLayer
from scripts import tools
from scripts.bench.generation.torch_engine import TorchEngine

with tools.importing("dev"):
    from transformers.generation import BaseStreamer
    from transformers.integrations import bitnet

HEAD, LINEARS, ATTENTION, NORMS, REST = "head", "linears", "attention", "norms", "rest"
PARTS = (HEAD, LINEARS, ATTENTION, NORMS, REST)


def measure(engine: TorchEngine, depth: int, batch: int, count: int) -> dict[str, float]:
    """Return the seconds of each part of a token, the median of ``count`` tokens."""
    clock = _Clock(on_gpu=engine.model.device.type == "cuda")
    with _hooks(engine.model, clock):
        engine.generate_after(depth, batch, 1 + count, clock)
    tokens = clock.tokens()[-count:]
    return {part: float(np.median([token[part] for token in tokens])) for part in PARTS}


class _Clock(BaseStreamer):
    """Writes down when each part begins and ends, and when ``generate`` has a token."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._log: list[tuple[str | None, Any]] = []  # (part that begins, None for an end; time)

    def begin(self, part: str) -> None:
        self._log.append((part, self._now()))

    def end_part(self) -> None:
        self._log.append((None, self._now()))

    def put(self, value: Tensor) -> None:
        """Begin the next token."""
        self.begin("")

    def end(self) -> None:
        """Do nothing."""

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def tokens(self) -> list[dict[str, float]]:
        """Return the seconds of each part, for each token between two calls of ``put``."""
        if self._on_gpu:
            torch.cuda.synchronize()
        tokens: list[dict[str, float]] = []
        stack = [REST]
        last = None
        for part, now in self._log:
            if tokens:
                tokens[-1][stack[-1]] += self._seconds(last, now)
            last = now
            if part == "":
                tokens.append(dict.fromkeys(PARTS, 0.0))
            elif part is None:
                stack.pop()
            else:
                stack.append(part)
        return tokens[:-1]  # the last call of put ends the last token

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) * 1e-3 if self._on_gpu else end - start


@contextlib.contextmanager
def _hooks(model: Any, clock: _Clock) -> Iterator[None]:
    handles = []
    # Hooks on the modules inside a fused layer would make it call them.
    fused = [m for m in model.modules() if isinstance(m, FusedDecoderLayer)]
    inside = {id(child) for layer in fused for child in layer.modules() if child is not layer}
    for module in model.modules():
        part = part_of(module, model.get_output_embeddings())
        if part is not None and id(module) not in inside:
            handles += [
                module.register_forward_pre_hook(lambda *_, part=part: clock.begin(part)),
                module.register_forward_hook(lambda *_: clock.end_part()),
            ]

    def timed_product(*args: Any, **kwargs: Any) -> Tensor:
        clock.begin(LINEARS)
        output = fused_linear(*args, **kwargs)
        clock.end_part()
        return output

    try:
        with mock.patch.object(fusable, "fused_linear", timed_product):
            yield
    finally:
        for handle in handles:
            handle.remove()


def part_of(module: nn.Module, head: nn.Module) -> str | None:
    """Return the part of a token that a module's own time belongs to, or None."""
    kind = type(module).__name__
    if module is head:
        return HEAD
    if isinstance(module, FusedDecoderLayer):
        return ATTENTION
    if isinstance(module, (nn.Linear, bitnet.BitLinear)):
        return LINEARS
    if kind.endswith("RMSNorm"):
        return NORMS
    return ATTENTION if kind.endswith("Attention") else None
