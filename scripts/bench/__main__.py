"""Time a deployed BitLinear, on each kernel that this machine can run, beside its alternatives.

    python -m scripts.bench [--grid floor] [--json scripts/bench/results/NAME.json] [--check]
    python -m scripts.bench --device cuda [...]

The table goes to standard output as Markdown; the JSON file has the same figures, the machine and
the versions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from bitlinear import runtime
from scripts.bench import benchmark, contestants, records, report
from scripts.bench.arguments import (
    Shape,
    parse_count,
    parse_output_path,
    parse_seconds,
    parse_shape,
)
from scripts.bench.benchmark import Setup
from scripts.bench.contestants import OTHERS
from scripts.bench.devices import DEVICES, choose_device

GRIDS: dict[str, dict[str, tuple[list[Shape], list[int]]]] = {
    "cpu": {
        "quick": ([(1024, 1024), (4096, 4096)], [1, 8, 32, 256]),
        # No complete layer may be faster than a deployed one in any of these cells.
        "floor": (
            [
                (64, 64), (512, 256), (256, 512), (1024, 1024), (2560, 2560), (4096, 4096),
                (2560, 6912), (6912, 2560), (14336, 4096),
            ],
            [1 << exponent for exponent in range(11)],
        ),
    },
    "cuda": {
        "quick": ([(2560, 6912), (8192, 8192)], [1, 16, 64, 1024]),
        "floor": (
            [
                (64, 64), (512, 256), (256, 512), (1024, 1024), (2560, 2560), (4096, 4096),
                (2560, 6912), (6912, 2560), (13824, 2560), (14336, 4096), (8192, 8192),
                (28672, 8192),
            ],
            [*(1 << exponent for exponent in range(11)), 4096],
        ),
    },
}  # fmt: skip

FAILED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    setup = _parse(argv)
    results = benchmark.describe(setup)
    code = 0
    try:
        benchmark.measure(setup, results)
        results["complete"] = True
    except KeyboardInterrupt:
        code = INTERRUPTED
    if setup.json is not None:
        records.write(setup.json, results)
    print(report.render(results))
    if setup.check and code == 0:
        verdict, passed = report.check(results)
        print(f"\n{verdict}")
        code = 0 if passed else FAILED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench",
        description=__doc__.splitlines()[0],
        epilog=f"{report.EXPLANATION}\n{report.GPU_EXPLANATION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ["bitlinear", *OTHERS]
    budgets = ", ".join(f"{device.budget:g} on {name}" for name, device in DEVICES.items())
    add = parser.add_argument
    add("--grid", choices=GRIDS["cpu"], default="quick", help="which cells (default: quick)")
    add(
        "--shapes",
        nargs="+",
        type=parse_shape,
        metavar="NxK",
        help="outputs x inputs, instead of the grid's",
    )
    add("--tokens", nargs="+", type=parse_count, metavar="M", help="instead of the grid's")
    add("--threads", nargs="+", type=parse_count, metavar="T", help="default: those of torch")
    add("--modes", nargs="+", metavar="MODE", help="ways of timing on a GPU (default: all)")
    add(
        "--budget",
        type=parse_seconds,
        help=f"seconds of calls for each cell (default: {budgets}); every contestant has at least "
        "one call, and --check measures a lost cell again, for two and four times as long",
    )
    add("--device", choices=DEVICES, default="cpu")
    add("--contestants", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--kernels", nargs="+", metavar="NAME", help="default: all that this machine can run")
    add("--json", type=parse_output_path, metavar="PATH", help="write the results there")
    add(
        "--check",
        action="store_true",
        help="exit with 1 if a complete layer wins a cell; bare products are counted apart",
    )
    return parser


def _parse(argv: Sequence[str] | None) -> Setup:
    parser = _parser()
    options = parser.parse_args(argv)
    device = choose_device(parser, options.device)
    modes = options.modes or list(device.modes)
    if not set(modes) <= set(device.modes):
        parser.error(f"--modes: on {device.name} there are {', '.join(device.modes) or 'none'}")

    available = [name for name, kind in OTHERS.items() if device.name in kind.devices]
    by_default = [name for name in available if OTHERS[name].by_default]
    wanted = options.contestants or ["bitlinear", *by_default]
    if not set(wanted) <= {"bitlinear", *available}:
        parser.error(f"--contestants: on {device.name} there are bitlinear, {', '.join(available)}")
    usable = contestants.available_kernels(device.name)
    kernels = (options.kernels or usable) if "bitlinear" in wanted else []
    if not set(kernels) <= set(usable):
        parser.error(f"--kernels: on this machine there are {', '.join(usable)}")
    chosen = contestants.chosen_kernel(device.name)
    if chosen is None:
        parser.error(f"there is no compiled kernel: {runtime.current().problem}")
    shapes, tokens = GRIDS[device.name][options.grid]
    setup = Setup(
        shapes=options.shapes or shapes,
        tokens=options.tokens or tokens,
        threads=options.threads or [torch.get_num_threads()],
        modes=modes,
        budget=options.budget or device.budget,
        device=device,
        kernels=kernels,
        chosen=chosen,
        others=[name for name in available if name in wanted],
        json=options.json,
        check=options.check,
    )
    if setup.check and not (chosen in kernels and setup.layers and setup.checked_modes):
        parser.error(f"--check compares {chosen} with the complete layers: leave them in")
    return setup


if __name__ == "__main__":
    raise SystemExit(main())
