"""The order of the package's modules: none imports a later one, or a private name of another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bitlinear

PACKAGE = Path(bitlinear.__file__).parent

# From the bottom to the top. packing and groups import nothing of the package.
ORDER = [
    "packing",
    "groups",
    "quantize",
    "prologue",
    "messages",
    "arguments",
    "integrations",
    "attend",
    "quantized_linear",
    "head_products",
    "ops",
    "autograd",
    "deployed",
    "fused",
    "lookup",
    "training",
    "latent_weight",
    "packed_weight",
    "foreign",
    "preconditions",
    "half_scales",
    "ties",
    "state",
    "packable",
    "ternary_layer",
    "linear",
    "fusable",
    "linear_group",
    "embedding",
    "tensor_parallel",
    "conversion.weight_readers",
    "conversion.layers",
    "conversion.exclusion",
    "conversion.replacement",
    "conversion.coverage",
    "conversion.object_contents",
    "conversion.references",
    "conversion.ternary",
    "conversion.repacking",
    "convert",
    "pack_dense",
    "mapped",
    "loading",
    "filling",
    "integrations.checkpoints",
    "integrations.flop_counter",
    "integrations.inductor",
    "integrations.onnx",
    "integrations.transformers.layers",
    "integrations.transformers.small_kernels",
    "integrations.transformers.rotation",
    "integrations.transformers.attention",
    "integrations.transformers.cache",
    "integrations.transformers.step_cache",
    "integrations.transformers.token_choice",
    "integrations.transformers.report_reader",
    "integrations.transformers.decode_step",
    "integrations.transformers.captured",
    "integrations.transformers.decoder_layers",
    "integrations.transformers.fusion",
    "integrations.transformers.decoding_head",
    "integrations.transformers.decoding",
    "integrations.transformers.int8",
    "integrations.transformers.int8_head",
    "integrations.transformers.mapped_files",
    "integrations.transformers.config",
    "integrations.transformers.quantizer",
    "integrations.transformers.head",
    "integrations.transformers.bitnet_layers",
    "integrations.transformers.bitnet",
    "integrations.transformers",
    "integrations.gguf.types",
    "integrations.gguf.reader",
    "integrations.gguf.codecs",
    "integrations.gguf.scales",
    "integrations.gguf.ternary",
    "integrations.gguf.architectures",
    "integrations.gguf.sources",
    "integrations.gguf.loading",
    "integrations.gguf.saving",
    "integrations.gguf",
]


def path_of(module):
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(path):
    """``(module, names)`` of each relative import; not those for type checkers alone.

    ``module`` is the qualified name inside the package, ``""`` for the package itself.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    folders = path.parent.relative_to(PACKAGE).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in for_types:
            parts = [*folders[: len(folders) + 1 - node.level], *filter(None, [node.module])]
            yield ".".join(parts), [alias.name for alias in node.names]


def imported_modules(path):
    for source, names in imports(path):
        for name in names:
            module = f"{source}.{name}".lstrip(".")
            yield module if path_of(module).exists() else source


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_modules_below(module):
    assert set(imported_modules(path_of(module))) <= set(ORDER[: ORDER.index(module)])
    if module in ("packing", "groups"):
        assert not list(imports(path_of(module)))


def test_no_module_imports_a_private_name():
    private = [
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for _, names in imports(path)
        for name in names
        if name.startswith("_") and name != "__version__"
    ]
    assert not private
