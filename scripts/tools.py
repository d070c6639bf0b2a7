"""Tools that a machine can lack. A script ends with one line that names the tool, and with 2."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from typing import NoReturn

MISSING = 2


def exit_without(tool: str, remedy: str) -> NoReturn:
    """End this process because ``tool`` is missing."""
    print(f"this script needs {tool}, which is missing: {remedy}", file=sys.stderr)
    raise SystemExit(MISSING)


def require_program(name: str, remedy: str) -> str:
    """Return the path of a program on ``PATH``, or end this process."""
    return shutil.which(name) or exit_without(name, remedy)


@contextlib.contextmanager
def importing(extra: str) -> Iterator[None]:
    """End this process if an import fails that ``extra`` of pyproject.toml installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        exit_without(
            f"the Python module {error.name}", f"run pip install '.[{extra}]' in the checkout"
        )
