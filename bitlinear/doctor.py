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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .arguments import QUANT_TYPES
from .kernels import DIRECTORY, VARIANTS
from .report import BROKEN, FALLBACK, OK, Report, redact
from .runtime import Runtime, artifacts, current, parallel_threads
from .runtime.artifacts import Artifact
from .runtime.build_lock import build_lock
from .runtime.hardware import detect
from .runtime.installation import foreign_distribution
from .runtime.prebuild import parse, prebuild
from .runtime.provider import LibraryProvider, toolchain_obstacle
from .runtime.rejection import Rejection, SettingError
from .runtime.verdicts import Verdict

__all__ = ["BROKEN", "FALLBACK", "OK", "Report", "main", "report"]


def report(verbose: bool = False) -> Report:
    """Examine this process; a notebook shows the result as a table."""
    runtime = _with_missing_kernels(current())
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
        epilog="Exit code: 0 fine, 1 works but on a fallback, 2 broken, or import bitlinear fails.",
        allow_abbrev=False,  # the import looks at the options, too, and in full
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--verbose", action="store_true", help="add build logs and the environment")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--rebuild",
        action="store_true",
        help="delete all compiled libraries, then compile those for this machine",
    )
    action.add_argument(
        "--clean", action="store_true", help="delete all compiled libraries, and stop"
    )
    action.add_argument("--no-build", action="store_true", help="compile nothing")
    action.add_argument(
        "--prebuild",
        metavar="LIST",
        action="append",
        help="compile kernels for other machines into $BITLINEAR_CACHE_DIR: all, or names of CPU "
        "kernels, then architectures of GPUs, such as avx2,avx512_vnni,cuda:8.0,9.0; "
        "exit code 2 if one fails",
    )
    options = parser.parse_args(arguments)
    # runtime/settings.py keeps the import from building under these four options.
    if options.clean or options.rebuild:
        obstacle = toolchain_obstacle(current().hardware)
        if options.rebuild and obstacle is not None:
            print(f"nothing deleted, as nothing can be compiled: {obstacle.line}", file=sys.stderr)
            return BROKEN
        exit_code = _clean(options.json, quiet=options.rebuild)
        if options.clean or exit_code != OK:
            return exit_code
        rest = [f"--{name}" for name in ("json", "verbose") if getattr(options, name)]
        # A process cannot load the operator twice, so a new process examines the new one.
        return subprocess.call(
            [sys.executable, *_interpreter_flags(), "-m", "bitlinear.doctor", *rest]
        )
    if options.prebuild is not None:
        return _prebuild(options.prebuild, options.json, options.verbose)
    found = report(options.verbose)
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack a letter of a path
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(json.dumps(found.to_json(), indent=2) if options.json else found, flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return found.exit_code


def _interpreter_flags() -> list[str]:
    """The options that restrict where this Python imports from."""
    flags = {"isolated": "-I", "safe_path": "-P", "no_user_site": "-s", "ignore_environment": "-E"}
    return [flag for name, flag in flags.items() if getattr(sys.flags, name, False)]


# --- Actions -------------------------------------------------------------------------------------


def _clean(as_json: bool, quiet: bool) -> int:
    cache = current().cache
    if cache.override_problem:  # the import has said why
        print("nothing deleted: that is not the directory asked for", file=sys.stderr)
        return BROKEN
    deleted = 0
    for root in cache.readable:
        with build_lock(root):  # a process that compiles can still finish
            deleted += artifacts.clean(root)
    left = {root: len(artifacts.entries(root)) for root in cache.readable}
    where = redact(", ".join(map(str, cache.readable))) or "no cache directory"
    if not quiet:
        counts = {"deleted": deleted, "left": sum(left.values())}
        print(json.dumps(counts) if as_json else f"{deleted} deleted: {where}")
    for root, count in left.items():
        if count:
            print(
                f"{count} not deleted, for want of permission: {redact(str(root))}", file=sys.stderr
            )
    return BROKEN if any(left.values()) else OK


def _prebuild(lists: list[str], as_json: bool, verbose: bool) -> int:
    cache = current().cache
    try:
        hardware = detect(cache.path)
        libraries = [lib for text in lists for lib in parse(text, hardware.cpu.machine)]
        done = prebuild(libraries, hardware, cache, verbose=verbose)
    except SettingError as error:
        print(f"bitlinear: {error}", file=sys.stderr)
        return BROKEN
    lines = {
        name: probe.reason if probe.rejection else _described(probe.value)
        for name, probe in done.libraries.items()
    }
    failed = [name for name, probe in done.libraries.items() if probe.rejection]
    if as_json:
        print(json.dumps({"directory": str(done.directory), "libraries": lines, "failed": failed}))
    else:
        for name, line in lines.items():
            print(f"  {'x' if name in failed else '*'} {name:<12} {redact(line)}")
        print(f"{len(lines) - len(failed)} of {len(lines)} in {redact(str(done.directory))}")
    return BROKEN if failed else OK


def _with_missing_kernels(runtime: Runtime) -> Runtime:
    """With ``BITLINEAR_BUILD=cached``, a kernel that is not in the cache is not available."""
    if not runtime.required:
        return runtime
    absent = Rejection("not-cached", "not in the cache")
    provider = LibraryProvider(DIRECTORY, runtime.hardware, runtime.cache, absent)
    by_name = {variant.name: variant for variant in VARIANTS}

    def judge(verdict: Verdict) -> Verdict:
        if verdict.status != "available":
            return verdict
        provider.prepare(by_name[verdict.variant])
        rejection = provider.results[verdict.variant].rejection
        return Verdict(verdict.variant, rejection=rejection) if rejection else verdict

    return replace(runtime, verdicts=tuple(map(judge, runtime.verdicts)))


def _described(artifact: Artifact | None) -> str:
    assert artifact is not None
    tested = artifact.self_test or "to be tested where it runs"
    return f"{artifact.state} {artifact.key[:8]}  self-test: {tested}"


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
    scales = torch.rand(N, 1, generator=generator) + 0.01
    bias = torch.randn(N, generator=generator)
    different = 0
    try:
        for quant_type in QUANT_TYPES.values():
            w_scale = scales if quant_type.group_size else scales[0]
            rest: Any = (K, 1e-6, 0, quant_type.act_bits)
            expected = ops.reference_linear(x, w_packed, w_scale, bias, *rest)
            arguments = (tensor.to(device) for tensor in (x, w_packed, w_scale, bias))
            found = torch.ops.bitlinear.linear(*arguments, *rest).cpu()
            different += int((found != expected).sum())
    except Exception as error:  # any error belongs in the report
        return f"fails on {device}: {type(error).__name__}: {error}"
    if different:
        count = M * N * len(QUANT_TYPES)
        return f"{different} of {count} results differ from the reference on {device}"
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
