"""What is detected on this machine."""

from __future__ import annotations

import dataclasses
import platform
import sys

import pytest
import torch

from bitlinear.runtime.hardware import detect
from bitlinear.runtime.rejection import CODES, Probe, Rejection, rejected

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_detect_describes_this_machine() -> None:
    found = detect()
    assert found.system == {"linux": "linux", "darwin": "darwin", "win32": "windows"}[sys.platform]
    assert found.cpu.machine not in ("AMD64", "arm64")
    assert found.python == platform.python_version()
    assert found.torch.version == torch.__version__
    assert found.torch.cuda == torch.version.cuda
    assert found.libc
    for probe in (found.compiler, found.ninja, found.nvcc, found.driver):
        assert probe.rejection is None or probe.rejection.code in CODES
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.python = "4"  # type: ignore[misc]


def test_a_probe_is_a_value_or_a_rejection() -> None:
    with pytest.raises(ValueError, match="a value or a rejection"):
        Probe(None)
    with pytest.raises(ValueError, match="a value or a rejection"):
        Probe("something", Rejection("no-gpu", "and a reason"))
    assert Probe("something").reason == ""
    assert rejected("no-gpu", "none").reason == "none"  # type: ignore[var-annotated]


def test_a_rejection_is_one_line() -> None:
    assert Rejection("no-gpu", "none").line == "none"
    assert Rejection("no-gpu", "none", "buy one").line == "none (buy one)"
