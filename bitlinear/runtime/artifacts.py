"""Where compiled kernels live between processes: the directory, the keys, what makes one valid.

An artifact is a directory that appears by one rename and is never changed afterwards::

    <cache>/<library>/<key>/<library>.so    absent where the result is that it cannot be had
                            meta.json       every ingredient of the key in clear, the .so's hash
                            build.log       what the compiler printed
    <cache>/.staging/<random>/              being built, seen by nobody else
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from ..kernels import CudaLibrary, Library, Variant
from .hardware import Hardware

META = "meta.json"
LOG = "build.log"
STAGING = ".staging"
BUILDER = Path(__file__).with_name("build_worker.py")
LIBRARY_SUFFIX = ".pyd" if sys.platform == "win32" else ".so"  # what cpp_extension.load appends

_FORMAT = "1"
_COMPILER_INGREDIENTS = frozenset({"compiler", "compiler_arguments", "nvcc"})
_KEY = re.compile(r"[0-9a-f]{32}")
_KEEP = 8  # artifacts of one library
_KEEP_SECONDS = 24 * 3600.0  # whatever was used more recently than this stays
_STAGING_SECONDS = 3600.0  # twice as long as any build is allowed to take


# --------------------------------------------------------------------------------- directory


@dataclass(frozen=True)
class CacheDirectory:
    """Where artifacts are written to and read from.

    Attributes:
        path: The directory for new artifacts; None: there is none that can be written to.
        reason: Why it is not the first one asked for; empty if it is.
        temporary: It vanishes when this process ends.
        unsafe: A directory was refused because other users could put code into it.
        readable: Every directory to look for artifacts in, best first, read-only ones included.
        refused: Why BITLINEAR_CACHE_DIR is not even read; empty if it is, or is not set.
    """

    path: Path | None
    reason: str = ""
    temporary: bool = False
    unsafe: bool = False
    readable: tuple[Path, ...] = ()
    refused: str = ""


def open_cache(environ: Mapping[str, str] = os.environ) -> CacheDirectory:
    """The first candidate that is safe and can be written to."""
    reasons: list[str] = []
    readable: list[Path] = []
    unsafe = False
    refused = ""
    for candidate in _candidates(environ):
        reason = _make(candidate)
        directory = Path(os.path.realpath(candidate))
        if not reason and (reason := _unsafe(directory)):
            unsafe = True
        elif not reason:
            readable.append(directory)
            if not (reason := unusable(directory)):
                break
        reasons.append(f"{candidate} {reason}")
        if not readable and not refused and environ.get("BITLINEAR_CACHE_DIR"):
            refused = reasons[0]
    else:
        directory = None
    return CacheDirectory(directory, "; ".join(reasons), False, unsafe, tuple(readable), refused)


def with_temporary(cache: CacheDirectory) -> CacheDirectory:
    """`cache`, with a private temporary directory if it has none to write to."""
    if cache.path is not None:
        return cache
    try:
        path = Path(tempfile.mkdtemp(prefix="bitlinear-")).resolve()
    except OSError as error:
        return replace(cache, reason=f"{cache.reason}; {error}")
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    if reason := unusable(path):
        return replace(cache, reason=f"{cache.reason}; {path} {reason}")
    return replace(cache, path=path, temporary=True, readable=(*cache.readable, path))


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    if chosen := environ.get("BITLINEAR_CACHE_DIR"):
        yield Path(os.path.abspath(os.path.expanduser(chosen)))
    if os.path.isabs(xdg := environ.get("XDG_CACHE_HOME", "")):  # relative: to be ignored (XDG)
        yield Path(xdg, "bitlinear")
    if os.path.isabs(home := os.path.expanduser("~")):
        yield Path(home, ".cache", "bitlinear")


def _make(directory: Path) -> str:
    """Make sure that it exists; the reason if it cannot."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be created ({error.strerror})"
    return ""


