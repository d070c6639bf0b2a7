"""Lines on stderr for the person who waits for the import."""

from __future__ import annotations

import sys


def announce(text: str) -> None:
    """Print one line."""
    if sys.stderr is not None:  # pythonw has none
        print(f"bitlinear: {text}", file=sys.stderr, flush=True)
