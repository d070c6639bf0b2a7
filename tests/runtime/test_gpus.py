"""The NVIDIA driver and its GPUs, with a stand-in for the driver."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Callable

import pytest
import torch

from bitlinear.runtime import children, gpus
from bitlinear.runtime.gpus import Driver, Gpu
from bitlinear.runtime.hardware import Hardware, detect
from bitlinear.runtime.rejection import Probe
from tests.runtime.stand_ins import libcuda

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="session")
def stand_in_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return libcuda(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(stand_in_driver: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hardware]:
    """Detects what a CUDA build of torch would meet beside a driver with these GPUs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpus, "_NVIDIA_DRIVER", (str(stand_in_driver),))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(stand_in_driver.parent))

    def detect_with(gpus: str, init: int = 0, cache_dir: Path | None = None) -> Hardware:
        monkeypatch.setenv("STAND_IN_GPUS", gpus)
        monkeypatch.setenv("STAND_IN_INIT", str(init))
        return detect(cache_dir)

    return detect_with


H100, OLD = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 1 << 36), Gpu("Quadro M4000", (5, 2), 1 << 36)


@linux
@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("NVIDIA H100 80GB HBM3:9.0;", (H100,)),
        ("NVIDIA H100 80GB HBM3:9.0;Quadro M4000:5.2;", (H100, OLD)),
        ("Quadro M4000:5.2;NVIDIA H100 80GB HBM3:9.0;", (OLD, H100)),
        ("", ()),
    ],
)
def test_gpus(text: str, gpus: tuple[Gpu, ...], driver: Callable[..., Hardware]) -> None:
    found = driver(text)
    assert found.driver == Probe(Driver("13.2", gpus))


@linux
def test_a_driver_that_shows_no_gpu_is_an_answer(driver: Callable[..., Hardware]) -> None:
    """As with CUDA_VISIBLE_DEVICES="" on a machine with GPUs."""
    assert driver("NVIDIA H100:9.0;", init=100).driver.value == Driver("13.2", ())


@linux
@pytest.mark.parametrize(
    ("init", "reason"),
    [
        (999, "the NVIDIA driver does not answer: cuInit: unknown error (999)"),
        (-1, "gpu_probe.py failed with -6: no message"),
    ],
)
def test_a_driver_that_fails_has_a_reason_and_is_asked_again(
    init: int, reason: str, driver: Callable[..., Hardware], tmp_path: Path
) -> None:
    for _ in range(2):
        found = driver("NVIDIA H100:9.0;", init, tmp_path)
        assert found.driver.rejection is not None
        assert found.driver.rejection.code == "cuda-mismatch"  # torch may still use the GPU
        assert found.driver.reason.endswith(reason)
    assert driver("NVIDIA H100:9.0;", 0, tmp_path).driver.value is not None


@linux
def test_no_driver(
    driver: Callable[..., Hardware], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLINEAR_CHILD", "1")
    assert "is a child of an import of bitlinear" in driver("").driver.reason
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpus, "_NVIDIA_DRIVER", (str(tmp_path),))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    (tmp_path / "libcuda.so.1").touch()
    assert "does not answer: " in detect().driver.reason
    monkeypatch.setattr(gpus, "_NVIDIA_DRIVER", (str(tmp_path / "missing"),))
    assert detect().driver.reason == "no NVIDIA driver is loaded"
    monkeypatch.setattr(torch.version, "cuda", None)  # of ROCm's builds, too
    assert detect().driver.reason == "not looked for: torch is built without CUDA"


@linux
def test_the_drivers_answer_is_remembered(
    driver: Callable[..., Hardware], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    ask = gpus._ask_driver
    monkeypatch.setattr(gpus, "_ask_driver", lambda: asked.append(1) or ask())

    def count(gpus: str = "NVIDIA H100 80GB HBM3:9.0;") -> int:
        assert driver(gpus, 0, tmp_path).driver.value is not None
        return len(asked)

    assert [count(), count()] == [1, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [count(""), count("")] == [2, 2]  # that there is none is remembered as well
    monkeypatch.setattr(gpus, "boot_id", lambda: "another")
    assert [count(), count()] == [3, 3]
    monkeypatch.setattr(gpus, "file_text", lambda path: "another driver")
    assert [count(), count()] == [4, 4]
    monkeypatch.setattr(gpus, "_nvidia_devices", lambda: ["nvidia0", "nvidia1"])
    assert [count(), count()] == [5, 5]
    monkeypatch.setattr(gpus, "boot_id", lambda: "")  # nothing says how long it holds
    assert [count(), count()] == [6, 7]


@linux
@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("NVRM: API mismatch\nmore", "the NVIDIA driver does not answer: NVRM: API mismatch"),
        ('{"reason": "no device"}', "the NVIDIA driver does not answer: no device"),
    ],
)
def test_an_answer_that_is_none(
    output: str, reason: str, driver: Callable[..., Hardware], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "output_of", lambda program: output)
    assert driver("").driver.reason == reason
