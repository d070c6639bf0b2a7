"""Draw pictures of the results of the benchmark.

    python -m scripts.bench.plot scripts/bench/results/NAME.json [--output-dir DIRECTORY]

Writes NAME-latency.png and NAME-throughput.png (one shape, by batch size), NAME-speedup.png (all
shapes), NAME-memory.png and, with results on several numbers of threads, NAME-threads.png; beside
the results unless --output-dir names another directory. Pictures of a GPU show one of its ways of
timing: cold weights if they were timed. Of the results of ``python -m scripts.bench.generate`` it
writes NAME-models.png alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from scripts import tools
from scripts.bench import charts, pictures, records, report
from scripts.bench.arguments import parse_count, parse_shape
from scripts.bench.generation import picture
from scripts.bench.pictures import layer_name, shape_of, weight_count
from scripts.bench.records import Record

with tools.importing("bench"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

PICTURES = ("latency", "throughput", "speedup", "memory", "threads", "models")


Drawings = dict[str, Callable[[], Figure]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("results", type=Path, help="a JSON file of a benchmark")
    add("--output-dir", type=Path, metavar="DIRECTORY", help="default: beside the results")
    add("--pictures", nargs="+", choices=PICTURES, default=PICTURES, help="default: all")
    add("--shape", type=parse_shape, metavar="NxK", help="default: 4096x4096, or else the largest")
    add("--threads", type=parse_count, metavar="T", help="default: the largest number measured")
    add("--mode", choices=pictures.MODES, help="of timing on a GPU; default: the first one")
    options = parser.parse_args(argv)
    try:
        results = records.read(options.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    of_models = results.get("benchmark") == "generate"
    draw = _of_models(results) if of_models else _of_layers(parser, options, results)
    directory = options.output_dir or options.results.parent
    directory.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(charts.STYLE):
        for name in PICTURES:
            if name in options.pictures and name in draw:
                path = directory / f"{options.results.stem}-{name}.png"
                draw[name]().savefig(path)
                print(path)


def _of_models(results: Record) -> Drawings:
    return {"models": lambda: picture.draw(results)} if results["cells"] else {}


def _of_layers(
    parser: argparse.ArgumentParser, options: argparse.Namespace, results: Record
) -> Drawings:
    mode = options.mode or results["modes"][0]
    if mode not in results["modes"]:
        parser.error(f"--mode: {options.results} has no results of {mode}")
    results = records.of_mode(results, mode)
    chosen = results["chosen_kernel"]
    cells = [cell for cell in results["cells"] if chosen in cell["contestants"]]
    if not cells:
        parser.error(f"{options.results} has no times of {chosen}, the chosen kernel")
    threads = options.threads or max(cell["threads"] for cell in cells)
    shapes = {shape_of(cell) for cell in cells if cell["threads"] == threads}
    if not shapes:
        count = report.plural(threads, "thread")
        parser.error(f"--threads: {options.results} has no results on {count}")
    usual = (4096, 4096) if (4096, 4096) in shapes else max(shapes, key=weight_count)
    shape = options.shape or usual
    if shape not in shapes:
        parser.error(f"--shape: {options.results} has no {layer_name(shape)} layer")

    draw: Drawings = {
        "latency": lambda: pictures.latency(results, shape, threads),
        "throughput": lambda: pictures.throughput(results, shape, threads),
        "speedup": lambda: pictures.speedup(results, threads),
        "memory": lambda: pictures.memory(results),
    }
    if len({cell["threads"] for cell in cells if shape_of(cell) == shape}) > 1:
        draw["threads"] = lambda: pictures.scaling(results, shape)
    return draw


if __name__ == "__main__":
    main()
