"""Train a small ternary network on real data, deploy it, and compare it with its float twin.

    python scripts/quickstart.py [--epochs 40]

The data is scikit-learn's digits: 1797 images of handwritten digits, 8 x 8 pixels. The same network
is trained twice, with ``nn.Linear`` and with ``BitLinear``; the ternary one is then deployed. Takes
under a minute on two idle cores.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ModuleNotFoundError as error:
    # This file also runs on its own, so scripts/tools.py is out of its reach.
    print(
        f"this script needs the Python module {error.name}, which is missing: "
        "run pip install '.[quickstart]' in the checkout",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

import bitlinear

WIDTH = 512

# (accuracy, bytes of the linear layers, us for a batch of 1, us for a batch of 256)
Row = tuple[float, int, float, float]


def load_data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train images, test images, train labels, test labels; pixels are scaled to [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        torch.tensor(images, dtype=torch.float32) / 16,
        torch.tensor(labels),
        test_size=0.25,
        random_state=seed,
        stratify=labels,
    )
    return tuple(split)


def build_network(seed: int = 0) -> nn.Sequential:
    """Return three linear layers; a normalisation before a layer keeps ternary training stable."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, WIDTH),
        nn.ReLU(),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 10),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, name: str) -> list[float]:
    """Train with plain AdamW and a cosine schedule: BitLinear needs no special treatment.

    Returns:
        The loss of every step.
    """
    torch.manual_seed(0)
    batch = 64
    steps = -(-len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    model.train()
    losses = []
    progress = tqdm(range(epochs), desc=f"training {name}", unit="epoch")
    for _ in progress:
        for indices in torch.randperm(len(images)).split(batch):
            loss = nn.functional.cross_entropy(model(images[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
    model.eval()
    return losses


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).argmax(dim=-1)


def layer_bytes(model: nn.Module) -> int:
    """Return the bytes of the linear layers' parameters and buffers."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
        for tensor in (*layer.parameters(), *layer.buffers())
    )


@torch.inference_mode()
def latency(model: nn.Module, images: Tensor, runs: int = 200) -> float:
    """Return the median time of one forward pass, in microseconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure(models: dict[str, nn.Module], images: Tensor, labels: Tensor) -> dict[str, Row]:
    """Return accuracy, bytes of the linear layers, latency at batch 1 and 256, by name."""
    return {
        name: (
            (predict(model, images) == labels).float().mean().item(),
            layer_bytes(model),
            latency(model, images[:1]),
            latency(model, images[:256]),
        )
        for name, model in models.items()
    }


def table(rows: dict[str, Row]) -> str:
    """Return the rows of :func:`measure` as text."""
    lines = [f"{'':<22}{'accuracy':>10}{'bytes':>12}{'batch 1':>12}{'batch 256':>12}"]
    lines += [
        f"{name:<22}{accuracy:>10.2%}{size:>12,}{one:>9.1f} us{many:>9.1f} us"
        for name, (accuracy, size, one, many) in rows.items()
    ]
    return "\n".join(lines)


def run(epochs: int = 40) -> dict[str, nn.Module]:
    """Train both networks, deploy the ternary one, print the table."""
    train_images, test_images, train_labels, test_labels = load_data()

    linear = build_network()
    ternary = bitlinear.convert(build_network())
    train(linear, train_images, train_labels, epochs, "nn.Linear")
    train(ternary, train_images, train_labels, epochs, "BitLinear")

    deployed = bitlinear.deploy(copy.deepcopy(ternary))
    models = {"nn.Linear": linear, "BitLinear (QAT)": ternary, "BitLinear (deployed)": deployed}
    print(table(measure(models, test_images, test_labels)))

    same = torch.equal(predict(ternary, test_images), predict(deployed, test_images))
    print(f"QAT and deployed predict the same classes: {'yes' if same else 'NO'}")
    if not same:
        raise SystemExit(1)
    return models


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40, help="passes over the data (default: 40)")
    run(parser.parse_args(argv).epochs)


if __name__ == "__main__":
    main()
