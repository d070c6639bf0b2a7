"""``python -m bitlinear.doctor``: which kernel runs here, why not a better one, and how to fix it.

It renders the report of the runtime and runs the operator once. It decides nothing itself.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from .report import BROKEN, FALLBACK, OK, Report, redact
from .runtime import artifacts, current, parallel_threads
from .runtime.hardware import detect
from .runtime.installation import foreign_distribution

__all__ = ["BROKEN", "FALLBACK", "OK", "Report", "main", "report"]


def report(verbose: bool = False) -> Report:
    """Examine this process; a notebook shows the result as a table."""
    runtime = current()
    devices = ("cpu", *(f"cuda:{number}" for number in runtime.cuda_devices))
    return Report(
        runtime=runtime,
        hardware=detect(runtime.cache.path, everything=True),
        operator="; ".join(filter(None, map(_run_operator, devices))),
        threads=parallel_threads(),
        openmp=_openmp_runtimes(),
        devices=devices,
        foreign=foreign_distribution(),
        verbose=verbose,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bitlinear.doctor",
        description="Shows which kernel bitlinear runs on this machine, and why not another.",
        epilog="Exit code: 0 fine, 1 works but on a fallback, 2 broken.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--verbose", action="store_true", help="add build logs and the environment")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--rebuild", action="store_true", help="delete all compiled libraries, then compile"
    )
    action.add_argument(
        "--clean", action="store_true", help="delete all compiled libraries, and stop"
    )
    action.add_argument("--no-build", action="store_true", help="compile nothing")
    options = parser.parse_args(arguments)
    # runtime/settings.py keeps the import from building under --no-build, --clean and --rebuild.
    if options.clean or options.rebuild:
        if current().cache.override_problem:  # the import has said why
            print("nothing deleted: that is not the directory asked for", file=sys.stderr)
            return BROKEN
        roots = current().cache.readable
        count = sum(map(artifacts.clean, roots))
        if options.clean:
            where = redact(", ".join(map(str, roots))) or "no cache directory"
            print(json.dumps({"deleted": count}) if options.json else f"{count} deleted: {where}")
            return OK
        rest = [f"--{name}" for name in ("json", "verbose") if getattr(options, name)]
        # A process cannot load the operator twice, so a new process examines the new one.
        return subprocess.call([sys.executable, "-m", "bitlinear.doctor", *rest])
    found = report(options.verbose)
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack a letter of a path
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(json.dumps(found.to_json(), indent=2) if options.json else found, flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return found.exit_code


# --- Examination ---------------------------------------------------------------------------------


def _run_operator(device: str = "cpu") -> str:
    """Compare the operator with the reference implementation; return the difference, if any."""
    from . import ops

    generator = torch.Generator().manual_seed(0)
    M, N, K = 3, 37, 261
    x = torch.randn(M, K, generator=generator)
    codes = torch.randint(0, 3, (N, (K + 3) // 4, 4), generator=generator)
    codes[:, -1, K % 4 :] = 1  # the slots past K
    w_packed = (codes * torch.tensor([64, 16, 4, 1])).sum(-1).to(torch.uint8)
    w_scale, bias = torch.tensor([0.02]), torch.randn(N, generator=generator)
    try:
        expected = ops.reference_linear(x, w_packed, w_scale, bias, K)
        arguments = (tensor.to(device) for tensor in (x, w_packed, w_scale, bias))
        found = torch.ops.bitlinear.linear(*arguments, K).cpu()
    except Exception as error:  # any error belongs in the report
        return f"fails on {device}: {type(error).__name__}: {error}"
    different = int((found != expected).sum())
    if different:
        return f"{different} of {M * N} results differ from the reference on {device}"
    return ""


def _openmp_runtimes() -> tuple[str, ...]:
    """List the files of the OpenMP runtimes in this process; none outside of Linux."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(sorted(set(re.findall(r"/\S*/lib(?:gomp|omp|iomp5)\b[^/\n]*\.so[^/\n]*", maps))))


if __name__ == "__main__":
    sys.exit(main())
