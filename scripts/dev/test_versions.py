"""Run the test suite on pairs of Python and torch, each in a virtual environment of its own.

    python -m scripts.dev.test_versions [python3.9=lowest python3.13=2.14.1]

Needs the interpreters, with their venv modules, and the package index. The default is the lowest
and the newest pair that pyproject.toml claims: ``lowest`` installs every dependency at its lower
bound. The environments stay in --venvs, so that a second run installs nothing. Prints one line per
pair, for tests/README.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts import tools

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ("python3.9=lowest", "python3.13=2.14.1")
DESCRIBE = """
import sys, numpy, torch
print(sys.version.split()[0], torch.__version__, numpy.__version__)
"""


def constraints(torch_version: str) -> str:
    """Return the contents of a pip constraints file."""
    if torch_version != "lowest":
        return f"torch=={torch_version}"
    floors = re.findall(r'"([\w-]+)>=([\w.]+)', (ROOT / "pyproject.toml").read_text())
    # The bound of setuptools is for the build of the package, which the claim leaves out.
    return "\n".join(f"{name}=={floor}" for name, floor in floors if name != "setuptools")


def test_pair(interpreter: str, torch_version: str, venvs: Path) -> tuple[str, bool]:
    """Install one pair and run pytest; return the line for the table, and whether all passed."""
    venv = venvs / f"{interpreter.strip('/').replace('/', '-')}-torch-{torch_version}"
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", venv], check=True)
    (venv / "constraints.txt").write_text(constraints(torch_version))
    pip = [python, "-m", "pip", "install", "--quiet", "-c", venv / "constraints.txt"]
    subprocess.run([*pip, "-e", f"{ROOT}[dev]"], check=True)
    report = subprocess.run(
        [python, "-m", "pytest", "-q", "-m", "slow or not slow"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(report.stdout)
    versions = subprocess.run(
        [python, "-c", DESCRIBE], stdout=subprocess.PIPE, text=True, check=True
    )
    summary = report.stdout.strip().splitlines()[-1].strip("= ")
    cells = [*versions.stdout.split(), summary]
    return f"| {' | '.join(cells)} |", report.returncode == 0


def parse_pair(text: str) -> tuple[str, str]:
    """Return an interpreter and a version of torch, for argparse."""
    match = re.fullmatch(r"([^=]+)=(lowest|\d+(?:\.\d+)*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form python3.9=2.4.0")
    return match[1], match[2]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pairs = [parse_pair(pair) for pair in PAIRS]
    parser.add_argument(
        "pairs", nargs="*", type=parse_pair, default=pairs, metavar="INTERPRETER=TORCH"
    )
    parser.add_argument("--venvs", type=Path, default=ROOT / ".venv-versions")
    arguments = parser.parse_args(argv)
    for interpreter, _ in arguments.pairs:
        tools.require_program(interpreter, "install that version of Python")
    results = [test_pair(*pair, arguments.venvs.resolve()) for pair in arguments.pairs]
    print("| Python | torch | NumPy | result |\n|---|---|---|---|")
    for line, _ in results:
        print(line)
    sys.exit(0 if all(passed for _, passed in results) else 1)


if __name__ == "__main__":
    main()
