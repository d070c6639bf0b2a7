"""Types of command-line arguments, for ``argparse``."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from pathlib import Path

# Outputs and inputs of a layer: (N, K).
Shape = tuple[int, int]


def parse_shape(text: str) -> Shape:
    """Return ``(N, K)`` from ``NxK``."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NxK, such as 4096x1024")
    return int(match[1]), int(match[2])


def parse_count(text: str) -> int:
    """Return a whole number above 0."""
    if re.fullmatch(r"[1-9]\d*", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_seconds(text: str) -> float:
    """Return a duration above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")


def parse_output_path(text: str) -> Path:
    """Return a path in a directory that exists."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    return path
