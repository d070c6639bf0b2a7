"""The main job and its notebook, as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

pytestmark = pytest.mark.slow


def test_script():
    pytest.importorskip("sklearn")
    result = subprocess.run(
        [sys.executable, SCRIPTS / "quickstart.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^(\S.*?)\s+([\d.]+)%\s+([\d,]+)\s", result.stdout, re.MULTILINE)
    accuracy = {name: float(percent) for name, percent, _ in rows}
    size = {name: int(count.replace(",", "")) for name, _, count in rows}
    assert set(accuracy) == {"nn.Linear", "BitLinear (QAT)", "BitLinear (deployed)"}
    # With 8 seeds it was 98.2 to 98.9: another CPU's path is far above this bound, too.
    assert accuracy["BitLinear (QAT)"] >= 96
    assert accuracy["BitLinear (deployed)"] == accuracy["BitLinear (QAT)"]
    assert size["BitLinear (deployed)"] < 0.07 * size["nn.Linear"]
    assert "predict the same classes: yes" in result.stdout
    assert "training BitLinear: 100%" in result.stderr


def test_notebook(tmp_path):
    pytest.importorskip("sklearn")
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(SCRIPTS / "quickstart.ipynb", as_version=4)
    # Run in a folder of its own: the notebook writes a checkpoint beside itself.
    (tmp_path / "quickstart.py").write_text((SCRIPTS / "quickstart.py").read_text())
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "BitLinear (deployed)" in printed
