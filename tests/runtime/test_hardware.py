"""What is detected on this machine."""

from __future__ import annotations

import dataclasses
import platform
import sys

import pytest
import torch

from bitlinear.runtime.hardware import detect
from bitlinear.runtime.probe import Probe

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_detect_describes_this_machine() -> None:
    found = detect()
    assert found.system == {"linux": "linux", "darwin": "darwin", "win32": "windows"}[sys.platform]
    assert found.cpu.machine not in ("AMD64", "arm64")
    assert found.python == platform.python_version()
    assert found.torch.version == torch.__version__
    assert found.torch.cuda == torch.version.cuda
    assert found.libc
    assert (found.compiler is None) == bool(found.compiler_reason)
    assert (found.ninja is None) == bool(found.ninja_reason)
    assert (found.nvcc is None) == bool(found.nvcc_reason)
    assert (found.driver is None) == bool(found.driver_reason)
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.python = "4"  # type: ignore[misc]


@pytest.mark.parametrize(("value", "reason"), [(None, ""), ("something", "and a reason")])
def test_a_probe_is_a_value_or_a_reason(value: str | None, reason: str) -> None:
    with pytest.raises(ValueError, match="a value or a reason"):
        Probe(value, reason)
