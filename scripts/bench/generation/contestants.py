"""What generates: a row for each contestant, and the materials that they are made of."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from torch import nn

from scripts.bench.generation import models
from scripts.bench.generation.llama import LlamaEngine, write_with_head
from scripts.bench.generation.torch_engine import RandomCache, TorchEngine

# What LlamaEngine and TorchEngine have in common.
Engine = Any


class Materials:
    """The parts of the contestants of one shape; they are made when they are first needed.

    Args:
        shape: A name in ``models.SHAPES``.
        layers: Another number of layers, or None.
        device: The device of torch's tensors.
        threads: Of llama.cpp; torch's number is that of the process.
        folder: For GGUF files.
    """

    def __init__(
        self, shape: str, layers: int | None, device: str, threads: int, folder: Path
    ) -> None:
        self.config = models.make_config(shape, layers)
        self.device, self.threads, self._folder = device, threads, folder

    @functools.cached_property
    def embedding(self) -> nn.Parameter:
        """The embedding of all models, and the head of most."""
        return models.random_embedding(self.config, self.device)

    @functools.cached_property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights of all models whose layers are in bf16."""
        return models.ternary_weights(self.config, self.device)

    @functools.cached_property
    def cache(self) -> RandomCache:
        """The keys and values of all models."""
        return RandomCache(self.config, self.device)

    def gguf(self, head: str) -> Path:
        """Return a GGUF file of this shape, with TQ2_0 layers and a head of this type.

        Raises:
            RuntimeError: llama.cpp cannot write it, or it is not installed.
        """
        path = self._folder / f"{head}.gguf"
        if not path.exists():
            # Others than llama.cpp need no package gguf.
            from bitlinear.integrations import gguf

            source = self._folder / "source.gguf"
            if not source.exists():
                gguf.save(models.ours(self.embedding, self.config, fuse=False), source)
            write_with_head(source, path, head, self.threads)
        return path


@dataclass(frozen=True)
class Kind:
    """A contestant.

    Attributes:
        label: Its name for people.
        make: Makes its engine.
        note: What a reader must know about it.
        head: The type of the head of its GGUF file, or "".
        by_default: Whether it takes part unless others are named.
    """

    label: str
    make: Callable[[Materials], Engine]
    note: str = ""
    head: str = ""
    by_default: bool = True


def _torch(make: Callable[[Materials], nn.Module]) -> Callable[[Materials], Engine]:
    return lambda materials: TorchEngine(make(materials), materials.cache)


def _ours(settings: Mapping[str, Any]) -> Kind:
    arguments = "".join(f", {name}={value!r}" for name, value in settings.items())
    label = f"BitLinear, convert(model{arguments})"
    return Kind(label, _torch(lambda m: models.ours(m.embedding, m.config, **settings)))


def _llama(head: str, by_default: bool) -> Kind:
    return Kind(
        f"llama.cpp TQ2_0, {head} head",
        lambda m: LlamaEngine(m.gguf(head), m.threads, on_gpu=m.device == "cuda"),
        note="it quantises activations in blocks, which is another function",
        head=head,
        by_default=by_default,
    )


KINDS = {
    **{name: _ours(settings) for name, settings in models.SETTINGS.items()},
    "transformers_packed": Kind(
        "transformers, packed",
        _torch(lambda m: models.packed(m.embedding, m.config)),
        note="transformers' BitLinear, which unpacks the weights in every call",
    ),
    "transformers_offline": Kind(
        "transformers, offline",
        _torch(lambda m: models.offline(m.embedding, m.config, m.weights)),
        note="transformers' AutoBitLinear, with ternary weights in bf16",
    ),
    "bf16": Kind(
        "nn.Linear bf16", _torch(lambda m: models.floating(m.embedding, m.config, m.weights))
    ),
    "llama_q6_k": _llama("Q6_K", by_default=True),
    "llama_f16": _llama("F16", by_default=False),
}
