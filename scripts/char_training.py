"""Train two networks side by side on Python's language reference, character by character.

One has ``nn.Linear`` layers, the other ternary ones. They begin with the same parameters and see
the same batches in the same order. If training is stopped or killed, it resumes from its last
checkpoint and ends with the same bits: a batch depends on the seed and its step, and nothing else
is random.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from pydoc_data.topics import topics
from types import FrameType
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import bitlinear
from scripts.char_model import CharModel

# The names of the networks.
LINEAR, TERNARY = "nn.Linear", "BitLinear"

VALIDATION_WINDOWS = 96
EVALUATIONS = 10
WARM_UP = 0.1  # the share of the steps in which the learning rate rises


class Stopped(Exception):
    """A signal stopped the training; it can be resumed."""


class UnusableCheckpoint(Exception):
    """The checkpoint is damaged, or it belongs to other settings or another text."""


@dataclass(frozen=True)
class Settings:
    """The settings that the result depends on.

    Attributes:
        width: Size of a character's vector; a multiple of twice ``heads``.
        depth: Number of blocks.
        heads: Attention heads of a block.
        context: Characters in a sequence.
        batch: Sequences in a batch.
        steps: Number of batches.
        linear_rate: Highest learning rate of the network with ``nn.Linear`` layers.
        ternary_rate: Highest learning rate of the ternary network.
        seed: The seed of the initial parameters and of the batches.
    """

    width: int = 384
    depth: int = 4
    heads: int = 6
    context: int = 128
    batch: int = 8
    steps: int = 400
    # The best of 0.5, 1 and 2e-3, and of 1, 2 and 4e-3, after 300 steps.
    linear_rate: float = 1e-3
    ternary_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0 and name != "seed":
                raise ValueError(f"{name} must be above 0, but it is {value}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of twice the heads, but it is {self.width}, with "
                f"{self.heads} heads"
            )


# --------------------------------------------------------------------------------- the text


class Text(NamedTuple):
    """A text, as indices into its characters; the network never trains on ``validation``."""

    characters: str
    train: Tensor
    validation: Tensor

    def encode(self, text: str) -> Tensor:
        """Return the indices of the characters in ``text``; unknown ones are left out."""
        return _encode(text, self.characters)

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.characters[token] for token in tokens.tolist())


def load_text() -> Text:
    """Return the language reference of ``help()``; up to a tenth, its last topics, validates.

    Topics repeat each other. Only the first of equal paragraphs stays, so that none is in both
    parts.
    """
    seen: set[str] = set()
    chapters = []
    for name in sorted(topics):
        paragraphs = dict.fromkeys(part.strip("\n") for part in topics[name].split("\n\n"))
        new = [paragraph for paragraph in paragraphs if paragraph not in seen]
        seen.update(new)
        chapters.append("\n\n".join(new) + "\n\n\n")
    whole, train = "".join(chapters), ""
    for chapter in chapters:
        if len(train) >= 0.9 * len(whole):
            break
        train += chapter
    characters = "".join(sorted(set(train)))
    return Text(characters, _encode(train, characters), _encode(whole[len(train) :], characters))


def _encode(text: str, characters: str) -> Tensor:
    index = {character: i for i, character in enumerate(characters)}
    return torch.tensor([index[character] for character in text if character in index])


def draw_batch(text: Text, settings: Settings, step: int) -> tuple[Tensor, Tensor]:
    """Return random sequences, and for each of their characters the next one.

    Returns:
        Two tensors of the shape ``(batch, context)``.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    first = torch.randint(
        len(text.train) - settings.context, (settings.batch, 1), generator=generator
    )
    sequences = text.train[first + torch.arange(settings.context + 1)]
    return sequences[:, :-1], sequences[:, 1:]


@torch.inference_mode()
def validation_loss(model: nn.Module, text: Text, context: int) -> float:
    """Return the mean loss, in nats per character, of sequences spread evenly over the text."""
    first = torch.linspace(0, len(text.validation) - context - 1, VALIDATION_WINDOWS).long()
    sequences = text.validation[first[:, None] + torch.arange(context + 1)]
    losses = [_loss(model, part[:, :-1], part[:, 1:]).item() for part in sequences.split(16)]
    return sum(losses) / len(losses)


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


# --------------------------------------------------------------------------------- training