def _unsafe(directory: Path) -> str:
    """Why code in `directory` cannot be trusted; empty if it can."""
    if not hasattr(os, "geteuid"):
        return ""
    try:
        status = directory.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to user {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written to by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def unusable(directory: Path) -> str:
    """Why nothing can be built in `directory`; empty if something can."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
        if hasattr(os, "statvfs") and os.statvfs(directory).f_flag & getattr(os, "ST_NOEXEC", 0):
            return "is mounted noexec"
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    return ""


# --------------------------------------------------------------------------------- keys


def ingredients(library: Library, directory: Path, hardware: Hardware) -> dict[str, str]:
    """Everything that the bytes of the library, or its self-test's result, depend on.

    Raises:
        OSError: a source cannot be read.
    """
    torch, compiler = hardware.torch, hardware.compiler
    parts = {
        "format": _FORMAT,
        "library": library.name,
        "sources": _digest_of_sources(library, directory),
        "flags": shlex.join((*library.cflags, "--", *library.ldflags)),
        "compiler": f"{compiler.realpath} | {compiler.version}" if compiler else "",
        "compiler_arguments": " ".join(os.environ.get("CXX", "").split()[1:]),
        "torch": f"{torch.version} {torch.git_version} cuda={torch.cuda}",
        "abi": f"cxx11={torch.cxx11_abi}",
        "system": f"{hardware.system} {hardware.cpu.machine}",
        "libc": hardware.libc,
    }
    if isinstance(library, Variant):
        parts["cpu"] = hardware.cpu.identity  # its self-test ran on this CPU, for this CPU
    else:
        parts["python"] = EXTENSION_SUFFIXES[0]
    if isinstance(library, CudaLibrary):
        parts.update(_cuda_ingredients(library, hardware))
    return parts


def _cuda_ingredients(library: CudaLibrary, hardware: Hardware) -> dict[str, str]:
    nvcc, driver = hardware.nvcc, hardware.driver
    assert driver is not None  # or there would be no GPU to compile for
    gpus = {driver.gpus[device].identity for device in library.devices}
    arguments = [os.environ.get(f"NVCC_{which}_FLAGS", "") for which in ("PREPEND", "APPEND")]
    return {
        "nvcc": " | ".join([nvcc.realpath, nvcc.version, *arguments]) if nvcc else "",
        "nvcc_flags": shlex.join(library.nvcc_flags),
        "gpus": f"{', '.join(sorted(gpus))} | {driver.cuda}",  # its self-test ran on these
    }


def key(parts: Mapping[str, str]) -> str:
    """The name of the artifact that these ingredients make."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _digest_of_sources(library: Library, directory: Path) -> str:
    """Of the sources, of every header beside them, and of the recipe in build_worker.py."""
    digest = hashlib.sha256()
    files = {name: directory / name for name in source_files(library, directory)}
    for name, file in {**files, BUILDER.name: BUILDER}.items():
        content = file.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def source_files(library: Library, directory: Path) -> list[str]:
    """The sources in `directory`, and every header that they may include, relative to it."""
    folders = {directory, *((directory / name).parent for name in library.sources)}
    files = (file for folder in folders for file in folder.iterdir())
    headers = (file for file in files if file.suffix in (".h", ".cuh"))
    return [*library.sources, *sorted(file.relative_to(directory).as_posix() for file in headers)]


# --------------------------------------------------------------------------------- artifacts


@dataclass(frozen=True)
class Artifact:
    """A library in the cache, or the recorded fact that it cannot be had.

    Attributes:
        name: The library's name.
        key: Its key; also the name of its directory.
        directory: Where it lies; None for a result that is not kept.
        state: "cached" (found), "built" (by this process) or "failed" (there is no library).
        self_test: What the self-test found.
        reason, fix, code: As in a Verdict; empty unless failed.
        seconds: How long the build took.
    """

    name: str
    key: str
    directory: Path | None
    state: str
    self_test: str = ""
    reason: str = ""
    fix: str = ""
    code: str = ""
    seconds: float = 0.0

    @property
    def path(self) -> Path:
        """The library file. Raises ValueError for a failed artifact."""
        if self.directory is None or self.state == "failed":
            raise ValueError(f"{self.name} is not available: {self.reason}")
        return self.directory / (self.name + LIBRARY_SUFFIX)


def find(cache: CacheDirectory, parts: Mapping[str, str], any_compiler: bool) -> Artifact | None:
    """The valid artifact for these ingredients, marked as used now; None if there is none.

    With `any_compiler`, one that another compiler built will do, but not another's failure.
    """
    name = parts["library"]
    for root in cache.readable:
        artifact = _read(root / name / key(parts), parts)
        if artifact is None and any_compiler:
            found = (_read(directory, parts, any_compiler) for directory in (root / name).glob("*"))
            artifact = next((a for a in found if a is not None and a.state == "cached"), None)
        if artifact is not None and artifact.directory is not None:
            with contextlib.suppress(OSError):
                os.utime(artifact.directory)  # pruning goes by this
            return artifact
    return None


def _read(directory: Path, parts: Mapping[str, str], any_compiler: bool = False) -> Artifact | None:
    """The artifact in `directory`; None if it is absent, damaged, foreign or for something else."""
    try:
        meta = json.loads((directory / META).read_bytes())
        if _unsafe(directory) or not _same(meta["ingredients"], parts, any_compiler):
            return None
        artifact = Artifact(
            name=parts["library"],
            key=directory.name,
            directory=directory,
            state="failed" if meta["result"]["code"] else "cached",
            **meta["result"],
        )
        if artifact.state == "cached" and _digest(artifact.path) != meta["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return artifact


def _same(found: Mapping[str, str], wanted: Mapping[str, str], any_compiler: bool) -> bool:
    ignored = _COMPILER_INGREDIENTS if any_compiler else frozenset()
    return found.keys() == wanted.keys() and all(
        found[name] == wanted[name] for name in wanted.keys() - ignored
    )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------- changes


def new_staging(root: Path) -> Path:
    """A fresh directory that only this process knows.

    Raises:
        OSError: it cannot be made.
    """
    (root / STAGING).mkdir(mode=0o700, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root / STAGING))


def publish(root: Path, staging: Path, artifact: Artifact, parts: Mapping[str, str]) -> Artifact:
    """Turn `staging`, with the library and the log in it, into an artifact.

    Whoever comes second uses what the first one published, or, should that be impossible, its own
    copy where it lies.

    Raises:
        OSError: the directory cannot be written to.
    """
    library = staging / (artifact.name + LIBRARY_SUFFIX)
    meta: dict[str, Any] = {
        "ingredients": dict(parts),
        "result": {
            "self_test": artifact.self_test,
            "reason": artifact.reason,
            "fix": artifact.fix,
            "code": artifact.code,
            "seconds": artifact.seconds,
        },
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    kept = {META, LOG}
    if artifact.state != "failed":
        meta.update(size=library.stat().st_size, sha256=_digest(library))
        kept.add(library.name)
    for leftover in staging.iterdir():
        if leftover.name not in kept:
            remove(leftover)
    (staging / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    (root / artifact.name).mkdir(mode=0o700, exist_ok=True)
    final = root / artifact.name / artifact.key
    directory = staging
    if _read(final, parts) is None:
        remove(_moved_away(root, final))  # a damaged one, if any
        with contextlib.suppress(OSError):
            os.replace(staging, final)
            directory = final
    else:
        remove(staging)
        directory = final
    return Artifact(**{**vars(artifact), "directory": directory})


def _moved_away(root: Path, directory: Path) -> Path:
    """Take `directory` out of sight in one step; where it is now."""
    away = new_staging(root)
    with contextlib.suppress(OSError):
        os.replace(directory, away / directory.name)
    return away


def remove(path: Path) -> None:
    """Delete a file or a tree as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def artifacts(root: Path) -> list[Path]:
    """The directories of all artifacts, the most recently used first."""
    found = [meta.parent for meta in root.glob(f"*/*/{META}") if _KEY.fullmatch(meta.parent.name)]
    return sorted(found, key=_last_use, reverse=True)


def prune(root: Path, now: float | None = None) -> None:
    """Delete what has not been used for long, and what killed builds left behind."""
    now = time.time() if now is None else now
    kept: dict[str, int] = {}
    for directory in artifacts(root):
        kept[directory.parent.name] = kept.get(directory.parent.name, 0) + 1
        if kept[directory.parent.name] > _KEEP and now - _last_use(directory) > _KEEP_SECONDS:
            remove(directory)
    for staging in (root / STAGING).glob("*"):
        if now - _last_use(staging) > _STAGING_SECONDS:
            remove(staging)


def clean(root: Path) -> int:
    """Delete every artifact, and nothing else that a user may keep there; how many there were."""
    found = artifacts(root)
    for directory in found:
        remove(directory)
    remove(root / STAGING)
    return len(found)


def size(directory: Path) -> int:
    """Bytes of the files below."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _last_use(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except OSError:
        return 0.0
