"""Load a small checkpoint of each format that ternary models come in, and check the weights.

    python -m scripts.bring_your_model [--only NAME ...]

Nothing is downloaded: `scripts/sample_checkpoints.py` writes the files, with the libraries that
write the real ones (transformers, safetensors, gguf). The functions below have the lines that load
each kind of model. The last one trains a LoRA adapter of PEFT on a loaded model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bitlinear
from bitlinear import BitLinear
from scripts import sample_checkpoints as samples
from scripts import tools
from scripts.bench import report

with tools.importing("dev"):
    import peft
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitlinear.integrations import checkpoints, gguf
    from bitlinear.integrations.transformers import convert


def load_bitnet(path: Path) -> Any:
    return convert(AutoModelForCausalLM.from_pretrained(path))


def load_norms_inside(path: Path) -> Any:
    config = AutoConfig.from_pretrained(path)
    config.quantization_config = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "use_rms_norm": True,
    }
    names = {"_proj.norm.weight": "_proj.rms_norm.weight"}
    return convert(AutoModelForCausalLM.from_pretrained(path, config=config, key_mapping=names))


def load_scales_of_rows(path: Path) -> Any:
    model = empty_model(path)
    return checkpoints.load(path, model, "transformers-bitlinear")


def load_tetra(path: Path) -> Any:
    model = empty_model(path)  # with nn.Linear in place of the project's layers
    return checkpoints.load(path / "tetra.pth", model, "tetra-vpr")


def load_dense(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path)
    return bitlinear.pack(model, act_bits=16, exclude=("lm_head",))


def load_paretoq(path: Path) -> Any:
    state = load_file(path / "model.safetensors")
    for name in [name for name in state if name.endswith(".weight_clip_val")]:
        alpha = state.pop(name).clamp_min(1e-5)
        weight = name.replace("weight_clip_val", "weight")
        t = (1.5 * (state[weight] / alpha).clamp(-0.99, 0.99)).round()
        state[weight] = t * (alpha / 1.5)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    model.load_state_dict(state)
    return bitlinear.pack(model, act_bits=16, exclude=("lm_head",))


def load_own_class(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path)
    use_own_class(model)  # as models do whose code comes with their files
    return convert(model, weight_quantizers={OwnLinear: weight_quant})


def load_gguf(path: Path) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    return gguf.load(path / "model.gguf", model, i2_s_layout="x86")  # x86: only I2_S needs it


def empty_model(path: Path) -> Any:
    """A model of this config with ordinary linear layers."""
    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return AutoModelForCausalLM.from_config(config)


def weight_quant(weight: Tensor) -> Tensor:
    """How the code of BitNet models quantises a weight."""
    scale = 1.0 / weight.abs().mean().clamp_(min=1e-5)
    return (weight * scale).round().clamp_(-1, 1) / scale


class OwnLinear(nn.Linear):
    """A layer as it comes with the code of BitNet models: a norm, then quantised operands."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.norm = nn.RMSNorm(in_features, eps=1e-8)

    def forward(self, input: Tensor) -> Tensor:
        x = self.norm(input)
        scale = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        x = (x * scale).round().clamp(-128, 127) / scale
        return nn.functional.linear(x, weight_quant(self.weight))


def use_own_class(model: nn.Module) -> None:
    """Put the layers of the model's own class in place of its projections."""
    for name, linear in samples.projections(model).items():
        own = OwnLinear(linear.in_features, linear.out_features)
        own.weight = linear.weight
        model.set_submodule(name, own)


class Source(NamedTuple):
    """A kind of checkpoint.

    Attributes:
        models: The models that come in it.
        write: Writes a small one.
        load: Loads it.
        per_row: Whether each output feature has a scale.
        keeps_scales: Whether the file holds the scales; otherwise they are computed from the float
            weights.
    """

    models: str
    write: Callable[[Any, Path], None]
    load: Callable[[Path], Any]
    per_row: bool = False
    keeps_scales: bool = True


SOURCES = {
    "transformers": Source(
        "BitNet-b1.58-2B-4T, Falcon-E, Falcon3-1.58bit, Llama3-8B-1.58",
        samples.write_bitnet,
        load_bitnet,
    ),
    "norms-inside": Source(
        "BitNet-embedding", samples.write_masters, load_norms_inside, keeps_scales=False
    ),
    "scales-of-rows": Source(
        "packed by transformers, a scale per output feature",
        samples.write_bitnet,
        load_scales_of_rows,
        per_row=True,
    ),
    "own-class": Source(
        "1bitLLM, MatMul-free LM, BitVLA: layers of their own code",
        samples.write,
        load_own_class,
        keeps_scales=False,
    ),
    "dense": Source("TriLM unpacked, BitCPM4, fake-quantised", samples.write_dense, load_dense),
    "paretoq": Source("ParetoQ, 1.58 bits", samples.write_paretoq, load_paretoq, per_row=True),
    "tetra-vpr": Source("TeTRA-VPR", samples.write_tetra, load_tetra),
    "gguf-tq1": Source(
        "GGUF of llama.cpp, TQ1_0", lambda m, p: samples.write_gguf(m, p, "TQ1_0"), load_gguf
    ),
    "gguf-tq2": Source("GGUF of llama.cpp, TQ2_0", samples.write_gguf, load_gguf),
    "gguf-i2s": Source(
        "GGUF of bitnet.cpp, I2_S", lambda m, p: samples.write_gguf(m, p, "I2_S"), load_gguf
    ),
}


def bring(source: Source, folder: Path) -> tuple[Any, dict[str, str]]:
    """Write a checkpoint, load it and compare its weights; return the model and a row of a table.

    Raises:
        AssertionError: A layer has other ternary weights, or another scale, than were written.
    """
    original = samples.ternary_llama(per_row=source.per_row)
    wanted = {name: m.weight.detach().clone() for name, m in samples.projections(original).items()}
    source.write(original, folder)
    model = source.load(folder).eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}
    assert layers.keys() == wanted.keys(), layers.keys()
    for name, layer in layers.items():
        weight = layer.dequantize()
        assert torch.equal(weight.sign(), wanted[name].sign()), name
        assert not source.keeps_scales or torch.equal(weight, wanted[name].float()), name
    packed = sum(layer.w_packed.nbytes + layer.w_scale.nbytes for layer in layers.values())
    dense = sum(weight.numel() * 2 for weight in wanted.values())
    return model, {
        "models": source.models,
        "layers": f"{len(layers)} {layers[next(iter(layers))].quant_type}",
        "bytes, of bf16": f"{packed / dense:.3f}",
        "weights": "equal" if source.keeps_scales else "equal, scales computed",
    }


def train_adapter(model: Any, steps: int = 30) -> list[float]:
    """Train a LoRA adapter beside the packed weights; return the losses."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=r".*_proj", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    tokens = torch.randint(0, samples.CONFIG["vocab_size"], (4, 32))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = adapted(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SOURCES, default=[*SOURCES], metavar="NAME")
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            path = Path(folder, name)
            path.mkdir()
            model, row = bring(SOURCES[name], path)
            rows.append((name, *row.values()))
        print(report.markdown(("name", *row), rows, words=("name", *row)))
        losses = train_adapter(model)
        print(f"\nLoRA on the last model: loss {losses[0]:.2f} -> {losses[-1]:.2f}")


if __name__ == "__main__":
    main()
