"""The layers that the caller of ``bitlinear.convert`` excludes: ``exclude`` and ``filter_fn``."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..linear import BitLinear
from ..messages import list_names
from .layers import LinearLayer

# The output layer of a language model has this name in transformers.
DEFAULT_EXCLUDE = ("lm_head",)


class Exclusion:
    """The arguments ``exclude`` and ``filter_fn`` of ``bitlinear.convert``.

    Attributes:
        patterns: The entries of ``exclude``. A pattern matches a qualified name or the last
            components of one, with the wildcards of :mod:`fnmatch`.
        filter_fn: As for ``bitlinear.convert``.

    Raises:
        TypeError: ``exclude`` holds an entry that is not a string.
    """

    def __init__(
        self, exclude: Iterable[str], filter_fn: Callable[[str, nn.Module], bool] | None
    ) -> None:
        several = isinstance(exclude, Iterable) and not isinstance(exclude, str)
        patterns: tuple[Any, ...] = tuple(exclude) if several else (exclude,)
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"exclude must hold names of layers, but it holds {pattern!r:.80} "
                    f"({type(pattern).__name__}): to choose by anything else, use filter_fn"
                )
        self.patterns: tuple[str, ...] = patterns
        self.filter_fn = filter_fn

    def why_excluded(self, layer: LinearLayer) -> str:
        """Why the caller excludes a layer, or ``""``."""
        if isinstance(layer.module, BitLinear):
            return ""
        for name in layer.names or [""]:
            pattern = _matching_pattern(name, self.patterns)
            if pattern is not None:
                return f"excluded by {pattern!r}"
            if self.filter_fn is not None and not self.filter_fn(name, layer.module):
                return "filter_fn returned False"
        return ""

    def matches_module(self, name: str) -> bool:
        """Whether a pattern matches the qualified name of a module or of a module around it."""
        parts = name.split(".")
        names = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(_matching_pattern(name, self.patterns) is not None for name in names)

    def unmatched_patterns(self, linear_names: list[str], other_names: list[str]) -> list[str]:
        """The messages of warnings about patterns that exclude nothing.

        Args:
            linear_names: Qualified names of the linear layers.
            other_names: Qualified names of other modules with weights. A pattern that matches one
                of them is in use too: it suppresses the warning about weights in floating point.
        """
        return [
            f"exclude={pattern!r} matches no linear layer of the model: "
            f"{_advise(pattern, linear_names)}"
            for pattern in dict.fromkeys(self.patterns)
            if pattern not in DEFAULT_EXCLUDE
            and not any(_matching_pattern(n, [pattern]) for n in (*linear_names, *other_names))
        ]


def _matching_pattern(name: str, patterns: Iterable[str]) -> str | None:
    parts = name.split(".")
    endings = [".".join(parts[first:]) for first in range(len(parts))]
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(ending, pattern) for ending in endings):
            return pattern
    return None


def _advise(pattern: str, names: list[str]) -> str:
    """Say what to write instead of a pattern that matches none of the names of layers."""
    for name in names:
        parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        if any(_matching_pattern(parent, [pattern]) for parent in parents):
            return (
                f"it is the name of a module, but exclude holds names of layers; use "
                f"{pattern + '.*'!r} to exclude the layers inside, such as {name}"
            )
    return f"its layers are {list_names(names)}" if names else "the model has no linear layer"
