"""The doctor's report: the runtime's findings as text, as a table of a notebook, and as JSON."""

from __future__ import annotations

import html
import os
import platform
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from .kernels import OPS, VARIANTS
from .kernels.tested import where_gpu_tested, where_tested
from .runtime import Runtime, artifacts
from .runtime.artifacts import Artifact
from .runtime.hardware import Hardware
from .runtime.pinned import at
from .runtime.rejection import Probe
from .runtime.settings import REPORTED
from .runtime.verdicts import Verdict

OK, FALLBACK, BROKEN = 0, 1, 2
"""Exit codes: the kernel passed its self-test; it works, but slower than it could; it is broken."""

_MARKS = {"chosen": "*", "available": "o", "rejected": "x"}
_FALLBACK_CODES = {
    *("no-compiler", "compile-failed", "illegal-instruction", "not-cached", "forced-off"),
}


@dataclass(frozen=True)
class Report:
    """The findings; ``str()`` of it is for people and bug reports, a notebook shows a table.

    Attributes:
        runtime: The report of the runtime.
        hardware: As ``runtime.hardware``, with GPUs and nvcc looked for.
        operator: What is wrong with the operator's result; empty if nothing is.
        threads: How many threads the operator ran on; None without a compiled one.
        openmp: The OpenMP runtimes in this process.
        devices: The devices that the operator ran on.
        foreign: Another project's distribution that is installed under this one's name, or empty.
        verbose: Show build logs, paths and the environment too.
    """

    runtime: Runtime
    hardware: Hardware
    operator: str
    threads: int | None
    openmp: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    foreign: str = ""
    verbose: bool = False

    @property
    def exit_code(self) -> int:
        """The exit code of the command: OK, FALLBACK or BROKEN."""
        runtime = self.runtime
        codes = {verdict.code for verdict in runtime.verdicts if verdict != runtime.cuda}
        differs = self.operator or "self-test-failed" in {*codes, runtime.cuda.code}
        if differs or runtime.cache.unsafe or runtime.missing:
            return BROKEN
        better = takewhile(lambda verdict: verdict.status != "chosen", runtime.verdicts)
        is_slower = any(verdict.code in _FALLBACK_CODES for verdict in better)
        if runtime.kernel is None or runtime.cache.temporary or is_slower:
            return FALLBACK
        return FALLBACK if runtime.cuda_problem else OK

    def sections(self) -> list[tuple[str, list[list[str]]]]:
        """List the title and the rows of cells of each section."""
        sections = [
            *([("Package", [[_foreign(self.foreign)]])] if self.foreign else []),
            ("CPU", [[_cpu(self.runtime)]]),
            ("GPU", [[line] for line in _gpus(self.hardware)]),
            ("Kernels", [_row(verdict, self.runtime) for verdict in self.runtime.verdicts]),
            ("Toolchain", [[_toolchain(self.hardware)]]),
            ("Cache", [[line] for line in _cache(self.runtime)]),
            ("Threads", [[_threads(self.threads, self.openmp)]]),
            ("Tested", [[line] for line in _tested(self.runtime)]),
            ("Operator", [[self.operator or _same_bits(self.runtime, self.devices)]]),
            ("Verdict", [[_summary(self.runtime, self.exit_code)]]),
        ]
        if self.verbose:
            variables = [list(item) for item in _environment().items()]
            sections.append(("Environment", variables or [["no relevant variable is set"]]))
            for name, library in self.runtime.libraries.items():
                sections.append((f"Build of {name}", [[line] for line in _log(library)]))
        return [
            (title, [[redact(cell) for cell in row] for row in rows]) for title, rows in sections
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

    __repr__ = __str__  # a dataclass would print the paths in full

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
        """Return the same for programs, of types that JSON has."""
        runtime, hardware = self.runtime, self.hardware
        operator = runtime.libraries.get(OPS.name)
        data = {
            "exit_code": self.exit_code,
            "tested": _tested(runtime),
            "versions": dict(entry.split(" ", 1) for entry in _versions(hardware)),
            "foreign_distribution": self.foreign,
            "kernel": runtime.kernel,
            "problem": runtime.problem,
            "cpu": {
                **vars(hardware.cpu),
                "flags": sorted(hardware.cpu.flags.value or ()),
                "reason": hardware.cpu.flags.reason,
            },
            "kernels": [
                {
                    **{name: getattr(verdict, name) for name in _VERDICT},
                    "artifact": _plain(runtime.artifacts.get(verdict.variant)),
                }
                for verdict in runtime.verdicts
            ],
            "operator": {
                "artifact": _plain(runtime.artifacts.get(OPS.name)),
                "rejection": _plain(operator.rejection) if operator else None,
                "error": self.operator,
                "devices": list(self.devices),
            },
            "gpu": {
                "driver": _plain(hardware.driver.value),
                "reason": hardware.driver.reason,
                "torch": hardware.torch.cuda,
                "problem": runtime.cuda_problem,
            },
            "toolchain": {
                name: {"found": _plain(probe.value), "reason": probe.reason}
                for name, probe in _tools(hardware).items()
            },
            "cache": _plain(runtime.cache),
            "threads": {"used": self.threads, "openmp": list(self.openmp)},
        }
        if self.verbose:
            data["environment"] = _environment()
            data["builds"] = {name: _log(library) for name, library in runtime.libraries.items()}
        redacted: dict[str, Any] = _redact_all(data)
        return redacted


_VERDICT = ("variant", "ok", "reason", "fix", "code", "status")
_COLUMNS = 4  # of the kernels' table: mark and name, status, artifact or reason, fix


def _versions(hardware: Hardware) -> list[str]:
    from . import __version__

    return [
        f"bitlinear {__version__}",
        f"torch {hardware.torch.version}",
        f"python {platform.python_version()}",
        f"{hardware.system} {hardware.cpu.machine}",
    ]


def _foreign(foreign: str) -> str:
    return (
        f"another project, {foreign}, is installed under this name; "
        "fix: pip uninstall bitlinear, then install from a checkout or its git URL"
    )


def _cpu(runtime: Runtime) -> str:
    cpu = runtime.hardware.cpu
    text = f"{cpu.brand or cpu.machine}, {torch.get_num_threads()} threads"
    if cpu.flags.value is None:
        return f"{text}; flags unknown: {cpu.flags.reason}"
    used = set().union(*(v.requires for v in VARIANTS if v.name == runtime.kernel))
    return f"{text}; flags used: {' '.join(sorted(used)) or 'none'}"


def _gpus(hardware: Hardware) -> list[str]:
    driver, nvcc = hardware.driver.value, hardware.nvcc.value
    if driver is None:
        return [hardware.driver.reason]
    lines = [
        f"{gpu.name}, compute capability {'.'.join(map(str, gpu.capability))}, "
        f"{gpu.memory / (1 << 30):.0f} GiB"
        for gpu in driver.gpus
    ]
    release = nvcc.release if nvcc else "none"
    cuda = f"driver {driver.cuda}, torch {hardware.torch.cuda or 'none'}, nvcc {release}"
    return [*(lines or ["the NVIDIA driver shows this process no GPU"]), f"CUDA: {cuda}"]


def _same_bits(runtime: Runtime, devices: tuple[str, ...]) -> str:
    if runtime.kernel is None:
        return "none is compiled"
    text = "bit-identical to the reference implementation"
    return text if devices == ("cpu",) else f"{text} on {' and '.join(devices)}"


def _row(verdict: Verdict, runtime: Runtime) -> list[str]:
    artifact = runtime.artifacts.get(verdict.variant)
    text = verdict.reason
    if verdict.status == "chosen" and artifact is not None:
        text = f"{artifact.state} {artifact.key[:8]}  self-test: {artifact.self_test}"
    fix = f"fix: {verdict.fix}" if verdict.fix else ""
    return [f"{_MARKS[verdict.status]} {verdict.variant}", verdict.status, text, fix]


def _tools(hardware: Hardware) -> dict[str, Probe[Any]]:
    return {"compiler": hardware.compiler, "ninja": hardware.ninja, "nvcc": hardware.nvcc}


def _toolchain(hardware: Hardware) -> str:
    texts = []
    for name, probe in _tools(hardware).items():
        found = probe.value
        if found is None:
            texts.append(probe.reason)
        elif isinstance(found, str):
            texts.append(f"{name} {found}")
        else:
            texts.append(f"{name} {found.path}, {found.version}")
    return "; ".join(texts)


def _cache(runtime: Runtime) -> list[str]:
    directory = runtime.cache
    lines = []
    for root in directory.readable:
        mode = stat.S_IMODE(os.stat(at(root)).st_mode)
        count, size = len(artifacts.entries(root)), artifacts.size(root)
        use = "" if root == directory.path else "  only read"
        held = f"{count} artifacts, {size / 1e6:.1f} MB: {artifacts.contents(root)}"
        lines.append(f"{root}  {mode:04o}{use}  {held}")
    if directory.path is None:
        lines.append("no directory can be written to")
    if directory.temporary:
        lines.append("temporary: every process compiles again; set BITLINEAR_CACHE_DIR")
    if directory.reason:
        lines.append(directory.reason)
    if directory.note:
        lines.append(directory.note)
    if directory.unsafe:
        lines.append("fix: own directory: chmod 700; of an image: chown -R root, chmod -R go-w")
    return lines


def _tested(runtime: Runtime) -> list[str]:
    """Say where the kernels in use have been tested."""
    system = runtime.hardware.system
    lines = [f"{runtime.kernel}: {where_tested(runtime.kernel, system)}"] if runtime.kernel else []
    driver = runtime.hardware.driver.value
    if driver is not None:
        capabilities = {driver.gpus[number].capability for number in runtime.cuda_devices}
        lines += [f"cuda: {where_gpu_tested(c, system)}" for c in sorted(capabilities)]
    return lines or ["no kernel is in use"]


def _threads(threads: int | None, openmp: tuple[str, ...]) -> str:
    if threads is None:
        return "torch's own (no compiled operator)"
    return f"OpenMP, {_count(len(openmp), 'runtime')}, {_count(threads, 'thread')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _summary(runtime: Runtime, exit_code: int) -> str:
    if runtime.missing:
        return f"import bitlinear fails: {runtime.missing}"
    if runtime.kernel is None:
        return f"the slow reference implementation runs: {runtime.problem}"
    chosen = [verdict.variant for verdict in runtime.verdicts if verdict.status == "chosen"]
    running = f"{' and '.join(chosen)} {'run' if len(chosen) > 1 else 'runs'}"
    if exit_code == OK:
        return running
    return f"{running}, but see above" if exit_code == FALLBACK else "broken: see above"


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in REPORTED if name in os.environ}


def _log(library: Probe[Artifact]) -> list[str]:
    artifact = library.value
    path = library.rejection.log if library.rejection else None
    if artifact is not None:
        path = artifact.directory / artifacts.LOG
    if path is None:
        return [library.reason]
    head = f"{path.parent}, {artifact.seconds} s" if artifact else str(path.parent)
    try:
        return [head, *path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError as error:
        return [head, str(error)]


def _plain(value: Any) -> Any:
    """Turn dataclasses into types that JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _redact_all(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redact_all(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact_all(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def redact(text: str) -> str:
    """Replace the home directory, which often has a person's name, by ``~``."""
    home = os.path.expanduser("~")
    for directory in {os.path.realpath(home), home}:
        if os.path.isabs(directory) and directory != "/":
            text = re.sub(re.escape(directory.rstrip("/")) + r"(?![\w.-])", "~", text)
    return text
