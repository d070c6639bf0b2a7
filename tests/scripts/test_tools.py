"""Every script's command line: its help, and the one line about a missing tool."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import tools

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "bench.__main__": "--shapes",
    "bench.plot": "--pictures",
    "bench.decode": "--layers",
    "bench.generate": "--depths",
    "bench.train_step": "--compile",
    "bench.train_model": "--models",
    "bench.input_gradient": "--dtypes",
    "bench.import_time": "--runs",
    "bench.load_memory": "--gib",
    "bench.steadiness": "--busy",
    "bring_your_model": "--only",
    "char_lm": "--restart",
    "quickstart": "--epochs",
    "dev.instruction_count": "--kernels",
    "dev.instruction_mix": "--compiler",
    "dev.save_notebooks": "notebooks",
    "dev.test_aarch64": "--emulator",
    "dev.test_versions": "INTERPRETER=TORCH",
}


def main_of(name):
    return importlib.import_module(f"scripts.{name}").main


def test_every_script_is_tested():
    with_main = {
        ".".join(path.relative_to(ROOT / "scripts").with_suffix("").parts)
        for path in (ROOT / "scripts").rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert with_main == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_the_options(name, capsys):
    if name == "quickstart":
        pytest.importorskip("sklearn")
    if name in {"bring_your_model", "bench.generate"}:
        for module in ("transformers", "gguf", "peft"):
            pytest.importorskip(module)
    with pytest.raises(SystemExit) as end:
        main_of(name)(["--help"])
    assert end.value.code == 0
    assert SCRIPTS[name] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bench.decode", ["--layers", "0"], "'0' is not a whole number above 0"),
        ("bench.train_step", ["--shapes", "64"], "'64' is not of the form NxK"),
        ("bench.input_gradient", ["--tokens", "many"], "'many' is not a whole number above 0"),
        ("bench.import_time", ["--runs", "none"], "'none' is not a whole number above 0"),
        ("dev.instruction_count", ["--kernels", "avx2"], "invalid choice: 'avx2'"),
        ("dev.test_versions", ["python3.9"], "'python3.9' is not of the form python3.9=2.4.0"),
    ],
)
def test_a_mistake_on_a_command_line_is_named(name, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main_of(name)(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "program", "remedy"),
    [
        ("dev.instruction_count", "gcc", "run apt-get install gcc"),
        ("dev.instruction_mix", "aarch64-linux-gnu-g++", "apt-get install g++-aarch64-linux-gnu"),
        ("dev.test_aarch64", "qemu-aarch64", "says how to get version 8.2 or newer"),
        ("dev.test_versions", "python3.9", "install that version of Python"),
    ],
)
def test_a_missing_program_is_named_in_one_line(name, program, remedy, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as end:
        main_of(name)([])
    assert end.value.code == tools.MISSING
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"this script needs {program}, which is missing: ")
    assert remedy in line


def run_without(module: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process in which ``module`` cannot be imported."""
    script = command[0]
    start = "run_path" if script.endswith(".py") else "run_module"
    code = (
        f"import sys, runpy; sys.modules[{module!r}] = None; sys.argv = {list(command)!r}; "
        f"runpy.{start}({script!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "module", "extra"),
    [
        ("scripts.bench", "tqdm", "bench"),
        ("scripts.bench.plot", "matplotlib", "bench"),
        ("scripts.char_lm", "matplotlib", "bench"),
        ("scripts.bench.load_memory", "safetensors", "safetensors"),
        ("scripts.dev.save_notebooks", "nbclient", "dev"),
        ("scripts/quickstart.py", "sklearn", "quickstart"),
    ],
)
def test_a_missing_module_is_named_in_one_line(script, module, extra):
    result = run_without(module, script)
    assert result.returncode == tools.MISSING
    (line,) = result.stderr.splitlines()
    assert f"needs the Python module {module}" in line
    assert f"pip install '.[{extra}]' in the checkout" in line


def test_an_import_that_fails_names_the_extra(capsys):
    with pytest.raises(SystemExit), tools.importing("bench"):
        import a_module_that_nobody_has  # noqa: F401
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "this script needs the Python module a_module_that_nobody_has, which is missing: "
        "run pip install '.[bench]' in the checkout"
    )
