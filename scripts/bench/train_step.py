"""Time a training step of one layer, and count the bytes that it saves for the backward pass.

    python -m scripts.bench.train_step [--shapes NxK ...] [--tokens M] [--compile] [--device cuda]

A step is a forward pass and a backward pass to the weight, the bias and the input, in fp32 on a
CPU and in bf16 on a GPU. The other contestants are ``nn.Linear`` and the expression by which most
implementations train: both operands are quantised and dequantised in floating point, with
``detach()`` for the straight-through gradient. The last column is evaluation with one token,
without ``deploy()``.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlinear import BitLinear, runtime
from scripts.bench import cuda_timing, machine, records, report, timing
from scripts.bench.arguments import Shape, parse_count, parse_seconds, parse_shape
from scripts.bench.devices import DEVICES, Device, choose_device
from scripts.bench.records import Record


class Expression(nn.Linear):
    """The expression by which most implementations train."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean().clamp_min(1e-6)
        weight = (self.weight / scale).round().clamp(-1, 1) * scale
        inverse = 127 / x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-6)
        tokens = (x * inverse).round().clamp(-128, 127) / inverse
        weight = self.weight + (weight - self.weight).detach()
        return F.linear(x + (tokens - x).detach(), weight, self.bias)


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes that the forward pass keeps for the backward pass."""
    saved: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    # Tensors of a detached part of the graph are freed by now.
    kept = [tensor.untyped_storage() for tensor in (ref() for ref in saved) if tensor is not None]
    del y
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def training_step(layer: nn.Module, x: Tensor) -> timing.Call:
    grad = torch.randn(len(x), layer.out_features, device=x.device, dtype=x.dtype)
    operands = (layer.weight, layer.bias, x)

    def step() -> None:
        torch.autograd.graph.increment_version(layer.weight)  # as the optimizer does every time
        torch.autograd.grad(layer(x), operands, grad)

    return step


def build_layers(shape: Shape, compiled: bool, device: Device) -> dict[str, nn.Module]:
    N, K = shape
    kinds = {"nn.Linear": nn.Linear, "BitLinear": BitLinear, "expression": Expression}
    layers: dict[str, nn.Module] = {
        name: kind(K, N, device=device.torch_device, dtype=device.dtype)
        for name, kind in kinds.items()
    }
    if compiled:
        expression = Expression(K, N, device=device.torch_device, dtype=device.dtype)
        expression.compile()
        layers["expression, compiled"] = expression
    return layers


def compare(calls: dict[str, timing.Call], budget: float, timer: timing.Timer) -> dict[str, Record]:
    """Return the quartiles of each call's time."""
    contestants = [timing.Contestant(name, call) for name, call in calls.items()]
    times = timing.compare(contestants, budget, timer)
    return {name: records.quartiles(times[name]) for name in calls}


def measure(
    shape: Shape, M: int, compiled: bool, budget: float, device: Device
) -> list[dict[str, str]]:
    """Return a row for each layer: its step, its saved bytes and one token in evaluation."""
    layers = build_layers(shape, compiled, device)
    on_gpu = device.torch_device == "cuda"
    timer = cuda_timing.stream_timer if on_gpu else timing.cpu_timer
    x = torch.randn(M, shape[1], device=device.torch_device, dtype=device.dtype, requires_grad=True)
    steps = {name: training_step(layer, x) for name, layer in layers.items()}
    kinds = {"step": compare(steps, budget, timer)}
    if on_gpu:  # the GPU's time alone: Python can be slower to queue the work
        graphs = {name: cuda_timing.capture([step]) for name, step in steps.items()}
        kinds["in a graph"] = compare(graphs, budget / 4, cuda_timing.graph_timer)
    token = x.detach()[:1].clone()
    with torch.no_grad():
        calls = {name: lambda layer=layer: layer(token) for name, layer in layers.items()}
        tokens = compare(calls, budget / 4, timer)
    saved = {name: saved_bytes(layer, x) for name, layer in layers.items()}

    rows = []
    for name in layers:
        row = {report.SHAPE: f"{shape[0]} x {shape[1]}", "layer": name}
        for kind, times in kinds.items():
            ours, linear = times[name], times["nn.Linear"]
            milliseconds = f"{ours['median_us'] * 1e-3:.{3 if on_gpu else 1}f}"
            ratio = f"{ours['median_us'] / linear['median_us']:.2f}"
            row[f"{kind}, ms"] = report.marked(milliseconds, ours)
            row[f"{kind}, of nn.Linear"] = report.marked(ratio, ours, linear)
        row["saved, of nn.Linear"] = f"{saved[name] / saved['nn.Linear']:.2f}"
        row["eval, M = 1, us"] = report.marked(f"{tokens[name]['median_us']:.0f}", tokens[name])
        rows.append(row)
    return rows


def print_rows(
    rows: Sequence[dict[str, str]], device: Device, size: str, words: tuple[str, ...]
) -> None:
    """Print the machine, the size of the input and a table; ``words`` are its columns of words."""
    described = machine.describe(runtime.current().hardware, device.name)
    threads = report.plural(torch.get_num_threads(), "thread")
    print(f"{machine.display_name(described)}, {threads}, {size}\n")
    cells = [tuple(row.values()) for row in rows]
    print(report.markdown(tuple(rows[0]), cells, words=words))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", nargs="+", type=parse_shape, metavar="NxK", default=[(1024,) * 2, (4096,) * 2])
    add("--tokens", type=parse_count, metavar="M", default=512)
    add("--compile", action="store_true", help="the expression compiled, too")
    add("--budget", type=parse_seconds, default=20.0, help="seconds for each shape (default: 20)")
    add("--device", choices=DEVICES, default="cpu")
    options = parser.parse_args(argv)
    device = choose_device(parser, options.device)
    rows = [
        row
        for shape in options.shapes
        for row in measure(shape, options.tokens, options.compile, options.budget, device)
    ]
    print_rows(rows, device, f"M = {options.tokens}", words=(report.SHAPE, "layer"))


if __name__ == "__main__":
    main()
