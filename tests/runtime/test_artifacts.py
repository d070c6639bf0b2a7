"""Artifacts: valid, damaged, published twice, pruned. No compiler is needed here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bitlinear.kernels import Variant
from bitlinear.runtime import artifacts, keys, self_tests
from bitlinear.runtime.artifacts import Artifact
from bitlinear.runtime.cache_directory import CacheDirectory
from bitlinear.runtime.hardware import Hardware, detect
from bitlinear.runtime.rejection import Probe, Rejection

HOUR = 3600.0
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files to others"
)


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return detect()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "fast.cpp").write_text("int fast;")
    (directory / "shared.h").write_text("int shared;")
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    return directory


FAST = Variant("fast", ("fast.cpp",), ("-O3",), requires=frozenset({"avx2"}))


def publish(root: Path, parts: dict[str, str], content: bytes = b"code") -> Artifact:
    staging = artifacts.new_staging(root)
    (staging / "fast.so").write_bytes(content)
    (staging / "fast.o").write_bytes(b"left over")
    built = Artifact("fast", keys.key_of(parts), staging, "built", "", 1.5)
    return artifacts.publish(root, built, parts)


def find(root: Path, parts: dict[str, str], can_build: bool = True) -> Artifact | None:
    entry = artifacts.find(opened(root), parts, can_build)
    return None if entry is None else entry.value


def opened(root: Path) -> CacheDirectory:
    return CacheDirectory(root, readable=(root,))


@pytest.fixture
def parts(sources: Path, hardware: Hardware) -> dict[str, str]:
    return keys.ingredients(FAST, sources, hardware)


def test_what_is_published_is_found(root: Path, parts: dict[str, str]) -> None:
    assert find(root, parts) is None
    built = publish(root, parts)
    found = find(root, parts)
    assert found == replace(built, state="cached")
    assert found is not None
    assert found.path.read_bytes() == b"code"
    assert found.directory == root / "fast" / keys.key_of(parts)
    assert sorted(file.name for file in found.directory.iterdir()) == ["fast.so", "meta.json"]
    assert not any((root / artifacts.STAGING).iterdir())
    meta = json.loads((found.directory / "meta.json").read_text())
    assert meta["ingredients"] == parts
    assert meta["size"] == 4
    assert meta["sha256"] == hashlib.sha256(b"code").hexdigest()


def test_the_second_to_publish_uses_what_the_first_published(
    root: Path, parts: dict[str, str]
) -> None:
    first = publish(root, parts, b"first")
    second = publish(root, parts, b"second")
    assert second.path == first.path
    assert second.path.read_bytes() == b"first"
    assert not any((root / artifacts.STAGING).iterdir())


def test_where_the_rename_is_impossible_the_own_copy_serves(
    root: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError("no renames here")

    monkeypatch.setattr(os, "replace", refuse)
    built = publish(root, parts)
    assert built.path.read_bytes() == b"code"
    assert find(root, parts) is None


def damage_truncate(directory: Path) -> None:
    (directory / "fast.so").write_bytes(b"co")


def damage_flip(directory: Path) -> None:
    (directory / "fast.so").write_bytes(b"node")


def damage_remove(directory: Path) -> None:
    (directory / "fast.so").unlink()


def damage_meta(directory: Path) -> None:
    (directory / "meta.json").write_text('{"ingredients": {"libc"')


def damage_meta_type(directory: Path) -> None:
    (directory / "meta.json").write_text("[]")


def damage_libc(directory: Path) -> None:
    """As if the cache of another machine had been copied over this one."""
    meta = json.loads((directory / "meta.json").read_text())
    meta["ingredients"]["libc"] = "another"
    (directory / "meta.json").write_text(json.dumps(meta))


def damage_mode(directory: Path) -> None:
    directory.chmod(0o777)


def damage_mode_of_parent(directory: Path) -> None:
    """Others can rename entries."""
    directory.parent.chmod(0o775)


def damage_mode_of_library(directory: Path) -> None:
    """As Kubernetes does for the group of a volume."""
    (directory / "fast.so").chmod(0o664)


def damage_mode_of_meta(directory: Path) -> None:
    (directory / "meta.json").chmod(0o666)


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_flip,
        damage_remove,
        damage_meta,
        damage_meta_type,
        damage_libc,
        damage_mode,
        damage_mode_of_parent,
        damage_mode_of_library,
        damage_mode_of_meta,
    ],
)
def test_a_damaged_artifact_is_not_found_and_gets_replaced(
    root: Path, parts: dict[str, str], damage: object
) -> None:
    directory = publish(root, parts).path.parent
    assert callable(damage)
    damage(directory)
    assert find(root, parts) is None
    assert find(root, parts, can_build=False) is None
    again = publish(root, parts, b"again")
    assert again.path.parent == directory
    found = find(root, parts)
    assert found is not None
    assert found.path.read_bytes() == b"again"
    assert not any((root / artifacts.STAGING).iterdir())


FAILURE = Rejection("compile-failed", "g++: error", "fix")


def test_without_a_compiler_anothers_artifact_serves_but_not_its_failure(
    root: Path, parts: dict[str, str]
) -> None:
    other = {**parts, "compiler": "another", "compiler_arguments": "-O3"}
    artifacts.record_failure(root, artifacts.new_staging(root), FAILURE, other)
    none = {**parts, "compiler": ""}
    assert artifacts.find(opened(root), none, can_build=False) is None
    publish(root, parts)
    assert find(root, none) is None
    found = find(root, none, can_build=False)
    assert found is not None
    assert found.key == keys.key_of(parts)


def test_a_failure_is_remembered_with_its_log(root: Path, parts: dict[str, str]) -> None:
    staging = artifacts.new_staging(root)
    (staging / artifacts.LOG).write_text("g++: error")
    recorded = artifacts.record_failure(root, staging, FAILURE, parts)
    entry = artifacts.find(opened(root), parts, can_build=True)
    assert entry == Probe(rejection=recorded)
    assert recorded.log is not None
    assert recorded == replace(FAILURE, log=recorded.log)
    assert recorded.log.read_text() == "g++: error"
    assert sorted(file.name for file in recorded.log.parent.iterdir()) == ["build.log", "meta.json"]


@pytest.mark.parametrize(("name", "mode"), [("", 0o770), ("", 0o702), ("meta.json", 0o664)])
def test_a_failure_that_others_may_have_written_does_not_count(
    root: Path, parts: dict[str, str], name: str, mode: int
) -> None:
    artifacts.record_failure(root, artifacts.new_staging(root), FAILURE, parts)
    assert artifacts.find(opened(root), parts, can_build=True) is not None
    (root / "fast" / keys.key_of(parts) / name).chmod(mode)
    assert artifacts.find(opened(root), parts, can_build=True) is None


@as_root
@pytest.mark.parametrize("name", ["..", "", "meta.json", "fast.so"])
@pytest.mark.parametrize("is_link", [False, True])
def test_an_entry_of_another_user_does_not_count(
    root: Path, parts: dict[str, str], name: str, is_link: bool
) -> None:
    path = Path(os.path.normpath(publish(root, parts).directory / name))
    if is_link:
        path.rename(root / "target")
        path.symlink_to(root / "target")
        assert find(root, parts) is not None
    os.lchown(path, 65534, 65534)
    assert find(root, parts) is None
    assert find(root, parts, can_build=False) is None


@as_root
@pytest.mark.parametrize("folder", ["fast", artifacts.STAGING])
def test_nothing_is_written_into_a_folder_of_another_user(
    root: Path, parts: dict[str, str], folder: str
) -> None:
    publish(root, parts)
    os.chown(root / folder, 65534, 65534)
    with pytest.raises(PermissionError, match="belongs to user 65534"):
        publish(root, parts, b"again")


def test_the_folder_of_unfinished_entries_is_closed(root: Path) -> None:
    artifacts.new_staging(root)
    (root / artifacts.STAGING).chmod(0o2777)
    assert artifacts.new_staging(root).parent.stat().st_mode & 0o777 == 0o700


def test_the_entry_of_this_compiler_comes_before_those_of_others(
    root: Path, parts: dict[str, str]
) -> None:
    compilers = [{**parts, "compiler": f"g++ {release}"} for release in range(3)]
    for wanted in compilers:
        publish(root, wanted)
    for wanted in compilers:
        found = find(root, wanted, can_build=False)
        assert found is not None
        assert found.key == keys.key_of(wanted)


def test_a_cache_that_is_only_readable_serves(root: Path, parts: dict[str, str]) -> None:
    publish(root, parts)
    found = artifacts.find(CacheDirectory(None, readable=(root,)), parts, can_build=True)
    assert found is not None


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_published_is_closed_to_others(
    root: Path, parts: dict[str, str], umask: int
) -> None:
    old = os.umask(umask)
    try:
        built = publish(root, parts)
    finally:
        os.umask(old)
    assert find(root, parts) is not None
    staging, library = root / artifacts.STAGING, root / "fast"
    for path in (staging, library, built.directory, *built.directory.iterdir()):
        assert not path.stat().st_mode & 0o022


def test_a_momentary_failure_is_found_only_while_it_is_not_due(
    root: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    momentary = replace(FAILURE, momentary=True)

    def fail() -> None:
        artifacts.record_failure(root, artifacts.new_staging(root), momentary, parts)

    fail()
    assert artifacts.find(opened(root), parts, can_build=True) is None  # tried again at once
    fail()
    entry = artifacts.find(opened(root), parts, can_build=True)
    assert entry is not None
    assert entry.rejection is not None
    assert "the next try is in 60 minutes" in entry.rejection.fix
    now[0] += 3601
    assert artifacts.find(opened(root), parts, can_build=True) is None
    publish(root, parts)
    assert find(root, parts) is not None


def test_what_distinguishes_an_entry_is_named(root: Path, parts: dict[str, str]) -> None:
    assert artifacts.nearest(opened(root), parts) == ""
    publish(root, {**parts, "torch": "1.0", "libc": "musl 1"})
    publish(root, {**parts, "torch": "2.0"})
    wanted = f"the cache has fast for torch 2.0, not {parts['torch']}"
    assert artifacts.nearest(opened(root), parts) == wanted
    other_compiler = {**parts, "compiler": "another"}
    publish(root, {**other_compiler, "sources": "0"})
    assert artifacts.nearest(opened(root), parts) == "the cache has fast for other sources"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_flip, "fast.so is damaged: copy the directory again"),
        (damage_remove, "fast.so cannot be read (No such file or directory)"),
        (damage_meta, "meta.json is damaged: copy the directory again"),
        (damage_meta_type, "meta.json is damaged: copy the directory again"),
        (damage_mode_of_library, "fast.so can be written to by others (mode 0664)"),
    ],
)
def test_an_entry_that_is_damaged_is_named(
    root: Path, parts: dict[str, str], damage: object, reason: str
) -> None:
    directory = publish(root, parts).directory
    assert callable(damage)
    damage(directory)
    publish(root, {**parts, "libc": "another"})
    assert artifacts.nearest(opened(root), parts) == f"{directory}/{reason}"


@pytest.mark.parametrize("near", ["1", "2"])
def test_the_entry_that_differs_least_is_named(
    root: Path, parts: dict[str, str], near: str
) -> None:
    for torch in ("1", "2"):
        publish(root, {**parts, "torch": torch, "abi": torch})
    wanted = {**parts, "abi": near}
    expected = f"the cache has fast for torch {near}, not {parts['torch']}"
    assert artifacts.nearest(opened(root), wanted) == expected


# --- Pruning and cleaning ------------------------------------------------------------------------


def test_pruning_keeps_the_most_recently_used(
    root: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    directories = []
    for age in range(12):
        directory = publish(root, {**parts, "libc": str(age)}).path.parent
        os.utime(directory, (now - age * 24 * HOUR - HOUR,) * 2)
        directories.append(directory)
    find(root, {**parts, "libc": "11"})  # used now
    artifacts.prune(root, now)
    assert [d.exists() for d in directories] == [True] * 7 + [False] * 4 + [True]


def test_pruning_spares_what_was_used_today(root: Path, parts: dict[str, str]) -> None:
    directories = [publish(root, {**parts, "libc": str(n)}).path.parent for n in range(12)]
    artifacts.prune(root)
    assert all(directory.exists() for directory in directories)


def test_pruning_removes_what_killed_builds_left(root: Path) -> None:
    old, young = artifacts.new_staging(root), artifacts.new_staging(root)
    os.utime(old, (time.time() - 2 * HOUR,) * 2)
    artifacts.prune(root)
    assert not old.exists()
    assert young.exists()


def test_cleaning_deletes_nothing_but_entries(root: Path, parts: dict[str, str]) -> None:
    """Somebody may set BITLINEAR_CACHE_DIR to their home directory."""
    publish(root, parts)
    publish(root, {**parts, "libc": "other"})
    artifacts.new_staging(root)
    precious = root / "fast" / "thesis" / "meta.json"
    precious.parent.mkdir()
    precious.touch()
    assert artifacts.clean(root) == 2
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == [
        "fast",
        "fast/thesis",
        "fast/thesis/meta.json",
    ]


def test_pruning_and_cleaning_include_the_results_of_self_tests(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    self_tests.record(root, "0" * 64, "a CPU", Probe("passed"))
    pruned: list[Path] = []
    monkeypatch.setattr(self_tests, "prune", pruned.append)
    artifacts.prune(root)
    assert pruned == [root]
    assert artifacts.clean(root) == 0
    assert list(root.iterdir()) == []


def test_cleaning_counts_only_what_is_gone(
    root: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a cache that this user cannot write to."""
    stays = publish(root, parts).directory
    publish(root, {**parts, "libc": "other"})
    remove = artifacts.remove
    monkeypatch.setattr(artifacts, "remove", lambda path: path == stays or remove(path))
    assert artifacts.clean(root) == 1
    assert artifacts.entries(root) == [stays]


