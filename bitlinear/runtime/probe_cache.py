"""The answers of slow probes, kept between processes in the cache directory."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, TypeVar

from .probe import Probe

T = TypeVar("T")


class ProbeCache:
    """Answers of slow probes, in one JSON file that can be lost or spoilt at any time.

    Keys name everything that an answer depends on. Writers replace the file as a whole, and the
    last one wins: what that forgets is probed again.
    """

    LIMIT = 32

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else Path(directory) / "hardware.json"
        self._answers: dict[str, Any] = {}
        self._changed = False
        # What another version of this module understood may be wrong.
        self._edition = file_version(__file__)
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError, RecursionError):
                answers = json.loads(self._path.read_bytes())
                self._answers = answers if isinstance(answers, dict) else {}

    def recall(
        self, key: str, probe: Callable[[], Probe[Any]], decode: Callable[[Any], T]
    ) -> Probe[T]:
        """What ``probe`` finds, or found when last asked under this key, decoded.

        ``decode`` raises on what it cannot use. Reasons are not remembered: they can be mended.
        """
        key = f"{self._edition} {key}"
        with contextlib.suppress(Exception):
            return Probe(decode(self._answers[key]))
        found = probe()
        if found.value is None:
            return Probe(reason=found.reason)
        self._answers.pop(key, None)
        self._answers[key] = found.value
        self._changed = True
        return Probe(decode(found.value))

    def save(self) -> None:
        """Write the file if an answer is new."""
        if self._path is None or not self._changed:
            return
        newest = dict(list(self._answers.items())[-self.LIMIT :])
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=".hardware-")
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(newest, file, indent=1)
                os.replace(name, self._path)
            except BaseException:
                os.unlink(name)
                raise


def decode_text(answer: Any) -> str:
    """Pass a text on; raise TypeError for anything else."""
    if not isinstance(answer, str):
        raise TypeError(f"not a text: {answer!r}")
    return answer


def file_version(path: str) -> str:
    """Time and size of a file, which change when the file does."""
    try:
        status = os.stat(path)
    except OSError:  # inside a zip
        return "unknown"
    return f"{status.st_mtime_ns}:{status.st_size}"
