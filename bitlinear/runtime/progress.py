"""Lines on stderr for the person who waits for the import."""

from __future__ import annotations

import contextlib
import sys


def announce(text: str) -> None:
    """Print one line, if there is anywhere to print it."""
    write(f"bitlinear: {text}\n")


def write(text: str) -> None:
    """Print a text as it is, if there is anywhere to print it."""
    # A program may have closed or replaced stderr; an import must not fail because of a message.
    with contextlib.suppress(Exception):
        stream = sys.stderr
        encoding = getattr(stream, "encoding", None) or "utf-8"
        with contextlib.suppress(LookupError):
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        stream.write(text)
        stream.flush()
