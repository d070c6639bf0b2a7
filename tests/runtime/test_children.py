"""The interpreter that starts child processes, and what reaches them from the user's program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bitlinear.runtime import children
from bitlinear.runtime.system import ProbeError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="shell scripts stand for interpreters")

PYTHON = sys.executable
SLEEP = shutil.which("sleep")


@pytest.fixture(autouse=True)
def _ask_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(children._MARK, raising=False)
    children.find_interpreter.cache_clear()
    yield
    children.find_interpreter.cache_clear()


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without an interpreter, the only one to look in."""
    folder = tmp_path / "nowhere"
    folder.mkdir()
    monkeypatch.setattr(sys, "executable", None)
    monkeypatch.setattr(sys, "_base_executable", None, raising=False)
    for name in ("prefix", "exec_prefix", "base_prefix"):
        monkeypatch.setattr(sys, name, str(folder))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def real(path: Path) -> str:
    """Put this Python under another path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return script(path, f'exec "{PYTHON}" "$@"')


IDENTITY = f"{sys.implementation.cache_tag} {sys.hexversion} {sys.maxsize}"


def is_this_python(path: str) -> bool:
    answer = subprocess.run([path, *children._ISOLATED, children._IDENTITY], stdout=-1, check=True)
    return answer.stdout.decode().strip() == IDENTITY


# --- The interpreter -----------------------------------------------------------------------------


def test_the_interpreter_is_the_one_of_this_process() -> None:
    assert children.interpreter() == os.path.abspath(PYTHON)


@pytest.mark.parametrize("executable", [None, "", "/missing/python3", "python3", os.sep])
def test_an_executable_that_is_none(
    executable: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", executable)
    assert is_this_python(children.interpreter())


def test_a_relative_executable_is_found_from_any_directory(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program finds itself that was started as ``bin/python``."""
    path = real(nowhere / "bin" / "python")
    monkeypatch.chdir(nowhere)
    monkeypatch.setattr(sys, "executable", "bin/python")
    assert children.interpreter() == path
    assert 1.0 <= children._SECONDS <= 10.0  # for one that does not answer


def test_a_program_that_embeds_python_is_not_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    for name in ("blender", "uwsgi", "pytest", "my-python", "python.sh/app"):
        path = script(tmp_path / "bin" / name, f": > '{started}'")
        monkeypatch.setattr(sys, "executable", path)
        monkeypatch.setattr(sys, "_base_executable", path, raising=False)
        children.find_interpreter.cache_clear()
        assert is_this_python(children.interpreter())
    assert not started.exists()


