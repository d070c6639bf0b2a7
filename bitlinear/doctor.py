"""``python -m bitlinear.doctor``: which kernel runs here, why not a better one, and how to mend it.

It shows what the runtime reports and runs the operator once; it decides nothing itself.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import os
import platform
import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .kernels import OPS, VARIANTS
from .runtime import Runtime, artifacts, current, parallel_threads
from .runtime.artifacts import Artifact
from .runtime.cuda_arch import targets
from .runtime.hardware import Hardware, detect
from .runtime.verdicts import Verdict

OK, FALLBACK, BROKEN = 0, 1, 2
"""Exit codes: the kernel passed its self-test; it works, but slower than it could; it is broken."""

_MARKS = {"chosen": "*", "available": "o", "rejected": "x"}
_FALLBACK_CODES = {"no-compiler", "compile-failed", "illegal-instruction", "forced-off"}
_ENVIRONMENT = (
    "BITLINEAR_KERNEL", "BITLINEAR_CACHE_DIR", "BITLINEAR_BUILD", "BITLINEAR_CUDA",
    "BITLINEAR_VERBOSE", "XDG_CACHE_HOME", "CXX", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST", "OMP_NUM_THREADS",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """The findings; ``str()`` of it is for people and bug reports, a notebook shows a table.

    Attributes:
        runtime: What the runtime reports.
        hardware: As ``runtime.hardware``, with GPUs and nvcc looked for.
        operator: What is wrong with the operator's result; empty if nothing is.
        devices: Those that the operator ran on.
        threads: How many threads the operator ran on; None without a compiled one.
        openmp: The OpenMP runtimes in this process.
        verbose: Show build logs, paths and the environment too.
    """

    runtime: Runtime
    hardware: Hardware
    operator: str
    threads: int | None
    openmp: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    verbose: bool = False

    @property
    def exit_code(self) -> int:
        """What the command exits with: OK, FALLBACK or BROKEN."""
        runtime = self.runtime
        codes = {verdict.code for verdict in runtime.verdicts if verdict != runtime.cuda}
        differs = self.operator or "self-test-failed" in {*codes, runtime.cuda.code}
        if differs or runtime.cache.unsafe:
            return BROKEN
        if runtime.kernel is None or runtime.cache.temporary or codes & _FALLBACK_CODES:
            return FALLBACK
        return FALLBACK if runtime.cuda_problem else OK

    def sections(self) -> list[tuple[str, list[list[str]]]]:
        """Title and rows of cells of each section, ready to be shown."""
        sections = [
            ("CPU", [[_cpu(self.runtime)]]),
            ("GPU", [[line] for line in _gpus(self.hardware)]),
            ("Kernels", [_row(verdict, self.runtime) for verdict in self.runtime.verdicts]),
            ("Toolchain", [[_toolchain(self.hardware)]]),
            ("Cache", [[line] for line in _cache(self.runtime)]),
            ("Threads", [[_threads(self.threads, self.openmp)]]),
            ("Tested", [[_tested(self.hardware)]]),
            ("Operator", [[self.operator or _identical(self.devices)]]),
            ("Verdict", [[_summary(self.runtime, self.exit_code)]]),
        ]
        if self.verbose:
            chosen = [list(item) for item in _environment().items()]
            sections.append(("Environment", chosen or [["nothing that matters is set"]]))
            for name, artifact in self.runtime.artifacts.items():
                sections.append((f"Build of {name}", [[line] for line in _log(artifact)]))
        return [
            (title, [[_redact(cell) for cell in row] for row in rows]) for title, rows in sections
        ]

    def __str__(self) -> str:
        lines = ["   ".join(_versions(self.hardware))]
        for title, rows in self.sections():
            widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows))]
            cells = [
                "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]])
                for row in rows
            ]
            if len(rows) == 1:
                lines.append(f"{title:<9} {cells[0]}".rstrip())
            else:
                lines += [title, *(f"  {text}".rstrip() for text in cells)]
        return "\n".join(lines)

    __repr__ = __str__  # that of a dataclass would tell the paths in full

    def _repr_html_(self) -> str:
        body = []
        for title, rows in self.sections():
            for number, row in enumerate(rows):
                label = html.escape(title) if number == 0 else ""
                span = f' colspan="{_COLUMNS - len(row) + 1}"' if len(row) < _COLUMNS else ""
                *first, last = map(html.escape, row)
                cells = "".join(f"<td>{cell}</td>" for cell in first)
                body.append(f"<tr><th>{label}</th>{cells}<td{span}>{last}</td></tr>")
        caption = html.escape("   ".join(_versions(self.hardware)))
        return f"<table><caption>{caption}</caption>{''.join(body)}</table>"

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        runtime, hardware = self.runtime, self.hardware
        directory = runtime.cache
        data = {
            "exit_code": self.exit_code,
            "tested": _tested(hardware),
            "versions": dict(entry.split(" ", 1) for entry in _versions(hardware)),
            "kernel": runtime.kernel,
            "problem": runtime.problem,
            "cpu": {**asdict(hardware.cpu), "flags": sorted(hardware.cpu.flags or ())},
            "kernels": [
                {**asdict(verdict), "artifact": _artifact(runtime.artifacts.get(verdict.variant))}
                for verdict in runtime.verdicts
            ],
            "operator": {
                "artifact": _artifact(runtime.artifacts.get(OPS.name)),
                "error": self.operator,
                "devices": list(self.devices),
            },
            "gpu": {
                "driver": None if hardware.driver is None else _plain(hardware.driver),
                "reason": hardware.driver_reason,
                "torch": hardware.torch.cuda,
                "problem": runtime.cuda_problem,
            },
            "toolchain": {
                name: {"found": _plain(found), "reason": reason}
                for name, found, reason in _tools(hardware)
            },
            "cache": {**_plain(asdict(directory)), "readable": [*map(str, directory.readable)]},
            "threads": {"used": self.threads, "openmp": list(self.openmp)},
        }
        if self.verbose:
            data["environment"] = _environment()
            data["builds"] = {name: _log(a) for name, a in runtime.artifacts.items()}
        redacted: dict[str, Any] = _redact_all(data)
        return redacted


def report(verbose: bool = False) -> Report:
    """Examine this process; in a notebook the result is shown as a table."""
    runtime = current()
    devices = ("cpu", *_cuda_devices(runtime))
    return Report(
        runtime=runtime,
        hardware=detect(runtime.cache.path, everything=True),
        operator="; ".join(filter(None, map(_run_operator, devices))),
        threads=parallel_threads(),
        openmp=_openmp_runtimes(),
        devices=devices,
        verbose=verbose,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bitlinear.doctor",
        description="Shows which kernel bitlinear runs on this machine, and why not another.",
        epilog="Exit code: 0 fine, 1 works but on a fallback, 2 broken.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--verbose", action="store_true", help="with build logs and environment")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--rebuild", action="store_true", help="forget what was compiled, compile")
    action.add_argument("--clean", action="store_true", help="delete what was compiled, and stop")
    action.add_argument("--no-build", action="store_true", help="look only, compile nothing")
    options = parser.parse_args(arguments)
    # What --no-build, --clean and --rebuild keep the import from doing is up to runtime.load.
    if options.clean or options.rebuild:
        if current().cache.refused:  # the import has said why
            print("nothing deleted: that is not the directory asked for", file=sys.stderr)
            return BROKEN
        roots = current().cache.readable
        count = sum(map(artifacts.clean, roots))
        if options.clean:
            places = _redact(", ".join(map(str, roots))) or "no cache directory"
            print(json.dumps({"deleted": count}) if options.json else f"{count} deleted: {places}")
            return OK
        rest = [f"--{name}" for name in ("json", "verbose") if getattr(options, name)]
        # A process cannot load the operator twice: look at the new one in a new process.
        return subprocess.call([sys.executable, "-m", "bitlinear.doctor", *rest])
    found = report(options.verbose)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have letters that it has not
        sys.stdout.reconfigure(errors="backslashreplace")
    print(json.dumps(found.to_json(), indent=2) if options.json else found)
    return found.exit_code


# --- What is looked at ---------------------------------------------------------------------------


def _cuda_devices(runtime: Runtime) -> list[str]:
    """Those that CUDA's kernels were compiled for, if they are in use."""
    if runtime.cuda.status != "chosen":
        return []
    judged = targets(runtime.hardware, os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    return [f"cuda:{number}" for number, target in enumerate(judged) if target.architecture]


def _run_operator(device: str = "cpu") -> str:
    """Compare the operator with the reference implementation; the difference, or nothing."""
    from . import ops

    generator = torch.Generator().manual_seed(0)
    M, N, K = 3, 37, 261
    x = torch.randn(M, K, generator=generator)
    codes = torch.randint(0, 3, (N, (K + 3) // 4, 4), generator=generator)
    codes[:, -1, K % 4 or 4 :] = 1  # the slots past K
    w_packed = (codes * torch.tensor([64, 16, 4, 1])).sum(-1).to(torch.uint8)
    w_scale, bias = torch.tensor([0.02]), torch.randn(N, generator=generator)
    try:
        expected = ops.reference_linear(x, w_packed, w_scale, bias, K)
        arguments = (tensor.to(device) for tensor in (x, w_packed, w_scale, bias))
        found = torch.ops.bitlinear.linear(*arguments, K).cpu()
    except Exception as error:  # whatever it is, it belongs into the report
        return f"fails on {device}: {type(error).__name__}: {error}"
    different = int((found != expected).sum())
    if different:
        return f"{different} of {M * N} results differ from the reference on {device}"
    return ""


def _openmp_runtimes() -> tuple[str, ...]:
    """Files of the OpenMP runtimes in this process (Linux; elsewhere nothing is known)."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(sorted(set(re.findall(r"/\S*/lib(?:gomp|omp|iomp5)\b[^/\n]*\.so[^/\n]*", maps))))


# --- How it is shown -----------------------------------------------------------------------------

_COLUMNS = 4  # of the kernels' table: mark and name, status, artifact or reason, fix


def _versions(hardware: Hardware) -> list[str]:
    from . import __version__

    return [
        f"bitlinear {__version__}",
        f"torch {hardware.torch.version}",
        f"python {platform.python_version()}",
        f"{hardware.system} {hardware.cpu.machine}",
    ]


def _cpu(runtime: Runtime) -> str:
    cpu = runtime.hardware.cpu
    text = f"{cpu.brand or cpu.machine}, {torch.get_num_threads()} threads"
    if cpu.flags is None:
        return f"{text}; flags unknown: {cpu.reason}"
    used = set().union(*(v.requires for v in VARIANTS if v.name == runtime.kernel))
    return f"{text}; flags used: {' '.join(sorted(used)) or 'none'}"


def _gpus(hardware: Hardware) -> list[str]:
    if hardware.driver is None:
        return [hardware.driver_reason]
    lines = [
        f"{gpu.name}, compute capability {'.'.join(map(str, gpu.capability))}, "
        f"{gpu.memory / (1 << 30):.0f} GiB"
        for gpu in hardware.driver.gpus
    ]
    release = hardware.nvcc.release if hardware.nvcc else "none"
    cuda = f"driver {hardware.driver.cuda}, torch {hardware.torch.cuda or 'none'}, nvcc {release}"
    return [*(lines or ["the NVIDIA driver shows this process no GPU"]), f"CUDA: {cuda}"]


def _identical(devices: tuple[str, ...]) -> str:
    text = "bit-identical to the reference implementation"
    return text if devices == ("cpu",) else f"{text} on {' and '.join(devices)}"


def _row(verdict: Verdict, runtime: Runtime) -> list[str]:
    artifact = runtime.artifacts.get(verdict.variant)
    text = verdict.reason
    if verdict.status == "chosen" and artifact is not None:
        text = f"{artifact.state} {artifact.key[:8]}  self-test: {artifact.self_test}"
    fix = f"fix: {verdict.fix}" if verdict.fix else ""
    return [f"{_MARKS[verdict.status]} {verdict.variant}", verdict.status, text, fix]


def _tools(hardware: Hardware) -> list[tuple[str, Any, str]]:
    return [
        ("compiler", hardware.compiler, hardware.compiler_reason),
        ("ninja", hardware.ninja, hardware.ninja_reason),
        ("nvcc", hardware.nvcc, hardware.nvcc_reason),
    ]


def _toolchain(hardware: Hardware) -> str:
    texts = []
    for name, found, reason in _tools(hardware):
        if found is None:
            texts.append(f"no {name} ({reason})")
        elif isinstance(found, str):
            texts.append(f"{name} {found}")
        else:
            texts.append(f"{name} {found.path}, {found.version}")
    return "; ".join(texts)


def _cache(runtime: Runtime) -> list[str]:
    directory = runtime.cache
    lines = []
    if directory.path is None:
        lines.append("there is no directory to write to")
    else:
        mode = stat.S_IMODE(os.stat(directory.path).st_mode)
        count, size = len(artifacts.artifacts(directory.path)), artifacts.size(directory.path)
        lines.append(f"{directory.path}  {mode:04o}  {count} artifacts, {size / 1e6:.1f} MB")
    if directory.temporary:
        lines.append("temporary: every process compiles again; set BITLINEAR_CACHE_DIR")
    if directory.reason:
        lines.append(directory.reason)
    if directory.unsafe:
        lines.append("fix: a cache directory must be your own and closed to others (chmod 700)")
    return lines


# Where the test suite has run.
_TESTED = {
    ("linux", "x86_64"): "on machines of this kind",
    ("linux", "aarch64"): "under an emulator of this kind of machine: the results, not the speed",
}


def _tested(hardware: Hardware) -> str:
    system, machine = hardware.system, hardware.cpu.machine
    return _TESTED.get((system, machine), f"never on {system} {machine}: reports are welcome")


def _threads(threads: int | None, openmp: tuple[str, ...]) -> str:
    if threads is None:
        return "those of torch (no compiled operator)"
    return f"OpenMP, {_count(len(openmp), 'runtime')}, {_count(threads, 'thread')}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _summary(runtime: Runtime, exit_code: int) -> str:
    if runtime.kernel is None:
        return f"the slow reference implementation runs: {runtime.problem}"
    chosen = [verdict.variant for verdict in runtime.verdicts if verdict.status == "chosen"]
    running = f"{' and '.join(chosen)} {'run' if len(chosen) > 1 else 'runs'}"
    if exit_code == OK:
        return running
    return f"{running}, but see above" if exit_code == FALLBACK else "broken: see above"


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}


def _log(artifact: Artifact) -> list[str]:
    if artifact.directory is None:
        return [artifact.reason or "nothing was built"]
    try:
        log = (artifact.directory / artifacts.LOG).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        log = str(error)
    return [f"{artifact.directory}, {artifact.seconds} s", *log.splitlines()]


def _artifact(artifact: Artifact | None) -> Any:
    return None if artifact is None else _plain(asdict(artifact))


def _plain(value: Any) -> Any:
    """Of types that JSON has."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _redact_all(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redact_all(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact_all(item) for item in value]
    return _redact(value) if isinstance(value, str) else value


def _redact(text: str) -> str:
    """Without the home directory, whose name is often that of a person."""
    home = os.path.expanduser("~")
    for directory in {os.path.realpath(home), home}:
        if os.path.isabs(directory) and directory != "/":
            text = re.sub(re.escape(directory.rstrip("/")) + r"(?![\w.-])", "~", text)
    return text


if __name__ == "__main__":
    sys.exit(main())
