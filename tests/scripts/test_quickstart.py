"""The quickstart, as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from scripts import quickstart

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart.py"


@pytest.mark.slow
def test_the_script_trains_deploys_and_compares():
    command = [sys.executable, SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^(\S.*?)\s+([\d.]+)%\s+([\d,]+)\s", result.stdout, re.MULTILINE)
    accuracy = {name: float(percent) for name, percent, _ in rows}
    size = {name: int(count.replace(",", "")) for name, _, count in rows}
    assert set(accuracy) == {"nn.Linear", "BitLinear (QAT)", "BitLinear (deployed)"}
    # 8 seeds gave 98.2 to 98.9 %: on another CPU the accuracy is also far above this bound.
    assert accuracy["BitLinear (QAT)"] >= 96
    assert accuracy["BitLinear (deployed)"] == accuracy["BitLinear (QAT)"]
    assert size["BitLinear (deployed)"] < 0.07 * size["nn.Linear"]
    assert "predict the same classes: yes" in result.stdout
    assert "training BitLinear: 100%" in result.stderr


def test_one_epoch_goes_through_all_steps(monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "WIDTH", 32)
    models = quickstart.run(epochs=1)
    assert list(models) == ["nn.Linear", "BitLinear (QAT)", "BitLinear (deployed)"]
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\S.*%.* us", printed, re.MULTILINE)) == 3
    assert "predict the same classes: yes" in printed


def test_different_predictions_fail(monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "train", lambda *_: [])
    monkeypatch.setattr(quickstart, "predict", lambda *_: torch.randn(450))
    with pytest.raises(SystemExit) as end:
        quickstart.run(epochs=1)
    assert end.value.code == 1
    assert "predict the same classes: NO" in capsys.readouterr().out