@pytest.mark.parametrize("name", ["python", "python3", "python3.11", "Python", "python3-dbg"])
def test_the_names_of_a_python(
    name: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = real(tmp_path / "elsewhere" / name)
    monkeypatch.setattr(sys, "executable", path)
    assert children.interpreter() == path


BROKEN = {
    "sleeps": (f"exec {SLEEP} 30", "timed out after 0.5 seconds"),
    "starts a program that sleeps": (f"{SLEEP} 2; exit 0", "timed out after 0.5 seconds"),
    "has another version": ("echo cpython-27 34015984 9223372036854775807", "is another Python"),
    "is 32-bit": (
        f"echo {sys.implementation.cache_tag} {sys.hexversion} 2147483647",
        "is another Python",
    ),
    "prints more": (f"echo {IDENTITY} and more", "is another Python"),
    "prints nothing": ("exit 0", "printed nothing"),
    "fails": (f"echo {IDENTITY}; echo 'no licence' >&2; exit 3", "failed with 3: no licence"),
    "crashes": ("kill -SEGV $$", "failed with -11: no message"),
    "prints no text": ("printf '\\377\\376'", "is another Python"),
}


@pytest.mark.parametrize(("text", "reason"), BROKEN.values(), ids=BROKEN)
def test_why_a_python_does_not_serve(
    text: str, reason: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "_SECONDS", 0.5 if "sleep" in text else 5.0)
    monkeypatch.setattr(sys, "executable", script(nowhere / "python3", text))
    with pytest.raises(ProbeError, match=f"start a child with: .*{reason}"):
        children.interpreter()


@pytest.mark.parametrize("text", [text for text, _ in BROKEN.values()], ids=BROKEN)
def test_the_next_python_is_tried(
    text: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "_SECONDS", 1.5 if "sleep" in text else 5.0)
    monkeypatch.setattr(sys, "executable", script(nowhere / "app" / "python3", text))
    path = real(nowhere / "bin" / "python")
    assert children.interpreter() == path


def test_a_program_that_is_only_called_python(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy("/bin/cat", nowhere / "python")
    monkeypatch.setattr(sys, "executable", str(nowhere / "python"))
    with pytest.raises(ProbeError, match="failed with 1: "):
        children.interpreter()
    children.find_interpreter.cache_clear()
    path = real(nowhere / "bin" / "python3")
    assert children.interpreter() == path


def test_a_file_that_cannot_be_started(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nowhere / "python3").write_text("no program")
    monkeypatch.setattr(sys, "executable", str(nowhere / "python3"))
    with pytest.raises(ProbeError, match="Permission denied"):
        children.interpreter()
    children.find_interpreter.cache_clear()
    (nowhere / "python3").chmod(0o755)
    with pytest.raises(ProbeError, match="Exec format error"):
        children.interpreter()


@pytest.mark.parametrize("attribute", ["executable", "_base_executable"])
def test_a_frozen_program_is_not_started(
    attribute: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    path = script(tmp_path / "app" / "python", f": > '{started}'; exec '{PYTHON}' \"$@\"")
    monkeypatch.setattr(sys, attribute, path, raising=False)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(ProbeError, match="there is no Python interpreter to start a child with"):
        children.interpreter()
    children.find_interpreter.cache_clear()
    expected = real(nowhere / "bin" / "python")
    assert children.interpreter() == expected
    assert not started.exists()


VERSION = "python{}.{}".format(*sys.version_info)


@pytest.mark.parametrize("name", [VERSION, "python3", "python"])
@pytest.mark.parametrize("folder", ["bin", "Scripts", "."])
def test_the_python_of_the_prefix(folder: str, name: str, nowhere: Path) -> None:
    path = real(nowhere / folder / name)
    assert children.interpreter() == path


@pytest.mark.parametrize("prefix", ["prefix", "exec_prefix", "base_prefix"])
def test_every_prefix_counts(
    prefix: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = real(tmp_path / "elsewhere" / "bin" / "python3")
    monkeypatch.setattr(sys, prefix, str(tmp_path / "elsewhere"))
    assert children.interpreter() == path


def test_the_python_on_path_is_the_last_one(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = real(nowhere / "on path" / VERSION)
    monkeypatch.setenv("PATH", str(nowhere / "on path"))
    assert children.interpreter() == path
    children.find_interpreter.cache_clear()
    better = real(nowhere / "bin" / "python")
    assert children.interpreter() == better


def test_no_python_at_all(nowhere: Path) -> None:
    reason = "there is no Python interpreter to start a child with: sys.executable is None"
    for _ in range(2):
        with pytest.raises(ProbeError) as caught:
            children.interpreter()
        assert str(caught.value) == reason
    rejection = children.find_interpreter().rejection
    assert rejection is not None
    assert (rejection.code, rejection.reason) == ("no-compiler", reason)


@pytest.mark.parametrize("text", ["exit 1", f"echo {IDENTITY}"])
def test_a_process_asks_once(
    text: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    path = script(nowhere / "python", f"echo asked >> '{asked}'; {text}")
    (nowhere / "bin").mkdir()
    (nowhere / "bin" / "python3").symlink_to(path)  # the same file again
    monkeypatch.setattr(sys, "executable", path)
    monkeypatch.setattr(sys, "_base_executable", path, raising=False)
    for _ in range(3):
        if text == "exit 1":
            with pytest.raises(ProbeError, match="failed with 1"):
                children.interpreter()
        else:
            assert children.interpreter() == path
    assert asked.read_text() == "asked\n"


def test_a_child_starts_no_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    monkeypatch.setattr(sys, "executable", script(tmp_path / "python", f": > '{asked}'"))
    monkeypatch.setenv("BITLINEAR_CHILD", "1")
    for call in (children.interpreter, lambda: children.python_command(Path("x.py"))):
        with pytest.raises(ProbeError, match="this process is a child of an import of bitlinear"):
            call()
    with pytest.raises(ProbeError, match="is a child"):
        children.output_of(Path("x.py"))
    assert not asked.exists()


# --- What a child sees ---------------------------------------------------------------------------

ASKED = ("encodings", "site", "json", "runpy", "tempfile", "setuptools")
NAMES = (*ASKED, "sitecustomize", "usercustomize")
_ASK = f"""
import importlib, json, sys, warnings
warnings.warn("this must not stand among the lines of a compiler")
found = {{}}
for name in {ASKED!r}:
    try:
        found[name] = getattr(importlib.import_module(name), "__file__", None)
    except ImportError:
        found[name] = None
print(json.dumps([found, sys.argv, __name__]))
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder of modules that end the process which imports them."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} of the user')")
        (folder / f"{name}").mkdir()
        (folder / f"{name}" / "__init__.py").write_text(f"raise SystemExit('{name} of the user')")
    (folder / "ask.py").write_text(_ASK)
    return folder


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with an importable package."""
    folder = tmp_path / "site packages"
    (folder / "setuptools").mkdir(parents=True)
    (folder / "setuptools" / "__init__.py").touch()
    return folder


def ask(hostile: Path, path: list[Path], *arguments: str) -> tuple[dict[str, str], list[str], str]:
    run = subprocess.run(
        children.python_command(hostile / "ask.py", *arguments, path=map(str, path)),
        cwd=hostile,
        env=children.child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    found, argv, name = json.loads(run.stdout)
    return found, argv, name


def test_the_folder_of_the_user_hides_nothing(
    hostile: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hostile)
    monkeypatch.syspath_prepend(str(hostile))
    found, _, name = ask(hostile, [packages, hostile])
    assert name == "__main__"
    assert found["setuptools"] == str(packages / "setuptools" / "__init__.py")
    standard = os.path.dirname(os.__file__)
    for module in ("encodings", "json", "runpy", "site", "tempfile"):
        assert found[module].startswith(standard), module


def test_only_the_standard_library_without_a_path(hostile: Path) -> None:
    found, _, _ = ask(hostile, [])
    assert found["setuptools"] is None


def test_arguments_arrive_as_they_are(hostile: Path) -> None:
    arguments = ["", "a b", '{"x": "é"}', "--", "-c", "'"]
    _, argv, _ = ask(hostile, [], *arguments)
    assert argv[0] == str(hostile / "ask.py")
    assert argv[-len(arguments) :] == arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTHONPATH", "."),
        ("PYTHONHOME", "/nonexistent"),
        ("PYTHONSTARTUP", "site.py"),
        ("PYTHONSAFEPATH", ""),
        ("PYTHONWARNINGS", "error"),
        ("PYTHONINSPECT", "1"),
        ("PYTHONVERBOSE", "1"),
        ("PYTHONIOENCODING", "nonsense"),
        ("PYTHONUSERBASE", "."),
        ("PYTHONDONTWRITEBYTECODE", "1"),
        ("PYTHONOPTIMIZE", "2"),
    ],
)
def test_the_settings_of_the_parent_do_not_matter(
    name: str, value: str, hostile: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(hostile, [packages])
    children.find_interpreter.cache_clear()
    monkeypatch.setenv(name, value)
    monkeypatch.chdir(hostile)
    assert ask(hostile, [packages]) == expected


def test_the_output_of_a_program(hostile: Path, packages: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import setuptools, sys; print(setuptools.__file__)")
    output = children.output_of(program, [str(packages)])
    assert output.strip() == str(packages / "setuptools" / "__init__.py")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "program.py printed nothing"),
        ("import sys; sys.exit('no driver')", "program.py failed with 1: no driver"),
        ("import os; os.kill(os.getpid(), 9)", "program.py failed with -9: no message"),
        ("import time; time.sleep(30)", "program.py: .*timed out after 0.5 seconds"),
        ("raise SystemExit(3)", "program.py failed with 3: no message"),
    ],
)
def test_a_program_that_gives_no_answer(text: str, reason: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(text)
    with pytest.raises(ProbeError, match=f"^{reason}"):
        children.output_of(program, timeout=0.5 if "sleep" in text else 30.0)


# --- Environment and path ------------------------------------------------------------------------


def test_the_environment_of_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
    kept = {"MKL_NUM_THREADS": "1", "LD_LIBRARY_PATH": "/opt/lib", "COMP_WORDS": "x", "é": "é"}
    for name in dropped:
        monkeypatch.setenv(name, "1")
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BITLINEAR_BUILD", "on")
    before = dict(os.environ)
    environment = children.child_environment()
    assert not set(dropped) & set(environment)
    assert kept.items() <= environment.items()
    assert environment["BITLINEAR_CHILD"] == "1"
    assert environment["BITLINEAR_BUILD"] == "off"
    changed = {"BITLINEAR_CHILD", "BITLINEAR_BUILD"}
    for name in set(environment) - changed:
        assert environment[name] == before[name]
    assert dict(os.environ) == before


TORCH = str(Path(torch.__file__).parents[1])


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what can stand on sys.path; it is the working directory."""
    for name in ("script", "lib", "a/site-packages", "b/dist-packages"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "library.zip").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (["script", TORCH], [TORCH, "script"]),
        (["script", "a/site-packages", TORCH], [TORCH, "a/site-packages", "script"]),
        (
            ["script", "lib", "b/dist-packages", "a/site-packages"],
            [TORCH, "b/dist-packages", "a/site-packages", "script", "lib"],
        ),
        (["", "lib", "a/site-packages"], [TORCH, "a/site-packages", "", "lib"]),
        (["script", "script/", "lib", "./script", TORCH, TORCH + "/"], [TORCH, "script", "lib"]),
        (["missing", "missing/site-packages", "library.zip"], [TORCH, "library.zip"]),
        ([], [TORCH]),
    ],
)
def test_installed_packages_come_first_and_the_folder_of_the_script_behind_them(
    path: list[str], expected: list[str], entries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", path)
    assert children.import_path() == [os.path.abspath(entries / entry) for entry in expected]


def test_the_import_path_of_this_process() -> None:
    path = children.import_path()
    assert path[0] == TORCH
    assert len(set(path)) == len(path)
    assert all(os.path.isabs(entry) and os.path.exists(entry) for entry in path)


def test_a_working_directory_that_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, whose sys.path begins with the working directory."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.syspath_prepend("")
    gone.rmdir()
    assert str(Path(torch.__file__).parents[1]) in children.import_path()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files to others"
)
def test_children_do_not_obey_files_of_other_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under sudo, which may keep HOME: ccache runs what its configuration there says."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CCACHE_DISABLE", raising=False)
    assert children.child_environment()["HOME"] == str(tmp_path)
    os.chown(tmp_path, 65534, 65534)
    environment = children.child_environment()
    assert environment["HOME"] == os.devnull
    assert environment["CCACHE_DISABLE"] == "1"
