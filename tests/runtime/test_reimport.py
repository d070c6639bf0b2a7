"""Imported again in the same process, as notebooks do it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.stand_ins import python

_PURGE = """
import gc, os, sys, warnings
import torch

def purge():
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitlinear"]:
        del sys.modules[name]
    gc.collect()

def check(layer):
    assert layer(torch.ones(2, 5)).shape == (2, 3)
    compiled = torch.compile(layer, backend="aot_eager")
    assert compiled(torch.ones(2, 5)).shape == (2, 3)
"""


def run(script: str, **environment: str) -> str:
    done = python(_PURGE + script, **environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_deleted_from_sys_modules_and_reloaded(warm: dict[str, str]) -> None:
    """Earlier layers and later ones work, whatever the garbage collector has done."""
    errors = run(
        """
import bitlinear
first = bitlinear.BitLinear(5, 3).deploy()
kernel = bitlinear.runtime.current().kernel
del bitlinear
for _ in range(2):
    purge()
    import bitlinear
    assert bitlinear.HAS_BITLINEAR
    assert bitlinear.runtime.current().kernel == kernel
    check(bitlinear.BitLinear(5, 3).deploy())
    check(first)
import importlib
importlib.reload(bitlinear)
check(bitlinear.BitLinear(5, 3).deploy())
""",
        **warm,
    )
    assert errors == ""


@pytest.mark.slow
def test_switched_off_after_the_first_import(warm: dict[str, str]) -> None:
    """The operator cannot be unloaded; the second import says what it runs."""
    errors = run(
        """
import bitlinear
kernel = bitlinear.runtime.current().kernel
purge()
os.environ["BITLINEAR_BUILD"] = "off"
import bitlinear
assert bitlinear.runtime.current().kernel == kernel
assert bitlinear.HAS_BITLINEAR
(chosen,) = [v for v in bitlinear.available_kernels() if v.status == "chosen"]
assert chosen.variant == kernel
check(bitlinear.BitLinear(5, 3).deploy())
""",
        **warm,
    )
    assert errors.startswith("bitlinear: this process keeps the kernels of its first import")


@pytest.mark.slow
def test_a_setting_put_right(warm: dict[str, str]) -> None:
    run(
        """
os.environ["BITLINEAR_KERNEL"] = "nonsense"
try:
    import bitlinear
except ValueError as error:
    assert "names no CPU kernel" in str(error)
del os.environ["BITLINEAR_KERNEL"]
import bitlinear
check(bitlinear.BitLinear(5, 3).deploy())
""",
        **warm,
    )


@pytest.mark.slow
@pytest.mark.parametrize("between", ["purge()", "del bitlinear; purge()"])
def test_first_without_kernels_then_with_them(
    warm: dict[str, str], tmp_path: Path, between: str
) -> None:
    """Python has defined the operators when the library comes that defines them, too."""
    run(
        f"""
warm = os.environ["BITLINEAR_CACHE_DIR"]
os.environ.update(BITLINEAR_CACHE_DIR={str(tmp_path)!r}, CXX="/nonexistent")
warnings.simplefilter("ignore")
import bitlinear
assert not bitlinear.HAS_BITLINEAR
first = bitlinear.BitLinear(5, 3).deploy()
check(first)
os.environ.update(BITLINEAR_CACHE_DIR=warm, CXX="")
{between}
import bitlinear
assert bitlinear.HAS_BITLINEAR
check(first)
check(bitlinear.BitLinear(5, 3).deploy())
""",
        **warm,
    )


@pytest.mark.slow
def test_integrations_are_registered_again(warm: dict[str, str]) -> None:
    """torch.compile with inductor and torch.onnx keep what they registered at the first import."""
    pytest.importorskip("onnx")
    errors = run(
        """
import torch.onnx, torch._inductor.lowering
import bitlinear
purge()
import bitlinear
layer = bitlinear.BitLinear(5, 3).deploy()
check(layer)
torch.compile(layer)(torch.ones(2, 5))
""",
        **warm,
    )
    assert "Error" not in errors
