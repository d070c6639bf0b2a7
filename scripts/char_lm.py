"""Train a ternary language model and its float twin side by side, deploy it, and let both write.

    python -m scripts.char_lm [--out runs/char_lm] [--restart]

The text is Python's language reference, which is part of every Python (``help("topics")``). If the
training is stopped or killed, the same command resumes it from the last checkpoint. The output
directory gets ``results.json``, ``losses.png`` and ``checkpoint.pt``. Takes about five minutes on
two idle cores.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn

import bitlinear
from bitlinear import runtime
from scripts import char_training, tools
from scripts.bench import charts, machine, records, report, timing
from scripts.bench.arguments import parse_count, parse_seconds
from scripts.bench.records import Record
from scripts.char_model import CharModel, generate
from scripts.char_training import LINEAR, TERNARY, Settings, Training

with tools.importing("bench"):
    import matplotlib as mpl

DEPLOYED = "BitLinear, deployed"
PROMPT = "An object "
SAMPLE, TEMPERATURE = 300, 0.8
LOOKS: dict[str, charts.Look] = {
    LINEAR: {"color": "#222222", "marker": "s", "markersize": 5},
    TERNARY: {"color": charts.EMPHASIS, "marker": "o", "markersize": 6},
}


def deploy(training: Training) -> dict[str, CharModel]:
    """Return the trained networks by name, and the ternary one deployed."""
    models = {name: model.eval() for name, model in training.models.items()}
    return {**models, DEPLOYED: bitlinear.deploy(copy.deepcopy(models[TERNARY]))}


def measure(training: Training, models: Mapping[str, CharModel], budget: float = 10.0) -> Record:
    """Return the losses of each network, the time of a character, and a sample of its text.

    Args:
        training: The training of the networks.
        models: The networks, as :func:`deploy` returns them.
        budget: Seconds of timing.
    """
    text, context = training.text, training.settings.context
    prompt = text.encode(PROMPT)
    writers = [
        timing.Contestant(name, _writer(model, context), repeats=context)
        for name, model in models.items()
    ]
    layers = [timing.Contestant(name, _linear_layers(model)) for name, model in models.items()]
    writing = timing.compare(writers, 0.8 * budget, timing.cpu_timer)
    with torch.inference_mode():
        alone = timing.compare(layers, 0.2 * budget, timing.cpu_timer)
    networks: Record = {}
    for name, model in models.items():
        loss = char_training.validation_loss(model, text, context)
        sample = generate(model, prompt, SAMPLE, TEMPERATURE)
        networks[name] = {
            "validation_loss": loss,
            "bits_per_character": loss / math.log(2),
            "bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
            "character": records.quartiles(writing[name]),
            "linear_layers": records.quartiles(alone[name]),
            "sample": PROMPT + text.decode(sample),
        }
    for name, curve in training.curves.items():
        networks[name]["step_s"] = statistics.median(curve["seconds"])
        networks[name]["losses"] = {part: curve[part] for part in ("train", "validation")}
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(runtime.current().hardware, "cpu"),
        "versions": machine.versions(),
        "kernel": runtime.current().kernel,
        "threads": torch.get_num_threads(),
        "settings": asdict(training.settings),
        "characters": {
            "different": len(text.characters),
            "train": len(text.train),
            "validation": len(text.validation),
        },
        "networks": networks,
    }


def _writer(model: CharModel, count: int) -> timing.Call:
    """Return a call that writes ``count`` characters, one after the other."""
    first = torch.zeros(1, dtype=torch.int64)
    return lambda: generate(model, first, count)


def _linear_layers(model: nn.Module) -> timing.Call:
    """Return a call of all linear layers for one character, without the operations between them."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    inputs = [torch.randn(1, 1, layer.in_features) for layer in layers]
    return lambda: [layer(x) for layer, x in zip(layers, inputs)]


