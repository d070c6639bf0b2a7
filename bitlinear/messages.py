"""Wording that messages of several modules share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable


def list_names(names: Iterable[str], limit: int = 3) -> str:
    """Join names with commas; count the names after the first ``limit`` instead of listing them."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def warn(message: str) -> None:
    """Warn at the line of the user's code that led here, past this package and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("bitlinear.", "torch.")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
