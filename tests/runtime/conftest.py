"""Fixtures: a process that has loaded nothing yet, with a cold, a half full or a warm cache."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitlinear import runtime
from bitlinear.runtime import artifacts, diagnosis, pinned
from tests.runtime.stand_ins import (
    forget_loaded,
    stand_ins,
)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Start over as in a new process; the directory of a cold cache."""
    for name in ("BITLINEAR_KERNEL", "BITLINEAR_BUILD", "BITLINEAR_VERBOSE", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BITLINEAR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("BITLINEAR_CUDA", "off")  # also on a machine with GPUs
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    # The compiler here may need such a variable, which makes every compile error momentary.
    monkeypatch.setattr(diagnosis, "search_paths", lambda: "")
    forget_loaded(monkeypatch)
    yield tmp_path / "cache"
    staging = tmp_path / "cache" / artifacts.STAGING
    assert not staging.exists() or not any(staging.iterdir())


@pytest.fixture(autouse=True)
def unpinned() -> Iterator[None]:
    """Close the directories that a test has pinned; a process keeps them to its end."""
    before = set(pinned._pinned)
    yield
    for path in set(pinned._pinned) - before:
        with contextlib.suppress(OSError):  # a test may have closed it
            os.close(pinned._pinned.pop(path)[0])


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the stand-in operator and kernel0, compiled from the default sources."""
    directory = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITLINEAR_CACHE_DIR", str(directory / "cache"))
        patch.setenv("BITLINEAR_CUDA", "off")
        forget_loaded(patch)
        assert stand_ins(directory / "sources").load().kernel == "kernel0"
    return directory / "cache"


@pytest.fixture
def ready(fresh: Path, compiled: Path) -> Path:
    """A fresh process whose cache holds the stand-in operator and kernel0."""
    shutil.copytree(compiled, fresh)
    return fresh


@pytest.fixture
def half(fresh: Path, compiled: Path) -> Path:
    """A fresh process whose cache holds the operator, so that only kernels are compiled."""
    shutil.copytree(compiled / "operator", fresh / "operator")
    fresh.chmod(0o700)
    return fresh


@pytest.fixture(scope="module")
def warm() -> dict[str, str]:
    """The environment in which the real package finds everything compiled."""
    loaded = runtime.current()
    if loaded.kernel is None or loaded.cache.path is None:
        pytest.skip(f"no compiled kernel: {loaded.problem}")
    return {"BITLINEAR_CACHE_DIR": str(loaded.cache.path)}
