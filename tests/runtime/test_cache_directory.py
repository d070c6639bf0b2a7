"""The choice of the cache directory."""

from __future__ import annotations

import atexit
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable

import pytest

from bitlinear.runtime import cache_directory
from bitlinear.runtime.cache_directory import CacheDirectory, open_cache

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


def test_candidates_in_order(tmp_path: Path) -> None:
    environ = {
        "BITLINEAR_CACHE_DIR": str(tmp_path / "chosen"),
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
    }
    found = open_cache(environ)
    assert (found.path, found.reason) == (tmp_path / "chosen", "")
    assert stat.S_IMODE((tmp_path / "chosen").stat().st_mode) == 0o700
    del environ["BITLINEAR_CACHE_DIR"]
    assert open_cache(environ).path == tmp_path / "xdg" / "bitlinear"


def test_home_is_the_last_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_cache({}).path == tmp_path / ".cache" / "bitlinear"
    relative = open_cache({"XDG_CACHE_HOME": "relative/is/ignored"})
    assert relative.path == tmp_path / ".cache" / "bitlinear"


def test_a_file_in_the_way_leads_to_the_next_candidate(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = open_cache(
        {"BITLINEAR_CACHE_DIR": str(tmp_path / "file"), "XDG_CACHE_HOME": str(tmp_path)}
    )
    assert found.path == tmp_path / "bitlinear"
    assert "file cannot be created" in found.reason
    assert not found.unsafe


def test_nowhere_to_write_gives_a_private_temporary_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    none = open_cache({})
    assert none.path is None
    assert none.reason.startswith("/proc/nonexistent/.cache/bitlinear cannot be created")
    found = cache_directory.with_temporary(none)
    assert found.path is not None
    assert found.temporary
    assert found.path in found.readable
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o700
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nonexistent")
    assert cache_directory.with_temporary(none).path is None


def test_the_exit_of_another_process_keeps_the_temporary_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    found = cache_directory.with_temporary(CacheDirectory(None, "no reason")).path
    (remove,) = at_exit
    assert found is not None
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: 0)
        remove()
    assert found.is_dir()
    remove()
    assert not found.exists()


@pytest.mark.slow
def test_the_temporary_directory_ends_with_the_process_but_not_with_its_forks() -> None:
    script = """
import os, sys
sys.argv = ["-c"]
os.environ["BITLINEAR_BUILD"] = "off"
from bitlinear.runtime import cache_directory
from bitlinear.runtime.cache_directory import open_cache
found = cache_directory.with_temporary(cache_directory.CacheDirectory(None, "no reason"))
if os.fork() == 0:
    sys.exit(0)  # runs the exit handlers, unlike os._exit
os.wait()
assert found.path.is_dir()
print(found.path)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not Path(run.stdout.strip()).exists()


@as_root
def test_a_home_that_belongs_to_somebody_else() -> None:
    """Root may write anywhere, so this process becomes somebody who may not."""
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        os.seteuid(NOBODY)
        try:
            found = open_cache({"XDG_CACHE_HOME": home})
        finally:
            os.seteuid(0)
    assert f"{home}/bitlinear cannot be created (Permission denied)" in found.reason


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_others_may_write(tmp_path: Path, mode: int) -> None:
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    chosen.chmod(mode)
    found = open_cache({"BITLINEAR_CACHE_DIR": str(chosen), "XDG_CACHE_HOME": str(tmp_path)})
    assert found.unsafe
    assert f"{chosen} can be written to by others (mode {mode:04o})" in found.reason
    assert found.path == tmp_path / "bitlinear"
    assert chosen not in found.readable


def test_belongs_to_somebody_else(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        chosen = tmp_path / "chosen"
        chosen.mkdir(mode=0o700)
        os.chown(chosen, NOBODY, NOBODY)
        owner = NOBODY
    else:
        chosen, owner = Path("/usr"), 0
    found = open_cache({"BITLINEAR_CACHE_DIR": str(chosen), "XDG_CACHE_HOME": str(tmp_path)})
    assert found.unsafe
    assert f"belongs to user {owner}, not to user {os.geteuid()}" in found.reason
    assert found.path == tmp_path / "bitlinear"


def test_symbolic_links_count_as_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "mine").mkdir(mode=0o700)
    for name in ("open", "mine"):
        (tmp_path / f"to_{name}").symlink_to(tmp_path / name)
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    found = open_cache({**environ, "BITLINEAR_CACHE_DIR": str(tmp_path / "to_open")})
    assert found.unsafe
    assert found.path == tmp_path / "bitlinear"
    found = open_cache({**environ, "BITLINEAR_CACHE_DIR": str(tmp_path / "to_mine")})
    assert not found.unsafe
    assert found.path == tmp_path / "mine"
