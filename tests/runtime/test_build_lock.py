"""The lock: one process at a time compiles, and none waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitlinear.runtime.build_lock import build_lock

_HOLD = """
import json, os, socket, sys, time
from filelock import FileLock
with FileLock(sys.argv[1] + "/.lock"):
    with open(sys.argv[1] + "/.lock.owner", "w") as owner:
        json.dump({"pid": int(sys.argv[2]) or os.getpid(), "host": socket.gethostname()}, owner)
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def hold_lock(root: Path, pid: int, seconds: float) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(root), str(pid), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_the_lock_says_whom_it_waits_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with hold_lock(tmp_path, 0, 2.0) as holder, build_lock(tmp_path):
        assert holder.wait(5) == 0
        owner = json.loads((tmp_path / ".lock.owner").read_text())
        assert owner["pid"] == os.getpid()
    host = os.uname().nodename
    assert capfd.readouterr().err == (
        f"bitlinear: waiting for process {holder.pid} on host {host}, which is compiling\n"
    )
    assert not (tmp_path / ".lock.owner").exists()


def test_the_lock_does_not_wait_for_the_dead_nor_for_ever(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    with hold_lock(tmp_path, dead.pid, 600) as holder:
        began = time.monotonic()
        with build_lock(tmp_path):
            pass
        assert time.monotonic() - began < 5
        holder.kill()
    with hold_lock(tmp_path, 0, 600) as holder:
        with build_lock(tmp_path, seconds=1.0):
            pass
        holder.kill()


def test_without_filelock_or_locks_the_build_goes_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build_lock(tmp_path / "missing"):  # no directory, so no lock
        pass
    monkeypatch.setitem(sys.modules, "filelock", None)
    with build_lock(tmp_path):
        assert not (tmp_path / ".lock.owner").exists()
