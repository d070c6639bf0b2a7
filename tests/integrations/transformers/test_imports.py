"""The registration with transformers: fresh processes in every order of imports, old versions."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

import bitlinear
from tests import oracle
from tests.integrations.transformers.checkpoints import IDS, convert, load, logits, save_checkpoint
from tests.integrations.transformers.models import make_llama

LOAD = """
import sys
import torch
{imports}
from transformers import AutoModelForCausalLM

for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    deployed = sum(isinstance(m, bitlinear.BitLinear) and m.is_deployed for m in model.modules())
    assert deployed == 14, model
    with torch.no_grad():
        torch.save(model(torch.load(sys.argv[1])).logits.float(), folder + "/logits.pt")
"""

IMPORTS = {
    "bitlinear first": """
import bitlinear
assert "transformers" not in sys.modules
assert "bitlinear.integrations.transformers" not in sys.modules
""",
    "the integration first": "import bitlinear.integrations.transformers",
    "transformers first": "import transformers\nimport bitlinear",
    "the quantisers first": "from transformers import AutoModelForCausalLM\nimport bitlinear",
}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, marks=[] if order == "bitlinear first" else pytest.mark.slow)
        for order in IMPORTS
    ],
)
def test_a_fresh_process_loads_saved_models(order, tmp_path):
    save_checkpoint(tmp_path / "theirs", "autobitlinear", True, True, torch.bfloat16)
    models = {
        "converted": convert(load(tmp_path / "theirs")),
        "deployed": bitlinear.deploy(bitlinear.convert(make_llama(mlp_bias=True))).eval(),
    }
    folders = {name: tmp_path / name for name in models}
    for name, model in models.items():
        model.save_pretrained(folders[name], max_shard_size="30KB")
        assert len(list(folders[name].glob("*.safetensors"))) > 1
    torch.save(IDS, tmp_path / "ids.pt")
    code = LOAD.replace("{imports}", IMPORTS[order])
    arguments = [tmp_path / "ids.pt", *folders.values()]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    for name, model in models.items():
        oracle.assert_same_bits(torch.load(folders[name] / "logits.pt"), logits(model))


WITHOUT_BITLINEAR = """
import sys
from transformers import AutoModelForCausalLM

AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_without_bitlinear_gets_a_warning(tmp_path):
    bitlinear.deploy(bitlinear.convert(make_llama())).save_pretrained(tmp_path)
    command = [sys.executable, "-c", WITHOUT_BITLINEAR, tmp_path]
    stderr = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "Unknown quantization type, got bitlinear" in stderr


@pytest.mark.parametrize("version", ["4.57.1", "5.23.0"])
def test_an_old_version_raises(version, monkeypatch):
    # The first import of this file used another module object: transformers replaces its own.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    monkeypatch.delitem(sys.modules, "bitlinear.integrations.transformers")
    with pytest.raises(ImportError, match=f"transformers 5.24 or later, but this is {version}"):
        importlib.import_module("bitlinear.integrations.transformers")
