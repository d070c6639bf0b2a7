"""Times the linear layers of a whole model, one token after the other: BitNet b1.58 2B's.

    python -m scripts.bench.decode --device cuda [--json scripts/bench/results/NAME.json]

In ``bench.py`` no call needs the result of another; here each does, as in a model. What lies
between the linear layers is as little as keeps them in that order, it is the same for all, and it
is timed alone, too. There is no attention to earlier tokens and no vocabulary. Weights are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitlinear
from bitlinear import runtime
from scripts.bench import contestants, machine, report, timing
from scripts.bench.benchmark import parse_count, parse_seconds
from scripts.bench.devices import DEVICES, Device
from scripts.bench.report import Record


@dataclass(frozen=True)
class Architecture:
    """The sizes of a transformer's decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int


BITNET_2B = Architecture(
    layers=30, hidden=2560, intermediate=6912, heads=20, kv_heads=5, head_size=128
)

# (in_features, out_features): the layer.
MakeLinear = Callable[[int, int], nn.Module]


class Block(nn.Module):
    """A layer of the decoder."""

    def __init__(self, its: Architecture, linear: MakeLinear) -> None:
        super().__init__()
        self._its = its
        attention, shared = its.heads * its.head_size, its.kv_heads * its.head_size
        self.q = linear(its.hidden, attention)
        self.k = linear(its.hidden, shared)
        self.v = linear(its.hidden, shared)
        self.o = linear(attention, its.hidden)
        self.gate = linear(its.hidden, its.intermediate)
        self.up = linear(its.hidden, its.intermediate)
        self.down = linear(its.intermediate, its.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and the result: ``(1, hidden)``."""
        h = F.rms_norm(x, x.shape[-1:])
        x = x + self.o(self._mix(self.q(h), self.k(h), self.v(h)))
        h = F.rms_norm(x, x.shape[-1:])
        return x + self.down(F.relu(self.gate(h)).square() * self.up(h))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Needs all three, as attention does, and is one kernel."""
        its = self._its
        groups = its.heads // its.kv_heads
        q, k, v = (t.view(its.kv_heads, -1, its.head_size) for t in (q, k, v))
        return torch.addcmul(q, k.expand(-1, groups, -1), v).view(1, -1)


class Constant(nn.Module):
    """A layer that takes no time."""

    def __init__(self, in_features: int, out_features: int, device: Device) -> None:
        super().__init__()
        self._y = torch.randn(1, out_features, device=device.place, dtype=device.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._y


def _float(in_features: int, out_features: int, device: Device) -> nn.Linear:
    return nn.Linear(
        in_features, out_features, bias=False, device=device.place, dtype=device.dtype
    ).eval()


def _deployed(in_features: int, out_features: int, device: Device) -> nn.Module:
    return bitlinear.BitLinear.from_linear(_float(in_features, out_features, device)).deploy()


def measure(its: Architecture, device: Device, budget: float) -> dict[str, Record]:
    """What a token takes, in time and memory, by contestant."""
    mode = next(iter(device.modes.values()))  # on a GPU, graphs
    field, memory = [], {}
    linears = {"bitlinear": _deployed, device.baseline: _float, "glue": Constant}
    for name, linear in linears.items():
        before = _allocated(device)
        with torch.inference_mode(False), torch.no_grad():  # as models are loaded
            blocks = nn.Sequential(
                *(Block(its, partial(linear, device=device)) for _ in range(its.layers))
            )
        step = _step(blocks, torch.randn(1, its.hidden, device=device.place, dtype=device.dtype))
        memory[name] = {
            "weight_bytes": sum(t.nbytes for t in (*blocks.parameters(), *blocks.buffers())),
            "peak_bytes": _peak(device, step, before),
        }
        call, repeats = mode.arrange([step])
        field.append(timing.Contestant(name, call, repeats=repeats))
    times = timing.compare(field, budget, mode.timer)
    return {
        name: {**report.quartiles(time), "tokens_per_s": round(1 / time.median, 1), **memory[name]}
        for name, time in times.items()
    }


def _step(blocks: nn.Module, token: Tensor) -> timing.Call:
    """What makes the next token of the last one."""

    def step() -> None:
        token.copy_(F.rms_norm(blocks(token), token.shape[-1:]))

    return step


def _allocated(device: Device) -> int:
    return torch.cuda.memory_allocated() if device.place == "cuda" else 0


def _peak(device: Device, step: timing.Call, before: int) -> int | None:
    """The most memory, beyond what there was before, that the model and a token take."""
    if device.place != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def render(results: Record) -> str:
    """What was measured, for people, in Markdown."""
    header = ("model", "us per token", "p25", "p75", "tokens/s", "weights", "peak memory")
    labels = {"bitlinear": "**BitLinear**", "glue": "without linear layers"}
    rows = [
        (
            labels.get(name, f"nn.Linear {name}"),
            *(f"{its[key]:.0f}" for key in ("median_us", "p25_us", "p75_us", "tokens_per_s")),
            *(
                "" if its[key] is None else f"{its[key] / 1e6:.1f} MB"
                for key in ("weight_bytes", "peak_bytes")
            ),
        )
        for name, its in results["contestants"].items()
    ]
    table = report.markdown(header, rows, words=("model",))
    described = results["machine"]
    name = described["gpu"]["name"] if "gpu" in described else described["cpu"]
    return f"{name}; kernel: {results['kernel']}\n\n{table}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=DEVICES, default="cpu")
    add("--layers", type=parse_count, metavar="N", help=f"default: {BITNET_2B.layers}")
    add("--budget", type=parse_seconds, default=5.0, help="seconds of timing (default: 5)")
    add("--json", type=Path, metavar="PATH", help="write the results there")
    options = parser.parse_args(argv)
    device = DEVICES[options.device]
    if not device.is_available():
        parser.error(f"--device {device.name}: torch finds no GPU")
    model = replace(BITNET_2B, layers=options.layers or BITNET_2B.layers)
    with torch.inference_mode():
        times = measure(model, device, options.budget)
    results = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.name,
        "machine": machine.describe(runtime.current().hardware, device.name),
        "versions": machine.versions(),
        "kernel": contestants.chosen_kernel(device.name),
        "model": asdict(model),
        "contestants": times,
    }
    if options.json is not None:
        report.write(options.json, results)
    print(render(results))


if __name__ == "__main__":
    main()
