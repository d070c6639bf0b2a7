"""Time whole models: prefill and decode of a BitNet model, in every form that can run here.

    python -m scripts.bench.generate [--shape 2b] [--json scripts/bench/results/NAME.json]

Contestants are the model after ``convert`` (one for each of its settings), transformers' own BitNet
layers, ``nn.Linear`` in bf16, and llama.cpp on a GGUF file of the same shape. All have random
weights, run on the same number of threads, and take turns in one process.

**Prefill**: the time from the call of ``model.generate`` to the first new token. **Decode**: the
time between two tokens that ``model.generate`` hands over, the choice of the token included. The
first token of a call does not count, as it contains the set-up of the call. The keys and values in
the cache of a model of torch are random. **Captured decode** (NVIDIA GPU only): the same by
``bitlinear.integrations.transformers.generate``, which replays a CUDA graph, from the token on in
whose step the graph was captured. Loading, tokenizing and sampling are not timed: the next token is
the most likely one. Memory is measured in a process that only loads one contestant and generates
2 tokens after 128.

llama.cpp is timed through the package llama-cpp-python, if it is installed (``pip install
llama-cpp-python`` compiles it for minutes, for the instructions of this machine). Its settings are
the defaults, except for the threads and the size of the context. Its own quantiser makes the head
of the file. It does not tell the parts of a token.

A contestant whose call would take longer than ``--limit`` is left out of a cell, and the report
says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from bitlinear import runtime
from scripts.bench import contestants as layers
from scripts.bench import records
from scripts.bench.arguments import parse_count, parse_output_path, parse_seconds
from scripts.bench.devices import DEVICES, choose_device
from scripts.bench.generation import measure, models, report
from scripts.bench.generation.contestants import KINDS
from scripts.bench.generation.measure import Setup

# Seconds of a cell, by device.
BUDGETS = {"cpu": 20.0, "cuda": 3.0}
# Exit codes.
INTERRUPTED, NOTHING_RAN = 130, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    setup = _parse(argv)
    results = measure.describe(setup)
    code = 0
    try:
        measure.measure(setup, results)
        results["complete"] = True
    except KeyboardInterrupt:
        code = INTERRUPTED
    if setup.json is not None:
        records.write(setup.json, results)
    print(report.render(results))
    if results["complete"] and not any(cell["contestants"] for cell in results["cells"]):
        code = NOTHING_RAN
    return code


def _parse(argv: Sequence[str] | None) -> Setup:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.generate",
        description=__doc__.splitlines()[0],
        epilog=f"{__doc__.split(chr(10), 4)[4]}\n{report.EXPLANATION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", choices=models.SHAPES, default="2b", help="default: 2b, BitNet-b1.58-2B-4T")
    add("--layers", type=parse_count, metavar="N", help="another number of layers")
    add("--contestants", nargs="+", choices=KINDS, metavar="NAME", help=f"of {', '.join(KINDS)}")
    for name, nargs, default, meaning in (
        ("--prefill", "*", [128, 1024], "lengths of prompts"),
        ("--depths", "*", [128, 2048], "numbers of tokens in the cache when a decode begins"),
        ("--batches", "+", [1, 4, 16], "numbers of sequences"),
    ):
        text = f"{meaning} (default: {' '.join(map(str, default))})"
        add(name, nargs=nargs, type=parse_count, metavar="N", default=default, help=text)
    add("--device", choices=DEVICES, default="cpu")
    add("--threads", type=parse_count, default=torch.get_num_threads(), help="default: torch's")
    budgets = ", ".join(f"{budget:g} on {name}" for name, budget in BUDGETS.items())
    add("--budget", type=parse_seconds, help=f"seconds of calls for each cell (default: {budgets})")
    add(
        "--limit",
        type=parse_seconds,
        default=60.0,
        help="leave a contestant out of a cell if one call takes longer (default: 60 seconds)",
    )
    add("--no-memory", action="store_true", help="do not measure memory")
    add("--json", type=parse_output_path, metavar="PATH", help="write the results there")
    options = parser.parse_args(argv)
    device = choose_device(parser, options.device)
    if layers.chosen_kernel(device.name) is None:
        parser.error(f"there is no compiled kernel: {runtime.current().problem}")
    positions = max([*options.prefill, *options.depths], default=0)
    if not 0 < positions <= models.MAX_LENGTH:
        parser.error(
            f"--prefill, --depths: give at least one length, and none over {models.MAX_LENGTH}"
        )
    return Setup(
        shape=options.shape,
        layers=options.layers,
        device=device,
        threads=options.threads,
        contestants=options.contestants or [n for n, kind in KINDS.items() if kind.by_default],
        prefill=options.prefill,
        depths=options.depths,
        batches=options.batches,
        budget=options.budget or BUDGETS[device.name],
        limit=options.limit,
        with_memory=not options.no_memory,
        json=options.json,
    )


if __name__ == "__main__":
    raise SystemExit(main())
