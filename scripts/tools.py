"""The one line about a missing tool, and texts without the paths of this machine."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Iterator
from typing import NoReturn

# The exit code of a script that lacks a tool.
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


def without_paths(text: str) -> str:
    """Replace absolute paths of two or more parts; text can be HTML."""
    return re.sub(r"(?<![\w.</])~?(/[\w.+@-]+){2,}/?", "[path]", text)
