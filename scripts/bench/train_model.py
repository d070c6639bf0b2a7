"""Time training steps of a whole decoder, compiled: BitLinear beside nn.Linear.

    python -m scripts.bench.train_model [--models BLOCKSxWIDTH ...] [--batch B] [--length T]

A step is a forward pass, a backward pass and fused AdamW, in bf16 by autocast over fp32 weights, as
models are trained on a GPU. The decoder is Llama's: RMSNorm, rotary positions, attention with heads
of 64, a gated feed-forward network 8/3 as wide. ``lm_head`` stays an ``nn.Linear``. The third
contestant is the expression by which most implementations train (see
:mod:`scripts.bench.train_step`), which the compiler fuses into the norms.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitlinear
from scripts.bench import cuda_timing, report, timing
from scripts.bench.arguments import Shape, parse_count, parse_seconds, parse_shape
from scripts.bench.devices import DEVICES, Device, choose_device
from scripts.bench.train_step import Expression, compare, print_rows

VOCABULARY = 32768
HEAD_SIZE = 64


class Block(nn.Module):
    """Attention and a gated feed-forward network, with an RMSNorm in front of each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 128) * 128
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp_norm = nn.RMSNorm(width, eps=1e-5)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape

        def split_heads(y: Tensor) -> Tensor:
            return y.view(batch, length, -1, HEAD_SIZE).transpose(1, 2)

        values = self.attention_norm(x)
        q, k, v = (split_heads(layer(values)) for layer in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, width))
        values = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(values)) * self.up(values))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by angles that grow with the position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Decoder(nn.Module):
    """A decoder of ``blocks`` blocks."""

    def __init__(self, blocks: int, width: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        frequencies = 10_000 ** -(torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
        angles = torch.arange(length)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of predicting ``targets``; both have shape ``(batch, length)``."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def with_expression(model: nn.Module) -> nn.Module:
    """Replace the layers that ``convert`` replaces by :class:`Expression`."""
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                expression = Expression(layer.in_features, layer.out_features, bias=False)
                expression.weight = layer.weight
                setattr(block, name, expression)
    return model


CONTESTANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nn.Linear": lambda model: model,
    "BitLinear": bitlinear.convert,
    "expression": with_expression,
}


def training_step(model: nn.Module, batch: int, length: int, device: str) -> timing.Call:
    """Compile a model, and return a call that trains it by one step."""
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, targets = torch.randint(VOCABULARY, (2, batch, length), device=device)
    model.compile()

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    model: Shape, batch: int, length: int, names: Sequence[str], budget: float, device: Device
) -> list[dict[str, str]]:
    """Return a row for each contestant: its tokens per second."""
    blocks, width = model
    calls = {}
    for name in names:
        torch.manual_seed(0)
        decoder = CONTESTANTS[name](Decoder(blocks, width, length))
        calls[name] = training_step(decoder, batch, length, device.torch_device)
    timer = cuda_timing.stream_timer if device.torch_device == "cuda" else timing.cpu_timer
    times = compare(calls, budget, timer)
    first = times[names[0]]
    rows = []
    for name, ours in times.items():
        rate = f"{batch * length / ours['median_us'] * 1e3:.1f}"
        ratio = f"{first['median_us'] / ours['median_us']:.3f}"
        rows.append(
            {
                "model": f"{blocks} x {width}",
                "layers": name,
                "1000 tokens / s": report.marked(rate, ours),
                f"of {names[0]}": report.marked(ratio, ours, first),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    models = [(12, 768), (8, 2048)]
    add("--models", nargs="+", type=parse_shape, metavar="BLOCKSxWIDTH", default=models)
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    add("--batch", type=parse_count, default=16, help="sequences of a step (default: 16)")
    add("--length", type=parse_count, default=1024, help="their tokens (default: 1024)")
    add("--budget", type=parse_seconds, default=20.0, help="seconds for each model (default: 20)")
    add("--device", choices=DEVICES, default="cuda")
    options = parser.parse_args(argv)
    device = choose_device(parser, options.device)
    rows = [
        row
        for model in options.models
        for row in measure(
            *(model, options.batch, options.length, options.contestants, options.budget, device)
        )
    ]
    print_rows(rows, device, f"{options.batch} x {options.length} tokens", ("model", "layers"))


if __name__ == "__main__":
    main()
