"""The answers of slow probes, kept between processes in the cache directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, TypeVar

from .pinned import at
from .trust import why_unsafe

T = TypeVar("T")


class ProbeCache:
    """Answers of slow probes, in one JSON file that may vanish or be damaged at any time.

    A key names everything that its answer depends on; this class adds the version of this package's
    code. A writer adds its new answers to those in the file, and replaces the file as a whole. If
    two processes write at the same moment, the answers of one may be lost and are probed again.

    Args:
        directory: An existing directory that only this user can write to. None: nothing is kept.
    """

    LIMIT = 32  # answers; the oldest are dropped

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else at(directory) / "hardware.json"
        self._answers = self._read()
        self._new: dict[str, Any] = {}
        self._code_version = _code_version()

    @property
    def keeps_answers(self) -> bool:
        """Whether the next process will find what this one learns."""
        return self._path is not None and os.access(self._path.parent, os.W_OK)

    def recall(self, key: str, probe: Callable[[], Any], decode: Callable[[Any], T]) -> T:
        """Return the decoded answer under this key, or else the one that ``probe`` gives now.

        Args:
            key: Everything that the answer depends on.
            probe: Returns an answer of JSON types. What it raises passes through and is not kept,
                because a failure can be mended.
            decode: Makes a value of an answer; raises any exception for a damaged one.
        """
        key = f"{self._code_version} {key}"
        with contextlib.suppress(Exception):
            return decode(self._answers[key])
        answer = probe()
        self._answers[key] = self._new[key] = answer
        return decode(answer)

    def save(self) -> None:
        """Write the file if there are new answers; ignore failures."""
        if self._path is None or not self._new:
            return
        older = {key: answer for key, answer in self._read().items() if key not in self._new}
        newest = dict([*older.items(), *self._new.items()][-self.LIMIT :])
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=".hardware-")
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(newest, file, indent=1)
                os.replace(name, self._path)
            except BaseException:
                os.unlink(name)
                raise

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            # Another user may have laid it into a directory that was open for a while.
            if self._path is not None and not why_unsafe(self._path):
                answers = json.loads(self._path.read_bytes())
                return answers if isinstance(answers, dict) else {}
        return {}


def decode_text(answer: Any) -> str:
    """Return an answer that is a text.

    Raises:
        TypeError: The answer is something else.
    """
    if not isinstance(answer, str):
        raise TypeError(f"not a text: {answer!r}")
    return answer


def file_version(path: str) -> str:
    """Modification time and size of a file, which change when the file does."""
    try:
        status = os.stat(path)
    except OSError:  # inside a zip
        return "unknown"
    return f"{status.st_mtime_ns}:{status.st_size}"


def _code_version() -> str:
    # Another version of a probe may have answered wrongly.
    files = sorted(Path(__file__).parent.glob("*.py"))
    versions = " ".join(file_version(str(file)) for file in files)
    return hashlib.sha256(versions.encode()).hexdigest()[:12]