@mpl.rc_context(charts.STYLE)
def draw(results: Record, path: Path, dpi: int | None = None) -> None:
    """Draw the losses of both networks, of every batch and of the validation text, to ``path``."""
    settings, versions = results["settings"], results["versions"]
    lines = (
        (machine.display_name(results["machine"]), report.plural(results["threads"], "thread")),
        (
            *(f"{name} {versions[name]}" for name in ("bitlinear", "torch", "python")),
            results["time"][:10],
        ),
    )
    figure, axes = charts.canvas(
        f"Learning Python's language reference, {settings['depth']} blocks of {settings['width']}",
        "\n".join("   ·   ".join(parts) for parts in lines),
        size=(9.5, 5.4),
        left=0.7,
        right=1.1,
    )
    axes.set_title(
        f"nats per character; thin: each of {settings['steps']} batches, thick: validation text",
        loc="left",
        fontsize=11,
    )
    axes.set_xlabel("step")
    axes.set_yscale("log")  # shows the fast fall at first, and the slow one later
    ends = []
    for name, look in LOOKS.items():
        losses = results["networks"][name]["losses"]
        steps = range(1, 1 + len(losses["train"]))
        axes.plot(steps, losses["train"], color=look["color"], linewidth=0.7, alpha=0.5)
        ends.append(charts.line(axes, dict(losses["validation"]), {**look, "linewidth": 2}, name))
    charts.plain_y_ticks(axes)
    charts.label_ends(axes, ends)
    figure.savefig(path, dpi=dpi)


def table(results: Record) -> str:
    """Return the results as a table, in Markdown."""
    header = (
        "network",
        "validation, nats",
        "bits per character",
        "steps/s",
        "characters/s",
        "us for one",
        "linear layers alone",
        "parameters",
    )
    rows = [
        (
            name,
            f"{network['validation_loss']:.4f}",
            f"{network['bits_per_character']:.3f}",
            f"{1 / network['step_s']:.2f}" if "step_s" in network else "",
            f"{1e6 / network['character']['median_us']:.0f}",
            *(
                report.marked(f"{network[part]['median_us']:.0f}", network[part])
                for part in ("character", "linear_layers")
            ),
            f"{network['bytes'] / 1e6:.2f} MB",
        )
        for name, network in results["networks"].items()
    ]
    return report.markdown(header, rows, words=("network",))


def same_bits(results: Record) -> bool:
    """Whether the deployed network computes the same bits as before."""
    trained, deployed = (results["networks"][name] for name in (TERNARY, DEPLOYED))
    return all(trained[key] == deployed[key] for key in ("validation_loss", "sample"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, metavar="DIRECTORY", default=Path("runs/char_lm"))
    add("--restart", action="store_true", help="do not resume from the checkpoint")
    add("--save-every", type=parse_count, metavar="STEPS", default=50, help="default: 50")
    add("--budget", type=parse_seconds, default=10.0, help="seconds of timing (default: 10)")
    settings = parser.add_argument_group("settings (see char_training.Settings)")
    for field in fields(Settings):
        convert = float if isinstance(field.default, float) else int
        settings.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=convert,
            default=field.default,
            help=f"default: {field.default}",
        )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    options = parser.parse_args(argv)
    checkpoint = options.out / "checkpoint.pt"
    try:
        settings = Settings(
            **{field.name: getattr(options, field.name) for field in fields(Settings)}
        )
    except ValueError as error:
        parser.error(str(error))
    if options.restart:
        checkpoint.unlink(missing_ok=True)
    text = char_training.load_text()
    try:
        training = char_training.train(settings, text, checkpoint, options.save_every)
    except char_training.UnusableCheckpoint as error:
        parser.error(str(error))
    except char_training.Stopped as stopped:
        sys.exit(str(stopped))
    results = measure(training, deploy(training), options.budget)
    records.write(options.out / "results.json", results)
    draw(results, options.out / "losses.png")
    for name in (LINEAR, DEPLOYED):
        print(f"{name} writes:\n\n{results['networks'][name]['sample']}\n")
    print(table(results))
    same = same_bits(results)
    print(f"the deployed network computes the same bits: {'yes' if same else 'NO'}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
