"""Generate with a model of transformers, and time every token."""

from __future__ import annotations

import functools
import time
from typing import Any, Callable
from unittest import mock

import torch
from torch import Tensor, nn

from bitlinear.integrations.transformers import captured
from bitlinear.integrations.transformers.decode_step import DecodeStep
from scripts import tools
from scripts.bench.generation import models

with tools.importing("dev"):
    from transformers import DynamicCache, StaticCache
    from transformers.generation import BaseStreamer

# The tokens of a call until its steps are captured.
CAPTURE_TOKENS = 3


class Stamps(BaseStreamer):
    """The times at which ``generate`` hands over its tokens: first the prompt, then each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time; the tokens are on the CPU already, so a GPU has finished them."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


class RandomCache:
    """Keys and values of tokens that were never computed; all models of a cell share them."""

    def __init__(self, config: Any, device: str) -> None:
        self._config, self._device = config, device
        self._depth, self._batch = 0, 0
        self._cache = DynamicCache(config=config)

    def of(self, depth: int, batch: int) -> DynamicCache:
        """Return the cache with exactly ``depth`` tokens in each of ``batch`` sequences."""
        if (depth, batch) != (self._depth, self._batch):
            self._cache = DynamicCache(config=self._config)  # releases the last one first
            self._depth, self._batch = depth, batch
            heads = self._config.num_key_value_heads
            size = self._config.hidden_size // self._config.num_attention_heads
            for index in range(self._config.num_hidden_layers):
                shape = (2, batch, heads, depth, size)
                k, v = torch.randn(shape, dtype=models.DTYPE, device=self._device)
                self._cache.update(k, v, index)
        self._cache.crop(depth - self._cache.get_seq_length())  # what the last call has added
        return self._cache

    def static(self, depth: int, batch: int, length: int) -> StaticCache:
        """Return a new static cache of a length with the same tokens."""
        cache = StaticCache(config=self._config, max_cache_len=length)
        for index, layer in enumerate(self.of(depth, batch).layers):
            cache.update(layer.keys, layer.values, index)
        return cache


class TorchEngine:
    """A model of transformers.

    Attributes:
        model: The model.
        token_bytes: The bytes of weights that a token reads.
    """

    def __init__(self, model: nn.Module, cache: RandomCache) -> None:
        self.model: Any = model
        self.token_bytes = models.token_bytes(model)
        self._cache = cache

    def first_token(self, length: int, batch: int) -> Callable[[], float]:
        """Return a call that reads a prompt; it returns the seconds until its first token."""
        prompt = self._tokens(batch, length)

        def call() -> float:
            stamps = Stamps()
            start = time.perf_counter()
            self._generate(prompt, 1, stamps)
            return stamps.times[1] - start

        return call

    def next_tokens(self, depth: int, batch: int, count: int) -> Callable[[], float]:
        """Return a call that generates after ``depth`` tokens, in ``batch`` sequences at once.

        It generates ``1 + count`` tokens and returns the seconds of the last ``count``: the first
        one's contain the set-up of ``generate``.
        """

        def call() -> float:
            stamps = Stamps()
            self.generate_after(depth, batch, 1 + count, stamps)
            return stamps.times[-1] - stamps.times[1]

        return call

    def generate(self, length: int, batch: int, count: int) -> None:
        """Generate ``count`` tokens after random prompts of ``length`` tokens."""
        self._generate(self._tokens(batch, length), count, Stamps())

    def generate_after(self, depth: int, batch: int, count: int, streamer: BaseStreamer) -> None:
        """Generate ``count`` tokens after ``depth`` cached ones."""
        cache = self._cache.of(depth, batch)
        self._generate(self._tokens(batch, depth + 1), count, streamer, cache=cache)

    def captured_tokens(self, depth: int, batch: int, count: int) -> Callable[[], float]:
        """Return a call that generates after ``depth`` tokens by the replay of a CUDA graph.

        It returns the seconds of ``count`` tokens after the first ones: of these one comes from the
        prompt, and in the steps of the others the graph is captured.
        """
        total = CAPTURE_TOKENS + count

        def call() -> float:
            stamps = Stamps()
            cache = self._cache.static(depth, batch, depth + total)
            self._generate(
                self._tokens(batch, depth + 1),
                total,
                stamps,
                generate=functools.partial(captured.generate, self.model),
                cache=cache,
            )
            return stamps.times[-1] - stamps.times[CAPTURE_TOKENS]

        return call

    def captured_steps(self, depth: int, batch: int, count: int) -> Callable[[], float]:
        """Return a call that replays the graph of a step ``count`` times after ``depth`` tokens.

        It returns the seconds of the replays, which no work of ``generate`` interrupts.
        """
        steps: list[DecodeStep] = []
        positions: list[Tensor] = []

        def make_step(forward: Any, inputs: Any, visible: Any, position: Tensor, *rest: Any) -> Any:
            steps.append(DecodeStep(forward, inputs, visible, position, *rest))
            positions.append(position)
            return steps[-1]

        with mock.patch.object(captured, "DecodeStep", make_step):
            self.captured_tokens(depth, batch, count)()

        def call() -> float:
            positions[0].sub_(count)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                steps[0]()
            torch.cuda.synchronize()
            return time.perf_counter() - start

        return call

    def _tokens(self, batch: int, length: int) -> Tensor:
        device = self.model.device
        return torch.randint(self.model.config.vocab_size, (batch, length), device=device)

    def _generate(
        self,
        prompt: Tensor,
        count: int,
        streamer: BaseStreamer,
        generate: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        (generate or self.model.generate)(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            streamer=streamer,
            **kwargs,
        )
