"""Artifacts: valid, damaged, published twice, pruned. No compiler is needed here."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bitlinear.kernels import Variant
from bitlinear.runtime import artifacts, keys
from bitlinear.runtime.artifacts import Artifact
from bitlinear.runtime.cache_directory import CacheDirectory
from bitlinear.runtime.hardware import Hardware, detect

HOUR = 3600.0
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


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
    built = Artifact("fast", keys.key(parts), None, "built", self_test="passed", seconds=1.5)
    return artifacts.publish(root, staging, built, parts)


def opened(root: Path) -> CacheDirectory:
    return CacheDirectory(root, readable=(root,))


@pytest.fixture
def parts(sources: Path, hardware: Hardware) -> dict[str, str]:
    return keys.ingredients(FAST, sources, hardware)


def test_what_is_published_is_found(root: Path, parts: dict[str, str]) -> None:
    assert artifacts.find(opened(root), parts, any_compiler=False) is None
    built = publish(root, parts)
    found = artifacts.find(opened(root), parts, any_compiler=False)
    assert found == replace(built, state="cached")
    assert found is not None
    assert found.path.read_bytes() == b"code"
    assert found.directory == root / "fast" / keys.key(parts)
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
    assert artifacts.find(opened(root), parts, any_compiler=False) is None


def damage_truncate(directory: Path) -> None:
    (directory / "fast.so").write_bytes(b"co")


def damage_flip(directory: Path) -> None:
    (directory / "fast.so").write_bytes(b"node")


def damage_remove(directory: Path) -> None:
    (directory / "fast.so").unlink()


def damage_meta(directory: Path) -> None:
    (directory / "meta.json").write_text('{"ingredients": {"cpu"')


def damage_meta_type(directory: Path) -> None:
    (directory / "meta.json").write_text("[]")


def damage_cpu(directory: Path) -> None:
    """As if the cache of another machine had been copied over this one."""
    meta = json.loads((directory / "meta.json").read_text())
    meta["ingredients"]["cpu"] = "another"
    (directory / "meta.json").write_text(json.dumps(meta))


def damage_mode(directory: Path) -> None:
    directory.chmod(0o777)


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_flip,
        damage_remove,
        damage_meta,
        damage_meta_type,
        damage_cpu,
        damage_mode,
    ],
)
def test_a_damaged_artifact_is_not_found_and_gets_replaced(
    root: Path, parts: dict[str, str], damage: object
) -> None:
    directory = publish(root, parts).path.parent
    assert callable(damage)
    damage(directory)
    assert artifacts.find(opened(root), parts, any_compiler=False) is None
    assert artifacts.find(opened(root), parts, any_compiler=True) is None
    again = publish(root, parts, b"again")
    assert again.path.parent == directory
    found = artifacts.find(opened(root), parts, any_compiler=False)
    assert found is not None
    assert found.path.read_bytes() == b"again"
    assert not any((root / artifacts.STAGING).iterdir())


def test_without_a_compiler_anothers_artifact_serves_but_not_its_failure(
    root: Path, parts: dict[str, str]
) -> None:
    other = {**parts, "compiler": "another", "compiler_arguments": "-O3"}
    staging = artifacts.new_staging(root)
    failed = Artifact("fast", keys.key(other), None, "failed", reason="no", code="compile-failed")
    artifacts.publish(root, staging, failed, other)
    none = {**parts, "compiler": ""}
    assert artifacts.find(opened(root), none, any_compiler=True) is None
    publish(root, parts)
    assert artifacts.find(opened(root), none, any_compiler=False) is None
    found = artifacts.find(opened(root), none, any_compiler=True)
    assert found is not None
    assert found.key == keys.key(parts)


def test_a_failure_is_remembered_and_has_no_library(root: Path, parts: dict[str, str]) -> None:
    staging = artifacts.new_staging(root)
    failed = Artifact(
        "fast", keys.key(parts), None, "failed", "", "g++: error", "fix", "compile-failed"
    )
    published = artifacts.publish(root, staging, failed, parts)
    found = artifacts.find(opened(root), parts, any_compiler=False)
    assert found == published
    assert found is not None
    assert (found.state, found.reason, found.fix) == ("failed", "g++: error", "fix")
    with pytest.raises(ValueError, match="fast is not available"):
        _ = found.path


def test_a_cache_that_is_only_readable_serves(root: Path, parts: dict[str, str]) -> None:
    publish(root, parts)
    found = artifacts.find(CacheDirectory(None, readable=(root,)), parts, any_compiler=False)
    assert found is not None


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
    artifacts.find(opened(root), {**parts, "libc": "11"}, any_compiler=False)  # used now
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


def test_cleaning_deletes_nothing_but_artifacts(root: Path, parts: dict[str, str]) -> None:
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
