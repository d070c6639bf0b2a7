"""CUDA's kernels beside the CPU's: built, found again, rejected. No GPU is needed here."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitlinear import runtime
from bitlinear.runtime import artifacts
from bitlinear.runtime.gpus import Driver, Gpu
from bitlinear.runtime.hardware import Hardware, detect
from bitlinear.runtime.rejection import Probe, Rejection
from bitlinear.runtime.verdicts import Verdict
from tests.runtime.machines import with_release
from tests.runtime.stand_ins import (
    forget_loaded,
    python,
    stand_ins,
    states,
)


def with_gpus(nvcc: str = "13.0") -> Hardware:
    """This machine, with two usable GPUs beside one that is too old."""
    real = detect()
    capabilities = ((9, 0), (5, 2), (8, 0))
    gpus = tuple(Gpu(f"GPU of {major}.{minor}", (major, minor), 1) for major, minor in capabilities)
    return replace(
        real,
        torch=replace(real.torch, cuda="13.0"),
        driver=Probe(Driver("13.0", gpus)),
        nvcc=Probe(with_release(nvcc)) if nvcc else Probe(rejection=NO_NVCC),
    )


NO_NVCC = Rejection("no-compiler", "no nvcc: it is not installed", "install it")


@pytest.fixture(scope="session")
def compiled_beside_gpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `compiled`, with the CUDA build of torch that `with_gpus` pretends."""
    directory = tmp_path_factory.mktemp("compiled_beside_gpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITLINEAR_CACHE_DIR", str(directory / "cache"))
        patch.setenv("BITLINEAR_CUDA", "off")
        forget_loaded(patch)
        patch.setattr(runtime, "detect", lambda _: with_gpus())
        loaded = stand_ins(directory / "sources").load()
    off = Rejection("forced-off", "BITLINEAR_CUDA=off")
    assert loaded.cuda == Verdict("cuda", rejection=off)
    assert loaded.cuda_problem == ""
    assert states(loaded) == {"kernel0": "built", "operator": "built"}
    return directory / "cache"


