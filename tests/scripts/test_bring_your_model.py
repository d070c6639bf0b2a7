"""One small checkpoint of each format, written and loaded."""

from __future__ import annotations

import pytest
import torch

for module in ("transformers", "gguf", "peft"):
    pytest.importorskip(module)

from scripts import bring_your_model  # noqa: E402
from scripts.bring_your_model import SOURCES, bring, train_adapter  # noqa: E402


@pytest.fixture(autouse=True)
def _eager():
    """Switch off torch.compile in transformers: it takes a minute, and changes only roundings."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", SOURCES)
def test_a_checkpoint_is_loaded_as_it_was_written(name, tmp_path):
    model, row = bring(SOURCES[name], tmp_path)
    assert row["weights"].startswith("equal")
    assert model(torch.tensor([[1, 5, 7]])).logits.isfinite().all()


def test_a_changed_weight_is_noticed(tmp_path):
    source = SOURCES["dense"]

    def load(path):
        model = source.load(path)
        model.model.layers[1].mlp.up_proj.w_packed[3, 5] ^= 0b11  # 1 becomes 2, and 0 becomes 3
        return model

    with pytest.raises((AssertionError, ValueError), match=r"up_proj|code 3"):
        bring(source._replace(load=load), tmp_path)


def test_the_script_prints_a_table_and_trains(capsys):
    bring_your_model.main(["--only", "gguf-tq2"])
    printed = capsys.readouterr().out
    assert "| gguf-tq2 " in printed
    assert "LoRA on the last model" in printed


def test_the_adapter_learns(tmp_path):
    model, _ = bring(SOURCES["dense"], tmp_path)
    losses = train_adapter(model, steps=10)
    assert losses[-1] < 0.9 * losses[0]
