"""Run the notebooks and save them with their output.

    python -m scripts.dev.save_notebooks [scripts/quickstart.ipynb ...]

Progress bars keep their last state only, and paths of this machine become "[path]". Takes two to
four minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts import tools

with tools.importing("dev"):
    import nbclient
    import nbformat

SCRIPTS = Path(__file__).resolve().parents[1]
NOTEBOOKS = tuple(
    SCRIPTS / f"{name}.ipynb" for name in ("quickstart", "generate", "bring_your_model", "char_lm")
)
# Each cell has this long, in seconds.
TIMEOUT = 900


def run(notebook: Any, folder: Path) -> Any:
    """Run all cells, and make their output fit to be saved.

    Args:
        notebook: The notebook, which is changed in place and returned.
        folder: The working directory; the files that the cells write stay there.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised an exception.
    """
    # The cells import modules that lie beside the notebook, and the package of the scripts.
    search = [str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": folder}},
        record_timing=False,
    )
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = list(map(cleaned, merged(cell.outputs)))
    return notebook


def merged(outputs: Sequence[Any]) -> list[Any]:
    """Join the pieces of a stream, as a notebook's user interface does."""
    joined: list[Any] = []
    for output in outputs:
        name = output.get("name")
        if joined and name is not None and joined[-1].get("name") == name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def cleaned(output: Any) -> Any:
    """Remove paths and overwritten text from an output."""
    if output.output_type == "stream":
        output.text = tools.without_paths(last_states(output.text))
    for kind, text in output.get("data", {}).items():
        if kind.startswith("text/"):
            output.data[kind] = tools.without_paths(text)
    return output


def last_states(text: str) -> str:
    """Return ``text`` as a terminal shows it: a carriage return overwrites its line."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS)
    for path in parser.parse_args(argv).notebooks:
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(nbformat.read(path, as_version=4), Path(folder))
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
