"""Time the backward pass to the input of one deployed layer, as training an adapter needs it.

    python -m scripts.bench.input_gradient [--shapes NxK ...] [--tokens M] [--device cuda]

The other contestant is ``nn.Linear`` of the same dtype, whose weight is frozen too. Both compute
``grad @ weight``; a deployed layer expands its packed weights for it, and keeps none of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitlinear import BitLinear
from scripts.bench import cuda_timing, report, timing
from scripts.bench.arguments import Shape, parse_count, parse_seconds, parse_shape
from scripts.bench.devices import DEVICES, Device, choose_device
from scripts.bench.train_step import compare, print_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def backward_pass(layer: nn.Module, x: Tensor) -> timing.Call:
    """A backward pass to ``x``, again and again through one graph."""
    y = layer(x)
    grad = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, x, grad, retain_graph=True)


def measure(
    shape: Shape, M: int, dtype: str, quant_type: str, budget: float, device: Device
) -> dict[str, str]:
    """Return the times of both layers, and how many times as long a deployed layer takes."""
    N, K = shape
    options = {"bias": False, "device": device.torch_device, "dtype": DTYPES[dtype]}
    layers = {
        "nn.Linear": nn.Linear(K, N, **options).requires_grad_(False),
        "BitLinear": BitLinear(K, N, quant_type=quant_type, **options).deploy(),
    }
    x = torch.randn(M, K, device=device.torch_device, dtype=DTYPES[dtype], requires_grad=True)
    calls = {name: backward_pass(layer, x) for name, layer in layers.items()}
    timer = timing.cpu_timer if device.torch_device == "cpu" else cuda_timing.stream_timer
    times = compare(calls, budget, timer)
    row = {report.SHAPE: f"{N} x {K}", "dtype": dtype}
    for name, record in times.items():
        row[f"{name}, ms"] = report.marked(f"{record['median_us'] * 1e-3:.3f}", record)
    ratio = times["BitLinear"]["median_us"] / times["nn.Linear"]["median_us"]
    row["ratio"] = report.marked(f"{ratio:.2f}", *times.values())
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", nargs="+", type=parse_shape, metavar="NxK", default=[(1024,) * 2, (4096,) * 2])
    add("--tokens", type=parse_count, metavar="M", default=512)
    add("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    add("--quant-type", default="ai8pc_wpt")
    add("--budget", type=parse_seconds, default=5.0, help="seconds for each row (default: 5)")
    add("--device", choices=DEVICES, default="cpu")
    options = parser.parse_args(argv)
    device = choose_device(parser, options.device)
    rows = [
        measure(shape, options.tokens, dtype, options.quant_type, options.budget, device)
        for shape in options.shapes
        for dtype in options.dtypes
    ]
    print_rows(rows, device, f"M = {options.tokens}", words=(report.SHAPE, "dtype"))


if __name__ == "__main__":
    main()
