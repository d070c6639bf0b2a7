"""Wording that messages of several modules share."""

from __future__ import annotations

from collections.abc import Iterable


def list_names(names: Iterable[str], limit: int = 3) -> str:
    """Join names with commas; count the names after the first ``limit`` instead of listing them."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
