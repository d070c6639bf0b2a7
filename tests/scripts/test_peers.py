"""Other libraries' layers in the benchmark of one layer: stand-ins of their interfaces."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from bitlinear import runtime
from scripts.bench import contestants, peers, records
from scripts.bench.__main__ import main
from scripts.bench.devices import DEVICES

needs_a_kernel = pytest.mark.skipif(
    runtime.current().kernel is None, reason="the benchmark needs a compiled kernel"
)

GPU_PEERS = ["humming_bf16", "humming_int8", "gemlite_bf16", "gemlite_int8"]
GPU = ("--device", "cuda", "--shapes", "64x32", "--tokens", "1", "70", "--budget", "0.02")


class HummingLayer(nn.Module):
    """What the benchmark uses of ``humming.layer.HummingLayer``, with its packed weights."""

    def __init__(self, *, shape_n, shape_k, weight_config, input_config, torch_dtype):
        super().__init__()
        assert (weight_config, torch_dtype) == ({"dtype": "uint2"}, torch.bfloat16)
        self.activations, self.inputs = input_config["dtype"], []
        for name, shape, dtype in (
            ("weight", (shape_n, shape_k // 16), torch.int32),
            ("weight_scale", (shape_n, 1), torch.bfloat16),
        ):
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            self.register_parameter(name, parameter)

    def load_from_tensors(self, tensors):
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {
            name: parameter.dtype for name, parameter in self.named_parameters()
        }
        self.load_state_dict(tensors, strict=False)

    def transform(self):
        codes = (self.weight[..., None] >> torch.arange(0, 32, 2)) & 3
        self.dense = (codes.flatten(1) - 2) * self.weight_scale.float()

    def forward(self, x):
        assert x.dtype == torch.bfloat16
        self.inputs.append(x)
        return (x.float() @ self.dense.T).bfloat16()


class GemliteLayer(nn.Module):
    """What a class of ``gemlite.helper`` returns."""

    def __init__(self, weight, scale):
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, x):
        assert x.dtype == torch.bfloat16
        return (x.float() @ self.weight.float().T * self.scale).bfloat16()


class Helper:
    """A class of ``gemlite.helper``."""

    def __init__(self, device, dtype):
        assert dtype == torch.bfloat16

    def from_weights(self, weight, weight_scale):
        assert weight.dtype == torch.bfloat16
        assert set(weight.unique().tolist()) == {-1, 0, 1}
        return GemliteLayer(weight, weight_scale.item())


@pytest.fixture
def humming(monkeypatch):
    """The module ``humming.layer``."""
    module = ModuleType("humming.layer")
    module.HummingLayer = HummingLayer
    monkeypatch.setitem(sys.modules, "humming.layer", module)
    return module


@pytest.fixture
def gemlite(monkeypatch):
    """The module ``gemlite.helper``."""
    module = ModuleType("gemlite.helper")
    module.A16W158_INT = module.A8W158_INT_dynamic = Helper
    monkeypatch.setitem(sys.modules, "gemlite.helper", module)


def run(path, *names):
    """Return the results of a run with these contestants, and the reasons of those it skips."""
    assert main([*GPU, "--modes", "cold", "--contestants", *names, "--json", str(path)]) == 0
    results = records.read(path)
    reasons = {}
    for skipped in results["skipped"]:
        reasons.setdefault(skipped["contestant"], []).append(
            (skipped["reason"], [cell["M"] for cell in skipped["cells"]])
        )
    return results, reasons


def test_peers_take_part_only_if_named():
    named = [name for name, kind in contestants.OTHERS.items() if kind.package]
    assert named == [*GPU_PEERS, "llama_cpp"]
    assert not any(contestants.OTHERS[name].by_default for name in named)


@needs_a_kernel
def test_peers_are_complete_layers_of_the_same_weights(
    no_gpu, humming, gemlite, monkeypatch, tmp_path
):
    monkeypatch.setattr(
        contestants.metadata, "version", {"gemlite": "7", "humming-kernels": "8"}.get
    )
    results, reasons = run(tmp_path / "results.json", "bitlinear", "bf16", *GPU_PEERS)
    assert reasons == {}
    assert records.names_of(results, contestants.LAYER) == ["bf16", *GPU_PEERS]
    assert {"gemlite": "7", "humming-kernels": "8"}.items() <= results["versions"].items()
    for cell in results["cells"]:
        assert set(GPU_PEERS) < set(cell["contestants"])


def test_activations_are_those_of_the_name(humming, gemlite, monkeypatch):
    linear = nn.Linear(32, 64)
    for dtype, name in (("bf16", "bfloat16"), ("int8", "int8")):
        assert peers.humming(linear, dtype).activations == name
    helpers = sys.modules["gemlite.helper"]
    monkeypatch.setattr(helpers, "A8W158_INT_dynamic", None)
    peers.gemlite(linear, "bf16")
    with pytest.raises(TypeError):
        peers.gemlite(linear, "int8")


@needs_a_kernel
def test_a_missing_package_is_named(no_gpu, monkeypatch, tmp_path, capsys):
    def import_module(name):
        package = name.partition(".")[0]
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(peers, "importlib", SimpleNamespace(import_module=import_module))
    _, reasons = run(tmp_path / "results.json", "bf16", "humming_int8", "gemlite_bf16")
    assert reasons == {
        "humming_int8": [
            ("humming-kernels is not installed: run pip install humming-kernels", [1, 70])
        ],
        "gemlite_bf16": [("gemlite is not installed: run pip install gemlite", [1, 70])],
    }
    assert "skipped: gemlite_bf16 everywhere: gemlite is not installed" in capsys.readouterr().out


@needs_a_kernel
def test_a_package_without_its_own_dependency_is_skipped(no_gpu, monkeypatch, tmp_path):
    folder = tmp_path / "humming"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "layer.py").write_text("import a_missing_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("humming", "humming.layer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    _, reasons = run(tmp_path / "results.json", "bf16", "humming_bf16")
    assert reasons == {"humming_bf16": [("No module named 'a_missing_dependency'", [1, 70])]}


@needs_a_kernel
def test_a_peer_that_computes_nothing_is_reported_and_not_timed(
    no_gpu, humming, monkeypatch, tmp_path
):
    def forward(self, x):
        return nothing if len(x) > 64 else compute(self, x)

    nothing, compute = torch.zeros(70, 64), HummingLayer.forward
    monkeypatch.setattr(HummingLayer, "forward", forward)
    results, reasons = run(tmp_path / "results.json", "bf16", "humming_bf16")
    (((reason, tokens),),) = reasons.values()
    assert reason.startswith("wrong result: relative errors of 1 rms, ")
    assert tokens == [70]
    assert [list(cell["contestants"]) for cell in results["cells"]] == [
        ["bf16", "humming_bf16"],
        ["bf16"],
    ]


def test_the_checked_input_is_not_the_timed_one(no_gpu, humming):
    layers = contestants.Layers(64, 32, ["humming_bf16"], [], DEVICES["cuda"])
    layers.contestants(2, DEVICES["cuda"].modes["cold"])
    ((layer,),) = layers._others.values()
    checked, timed, *_ = layer.inputs
    assert checked.shape == timed.shape
    assert not torch.equal(checked, timed)


@needs_a_kernel
def test_whatever_a_peer_raises_is_a_reason(no_gpu, humming, monkeypatch, tmp_path):
    def forward(self, x):
        raise AssertionError("padded_shape_k % 64 == 0")

    monkeypatch.setattr(HummingLayer, "forward", forward)
    _, reasons = run(tmp_path / "results.json", "bf16", "humming_bf16")
    assert reasons == {"humming_bf16": [("padded_shape_k % 64 == 0", [1, 70])]}


def test_what_a_check_accepts():
    x = peers.checked_input(30, 8192, "cpu", torch.float32)
    weight = torch.randint(-1, 2, (4000, 8192)) * 0.1
    y = x @ weight.T
    peers.check((y * 1.002).bfloat16(), x, weight)
    one_output, one_token = y.clone(), y.clone()
    one_output[:, 7] = one_token[7] = 0
    no_tail = y - x[:, -32:] @ weight[:, -32:].T
    for wrong in (y * 1.04, y.roll(1, 1), y * float("nan"), one_output, one_token, no_tail):
        with pytest.raises(RuntimeError, match=r"wrong result: relative errors of \S+ rms, "):
            peers.check(wrong, x, weight)
    with pytest.raises(RuntimeError, match=r"wrong result: its shape is \[30, 32\]"):
        peers.check(y[:, :32], x, weight)
