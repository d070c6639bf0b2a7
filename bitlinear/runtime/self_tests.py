"""Results of self-tests: each says how one library did on one kind of hardware.

They lie apart from the libraries. A library may be compiled on one machine and used on others, from
a directory that can only be read::

    <cache>/.self-tests/<digest>.json    the hash of the library, the hardware, and the result or
                                         the failure
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from .cache_directory import CacheDirectory, closed_folder
from .failures import Failure
from .pinned import at
from .rejection import Probe
from .trust import is_own_folder, why_unsafe

FOLDER = ".self-tests"
_KEEP = 256
_KEEP_SECONDS = 30 * 24 * 3600.0


def find(cache: CacheDirectory, sha256: str, hardware: str) -> Probe[str] | None:
    """Look up the result of a library on a kind of hardware.

    Args:
        cache: The directories to look in.
        sha256: The hash of the library.
        hardware: See :func:`bitlinear.runtime.keys.self_test_machine`.

    Returns:
        The result, or the rejection of a failure that is not to be tried again; None if the test
        must run.
    """
    for root in cache.readable:
        result = _read(root, sha256, hardware)
        if isinstance(result, Failure) and not result.is_due():
            return Probe(rejection=result.described())
        if isinstance(result, str):
            return Probe(result)
    return None


def record(root: Path, sha256: str, hardware: str, result: Probe[str]) -> None:
    """Keep a result; do nothing if the directory cannot be written to."""
    values: dict[str, object] = {"sha256": sha256, "hardware": hardware, "result": result.value}
    if result.rejection is not None:
        earlier = _read(root, sha256, hardware)
        failure = Failure.now(result.rejection, earlier if isinstance(earlier, Failure) else None)
        values["failure"] = failure.to_json()
    with contextlib.suppress(OSError):
        file = _file(root, sha256, hardware)
        closed_folder(file.parent)
        handle, name = tempfile.mkstemp(dir=file.parent)
        try:
            with open(handle, "w", encoding="utf-8") as new:
                json.dump(values, new, indent=1)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise


def prune(root: Path) -> None:
    """Delete old results."""
    folder = at(root) / FOLDER
    if not is_own_folder(folder):
        return
    with contextlib.suppress(OSError):
        files = sorted(folder.glob("*"), key=lambda file: -file.stat().st_mtime)
        for file in files[_KEEP:]:
            if time.time() - file.stat().st_mtime > _KEEP_SECONDS:
                file.unlink()


def _read(root: Path, sha256: str, hardware: str) -> str | Failure | None:
    file = _file(root, sha256, hardware)
    try:
        if why_unsafe(file.parent) or why_unsafe(file):
            return None
        values = json.loads(file.read_bytes())
        if (values["sha256"], values["hardware"]) != (sha256, hardware):
            return None
        return Failure.from_json(values["failure"]) if "failure" in values else values["result"]
    except Exception:  # a damaged file can raise anything
        return None


def _file(root: Path, sha256: str, hardware: str) -> Path:
    digest = hashlib.sha256(f"{sha256} {hardware}".encode()).hexdigest()
    return at(root) / FOLDER / f"{digest[:32]}.json"
