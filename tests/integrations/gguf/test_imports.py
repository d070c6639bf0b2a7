"""The import of the integration: without gguf, and without transformers."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from tests.integrations.gguf.files import Writer, gguf, integration
from tests.oracle import ternary


def test_without_the_package_gguf_an_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "bitlinear.integrations.gguf")
    with pytest.raises(ImportError, match=r"needs the package gguf: pip install 'gguf>=0\.19'"):
        importlib.import_module("bitlinear.integrations.gguf")


def test_the_package_of_the_same_name_is_another():
    assert integration is not gguf
    assert not hasattr(gguf, "tensors")


CODE = """
import sys
sys.modules["transformers"] = None
from bitlinear.integrations import gguf
print(*(tensor.name for tensor in gguf.tensors(sys.argv[1])))
"""


@pytest.mark.slow
def test_tensors_needs_no_transformers(tmp_path):
    path = (
        Writer(tmp_path / "x.gguf").add_ternary("a.weight", ternary(2, 256), 1.0, "TQ2_0").write()
    )
    command = [sys.executable, "-c", CODE, path]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"a.weight\n"
