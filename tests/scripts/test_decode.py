"""The linear layers of a whole model: their shapes, their order, and one small run."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bitlinear import runtime
from scripts.bench import decode, records

TINY = decode.Architecture(layers=2, hidden=16, intermediate=24, heads=4, kv_heads=2, head_size=4)
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")

pytestmark = pytest.mark.skipif(
    runtime.current().kernel is None, reason="the benchmark needs a compiled kernel"
)


def linear(in_features, out_features):
    return nn.Linear(in_features, out_features, bias=False)


def test_the_model_has_two_billion_weights():
    with torch.device("meta"):
        block = decode.Block(decode.BITNET_2B, linear)
    shapes = {name: tuple(getattr(block, name).weight.shape) for name in LAYERS}
    assert shapes == {
        "q": (2560, 2560),
        "k": (640, 2560),
        "v": (640, 2560),
        "o": (2560, 2560),
        "gate": (6912, 2560),
        "up": (6912, 2560),
        "down": (2560, 6912),
    }
    weights = sum(weight.numel() for weight in block.parameters())
    assert decode.BITNET_2B.layers * weights == 2_084_044_800


@pytest.mark.parametrize("name", LAYERS)
@torch.inference_mode()
def test_a_token_depends_on_every_layer(name):
    blocks = nn.Sequential(*(decode.Block(TINY, linear) for _ in range(2)))
    token = torch.randn(1, TINY.hidden)
    before = blocks(token)
    getattr(blocks[0], name).weight.mul_(-3)
    assert not torch.allclose(blocks(token), before)


@torch.inference_mode()
def test_a_token_is_made_of_the_last_one():
    token = torch.randn(1, TINY.hidden)
    step = decode._step(nn.Sequential(decode.Block(TINY, linear)), token)
    seen = [token.clone()]
    for _ in range(2):
        step()
        seen.append(token.clone())
    assert not torch.allclose(seen[1], seen[0])
    assert not torch.allclose(seen[2], seen[1])
    assert token.square().mean() == pytest.approx(1, abs=1e-3)  # and stays finite


def run(device, monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "BITNET_2B", TINY)
    path = tmp_path / "results.json"
    decode.main(["--device", device, "--budget", "0.02", "--json", str(path)])
    return json.loads(path.read_text())


def test_a_run(monkeypatch, tmp_path, capsys):
    results = run("cpu", monkeypatch, tmp_path)
    assert results["model"]["hidden"] == 16
    assert results["kernel"] == runtime.current().kernel
    ours, fp32, glue = (results["contestants"][name] for name in ("bitlinear", "fp32", "glue"))
    weights = 2 * (16 * 16 * 2 + 8 * 16 * 2 + 3 * 16 * 24)
    assert fp32["weight_bytes"] == 4 * weights
    assert ours["weight_bytes"] == weights / 4 + 4 * 2 * len(LAYERS)  # and a scale for each
    assert glue["weight_bytes"] == 0
    for figures in (ours, fp32, glue):
        assert figures["tokens_per_s"] == pytest.approx(1e6 / figures["median_us"], rel=1e-3)
        assert figures["peak_bytes"] is None
    assert "| **BitLinear** " in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not a results file"):
        records.read(tmp_path / "results.json")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_on_a_gpu(monkeypatch, tmp_path):
    results = run("cuda", monkeypatch, tmp_path)
    assert results["machine"]["gpu"]["name"]
    contestants = results["contestants"]
    assert list(contestants) == ["bitlinear", "bf16", "glue"]
    assert all(figures["tokens_per_s"] > 0 for figures in contestants.values())
    assert contestants["bf16"]["peak_bytes"] >= contestants["bf16"]["weight_bytes"]
