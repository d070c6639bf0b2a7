"""kernels/README.md: its recipe gives a kernel that is bit-exact, and its tables are complete."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import textwrap

import pytest

from bitlinear.kernels import CUDA, DIRECTORY, VARIANTS
from tests.kernels.native import compile_variant, this_machine

README = (DIRECTORY / "README.md").read_text(encoding="utf-8")


def fenced_block(language):
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return block


@pytest.fixture
def recipe(tmp_path):
    """``(directory, variant)``: a copy of the kernels with the file and the row of the README."""
    row = textwrap.indent(fenced_block("py").rstrip() + ",\n", "    ")
    source = fenced_block("cpp")
    directory = tmp_path / "kernels"
    shutil.copytree(DIRECTORY, directory, ignore=shutil.ignore_patterns("__pycache__"))
    name = re.search(r'_variant\(\s*"(\w+)"', row)[1]
    (directory / "cpu" / f"{name}.cpp").write_text(source)
    table = directory / "__init__.py"
    last_row = '    _variant("scalar"'
    text = table.read_text()
    assert text.count(last_row) == 1
    table.write_text(text.replace(last_row, row + last_row))
    variants = {variant.name: variant for variant in runpy.run_path(str(table))["VARIANTS"]}
    assert set(variants) == {variant.name for variant in VARIANTS} | {name}
    return directory, variants[name]


@pytest.mark.slow
def test_the_recipe_gives_a_bit_exact_kernel(recipe, tmp_path):
    """The native driver compares it with the numerics that ``scalar`` is compared with."""
    directory, variant = recipe
    cpu = this_machine().cpu
    if variant.arch != cpu.machine:
        pytest.skip(f"the example is for {variant.arch}")
    driver = tmp_path / "driver"
    compile_variant("g++", variant, driver, directory=directory)
    if not variant.requires <= (cpu.flags.value or frozenset()):
        pytest.skip(f"this CPU cannot run {variant.name}")
    result = subprocess.run([driver, "quick"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.match(rf"{variant.name}: \d+ passed, 0 failed", result.stdout)


def test_the_row_of_the_recipe_takes_no_place_of_another(recipe):
    _, variant = recipe
    for other in VARIANTS:
        if other.name != variant.name and other.arch in ("any", variant.arch):
            assert other.priority != variant.priority


def test_the_table_lists_every_cpu_kernel():
    rows = re.findall(r"^\| \[`(\w+)`\]\(cpu/(\w+)\.cpp\) \| (\d+) \|", README, re.MULTILINE)
    assert rows == [(v.name, v.name, str(v.priority)) for v in VARIANTS]


def test_the_table_lists_every_cuda_kernel():
    rows = set(re.findall(r"^\| \[`(\w+\.cu)`\]\(cuda/", README, re.MULTILINE))
    sources = {source.split("/")[1] for source in CUDA.sources if source.endswith(".cu")}
    assert rows == sources - {"launch.cu", "selftest.cu"}


def test_every_test_that_is_named_exists():
    folder = DIRECTORY.parent.parent / "tests" / "kernels"
    tests = "".join(path.read_text(encoding="utf-8") for path in folder.glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", README)):
        assert f"def {name}(" in tests, name
