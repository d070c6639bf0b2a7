"""Python child processes: which interpreter starts them, and what they can import.

A child runs what may crash or hang: a build, a self-test, a question to the driver or to
py-cpuinfo. It must not depend on the surroundings of the user's program. A folder with a file
``encodings.py`` keeps Python from starting, and one with ``setuptools.py`` breaks a build.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .rejection import Probe, rejected
from .system import ProbeError, command_output
from .trust import belongs_to_others

_MARK = "BITLINEAR_CHILD"  # set in children, which start no children of their own
_SECONDS = 5.0  # an interpreter answers within milliseconds
_PYTHON = re.compile(r"(python|pypy)[-.\w]*", re.IGNORECASE)
_IDENTITY = "import sys; print(sys.implementation.cache_tag, sys.hexversion, sys.maxsize)"
# -I and -S leave the standard library alone on the path. The entries that are added behind it
# cannot hide one of its modules. Warnings would stand among a compiler's lines.
_ISOLATED = ("-I", "-S", "-Wignore", "-c")
_RUN = (
    "import json, runpy, sys; path, program = sys.argv[1:3]; del sys.argv[1:3]; "
    "sys.path += json.loads(path); runpy.run_path(program, run_name='__main__')"
)


def python_command(program: Path, *arguments: str, path: Iterable[str] = ()) -> list[str]:
    """Return the command that runs a program in a child with this Python.

    Args:
        program: A Python file. Its folder is not on the child's path.
        arguments: Its arguments.
        path: Where it can import from, apart from the standard library.

    Raises:
        ProbeError: No interpreter was found.
    """
    run = [*_ISOLATED, _RUN, json.dumps(list(path)), str(program)]
    return [interpreter(), *run, *arguments]


def output_of(program: Path, path: Iterable[str] = (), timeout: float = 30.0) -> str:
    """Run a program in a child with this Python, and return what it prints.

    Raises:
        ProbeError: It fails, prints nothing or takes longer than ``timeout`` seconds.
    """
    command = python_command(program, path=path)
    return command_output(command, timeout, child_environment(), shown=program.name)


def child_environment() -> dict[str, str]:
    """Return the environment of a child: without the settings of a program's threads."""
    # A self-test must not depend on OMP_*.
    dropped = ("OMP_", "KMP_", "GOMP_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    # Compilers and ccache obey the configuration files that lie there.
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        if belongs_to_others(environment.get(name, "")):
            environment.update({name: os.devnull, "CCACHE_DISABLE": "1"})
    # If the child imports this package after all, that import must not start children.
    return {**environment, _MARK: "1", "BITLINEAR_BUILD": "off"}


def import_path() -> list[str]:
    """List the folders that this process imports packages from, those of installed ones first."""
    import torch

    entries = []
    for entry in sys.path:
        with contextlib.suppress(OSError):  # the working directory may have been deleted
            if os.path.exists(entry or "."):
                entries.append(os.path.abspath(entry))
    first = [str(Path(torch.__file__).parents[1])]
    first += [entry for entry in entries if entry.endswith(("site-packages", "dist-packages"))]
    # The rest begins with the folder of the user's script.
    return list(dict.fromkeys([*first, *entries]))


def interpreter() -> str:
    """Return an interpreter that is the same Python as this process.

    ``sys.executable`` is another program if Python is embedded in it. So only a file with the name
    of a Python is started, and its answer is waited for a few seconds.

    Raises:
        ProbeError: There is none.
    """
    if os.environ.get(_MARK):
        raise ProbeError("this process is a child of an import of bitlinear")
    found = find_interpreter()
    if found.value is None:
        raise ProbeError(found.reason)
    return found.value


@functools.cache
def find_interpreter() -> Probe[str]:
    """Try one Python after the other; a process does this once."""
    problem = f"sys.executable is {sys.executable!r}"
    tried: set[str] = set()
    for candidate in _candidates():
        if os.path.realpath(candidate) in tried:
            continue
        tried.add(os.path.realpath(candidate))
        command = [candidate, *_ISOLATED, _IDENTITY]
        try:
            answer = command_output(command, _SECONDS, child_environment())
        except ProbeError as error:
            problem = str(error)
            continue
        if answer.split() == list(map(str, _identity())):
            return Probe(candidate)
        problem = f"{candidate} is another Python"
    reason = f"there is no Python interpreter to start a child with: {problem}"
    return rejected("no-compiler", reason)


def _candidates() -> Iterator[str]:
    version = "python{}.{}".format(*sys.version_info)
    own = [sys.executable, getattr(sys, "_base_executable", None)]
    if getattr(sys, "frozen", False):
        own = []  # the program itself
    for prefix in (sys.prefix, sys.exec_prefix, sys.base_prefix):
        for folder in ("bin", "Scripts", ""):
            own += [os.path.join(prefix, folder, name) for name in (version, "python3", "python")]
            own.append(os.path.join(prefix, folder, "python.exe"))
    own.append(shutil.which(version))
    for path in own:
        if path and _PYTHON.fullmatch(os.path.basename(path)) and os.path.isfile(path):
            yield os.path.abspath(path)


def _identity() -> tuple[object, ...]:
    return sys.implementation.cache_tag, sys.hexversion, sys.maxsize
