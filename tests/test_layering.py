"""The order of the package's modules: none imports a later one, or a private name of another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bitlinear

PACKAGE = Path(bitlinear.__file__).parent

# From the bottom to the top. packing and quantize import nothing of the package.
ORDER = [
    "packing",
    "quantize",
    "arguments",
    "ops",
    "autograd",
    "deployed",
    "training",
    "latent_weight",
    "packed_weight",
    "foreign",
    "preconditions",
    "ties",
    "state",
    "packable",
    "linear",
    "tensor_parallel",
]


def imports(path):
    """``(module, names)`` of each relative import; not those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in for_types:
            yield node.module or "", [alias.name for alias in node.names]


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_modules_below(module):
    below = ORDER[: ORDER.index(module)]
    for source, names in imports(PACKAGE / f"{module}.py"):
        imported = [source] if source else names
        assert set(imported) <= set(below), (module, imported)
    if module in ("packing", "quantize"):
        assert not list(imports(PACKAGE / f"{module}.py"))


def test_no_module_imports_a_private_name():
    private = [
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for _, names in imports(path)
        for name in names
        if name.startswith("_") and name != "__version__"
    ]
    assert set(private) <= {("integrations/transformers.py", "_CALL_HOOKS")}
