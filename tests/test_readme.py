"""Every README: links, test names, Python examples. CI runs the shell commands (.ci/run)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from bitlinear.runtime import settings

ROOT = Path(__file__).parents[1]
FOLDERS = ("bitlinear", "scripts", "tests")
DOCUMENTS = [
    ROOT / "README.md",
    *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md")),
]

documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def read(path):
    return path.read_text(encoding="utf-8")


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(text):
    """The anchors of a document, as forges make them of its headings."""
    titles = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@documents
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(read(document)))
    for link in links:
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in headings(read(target)), link


@documents
def test_named_tests_exist(document):
    """A name counts for the files that are linked before it in the same cell or line."""
    for cell in re.split(r"[|\n]", without_code(read(document))):
        _, *parts = re.split(r"\]\(([\w./]+\.py)\)", cell)
        for file, names in zip(parts[::2], parts[1::2]):
            source = read(document.parent / file)
            for name in re.findall(r"`(test_\w+)`", names):
                assert f"def {name}(" in source, (file, name)


@documents
def test_named_files_exist(document):
    """A source file that is named in running text, with or without its folder."""
    names = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    for name in re.findall(r"`[\w./]*?(\w+\.(?:py|cpp|cuh?|h|ipynb|png|json))`", read(document)):
        assert name in names or name in ("config.json", "meta.json"), name


def write_checkpoint(folder):
    """Write a small packed model and its tokenizer, in place of one that would be downloaded."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from scripts import sample_checkpoints

    folder.mkdir(parents=True)
    sample_checkpoints.write_bitnet(sample_checkpoints.ternary_llama(), folder)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@documents
def test_python_examples_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", read(document), re.MULTILINE | re.DOTALL)
    if not blocks:
        pytest.skip("no examples")
    namespace: dict[str, object] = {}
    for block in blocks:
        if "from transformers" in block and importlib.util.find_spec("transformers") is None:
            continue  # an extra, which needs a newer Python than the package
        for name in re.findall(r'"(microsoft/[\w.-]+)"', block):
            write_checkpoint(tmp_path / name)  # from_pretrained takes a folder of this name
        exec(compile(block, str(document), "exec"), namespace)


def test_the_features_have_tests():
    table = read(ROOT / "tests" / "README.md").split("## What works with BitLinear")[1]
    rows = [line for line in table.split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        assert re.search(r"\]\([\w./]+\.py\): `test_\w+`", row), row


def test_the_map_names_every_test_file():
    text = read(ROOT / "tests" / "README.md")
    for path in sorted((ROOT / "tests").iterdir()):
        if path.name.startswith("test_") or (path.is_dir() and path.name[0] not in "_."):
            name = f"{path.name}/" if path.is_dir() else path.name
            assert f"`{name}`" in text, name


def test_the_table_of_variables_is_what_the_doctor_reports():
    table = read(ROOT / "bitlinear" / "runtime" / "README.md").split("## Environment variables")[1]
    rows = re.findall(r"^\| (`[A-Z].*?) \|", table.split("\n## ")[0], re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
    assert listed == set(settings.REPORTED)


def test_the_front_page_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= 200


def test_there_are_exactly_two_set_up_commands():
    section = read(ROOT / "README.md").split("## Set-up")[1].split("\n## ")[0]
    assert len(re.findall(r"^```sh\n(.*)\n```", section, re.MULTILINE)) == 2


def test_nobody_is_sent_to_the_package_of_somebody_else():
    """The name `bitlinear` on the package index belongs to a different project."""
    files = [*DOCUMENTS, *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
    for file in files:
        assert not re.search(r"pip install\s+['\"]?bitlinear\b", read(file)), file
