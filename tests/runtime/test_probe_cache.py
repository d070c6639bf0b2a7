"""The answers of slow probes, between processes."""

from __future__ import annotations

import json
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import pytest

from bitlinear.runtime import cpu, probe_cache
from bitlinear.runtime.hardware import Hardware, detect
from bitlinear.runtime.probe_cache import ProbeCache, decode_text

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def quick_py_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes more than a second, and many of these tests probe again and again."""
    flags = " ".join(sorted(detect().cpu.flags.value or {"none"}))
    monkeypatch.setattr(cpu, "_ask_py_cpuinfo", lambda package: flags)


def remembered(directory: Path) -> Path:
    return directory / "hardware.json"


def test_remembered_answers_equal_new_ones(tmp_path: Path) -> None:
    new = detect()
    assert detect(tmp_path) == new
    assert remembered(tmp_path).is_file()
    assert detect(tmp_path) == new
    assert [path.name for path in tmp_path.iterdir()] == ["hardware.json"]
    assert stat.S_IMODE(remembered(tmp_path).stat().st_mode) == 0o600


def _with_every_answer(change: Callable[[object], object]) -> Callable[[str], str]:
    return lambda text: json.dumps({key: change(v) for key, v in json.loads(text).items()})


def _of_the_cpu(**changes: object) -> Callable[[object], object]:
    return lambda answer: {**answer, **changes} if isinstance(answer, dict) else answer


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\0" * 100,
        lambda text: "[]",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: '{"a": 1e999999, "b": NaN}',
        _with_every_answer(lambda answer: None),
        _with_every_answer(lambda answer: 7),
        _with_every_answer(lambda answer: []),
        _with_every_answer(lambda answer: {}),
        _with_every_answer(_of_the_cpu(flags=["avx2"])),
        _with_every_answer(_of_the_cpu(flags="")),
        _with_every_answer(_of_the_cpu(flags=None)),
        _with_every_answer(_of_the_cpu(brand=7)),
        _with_every_answer(_of_the_cpu(surprise="")),
    ],
)
def test_a_damaged_file_is_replaced(damage: Callable[[str], str], tmp_path: Path) -> None:
    new = detect(tmp_path)
    sound = json.loads(remembered(tmp_path).read_text(encoding="utf-8"))
    damaged = damage(remembered(tmp_path).read_text(encoding="utf-8"))
    remembered(tmp_path).write_text(damaged, encoding="utf-8")
    assert detect(tmp_path) == new
    repaired = json.loads(remembered(tmp_path).read_text(encoding="utf-8"))
    assert {key: repaired[key] for key in sound} == sound


def test_a_binary_file(tmp_path: Path) -> None:
    remembered(tmp_path).write_bytes(b"\xff\xfe\x00junk")
    assert detect(tmp_path) == detect()


@pytest.mark.parametrize("kind", ["missing", "a file", "the file is a directory"])
def test_a_file_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    if kind == "a file":
        directory.write_text("")
    if kind == "the file is a directory":
        remembered(directory).mkdir(parents=True)
    assert detect(directory) == detect()
    left = [path.name for path in tmp_path.rglob("*")]
    assert not [name for name in left if name.startswith(".hardware-")]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert detect(tmp_path) == detect()
    finally:
        tmp_path.chmod(0o700)


def test_the_file_is_bounded(tmp_path: Path) -> None:
    for number in range(100):
        cache = ProbeCache(tmp_path)
        cache.recall(str(number), lambda n=number: str(n), decode_text)  # type: ignore[misc]
        cache.save()
    answers = json.loads(remembered(tmp_path).read_text(encoding="utf-8"))
    assert list(answers.values()) == [str(n) for n in range(100)][-ProbeCache.LIMIT :]


def test_other_code_probes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recall(answer: str) -> str:
        cache = ProbeCache(tmp_path)
        found = cache.recall("key", lambda: answer, decode_text)
        cache.save()
        return found

    assert [recall("first"), recall("second")] == ["first", "first"]
    monkeypatch.setattr(probe_cache, "__file__", str(tmp_path / "probe_cache.py"))
    assert recall("third") == "third"


def test_two_writers_keep_each_others_answers(tmp_path: Path) -> None:
    caches = [ProbeCache(tmp_path) for _ in range(2)]
    for number, cache in enumerate(caches):
        cache.recall(str(number), lambda n=number: str(n), decode_text)  # type: ignore[misc]
    for cache in caches:
        cache.save()
    assert [*json.loads(remembered(tmp_path).read_text(encoding="utf-8")).values()] == ["0", "1"]


def test_many_at_once(tmp_path: Path) -> None:
    new = detect(tmp_path)

    def again(_: int) -> Hardware:
        remembered(tmp_path).write_bytes(b"")  # so that every one of them writes
        return detect(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        assert all(found == new for found in pool.map(again, range(40)))
    assert [path.name for path in tmp_path.iterdir()] == ["hardware.json"]


def test_answers_that_others_could_have_written_do_not_count(tmp_path: Path) -> None:
    """A forged answer would name the ninja that the next build runs."""
    cache = ProbeCache(tmp_path)
    cache.recall("key", lambda: "true", str)
    cache.save()
    assert ProbeCache(tmp_path).recall("key", lambda: "probed", str) == "true"
    (tmp_path / "hardware.json").chmod(0o660)
    assert ProbeCache(tmp_path).recall("key", lambda: "probed", str) == "probed"
