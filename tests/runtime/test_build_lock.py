"""The lock: one process at a time compiles, and none waits for ever."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitlinear.runtime.build_lock import build_lock

_HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1] + "/.lock"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold_lock(root: Path, seconds: float) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(root), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_wait_is_announced_once_and_gets_the_lock(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with hold_lock(tmp_path, 1.0) as holder, build_lock(tmp_path):
        assert holder.wait(5) == 0
        with hold_in_vain(tmp_path) as other:
            assert other.wait(10) == 1
    announced = f"bitlinear: waiting for another process that compiles into {tmp_path}\n"
    assert capfd.readouterr().err == announced
    assert [file.name for file in tmp_path.iterdir()] in ([], [".lock"])


def test_a_free_lock_is_taken_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with build_lock(tmp_path), hold_in_vain(tmp_path) as other:
        assert other.wait(10) == 1
    assert capfd.readouterr().err == ""


def test_a_link_in_its_place_is_not_opened(tmp_path: Path) -> None:
    """Old versions of filelock would empty the file that it leads to."""
    other = tmp_path / "other"
    other.write_text("text")
    (tmp_path / ".lock").symlink_to(other)
    with build_lock(tmp_path), hold_in_vain(tmp_path) as holder:
        assert holder.wait(10) == 1
    assert other.read_text() == "text"


def hold_in_vain(root: Path) -> subprocess.Popen[str]:
    """A process that fails if it does not get the lock at once."""
    script = _HOLD.replace('"/.lock")', '"/.lock", timeout=0)')
    return subprocess.Popen(
        [sys.executable, "-c", script, str(root), "0"], stderr=subprocess.DEVNULL, text=True
    )


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    with hold_lock(tmp_path, 600) as holder:
        holder.kill()
        holder.wait()
        began = time.monotonic()
        with build_lock(tmp_path):
            pass
        assert time.monotonic() - began < 5


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    with hold_lock(tmp_path, 600) as holder:
        with build_lock(tmp_path, seconds=1.0):
            pass
        holder.kill()


def test_without_filelock_or_locks_the_build_goes_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build_lock(tmp_path / "missing"):  # no directory, so no lock
        pass
    with build_lock(None):
        pass
    monkeypatch.setitem(sys.modules, "filelock", None)
    with build_lock(tmp_path):
        assert not (tmp_path / ".lock").exists()
