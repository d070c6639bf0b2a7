"""Times a training step of one layer, and says what it saves for the backward pass.

    python -m scripts.bench.train_step [--shapes NxK ...] [--tokens M] [--compile] [--device cuda]

A step is a forward pass and a backward pass to the weight, the bias and the input, in fp32 on a
CPU and in bf16 on a GPU. Beside BitLinear: ``nn.Linear``, and the expression by which most
implementations train (both operands quantised and multiplied out again, in floating point, with
``detach()`` for the straight-through gradient). Then evaluation with one token, by layers that are
not deployed.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlinear import BitLinear
from scripts.bench import report, timing
from scripts.bench.benchmark import Shape, parse_count, parse_seconds, parse_shape
from scripts.bench.devices import DEVICES, Device


class Expression(nn.Linear):
    """The usual way."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean().clamp_min(1e-6)
        weight = (self.weight / scale).round().clamp(-1, 1) * scale
        inverse = 127 / x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-6)
        tokens = (x * inverse).round().clamp(-128, 127) / inverse
        weight = self.weight + (weight - self.weight).detach()
        return F.linear(x + (tokens - x).detach(), weight, self.bias)


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Of all memory that the forward pass keeps for the backward pass."""
    saved: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    # What only a detached part of the graph had saved is gone by now.
    kept = [tensor.untyped_storage() for tensor in (its() for its in saved) if tensor is not None]
    del y
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def step_of(layer: nn.Module, x: Tensor) -> timing.Call:
    grad = torch.randn(len(x), layer.out_features, device=x.device, dtype=x.dtype)
    operands = (layer.weight, layer.bias, x)

    def step() -> None:
        torch.autograd.graph.increment_version(layer.weight)  # as the optimizer does every time
        torch.autograd.grad(layer(x), operands, grad)

    return step


def layers(shape: Shape, compiled: bool, device: Device) -> dict[str, nn.Module]:
    N, K = shape
    kinds = {"nn.Linear": nn.Linear, "BitLinear": BitLinear, "expression": Expression}
    made: dict[str, nn.Module] = {
        name: kind(K, N, device=device.place, dtype=device.dtype) for name, kind in kinds.items()
    }
    if compiled:
        expression = Expression(K, N, device=device.place, dtype=device.dtype)
        expression.compile()
        made["expression, compiled"] = expression
    return made


def compare(calls: dict[str, timing.Call], budget: float, timer: timing.Timer) -> dict[str, float]:
    """The median time of each, in seconds."""
    contestants = [timing.Contestant(name, call) for name, call in calls.items()]
    times = timing.compare(contestants, budget, timer)
    return {name: times[name].median for name in calls}


def measure(
    shape: Shape, M: int, compiled: bool, budget: float, device: Device
) -> list[dict[str, str]]:
    """A row for each layer: its step, the ratio to nn.Linear, what it saves, one token in eval."""
    made = layers(shape, compiled, device)
    on_gpu = device.place == "cuda"
    timer = timing.cuda_timer if on_gpu else timing.cpu_timer
    x = torch.randn(M, shape[1], device=device.place, dtype=device.dtype, requires_grad=True)
    steps = {name: step_of(layer, x) for name, layer in made.items()}
    kinds = {"step": compare(steps, budget, timer)}
    if on_gpu:  # what the GPU takes, without Python, which may be slower in queueing it
        graphs = {name: timing.capture([step]) for name, step in steps.items()}
        kinds["in a graph"] = compare(graphs, budget / 4, timing.graph_timer)
    token = x.detach()[:1].clone()
    with torch.no_grad():
        calls = {name: lambda layer=layer: layer(token) for name, layer in made.items()}
        tokens = compare(calls, budget / 4, timer)
    saved = {name: saved_bytes(layer, x) for name, layer in made.items()}

    rows = []
    for name in made:
        row = {"N x K": f"{shape[0]} x {shape[1]}", "layer": name}
        for kind, times in kinds.items():
            row[f"{kind}, ms"] = f"{times[name] * 1e3:.{3 if on_gpu else 1}f}"
            row[f"{kind}, of nn.Linear"] = f"{times[name] / times['nn.Linear']:.2f}"
        row["saved, of its"] = f"{saved[name] / saved['nn.Linear']:.2f}"
        row["eval, M = 1, us"] = f"{tokens[name] * 1e6:.0f}"
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", nargs="+", type=parse_shape, metavar="NxK", default=[(1024,) * 2, (4096,) * 2])
    add("--tokens", type=parse_count, metavar="M", default=512)
    add("--compile", action="store_true", help="the usual expression compiled, too")
    add("--budget", type=parse_seconds, default=20.0, help="seconds for each shape (default: 20)")
    add("--device", choices=DEVICES, default="cpu")
    options = parser.parse_args(argv)
    device = DEVICES[options.device]
    if not device.is_available():
        parser.error(f"--device {device.name}: torch finds no GPU")
    rows = [
        row
        for shape in options.shapes
        for row in measure(shape, options.tokens, options.compile, options.budget, device)
    ]
    where = (
        torch.cuda.get_device_name()
        if device.place == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    print(f"{where}, M = {options.tokens}\n")
    cells = [tuple(row.values()) for row in rows]
    print(report.markdown(tuple(rows[0]), cells, words=("N x K", "layer")))


if __name__ == "__main__":
    main()
