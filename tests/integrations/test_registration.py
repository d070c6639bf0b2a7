"""The registration of integrations: as soon as their projects are imported, and not before."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys

import pytest

from bitlinear import integrations


def test_the_import_of_bitlinear_does_not_import_torch_onnx():
    code = """
import sys, torch
early = "torch.onnx" in sys.modules  # in old versions
import bitlinear
assert early or "torch.onnx" not in sys.modules
assert early or "bitlinear.integrations.onnx" not in sys.modules
import torch.onnx
assert "bitlinear.integrations.onnx" in sys.modules
assert torch.onnx.__spec__.name == "torch.onnx"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Modules ``stranger`` and ``stranger_integration``, not imported yet."""
    (tmp_path / "stranger.py").write_text("value = 1\n")
    (tmp_path / "stranger_integration.py").write_text(
        "import stranger\ncalls = []\ndef register():\n    calls.append(stranger.value)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    yield
    assert sys.meta_path == before
    for name in ("stranger", "stranger_integration"):
        sys.modules.pop(name, None)


def test_an_integration_is_registered_after_the_import(stranger):
    integrations.register_after_import("stranger", "stranger_integration")
    assert "stranger" not in sys.modules
    importlib.import_module("stranger")
    assert sys.modules["stranger_integration"].calls == [1]
    importlib.reload(sys.modules["stranger"])
    assert sys.modules["stranger_integration"].calls == [1]
    integrations.register_after_import("stranger", "stranger_integration")
    assert sys.modules["stranger_integration"].calls == [1, 1]


def test_an_integration_that_fails_breaks_no_import(stranger, caplog):
    caplog.set_level(logging.INFO, logger="bitlinear")
    integrations.register_after_import("stranger", "no_such_integration")
    assert importlib.import_module("stranger").value == 1
    assert "no_such_integration cannot be used: ModuleNotFoundError" in caplog.text