@pytest.mark.parametrize("is_others", [False, pytest.param(True, marks=as_root)])
def test_links_in_the_cache_are_not_followed_to_delete_or_change(
    root: Path, tmp_path: Path, parts: dict[str, str], is_others: bool
) -> None:
    """Somebody may have laid them while the directory was open to others."""
    home = tmp_path / "home"
    (home / "folder").mkdir(parents=True)
    home.chmod(0o750)
    for number in range(300):
        (home / f"{number}.json").touch()
    another = tmp_path / "another"
    another.mkdir()
    entry = publish(another, parts).directory
    for path in (*home.iterdir(), home / "folder", entry):
        os.utime(path, (0, 0))
    for name in (artifacts.STAGING, self_tests.FOLDER, "library"):
        link = root / name
        link.symlink_to(another / "fast" if name == "library" else home)
        if is_others:
            os.lchown(link, 65534, 65534)
    now = time.time()
    artifacts.prune(root, now)
    assert artifacts.entries(root) == []
    with contextlib.suppress(OSError):
        self_tests.record(root, "hash", "hardware", Probe("passed"))
    with contextlib.suppress(OSError):
        artifacts.remove(artifacts.new_staging(root))
    artifacts.clean(root)
    assert entry.is_dir()
    assert len([file for file in home.iterdir() if file.name[0].isdigit()]) >= 300
    assert (home / "folder").is_dir()
    assert home.stat().st_mode & 0o777 == 0o750
