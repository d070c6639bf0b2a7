"""Time the linear layers of a whole model, BitNet b1.58 2B, one token after the other.

    python -m scripts.bench.decode --device cuda [--json scripts/bench/results/NAME.json]

In ``python -m scripts.bench`` no call needs the result of another; here each call does, as in a
model. The operations between the linear layers are the fewest that keep the layers in this order.
They are the same for all contestants, and they are timed alone, too. There is no attention to
earlier tokens and no vocabulary. Weights are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitlinear
from bitlinear import runtime
from scripts.bench import contestants, machine, records, report, timing
from scripts.bench.arguments import parse_count, parse_output_path, parse_seconds
from scripts.bench.devices import DEVICES, Device, choose_device
from scripts.bench.records import Record


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

# From (in_features, out_features) to a layer.
MakeLinear = Callable[[int, int], nn.Module]


class Block(nn.Module):
    """A layer of the decoder."""

    def __init__(self, sizes: Architecture, linear: MakeLinear) -> None:
        super().__init__()
        self._sizes = sizes
        hidden, intermediate = sizes.hidden, sizes.intermediate
        attention, shared = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
        self.q = linear(hidden, attention)
        self.k = linear(hidden, shared)
        self.v = linear(hidden, shared)
        self.o = linear(attention, hidden)
        self.gate = linear(hidden, intermediate)
        self.up = linear(hidden, intermediate)
        self.down = linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; it and ``x`` have the shape ``(1, hidden)``."""
        h = F.rms_norm(x, x.shape[-1:])
        x = x + self.o(self._mix(self.q(h), self.k(h), self.v(h)))
        h = F.rms_norm(x, x.shape[-1:])
        return x + self.down(F.relu(self.gate(h)).square() * self.up(h))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Combine all three, in place of attention, with one kernel."""
        sizes = self._sizes
        groups = sizes.heads // sizes.kv_heads
        q, k, v = (t.view(sizes.kv_heads, -1, sizes.head_size) for t in (q, k, v))
        return torch.addcmul(q, k.expand(-1, groups, -1), v).view(1, -1)


class Constant(nn.Module):
    """A layer whose output is a constant, so that it takes no time."""

    def __init__(self, in_features: int, out_features: int, device: Device) -> None:
        super().__init__()
        self._y = torch.randn(1, out_features, device=device.torch_device, dtype=device.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._y


def _float(in_features: int, out_features: int, device: Device) -> nn.Linear:
    return nn.Linear(
        in_features, out_features, bias=False, device=device.torch_device, dtype=device.dtype
    ).eval()


def _deployed(in_features: int, out_features: int, device: Device) -> nn.Module:
    return bitlinear.BitLinear.from_linear(_float(in_features, out_features, device)).deploy()


def measure(sizes: Architecture, device: Device, budget: float) -> dict[str, Record]:
    """Return the time and the memory of a token, by contestant."""
    mode = next(iter(device.modes.values()))  # on a GPU, graphs
    field, memory = [], {}
    linears = {"bitlinear": _deployed, device.baseline: _float, "glue": Constant}
    for name, linear in linears.items():
        before = _allocated(device)
        with torch.inference_mode(False), torch.no_grad():  # as models are loaded
            blocks = nn.Sequential(
                *(Block(sizes, partial(linear, device=device)) for _ in range(sizes.layers))
            )
        token = torch.randn(1, sizes.hidden, device=device.torch_device, dtype=device.dtype)
        step = _step(blocks, token)
        memory[name] = {
            "weight_bytes": sum(t.nbytes for t in (*blocks.parameters(), *blocks.buffers())),
            "peak_bytes": _peak_memory(device, step, before),
        }
        call, repeats = mode.arrange([step])
        field.append(timing.Contestant(name, call, repeats=repeats))
    times = timing.compare(field, budget, mode.timer)
    return {
        name: {**records.quartiles(time), "tokens_per_s": round(1 / time.median, 1), **memory[name]}
        for name, time in times.items()
    }


def _step(blocks: nn.Module, token: Tensor) -> timing.Call:
    """Return the call that makes the next token of the last one, in place."""

    def step() -> None:
        token.copy_(F.rms_norm(blocks(token), token.shape[-1:]))

    return step


def _allocated(device: Device) -> int:
    return torch.cuda.memory_allocated() if device.torch_device == "cuda" else 0


def _peak_memory(device: Device, step: timing.Call, before: int) -> int | None:
    """Return the peak memory of the model and a token; ``before`` is subtracted. None on a CPU."""
    if device.torch_device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def render(results: Record) -> str:
    """Return the results as a table, in Markdown."""
    header = ("model", "us per token", "p25", "p75", "tokens/s", "weights", "peak memory")
    labels = {"bitlinear": "**BitLinear**", "glue": "without linear layers"}
    rows = [
        (
            labels.get(name, f"nn.Linear {name}"),
            report.marked(f"{figures['median_us']:.0f}", figures),
            *(f"{figures[key]:.0f}" for key in ("p25_us", "p75_us", "tokens_per_s")),
            *(
                "" if figures[key] is None else f"{figures[key] / 1e6:.1f} MB"
                for key in ("weight_bytes", "peak_bytes")
            ),
        )
        for name, figures in results["contestants"].items()
    ]
    table = report.markdown(header, rows, words=("model",))
    name = machine.display_name(results["machine"])
    return f"{name}; kernel: {results['kernel']}\n\n{table}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=DEVICES, default="cpu")
    add("--layers", type=parse_count, metavar="N", help=f"default: {BITNET_2B.layers}")
    add("--budget", type=parse_seconds, default=5.0, help="seconds of timing (default: 5)")
    add("--json", type=parse_output_path, metavar="PATH", help="write the results there")
    options = parser.parse_args(argv)
    device = choose_device(parser, options.device)
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
        records.write(options.json, results)
    print(render(results))


if __name__ == "__main__":
    main()
