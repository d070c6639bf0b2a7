"""Directories that others could replace, and what happens when they do."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitlinear import runtime
from bitlinear.runtime import artifacts, pinned
from bitlinear.runtime.cache_directory import open_cache
from bitlinear.runtime.pinned import at, opened, pin, shown
from tests.runtime.stand_ins import stand_ins, states

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory that nobody else can replace; pytest's may lie in one of another user."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


# --- The path to a pinned directory --------------------------------------------------------------


def test_a_pinned_directory_is_found_under_any_name(root: Path) -> None:
    first, second = root / "first", root / "second"
    first.mkdir()
    assert at(first) == first
    with opened(first) as descriptor:
        pin(first, descriptor)
    first.rename(second)
    first.mkdir()
    (at(first) / "file").touch()
    assert (second / "file").exists()
    assert not list(first.iterdir())
    assert (
        shown(f"{at(first)}/file: not found in {second}") == f"{first}/file: not found in {second}"
    )
    command = ["ls", at(first)]
    child = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, pass_fds=pinned.descriptors()
    )
    assert child.stdout == "file\n"
    if os.fork() == 0:
        os._exit(0 if (at(first) / "file").exists() else 1)
    assert os.wait()[1] == 0


def test_pinned_again(root: Path) -> None:
    for name in ("same", "same", "another"):
        (root / name).mkdir(exist_ok=True)
        with opened(root / name) as descriptor:
            pin(root / "name", descriptor)
        assert at(root / "name").samefile(root / name)
    before = len(os.listdir("/proc/self/fd"))
    with opened(root / "another") as descriptor:
        pin(root / "name", descriptor)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_closed_descriptor_leads_nowhere(root: Path) -> None:
    """A daemon closes every file, and the next one that it opens gets the number."""
    with opened(root) as descriptor:
        pin(root, descriptor)
    number = int(at(root).name)
    os.close(number)
    for reopened in (False, True):
        if reopened:
            other = os.open("/", os.O_RDONLY)
            os.dup2(other, number)
            os.close(other)
        with pytest.raises(OSError, match=f"the descriptor of {root} was closed"):
            at(root)
        assert shown("text") == "text"
    os.close(number)


@pytest.mark.parametrize("kind", ["a link", "a file", "nothing"])
def test_only_a_directory_is_opened(root: Path, kind: str) -> None:
    path = root / "path"
    if kind == "a link":
        path.symlink_to("/tmp")
    elif kind == "a file":
        path.touch()
    with pytest.raises(OSError), opened(path):  # noqa: PT011  ENOTDIR, ELOOP or ENOENT
        pass


@pytest.mark.parametrize("link", ["/nonexistent/{}", "/proc/1/root"])
def test_a_system_without_proc_or_with_anothers(
    root: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    """What cannot be pinned is not used."""
    shared = root / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    monkeypatch.setattr(pinned, "_link", link.format)
    found = open_cache({"BITLINEAR_CACHE_DIR": str(shared)})
    assert (found.path, found.readable, found.unsafe) == (None, (), True)
    assert f"user-{os.geteuid()} in it cannot be pinned" in found.override_problem


# --- Somebody replaces the directory during an import --------------------------------------------

_EVIL = """
#include <stdio.h>
__attribute__((constructor)) static void run() { fclose(fopen("{file}", "w")); }
"""


@pytest.fixture(scope="module")
def evil(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with other libraries. Those who load one leave a file beside the cache."""
    directory = tmp_path_factory.mktemp("evil")
    shutil.copytree(compiled, directory / "cache")
    source = directory / "evil.c"
    source.write_text(_EVIL.replace("{file}", str(directory / "loaded")))
    for library in (directory / "cache").rglob("*.so"):
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    return directory / "cache"


def _volume(root: Path, layout: str) -> Path:
    volume = root / "volume"
    volume.mkdir()
    if layout == "an own directory of another user's":
        (volume / "mine").mkdir(mode=0o700)
    if "another user" in layout:
        os.chown(volume, NOBODY, NOBODY)
    else:
        volume.chmod(int(layout, 8))
    return volume / "mine" if (volume / "mine").exists() else volume


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["open_cache", "a child process", "dlopen"])
@pytest.mark.parametrize("is_warm", [True, False])
@pytest.mark.parametrize(
    "layout",
    [
        "0777",
        "2775",
        pytest.param("another user's", marks=as_root),
        pytest.param("an own directory of another user's", marks=as_root),
    ],
)
def test_a_cache_that_is_replaced_during_an_import(
    root: Path,
    evil: Path,
    compiled: Path,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    is_warm: bool,
    moment: str,
) -> None:
    volume = _volume(root, layout)
    monkeypatch.setenv("BITLINEAR_CACHE_DIR", str(volume))
    folder = open_cache().path
    assert folder is not None
    assert folder == volume / f"user-{os.geteuid()}"
    if is_warm:
        shutil.copytree(compiled, folder, dirs_exist_ok=True)
        folder.chmod(0o700)
    moved = folder.with_name("moved")

    def replace() -> None:
        if not moved.exists():
            folder.rename(moved)
            shutil.copytree(evil, folder)

    def replacing(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if moment == "open_cache":
                result = function(*arguments, **options)
                replace()
                return result
            if moment != "dlopen" or "operator" in arguments[0]:
                replace()
            return function(*arguments, **options)

        return call

    if moment == "open_cache":
        monkeypatch.setattr(runtime, "open_cache", replacing(runtime.open_cache))
    elif moment == "dlopen":
        monkeypatch.setattr(ctypes, "CDLL", replacing(ctypes.CDLL))
    elif is_warm:
        shutil.rmtree(folder / ".self-tests")  # so that a child tests the libraries
    if moment == "a child process":
        monkeypatch.setattr(subprocess, "Popen", replacing(subprocess.Popen))

    loaded = stand_ins(compiled.with_name("sources")).load()
    assert loaded.kernel == "kernel0", loaded.problem
    assert set(states(loaded).values()) == {"cached" if is_warm else "built"}
    assert moved.exists()
    assert loaded.cache.path == folder
    assert len(artifacts.entries(folder)) == 2
    assert len(list(moved.glob("*/*/*.so"))) == 2
    assert not evil.with_name("loaded").exists()
    assert sorted(file.name for file in folder.rglob("*")) == sorted(
        file.name for file in evil.rglob("*")
    )


@as_root
@pytest.mark.slow
def test_a_cache_that_has_changed_hands_is_given_up(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long-lived process may compile again much later."""
    stand_ins(tmp_path / "sources", ("good", "good")).load()
    before = sorted(fresh.rglob("*"))
    os.chown(fresh, NOBODY, NOBODY)
    loaded = runtime.activate("kernel1")
    assert loaded.kernel == "kernel1"
    assert loaded.cache.temporary
    assert f"belongs to user {NOBODY}" in loaded.cache.reason
    assert sorted(fresh.rglob("*")) == before
