"""The notebooks: their saved output, and that they run."""

from __future__ import annotations

import json
import re

import pytest

from tests.scripts.small_char_lm import BUDGET, TINY

pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

import nbformat

from scripts import tools
from scripts.dev import save_notebooks
from scripts.dev.save_notebooks import NOTEBOOKS, SCRIPTS


def outputs_of(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def text_of(output):
    """Return all text of an output."""
    data = output.get("data", {})
    texts = [output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text/"))]
    # A file has lists of lines.
    return "\n".join("".join(text) for text in texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_notebooks_have_clean_output(path):
    content = path.read_text(encoding="utf-8")
    assert len(content) < 150 * 1024
    notebook = json.loads(content)
    outputs = outputs_of(notebook)
    assert all(cell.get("execution_count") for cell in notebook["cells"] if "outputs" in cell)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for text in map(text_of, outputs):
        assert tools.without_paths(text) == text
        assert "\r" not in text
        bars = re.findall(r"^(training[^:]*):", text, re.MULTILINE)
        assert len(bars) == len(set(bars))


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path):
    pytest.importorskip("sklearn")
    notebook = nbformat.read(SCRIPTS / "quickstart.ipynb", as_version=4)
    set_parameters(notebook, "epochs = 2")
    save_notebooks.run(notebook, tmp_path)
    printed = "".join(map(text_of, outputs_of(notebook)))
    assert "BitLinear (deployed)" in printed
    assert (tmp_path / "digits.pt").exists()


@pytest.mark.slow
def test_a_model_generates_before_and_after_conversion(tmp_path):
    for module in ("transformers", "gguf"):
        pytest.importorskip(module)
    notebook = nbformat.read(SCRIPTS / "generate.ipynb", as_version=4)
    set_parameters(notebook, "new_tokens, rounds = 2, 1")
    save_notebooks.run(notebook, tmp_path)
    outputs = [text_of(output).strip() for output in outputs_of(notebook)]
    assert "True" in outputs  # the tokens of both ways to generate are the same
    weights, rates = (text for text in outputs if "nn.Linear, bf16" in text)
    megabytes = {name: float(m) for name, m in re.findall(r"^(.*?) {2,}([\d.]+) MB", weights, re.M)}
    assert megabytes["BitLinear, int8 head"] < megabytes["BitLinear"]
    assert megabytes["BitLinear"] < megabytes["nn.Linear, bf16"]
    assert all(f"\n{name}  " in rates for name in megabytes)


@pytest.mark.slow
def test_every_format_is_loaded(tmp_path):
    for module in ("transformers", "gguf", "peft"):
        pytest.importorskip(module)
    notebook = nbformat.read(SCRIPTS / "bring_your_model.ipynb", as_version=4)
    save_notebooks.run(notebook, tmp_path)
    printed = "".join(map(text_of, outputs_of(notebook)))
    assert printed.count("every weight is what was written") == 11


@pytest.mark.slow
def test_the_language_model_runs(tmp_path):
    notebook = nbformat.read(SCRIPTS / "char_lm.ipynb", as_version=4)
    set_parameters(notebook, f"settings, budget = {TINY}, {BUDGET}")
    save_notebooks.run(notebook, tmp_path)
    outputs = outputs_of(notebook)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("| BitLinear, deployed" in text_of(output) for output in outputs)


def set_parameters(notebook, source):
    """Set the variables of the cell that is tagged "parameters"."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source += f"\n{source}"


def test_overwritten_progress_is_removed():
    assert save_notebooks.last_states("\rbar: 0%\rbar: 50%\rbar: 100%\nend\n") == (
        "bar: 100%\nend\n"
    )
    stream = nbformat.v4.new_output("stream", name="stderr", text="bar: 0%")
    more = nbformat.v4.new_output("stream", name="stderr", text="\rbar: 100%\n")
    other = nbformat.v4.new_output("stream", name="stdout", text="text\n")
    merged = save_notebooks.merged([stream, more, other])
    assert [save_notebooks.cleaned(output).text for output in merged] == ["bar: 100%\n", "text\n"]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("cache ~/.cache/bitlinear 0700", "cache [path] 0700"),
        ("<td>/usr/bin/c++</td><br/>", "<td>[path]</td><br/>"),
        ("fp16/bf16 and 3/4", "fp16/bf16 and 3/4"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
    ],
)
def test_paths_of_the_machine_are_removed(text, clean):
    assert tools.without_paths(text) == clean
