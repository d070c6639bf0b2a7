"""Lines on stderr for a person who waits for the import."""

from __future__ import annotations

import sys


def announce(text: str) -> None:
    """One line for whoever waits for the import."""
    if sys.stderr is not None:  # pythonw has none
        print(f"bitlinear: {text}", file=sys.stderr, flush=True)