class Training:
    """Both networks, their optimizers and their losses.

    Attributes:
        models: The networks by name.
        step: Number of batches that they have seen.
        curves: By name, ``train`` (the loss of every batch), ``validation`` (pairs of a step and
            the loss after it) and ``seconds`` (the time of every step).
    """

    def __init__(self, settings: Settings, text: Text) -> None:
        self.settings, self.text = settings, text
        self.models = {name: _build(settings, text) for name in (LINEAR, TERNARY)}
        bitlinear.convert(self.models[TERNARY])
        self.step = 0
        self.curves: dict[str, dict[str, list[Any]]] = {
            name: {"train": [], "validation": [], "seconds": []} for name in self.models
        }
        self._rates = {LINEAR: settings.linear_rate, TERNARY: settings.ternary_rate}
        self._optimizers = {
            name: torch.optim.AdamW(model.parameters()) for name, model in self.models.items()
        }

    def advance(self) -> None:
        """Train both on one batch. They take turns in going first, so that neither gains by it."""
        x, y = draw_batch(self.text, self.settings, self.step)
        names = list(self.models)
        for name in names if self.step % 2 == 0 else reversed(names):
            start = time.perf_counter()
            loss = self._update(name, x, y)
            self.curves[name]["seconds"].append(time.perf_counter() - start)
            self.curves[name]["train"].append(loss)
        self.step += 1
        steps = self.settings.steps
        if self.step * EVALUATIONS // steps > (self.step - 1) * EVALUATIONS // steps:
            for name, model in self.models.items():
                loss = validation_loss(model, self.text, self.settings.context)
                self.curves[name]["validation"].append([self.step, loss])

    def _update(self, name: str, x: Tensor, y: Tensor) -> float:
        model, optimizer = self.models[name], self._optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = self._rates[name] * share_of_rate(self.step, self.settings.steps)
        loss = _loss(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all."""
        part = path.with_name(f"{path.name}.part")
        torch.save(
            {
                "identity": self._identity(),
                "step": self.step,
                "curves": self.curves,
                "models": {name: model.state_dict() for name, model in self.models.items()},
                "optimizers": {
                    name: optimizer.state_dict() for name, optimizer in self._optimizers.items()
                },
            },
            part,
        )
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            UnusableCheckpoint: Nothing has changed.
        """
        remedy = "start over with --restart, or name another --out"
        try:
            with ZipFile(path) as archive:  # torch.load does not check checksums
                if archive.testzip() is not None:
                    raise BadZipFile("a checksum is wrong")
            state = torch.load(path, weights_only=True)
            identity = state["identity"]
        except (OSError, KeyError, RuntimeError, UnpicklingError, BadZipFile) as error:
            reason = str(error).partition("\n")[0]
            raise UnusableCheckpoint(
                f"{path} is damaged, or not a checkpoint ({reason}): {remedy}"
            ) from error
        differences = [
            f"{name} is {identity.get(name)} there and {value} here"
            for name, value in self._identity().items()
            if identity.get(name) != value
        ]
        if differences:
            raise UnusableCheckpoint(
                f"{path} belongs to another training: {'; '.join(differences)}; {remedy}"
            )
        self.step, self.curves = state["step"], state["curves"]
        for name, model in self.models.items():
            model.load_state_dict(state["models"][name])
            self._optimizers[name].load_state_dict(state["optimizers"][name])

    def _identity(self) -> dict[str, Any]:
        """Return the settings and a digest of the text, which differs between Python versions."""
        content = self.text.decode(torch.cat((self.text.train, self.text.validation)))
        digest = hashlib.sha256(content.encode()).hexdigest()
        return {**asdict(self.settings), "digest of the text": digest[:12]}


def _build(settings: Settings, text: Text) -> CharModel:
    torch.manual_seed(settings.seed)
    return CharModel(
        len(text.characters), settings.width, settings.depth, settings.heads, settings.context
    )


def share_of_rate(step: int, steps: int) -> float:
    """Return the share of the highest learning rate: linear warm-up, then cosine decay to 5 %."""
    warm_up = math.ceil(WARM_UP * steps)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2


def train(settings: Settings, text: Text, path: Path, save_every: int = 50) -> Training:
    """Train to the end, from the checkpoint in ``path`` if there is one.

    After SIGINT or SIGTERM the current step ends, and the checkpoint is written.

    Args:
        settings: The settings of the training; a checkpoint must have the same.
        text: The text to learn.
        path: The path of the checkpoint, which stays after the training.
        save_every: Steps from one checkpoint to the next.

    Raises:
        UnusableCheckpoint: The checkpoint is damaged, or it belongs to other settings or another
            text.
        Stopped: A signal stopped the training.
    """
    training = Training(settings, text)
    if path.exists():
        training.load(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=settings.steps, initial=training.step, desc="training", unit="step")
    with bar, _signals() as received:
        while training.step < settings.steps:
            training.advance()
            bar.set_postfix(
                {name: f"{curve['train'][-1]:.3f}" for name, curve in training.curves.items()}
            )
            bar.update()
            if received or training.step == settings.steps or training.step % save_every == 0:
                training.save(path)
            if received:
                raise Stopped(
                    f"stopped by {received[0].name} after step {training.step} of "
                    f"{settings.steps}: run the same command to resume"
                )
    return training


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT and SIGTERM; after the first one they act as they did before."""
    received: list[signal.Signals] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        restore()

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()
