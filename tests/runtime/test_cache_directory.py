"""The choice of the cache directory."""

from __future__ import annotations

import atexit
import ctypes
import errno
import io
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest

from bitlinear.runtime import cache_directory
from bitlinear.runtime.cache_directory import (
    CacheDirectory,
    open_cache,
    why_unusable,
    with_temporary,
)
from bitlinear.runtime.trust import why_unsafe

NOBODY = 65534
PR_SET_DUMPABLE = 4
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
    missing = open_cache({"XDG_CACHE_HOME": "/proc/nonexistent"})
    assert missing.path == tmp_path / ".cache" / "bitlinear"
    assert missing.reason.startswith("/proc/nonexistent/bitlinear cannot be created")
    assert missing.override_problem == ""


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
    monkeypatch.setattr(cache_directory, "_TEMPORARY", ())
    assert cache_directory.with_temporary(none).path is None


def test_the_exit_of_another_process_keeps_the_temporary_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", lambda *call: at_exit.append(partial(*call)))
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


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o711])
def test_a_directory_of_ones_own_serves_if_nobody_else_can_write_to_it(
    tmp_path: Path, mode: int
) -> None:
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    chosen.chmod(mode)
    found = open_cache({"BITLINEAR_CACHE_DIR": str(chosen)})
    assert found == CacheDirectory(chosen, readable=(chosen,))
    assert stat.S_IMODE(chosen.stat().st_mode) == mode


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_a_new_directory_is_closed_to_others(tmp_path: Path, umask: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    old = os.umask(umask)
    try:
        found = [
            open_cache({"BITLINEAR_CACHE_DIR": str(path)}).path
            for path in (tmp_path / "new" / "cache", shared)
        ]
    finally:
        os.umask(old)
    assert found == [tmp_path / "new" / "cache", shared / f"user-{os.geteuid()}"]
    for path in filter(None, found):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_the_path_may_begin_with_a_tilde_or_be_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for chosen, expected in (("~/cache", "home/cache"), ("one/two", "one/two")):
        found = open_cache({"BITLINEAR_CACHE_DIR": chosen})
        assert found == CacheDirectory(tmp_path / expected, readable=(tmp_path / expected,))


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


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory of root that every user can enter; its files are as root leaves them."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name, "cache")
        directory.mkdir()
        os.chmod(name, 0o755)
        yield directory


def open_as_nobody(**environ: str) -> CacheDirectory:
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    # In a process that has changed its user, /proc/self belongs to root unless it asks otherwise.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    try:
        return open_cache({"XDG_CACHE_HOME": "/proc/nonexistent", **environ})
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@as_root
@pytest.mark.parametrize(
    ("mode", "serves", "reason"),
    [
        (0o755, True, "cannot be written to (Permission denied)"),
        (0o711, False, "cannot be read (Permission denied)"),
        (0o744, False, "cannot be read (Permission denied)"),
        (0o700, False, "cannot be read (Permission denied)"),
        (0o775, False, "can be written to by others (mode 0775)"),
    ],
)
def test_a_directory_of_root_serves_if_it_is_closed_to_others(
    shared: Path, mode: int, serves: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image that root has built."""
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    shared.chmod(mode)
    found = open_as_nobody(BITLINEAR_CACHE_DIR=str(shared))
    assert found.path is None
    assert found.readable == ((shared,) if serves else ())
    assert bool(found.override_problem) != serves
    assert found.unsafe == (mode == 0o775)
    assert f"{shared} {reason}" in found.reason


@as_root
@pytest.mark.parametrize("next_one", ["", f"user-{NOBODY}"])
def test_what_is_skipped_as_unsafe_is_told_even_if_the_next_one_serves(
    shared: Path, next_one: str
) -> None:
    shared.chmod(0o775)
    other = shared.with_name("other")
    other.mkdir()
    os.chown(other, NOBODY, NOBODY)
    if next_one:
        (other / "bitlinear").mkdir()
        (other / "bitlinear").chmod(0o777)
    found = open_as_nobody(BITLINEAR_CACHE_DIR=str(shared), XDG_CACHE_HOME=str(other))
    assert found.path == other / "bitlinear" / next_one
    assert found.readable == (found.path,)
    assert found.unsafe
    assert found.override_problem == found.reason
    assert found.reason == f"{shared} can be written to by others (mode 0775)"


@as_root
def test_what_root_prepared_is_read_before_what_the_user_compiles(shared: Path) -> None:
    other = shared.with_name("other")
    other.mkdir()
    os.chown(other, NOBODY, NOBODY)
    found = open_as_nobody(BITLINEAR_CACHE_DIR=str(shared), XDG_CACHE_HOME=str(other))
    assert found.path == other / "bitlinear"
    assert found.readable == (shared, found.path)
    assert (found.unsafe, found.override_problem) == (False, "")
    assert found.reason == f"{shared} cannot be written to (Permission denied)"


@as_root
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o2775])
@pytest.mark.parametrize("owner", [0, 1])
def test_a_volume_that_a_group_or_everybody_can_write_to_holds_an_own_folder(
    shared: Path, mode: int, owner: int
) -> None:
    """As Kubernetes mounts volumes with fsGroup, and an emptyDir."""
    os.chown(shared, owner, NOBODY)
    shared.chmod(mode)
    for _ in range(2):
        found = open_as_nobody(BITLINEAR_CACHE_DIR=str(shared))
        own = shared / f"user-{NOBODY}"
        assert found.path == own
        assert found.readable == (own,)
        assert (found.reason, found.override_problem, found.unsafe) == ("", "", False)
        assert stat.S_IMODE(own.stat().st_mode) & 0o777 == 0o700
        own.chmod(0o2770)  # as the next mount does it


@as_root
@pytest.mark.parametrize("trap", ["a link", "a link to an own folder", "another user's", "a file"])
def test_an_own_folder_that_somebody_else_has_laid_is_refused(shared: Path, trap: str) -> None:
    shared.chmod(0o777)
    own = shared / f"user-{NOBODY}"
    if trap == "a link":
        own.symlink_to("/tmp")
    elif trap == "a link to an own folder":
        (shared / "private").mkdir()
        os.chown(shared / "private", NOBODY, NOBODY)
        own.symlink_to("private")
        os.lchown(own, NOBODY, NOBODY)
    elif trap == "a file":
        own.touch()
    else:
        own.mkdir()
    found = open_as_nobody(BITLINEAR_CACHE_DIR=str(shared))
    assert found.unsafe
    assert found.readable == ()
    assert f"{shared} can be written to by others (mode 0777)" in found.override_problem


@as_root
@pytest.mark.parametrize("trap", ["a link to root's folder", "a folder"])
def test_root_is_not_caught_in_a_directory_of_another_user(
    tmp_path: Path, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may change the mode of anything, so that proves nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    chosen, target, own = tmp_path / "chosen", tmp_path / "target", tmp_path / "chosen" / "user-0"
    for path in (chosen, target):
        path.mkdir(mode=0o755)
    if trap == "a folder":
        own.mkdir(mode=0o755)
    else:
        own.symlink_to(target)
    for path in (chosen, own):
        os.lchown(path, NOBODY, NOBODY)
    found = open_cache({"BITLINEAR_CACHE_DIR": str(chosen)})
    assert found.unsafe
    assert chosen not in found.readable
    assert own not in found.readable
    assert target not in found.readable
    assert found.override_problem.endswith("user-0 in it is not this user's own folder")
    assert stat.S_IMODE(own.stat().st_mode) == stat.S_IMODE(target.stat().st_mode) == 0o755


@as_root
@pytest.mark.parametrize("prepared", [False, True])
def test_a_link_of_another_user_is_not_followed(
    shared: Path, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may lead to what root has unpacked: a folder with the right name and others' content."""
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    private = shared / "private"
    private.mkdir(mode=0o700)
    if prepared:
        (private / "user-0").mkdir()
    (shared / "link").symlink_to("private")
    os.lchown(shared / "link", NOBODY, NOBODY)
    for name in ("link", "link/cache"):
        found = open_cache({"BITLINEAR_CACHE_DIR": str(shared / name)})
        assert (found.path, found.readable, found.unsafe) == (None, (), True)
        assert "a link of another user leads to it" in found.override_problem


@as_root
def test_a_directory_inside_that_of_another_user(shared: Path) -> None:
    """The other user can put another one in its place."""
    mine = shared / "mine"
    mine.mkdir(mode=0o700)
    os.chown(shared, NOBODY, NOBODY)
    found = open_cache({"BITLINEAR_CACHE_DIR": str(mine)})
    assert found.path == mine / "user-0"
    assert f"can be replaced by others ({shared} belongs to user {NOBODY})" in found.note


@as_root
def test_a_temporary_directory_of_another_user_is_not_used(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(shared, NOBODY, NOBODY)
    for name in ("shared", "link"):
        chosen = shared if name == "shared" else shared.with_name("link")
        if name == "link":  # to a directory in which only root may write
            chosen.symlink_to(shared.with_name("roots"))
            shared.with_name("roots").mkdir()
            os.lchown(chosen, NOBODY, NOBODY)
        monkeypatch.setenv("TMPDIR", str(chosen))
        monkeypatch.setattr(tempfile, "tempdir", None)
        found = with_temporary(CacheDirectory(None, "no home")).path
        assert found is not None
        assert found.parent == Path("/tmp")
        assert not list(chosen.iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_others_may_write(tmp_path: Path, mode: int) -> None:
    """Also to a directory of this user's own."""
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    chosen.chmod(mode)
    found = open_cache({"BITLINEAR_CACHE_DIR": str(chosen), "XDG_CACHE_HOME": str(tmp_path)})
    assert found.path == chosen / f"user-{os.geteuid()}"
    assert chosen not in found.readable


@as_root
def test_belongs_to_somebody_else(tmp_path: Path) -> None:
    """Root does not trust a user's directory; a user cannot write into another's."""
    chosen = tmp_path / "chosen"
    chosen.mkdir(mode=0o700)
    os.chown(chosen, NOBODY, NOBODY)
    assert why_unsafe(chosen) == f"belongs to user {NOBODY}, not to user 0"
    found = open_cache({"BITLINEAR_CACHE_DIR": str(chosen)})
    assert found.path == chosen / "user-0"


@as_root
def test_another_users_directory(shared: Path, tmp_path: Path) -> None:
    os.chown(shared, 1, 1)
    found = open_as_nobody(BITLINEAR_CACHE_DIR=str(shared))
    assert found.unsafe
    assert found.readable == ()
    assert f"{shared} belongs to user 1, not to user {NOBODY}" in found.override_problem


# --- Space, and directories that are given up ----------------------------------------------------


def test_space_is_probed_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_unusable(tmp_path, 5 << 20) == ""
    assert not list(tmp_path.iterdir())

    class Full(io.BytesIO):
        """A file on a disk with room for a million bytes."""

        def write(self, data: Any) -> int:
            room = 1_000_000 - self.tell()
            if room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data[:room])

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    assert why_unusable(tmp_path) == ""
    reason = "cannot be written to (No space left on device)"
    assert why_unusable(tmp_path, 5 << 20) == reason


_IN_A_VOLUME = """
import sys, types
package = sys.modules["package"] = types.ModuleType("package")  # the real one would import torch
package.__path__ = [sys.argv[1]]
from package.cache_directory import *
from pathlib import Path
cache = with_temporary(open_cache({"BITLINEAR_CACHE_DIR": sys.argv[2]}))
print(cache.path == Path(sys.argv[2]), why_unusable(Path(sys.argv[2]), int(sys.argv[3])), sep="|")
"""


def in_a_volume(directory: Path, options: str, size: int) -> str:
    """Mount a file system that only a child sees, and ask the child about it."""
    directory.mkdir()
    mount = f"mount -t tmpfs -o mode=700,{options} tmpfs '{directory}'"
    unshare = ["unshare", "--mount", "sh", "-c"]
    try:
        subprocess.run([*unshare, mount], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this process cannot mount a file system")
    folder = str(Path(cache_directory.__file__).parent)
    command = [sys.executable, "-S", "-c", _IN_A_VOLUME, folder, str(directory), str(size)]
    return subprocess.run(
        [*unshare, f'{mount} && exec "$@"', "sh", *command],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ("size=8m", "True|"),
        ("size=4m", "True|cannot be written to (No space left on device)"),
        ("size=8m,nr_inodes=3", "True|cannot be written to (No space left on device)"),
        ("size=8m,nr_inodes=1", "False|cannot be written to (No space left on device)"),
        ("size=8m,noexec", "False|is mounted noexec"),
        ("size=8m,ro", "False|cannot be written to (Read-only file system)"),
    ],
)
def test_a_small_volume(tmp_path: Path, options: str, answer: str) -> None:
    assert in_a_volume(tmp_path / "volume", options, 5 << 20) == answer


def test_space_is_given_back(tmp_path: Path) -> None:
    for size in (0, 1, (4 << 20) + 1):
        assert why_unusable(tmp_path, size) == ""
    assert why_unusable(tmp_path / "missing") == "cannot be written to (No such file or directory)"
    assert not list(tmp_path.iterdir())


def test_a_temporary_directory_without_space_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cache_directory, "why_unusable", lambda directory: "is mounted noexec")
    found = with_temporary(CacheDirectory(None, "no home"))
    assert (found.path, found.temporary, found.readable) == (None, False, ())
    assert found.reason.startswith(
        f"no home; no temporary directory ({tmp_path}: is mounted noexec; /tmp: is mounted noexec"
    )


def test_a_cache_that_can_be_written_to_needs_no_temporary_directory(tmp_path: Path) -> None:
    cache = CacheDirectory(tmp_path, readable=(tmp_path,))
    assert with_temporary(cache) == cache


def test_a_temporary_directory_that_is_given_up_is_no_longer_temporary(tmp_path: Path) -> None:
    cache = CacheDirectory(tmp_path, temporary=True, readable=(tmp_path,))
    assert cache.without(tmp_path, "is full") == CacheDirectory(None, f"{tmp_path} is full")


def test_a_directory_that_is_given_up(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    cache = CacheDirectory(second, "first reason", readable=(first, second))
    without = cache.without(first, "is gone")
    assert without.path == second
    assert without.readable == (second,)
    assert without.reason == f"first reason; {first} is gone"
    nothing = without.without(second, "is full")
    assert (nothing.path, nothing.readable) == (None, ())
    assert with_temporary(nothing).temporary


def test_symbolic_links_count_as_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "mine").mkdir(mode=0o700)
    for name in ("open", "mine"):
        (tmp_path / f"to_{name}").symlink_to(tmp_path / name)
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    found = open_cache({**environ, "BITLINEAR_CACHE_DIR": str(tmp_path / "to_open")})
    assert found.path == tmp_path / "open" / f"user-{os.geteuid()}"
    found = open_cache({**environ, "BITLINEAR_CACHE_DIR": str(tmp_path / "to_mine")})
    assert not found.unsafe
    assert found.path == tmp_path / "mine"