@pytest.fixture
def gpus(fresh: Path, compiled_beside_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh process on such a machine, whose cache holds everything but CUDA's kernels."""
    shutil.copytree(compiled_beside_gpus, fresh)
    monkeypatch.delenv("BITLINEAR_CUDA")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(runtime, "detect", lambda _: with_gpus())
    return fresh


CPU_ONLY = {"kernel0": "cached", "operator": "cached"}


@pytest.mark.slow
def test_cuda_is_built_beside_the_rest_and_found_again(
    fresh: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("BITLINEAR_CUDA")
    monkeypatch.setattr(runtime, "detect", lambda _: with_gpus())
    tested = tmp_path / "tested"
    note = f'FILE* f = fopen("{tested}", "a"); fprintf(f, "%d ", device); fclose(f); return 0;'
    sources = stand_ins(tmp_path / "sources", cuda=note)
    loaded = sources.load()
    assert loaded.kernel == "kernel0"
    assert loaded.cuda.status == "chosen"
    assert loaded.cuda_problem == ""
    assert states(loaded) == {"kernel0": "built", "operator": "built", "cuda": "built"}
    assert loaded.artifacts["cuda"].self_test == "bit-exact with the reference on 2 GPUs"
    assert tested.read_text() == "0 2 "
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith(
        "bitlinear: compiling the kernel0 kernel, the operator and the CUDA kernels for sm_80, "
        "sm_90a for this machine into "
    )
    assert first.endswith("happens once, takes about a minute")
    assert last.startswith("bitlinear: compiled in ")
    directory = loaded.artifacts["cuda"].directory
    assert directory is not None
    assert {file.name for file in directory.iterdir()} == {"cuda.so", artifacts.META, artifacts.LOG}
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]

    forget_loaded(monkeypatch)
    assert states(sources.load()) == {**CPU_ONLY, "cuda": "cached"}
    assert capfd.readouterr().err == ""
    assert tested.read_text() == "0 2 "


@pytest.mark.parametrize(
    ("self_test", "code", "reason", "lasting"),
    [
        ("return 1;", "self-test-failed", "self-test failed: GPU 0: stand-in", True),
        pytest.param(
            "return 2 * (device == 2);",
            "compile-failed",
            "not be run: GPU 2: stand-in",
            False,
            marks=pytest.mark.slow,
        ),
        pytest.param("nonsense", "compile-failed", "ops.cpp", True, marks=pytest.mark.slow),
    ],
)
def test_a_failure_of_cuda_leaves_the_cpu_alone(
    gpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    self_test: str,
    code: str,
    reason: str,
    lasting: bool,
) -> None:
    sources = stand_ins(tmp_path / "sources", cuda=self_test)
    for again in (False, True):
        with pytest.warns(RuntimeWarning) as caught:
            loaded = sources.load()
        assert len(caught) == 1
        assert "slow reference implementation for CUDA tensors: " in str(caught[0].message)
        assert loaded.kernel == "kernel0"
        assert (loaded.cuda.status, loaded.cuda.code) == ("rejected", code)
        assert reason in loaded.cuda.reason
        assert loaded.cuda_problem == f"{loaded.cuda.reason} ({loaded.cuda.fix})"
        assert states(loaded) == {**CPU_ONLY, "cuda": "failed"}
        assert ("compiling" in capfd.readouterr().err) == (not again)
        forget_loaded(monkeypatch)
    assert loaded.cuda.rejection is not None
    assert loaded.cuda.rejection.momentary != lasting


MISMATCH = Rejection(
    "cuda-mismatch",
    "nvcc is of CUDA 12.8, torch is built for CUDA 13.0",
    "install the CUDA 13.0 toolkit, or set CUDA_HOME to where it is",
)


@pytest.mark.parametrize(
    ("nvcc", "rejection"), [("", NO_NVCC), pytest.param("12.8", MISMATCH, marks=pytest.mark.slow)]
)
def test_a_toolkit_that_will_not_do(
    gpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    nvcc: str,
    rejection: Rejection,
) -> None:
    monkeypatch.setattr(runtime, "detect", lambda _: with_gpus(nvcc))
    sources = stand_ins(tmp_path / "sources")
    with pytest.warns(RuntimeWarning, match=rejection.fix):
        loaded = sources.load()
    assert loaded.kernel == "kernel0"
    assert loaded.cuda == Verdict("cuda", rejection=rejection)
    assert capfd.readouterr().err == ""

    # What somebody else has compiled needs none.
    forget_loaded(monkeypatch)
    monkeypatch.setattr(runtime, "detect", lambda _: with_gpus())
    assert states(sources.load())["cuda"] == "built"
    forget_loaded(monkeypatch)
    monkeypatch.setattr(runtime, "detect", lambda _: with_gpus(nvcc))
    assert states(sources.load())["cuda"] == "cached"


@pytest.mark.slow
def test_cuda_without_an_operator(gpus: Path, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="too old") as caught:
        loaded = stand_ins(tmp_path / "sources", operator="#error too old").load()
    assert len(caught) == 1
    assert loaded.kernel is None
    assert loaded.cuda.status == "chosen"
    assert states(loaded) == {"kernel0": "cached", "operator": "failed", "cuda": "built"}


@pytest.mark.slow
def test_cuda_without_a_kernel(gpus: Path, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="row 3 differs"):
        loaded = stand_ins(tmp_path / "sources", ("mismatch",)).load()
    assert loaded.kernel is None
    assert loaded.cuda.status == "chosen"


@pytest.mark.slow
def test_cuda_stays_when_the_operator_is_switched(gpus: Path, tmp_path: Path) -> None:
    imported = stand_ins(tmp_path / "sources", ("good", "good")).load()
    assert imported.cuda.status == "chosen"
    after = runtime.activate("kernel1")
    assert after.cuda == imported.cuda
    assert after.artifacts["cuda"] == imported.artifacts["cuda"]


def test_only_what_the_list_allows_is_compiled(
    gpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
    loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.cuda.reason.startswith("GPU of 9.0 (compute_80), GPU of 5.2 (requires")
    meta = json.loads(loaded.artifacts["cuda"].path.with_name(artifacts.META).read_text())
    assert meta["ingredients"]["architectures"] == "compute_80 sm_80"


def test_build_off_is_for_cuda_too(
    gpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLINEAR_BUILD", "OFF")
    loaded = stand_ins(tmp_path / "sources").load()
    assert loaded.kernel is None
    assert loaded.cuda.code == "forced-off"
    assert loaded.cuda_problem == ""


def test_kernels_may_be_there_before_the_operator_is_defined() -> None:
    """C++ enters the CUDA kernels first if Python defines the operator."""
    run = python(
        """
import torch
early = torch.library.Library("bitlinear", "IMPL")
early.impl("linear", lambda *arguments: "the kernel", "CUDA")
import bitlinear
has = torch._C._dispatch_has_kernel_for_dispatch_key
assert has("bitlinear::linear", "CUDA")
assert not torch.cuda.is_initialized()
assert bitlinear.BitLinear(5, 3).deploy()(torch.ones(2, 5)).shape == (2, 3)
""",
        BITLINEAR_BUILD="off",
    )
    assert run.returncode == 0, run.stderr
