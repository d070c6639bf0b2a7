"""Generate with a model of transformers, and time every token."""

from __future__ import annotations

import time
from typing import Any, Callable

import torch
from torch import Tensor, nn

from scripts import tools
from scripts.bench import cuda_timing
from scripts.bench.generation import models
from scripts.bench.timing import Call

with tools.importing("dev"):
    from transformers import DynamicCache, StaticCache
    from transformers.generation import BaseStreamer

# A captured step writes one token after the other into its cache, and then begins again.
STATIC_ROOM = 64


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

    def captured_step(self, depth: int, batch: int) -> Call:
        """Return the replay of a CUDA graph of one token after ``depth`` others.

        The cache is static, and its keys and values are zeros.
        """
        length = depth + STATIC_ROOM
        cache = StaticCache(config=self.model.config, max_cache_len=length)
        token = self._tokens(batch, 1)
        position = torch.full_like(token, depth)
        mask = (torch.arange(length, device=token.device) <= depth).expand(batch, 1, 1, length)

        def step() -> None:
            output = self.model(
                token, attention_mask=mask, position_ids=position, cache=cache, use_cache=True
            )
            token.copy_(output.logits[:, -1:].argmax(-1))

        step()  # allocates the cache
        reset(cache, depth)
        graph = cuda_timing.capture([step])  # runs it once more
        reset(cache, depth)
        left = STATIC_ROOM

        def replay() -> None:
            nonlocal left
            if left == 0:
                reset(cache, depth)
                left = STATIC_ROOM
            left -= 1
            graph()

        return replay

    def _tokens(self, batch: int, length: int) -> Tensor:
        device = self.model.device
        return torch.randint(self.model.config.vocab_size, (batch, length), device=device)

    def _generate(self, prompt: Tensor, count: int, streamer: BaseStreamer, **kwargs: Any) -> None:
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            streamer=streamer,
            **kwargs,
        )


def reset(cache: StaticCache, depth: int) -> None:
    """Make ``depth`` the number of tokens in a static cache."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(depth)
