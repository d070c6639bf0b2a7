"""The installed distribution ``bitlinear``: this project, or another one of the same name."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

SUMMARY = "A hardware-optimised ternary linear layer for PyTorch"
"""The first words of this project's description in ``pyproject.toml``."""

_PACKAGE = Path(__file__).parents[1]


def foreign_distribution() -> str:
    """Name the distribution of another project that is installed under the name ``bitlinear``.

    The name on the package index belongs to a different project. This one is installed from a
    checkout or a git URL, or it runs from a checkout without being installed.

    Returns:
        Name and version of the other project's distribution. Empty if the installed distribution
        owns this package's files or carries its description, and if there is none.
    """
    try:
        distribution = metadata.distribution("bitlinear")
    except metadata.PackageNotFoundError:
        return ""
    fields = distribution.metadata
    summary = str(fields["Summary"]) if "Summary" in fields else ""
    if summary.startswith(SUMMARY) or _owns_package(distribution):
        return ""
    return f"bitlinear {distribution.version}"


def _owns_package(distribution: metadata.Distribution) -> bool:
    init = (_PACKAGE / "__init__.py").resolve()
    return any(
        Path(str(distribution.locate_file(file))).resolve() == init
        for file in distribution.files or ()
        if file.name == "__init__.py"
    )
