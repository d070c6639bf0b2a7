"""Lines on stderr: they arrive where they can, and nothing fails where they cannot."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitlinear.runtime import progress

ROOT = Path(progress.__file__).parents[2]
E_ACUTE = "caf\u00e9"


class WriteOnly:
    """What some loggers put in the place of stderr."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


class Encoded(io.TextIOWrapper):
    """A stream into memory that refuses what its encoding lacks."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")

    @property
    def content(self) -> bytes:
        self.flush()
        return self.buffer.getvalue()  # type: ignore[attr-defined, no-any-return]


class Raises:
    """A stream of which everything fails, in some way."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error(name)


def test_announce_writes_one_line_with_the_name_of_the_package(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress.announce("compiling avx2")
    assert capsys.readouterr() == ("", "bitlinear: compiling avx2\n")


def test_write_adds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[1/2] c++", "", " -c x.cpp\n", "\n"):
        progress.write(text)
    assert capsys.readouterr() == ("", "[1/2] c++ -c x.cpp\n\n")


@pytest.mark.parametrize("make", [io.StringIO, WriteOnly])
def test_the_text_arrives_in_a_replaced_stderr(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make()
    monkeypatch.setattr(sys, "stderr", stream)
    progress.write(f"{E_ACUTE} \u2713\n")
    progress.announce(E_ACUTE)
    text = stream.text if isinstance(stream, WriteOnly) else stream.getvalue()
    assert text == f"{E_ACUTE} \u2713\nbitlinear: {E_ACUTE}\n"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", b"bitlinear: caf\\xe9 \\u2713\n"),
        ("latin-1", b"bitlinear: caf\xe9 \\u2713\n"),
        ("cp1252", b"bitlinear: caf\xe9 \\u2713\n"),
        ("utf-8", b"bitlinear: caf\xc3\xa9 \xe2\x9c\x93\n"),
        ("utf-16-le", f"bitlinear: {E_ACUTE} \u2713\n".encode("utf-16-le")),
    ],
)
def test_characters_that_the_encoding_lacks_are_escaped(
    encoding: str, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Encoded(encoding)
    monkeypatch.setattr(sys, "stderr", stream)
    progress.announce(f"{E_ACUTE} \u2713")
    assert stream.content == expected


def test_a_byte_of_a_path_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Encoded("utf-8")
    monkeypatch.setattr(sys, "stderr", stream)
    progress.announce(f"/home/{os.fsdecode(bytes([255]))}/cache")
    assert stream.content == b"bitlinear: /home/\\udcff/cache\n"


def test_the_text_is_flushed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "log", "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        progress.write("no end of the line")
        assert (tmp_path / "log").read_text() == "no end of the line"


def _none() -> Any:
    return None


def _closed() -> Any:
    stream = io.StringIO()
    stream.close()
    return stream


def _closed_file() -> Any:
    with open(os.devnull, "w", encoding="utf-8") as stream:
        pass
    return stream


def _read_only() -> Any:
    return open(os.devnull, encoding="utf-8")


def _detached() -> Any:
    stream = Encoded("utf-8")
    stream.detach()
    return stream


def _os_error() -> Any:
    return Raises(OSError)


def _runtime_error() -> Any:
    return Raises(RuntimeError)


@pytest.mark.parametrize(
    "make",
    [_none, object, _closed, _closed_file, _read_only, _detached, _os_error, _runtime_error],
)
def test_a_stderr_that_takes_nothing(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = make()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        progress.announce("compiling")
        progress.write("compiling\n")
    with contextlib.suppress(Exception):
        stream.close()
    assert capsys.readouterr() == ("", "")


# --- The stderr of a process ---------------------------------------------------------------------

_SAY = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("progress", {str(ROOT)!r} +
                                              "/bitlinear/runtime/progress.py")
progress = importlib.util.module_from_spec(spec)
spec.loader.exec_module(progress)
for number in range(3):
    progress.announce("caf\\xe9")
    progress.write("x" * 100_000)
print("goes on")
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="has no /dev/full")
posix = pytest.mark.skipif(os.name != "posix", reason="closes a descriptor")


def say(**options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", "-c", _SAY],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        check=False,
        **options,
    )


def test_a_pipe() -> None:
    run = say(stderr=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert (run.returncode, run.stdout) == (0, "goes on\n")
    assert run.stderr == f"bitlinear: caf\\xe9\n{'x' * 100_000}" * 3


@linux
def test_a_full_disk() -> None:
    with open("/dev/full", "wb") as stream:
        run = say(stderr=stream)
    assert (run.returncode, run.stdout) == (0, "goes on\n")


@posix
def test_a_pipe_that_nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        run = say(stderr=writer)
    finally:
        os.close(writer)
    assert (run.returncode, run.stdout) == (0, "goes on\n")


@posix
def test_no_descriptor() -> None:
    command = 'exec "$@" 2>&-'
    run = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-S", "-c", _SAY],
        stdout=subprocess.PIPE,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, b"goes on\n")
