"""Results of self-tests: found for one library on one kind of hardware, and nowhere else."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bitlinear.runtime import self_tests
from bitlinear.runtime.cache_directory import CacheDirectory
from bitlinear.runtime.failures import RETRY_SECONDS
from bitlinear.runtime.rejection import Probe, Rejection

HASH, CPU = "a" * 64, "GenuineIntel 6 143"
PASSED = Probe("bit-exact with scalar")
LASTING = Rejection("self-test-failed", "self-test failed: row 3 differs")
MOMENTARY = Rejection("compile-failed", "it was killed by SIGTERM", momentary=True)

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    return path


def find(*roots: Path, sha256: str = HASH, hardware: str = CPU) -> Probe[str] | None:
    return self_tests.find(CacheDirectory(None, readable=roots), sha256, hardware)


def only_file(root: Path) -> Path:
    (file,) = (root / self_tests.FOLDER).iterdir()
    return file


@pytest.mark.parametrize("result", [PASSED, Probe(rejection=LASTING)])
def test_a_result_counts_for_its_library_and_hardware_only(root: Path, result: Probe[str]) -> None:
    self_tests.record(root, HASH, CPU, result)
    assert find(root) == result
    assert find(root, sha256="b" * 64) is None
    assert find(root, hardware="GenuineIntel 6 63") is None
    assert find(root, sha256=CPU, hardware=HASH) is None


def test_results_of_several_libraries_and_machines(root: Path) -> None:
    cases = [(sha256 * 64, cpu) for sha256 in "ab" for cpu in ("intel", "amd")]
    for sha256, hardware in cases:
        self_tests.record(root, sha256, hardware, Probe(f"{sha256[0]} on {hardware}"))
    for sha256, hardware in cases:
        expected = Probe(f"{sha256[0]} on {hardware}")
        assert find(root, sha256=sha256, hardware=hardware) == expected


def test_a_copy_under_the_name_of_another_library_does_not_count(root: Path) -> None:
    self_tests.record(root, HASH, CPU, PASSED)
    passed = only_file(root).read_bytes()
    only_file(root).unlink()
    self_tests.record(root, "b" * 64, CPU, Probe(rejection=LASTING))
    only_file(root).write_bytes(passed)
    assert find(root, sha256="b" * 64) is None
    assert find(root) is None


def test_nothing_is_found_in_an_empty_cache(root: Path, tmp_path: Path) -> None:
    assert find() is None
    assert find(root, tmp_path / "missing") is None


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_result_is_found_in_every_readable_directory(tmp_path: Path, where: int) -> None:
    roots = [tmp_path / name for name in ("first", "second", "third")]
    for path in roots:
        path.mkdir()
    self_tests.record(roots[where], HASH, CPU, PASSED)
    assert find(*roots) == PASSED


def test_the_first_directory_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.mkdir()
    self_tests.record(first, HASH, CPU, PASSED)
    self_tests.record(second, HASH, CPU, Probe(rejection=LASTING))
    assert find(first, second) == PASSED
    assert find(second, first) == Probe(rejection=LASTING)


def test_a_failure_that_is_due_hides_no_result_of_another_directory(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.mkdir()
    self_tests.record(first, HASH, CPU, Probe(rejection=MOMENTARY))
    assert find(first, second) is None
    self_tests.record(second, HASH, CPU, PASSED)
    assert find(first, second) == PASSED


def test_a_new_result_replaces_the_old_one(root: Path) -> None:
    self_tests.record(root, HASH, CPU, Probe(rejection=LASTING))
    self_tests.record(root, HASH, CPU, PASSED)
    assert find(root) == PASSED
    self_tests.record(root, HASH, CPU, Probe(rejection=LASTING))
    assert find(root) == Probe(rejection=LASTING)


def test_a_momentary_failure_is_tried_again_once_and_then_hourly(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    failed: Probe[str] = Probe(rejection=MOMENTARY)
    self_tests.record(root, HASH, CPU, failed)
    assert find(root) is None
    self_tests.record(root, HASH, CPU, failed)
    found = find(root)
    assert found is not None
    assert found.rejection is not None
    assert found.rejection.reason == MOMENTARY.reason
    assert found.rejection.fix.startswith("the next try is in 60 minutes, or now: ")
    now += RETRY_SECONDS
    assert find(root) is None
    self_tests.record(root, HASH, CPU, failed)
    assert find(root) is not None
    now -= 2 * RETRY_SECONDS  # the clock goes back
    assert find(root) is None
    self_tests.record(root, HASH, CPU, PASSED)
    self_tests.record(root, HASH, CPU, failed)  # counts from one again
    assert find(root) is None


# --- Directories that cannot be written to -------------------------------------------------------


def _missing(path: Path) -> Path:
    return path / "missing"


def _file(path: Path) -> Path:
    (path / "file").touch()
    return path / "file"


def _read_only(path: Path) -> Path:
    path.chmod(0o500)
    return path


def _read_only_folder(path: Path) -> Path:
    (path / self_tests.FOLDER).mkdir(mode=0o500)
    return path


def _file_for_folder(path: Path) -> Path:
    (path / self_tests.FOLDER).touch()
    return path


def _dangling_folder(path: Path) -> Path:
    (path / self_tests.FOLDER).symlink_to(path / "missing")
    return path


def _system(path: Path) -> Path:
    return Path("/proc/self")


@pytest.mark.parametrize("result", [PASSED, Probe(rejection=MOMENTARY)])
@pytest.mark.parametrize(
    "prepare",
    [
        _missing,
        _file,
        _file_for_folder,
        _dangling_folder,
        pytest.param(_read_only, marks=posix),
        pytest.param(_read_only_folder, marks=posix),
        _system,
    ],
)
def test_a_directory_that_cannot_be_written_to(
    root: Path, prepare: Callable[[Path], Path], result: Probe[str]
) -> None:
    directory = prepare(root)
    before = sorted(root.rglob("*"))
    self_tests.record(directory, HASH, CPU, result)
    self_tests.prune(directory)
    if prepare in (_read_only, _read_only_folder) and os.geteuid() == 0:
        return  # root can write to them
    assert find(directory) is None
    assert sorted(root.rglob("*")) == before


def test_a_full_disk_leaves_no_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    self_tests.record(root, HASH, CPU, PASSED)

    def replace(source: object, target: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    self_tests.record(root, HASH, CPU, Probe(rejection=LASTING))
    only_file(root)
    assert find(root) == PASSED


# --- Files that do not count ---------------------------------------------------------------------


@posix
def test_nobody_else_can_write_to_a_result(root: Path) -> None:
    before = os.umask(0)
    try:
        self_tests.record(root, HASH, CPU, PASSED)
    finally:
        os.umask(before)
    for path in (root / self_tests.FOLDER, only_file(root)):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@posix
@pytest.mark.parametrize("mode", [0o666, 0o622, 0o660, 0o602])
def test_a_file_that_others_can_write_to_does_not_count(root: Path, mode: int) -> None:
    self_tests.record(root, HASH, CPU, PASSED)
    only_file(root).chmod(mode)
    assert find(root) is None
    self_tests.record(root, HASH, CPU, PASSED)
    assert find(root) == PASSED


@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_to_does_not_count(root: Path, mode: int) -> None:
    self_tests.record(root, HASH, CPU, PASSED)
    (root / self_tests.FOLDER).chmod(mode)
    assert find(root) is None
    (root / self_tests.FOLDER).chmod(0o755)
    assert find(root) == PASSED


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("name", ["", self_tests.FOLDER])
def test_what_belongs_to_another_user_does_not_count(root: Path, name: str) -> None:
    self_tests.record(root, HASH, CPU, PASSED)
    os.chown(root / name if name else only_file(root), 65534, 65534)
    assert find(root) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b"\xff\xfe",
        b"\0" * 100,
        b"{}",
    ],
)
def test_a_damaged_file_does_not_count(root: Path, text: bytes) -> None:
    self_tests.record(root, HASH, CPU, PASSED)
    only_file(root).write_bytes(text)
    assert find(root) is None
    self_tests.record(root, HASH, CPU, Probe(rejection=LASTING))
    assert find(root) == Probe(rejection=LASTING)


@pytest.mark.parametrize("failure", [None, {}, [], "text", {"rejection": {}}])
def test_a_damaged_failure_does_not_count(root: Path, failure: object) -> None:
    self_tests.record(root, HASH, CPU, Probe(rejection=LASTING))
    values = json.loads(only_file(root).read_text())
    only_file(root).write_text(json.dumps({**values, "failure": failure}))
    assert find(root) is None


@pytest.mark.parametrize("result", [None, 3, True, ["text"], {"text": 1}])
def test_a_result_that_is_no_text_does_not_count(root: Path, result: object) -> None:
    self_tests.record(root, HASH, CPU, PASSED)
    values = json.loads(only_file(root).read_text())
    only_file(root).write_text(json.dumps({**values, "result": result}))
    assert find(root) is None


def test_a_folder_in_the_place_of_a_file(root: Path) -> None:
    self_tests.record(root, HASH, CPU, PASSED)
    file = only_file(root)
    file.unlink()
    file.mkdir()
    self_tests.record(root, HASH, CPU, PASSED)
    assert find(root) is None
    assert only_file(root) == file


# --- Old results ---------------------------------------------------------------------------------

DAY = 24 * 3600


def files_of_ages(root: Path, days: list[float]) -> list[Path]:
    folder = root / self_tests.FOLDER
    folder.mkdir()
    now = time.time()
    files = []
    for number, age in enumerate(days):
        files.append(folder / f"{number:04d}.json")
        files[-1].touch()
        os.utime(files[-1], (now - age * DAY,) * 2)
    return files


def test_the_newest_results_are_kept(root: Path) -> None:
    files = files_of_ages(root, [100 - number / 10 for number in range(300)])
    self_tests.prune(root)
    kept = sorted((root / self_tests.FOLDER).iterdir())
    assert kept == files[-256:]


def test_few_results_are_kept_however_old(root: Path) -> None:
    files = files_of_ages(root, [1000.0] * 256)
    self_tests.prune(root)
    assert sorted((root / self_tests.FOLDER).iterdir()) == files


def test_new_results_are_kept_however_many(root: Path) -> None:
    files = files_of_ages(root, [29.0] * 300 + [31.0] * 5)
    self_tests.prune(root)
    assert sorted((root / self_tests.FOLDER).iterdir()) == files[:300]


def test_nothing_to_prune(root: Path) -> None:
    self_tests.prune(root)
    self_tests.prune(root / "missing")
    assert list(root.iterdir()) == []
