"""The README's Python runs as it stands; its shell commands are run by CI (see .ci/run)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict[str, object] = {}
    for block in blocks:
        if "from transformers" in block and importlib.util.find_spec("transformers") is None:
            continue  # an extra, which needs a newer Python than the package
        exec(compile(block, "README.md", "exec"), namespace)
    assert all(layer.is_deployed for layer in (namespace["layer"], namespace["fresh"][0]))


def test_there_are_exactly_two_set_up_commands():
    section = README.split("## Set-up")[1].split("\n## ")[0]
    assert len(re.findall(r"^```sh\n(.*)\n```", section, re.MULTILINE)) == 2


def test_every_test_that_the_table_of_features_names_exists():
    section = README.split("## What works with BitLinear")[1].split("\n## ")[0]
    *_, table = section.partition("|---|---|---|\n")
    rows = [line.split(" | ")[-1] for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    for row in rows:
        _, *files = re.split(r"\[[\w.]+\]\(([\w/.]+)\)", row)
        assert files, row
        for file, names in zip(files[::2], files[1::2]):
            for name in re.findall(r"`(\w+)`", names):
                assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (file, name)
