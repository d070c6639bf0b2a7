"""``load_deployed``: models that run from the mapped file."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import re
import struct
import sys

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file, save_model
from torch import nn

import bitlinear
from bitlinear import BitLinear, load_deployed
from tests.memory import linux, output_of


class Block(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.up = BitLinear(24, 50, bias=bias)
        self.down = BitLinear(50, 24, bias=bias)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.blocks = nn.ModuleList([Block(bias), Block(bias)])
        self.lm_head = nn.Linear(24, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


IDS = torch.arange(10).reshape(2, 5)


def on_meta(make):
    with torch.device("meta"):
        return make()


@pytest.fixture
def saved(tmp_path):
    """A deployed model, and the path of its file."""
    model = bitlinear.deploy(Model())
    save_model(model, str(tmp_path / "model.safetensors"))
    return model, tmp_path / "model.safetensors"


def tensors_of(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def mapped_ranges(path):
    """The address ranges to which this process has mapped a file."""
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps if line.rstrip().endswith(f" {path}")]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]


def is_mapped(tensor, path):
    start = tensor.untyped_storage().data_ptr()
    stop = start + tensor.untyped_storage().nbytes()
    return any(first <= start and stop <= last for first, last in mapped_ranges(path))


# --- Round trips ---


def per_output_feature(model):
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("w_scale"):
            rows = len(state[name.replace("w_scale", "w_packed")])
            state[name] = tensor * (torch.rand(rows, 1) + 0.5)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    "make",
    [
        Model,
        lambda: Model(bias=False),
        lambda: Model().bfloat16(),
        lambda: Model().half(),
        lambda: per_output_feature(bitlinear.deploy(Model())),
    ],
    ids=["bias", "no bias", "bfloat16", "float16", "scale per output feature"],
)
@pytest.mark.parametrize("built", ["meta", "cpu", "deployed", "deployed on meta"])
def test_round_trip(make, built, tmp_path):
    model = bitlinear.deploy(make().eval())
    save_model(model, str(tmp_path / "model.safetensors"))
    bias = model.blocks[0].up.bias is not None
    fresh = on_meta(lambda: Model(bias)) if "meta" in built else Model(bias)
    if "deployed" in built:
        bitlinear.deploy(fresh)
    assert load_deployed(tmp_path / "model.safetensors", fresh) is fresh
    assert all(m.is_deployed for m in fresh.modules() if isinstance(m, BitLinear))
    wanted, found = model.state_dict(), fresh.state_dict()
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].device) == (tensor.dtype, tensor.device)
        assert torch.equal(found[name], tensor)
    assert dict(fresh.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert torch.equal(fresh.eval()(IDS), model(IDS))


def test_round_trip_of_one_layer_and_of_a_converted_model(tmp_path):
    path, x = tmp_path / "layer.safetensors", torch.randn(3, 20)
    layer = BitLinear(20, 6).deploy()
    save_file(layer.state_dict(), path)
    assert torch.equal(load_deployed(str(path), BitLinear(20, 6, device="meta"))(x), layer(x))

    def make():
        return nn.Sequential(nn.Linear(20, 8), nn.GELU(), nn.Linear(8, 6, bias=False))

    model = bitlinear.deploy(bitlinear.convert(make()))
    save_file(model.state_dict(), path)
    assert torch.equal(load_deployed(path, bitlinear.convert(on_meta(make)))(x), model(x))


def sharded(model, directory):
    """Save a model in two files and an index, as Hugging Face does."""
    state = model.state_dict()
    weight_map = {name: f"model-{1 + i % 2:05}.safetensors" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in state.items() if weight_map[n] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_loading_shards_and_directories(saved, tmp_path):
    model, file = saved
    assert torch.equal(load_deployed(tmp_path, on_meta(Model))(IDS), model(IDS))
    other = bitlinear.deploy(Model())
    index = sharded(other, tmp_path)
    for path in (index, tmp_path):  # a directory with an index and single files uses the index
        assert torch.equal(load_deployed(path, on_meta(Model))(IDS), other(IDS))
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"several models, model-00001\.safetensors, .*: "):
        load_deployed(tmp_path, Model())
    assert torch.equal(load_deployed(file, on_meta(Model))(IDS), model(IDS))


def test_unaligned_tensors_are_copied(tmp_path):
    """safetensors pads its header to align the tensors; other writers may not."""
    layer = BitLinear(20, 6).deploy()
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    data = (tmp_path / "layer.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].rstrip()
    header += b" " * ((5 - len(header)) % 8)
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    loaded, x = load_deployed(odd, BitLinear(20, 6)), torch.randn(3, 20)
    assert all(t.data_ptr() % t.element_size() == 0 for t in loaded.buffers())
    assert torch.equal(loaded(x), layer(x))


# --- The tensors are the file ---


@linux
@pytest.mark.parametrize("make", [Model, lambda: on_meta(Model)], ids=["cpu", "meta"])
def test_every_tensor_lies_in_the_mapped_file(make, saved):
    _, path = saved
    model = load_deployed(path, make())
    assert tensors_of(model)
    for tensor in tensors_of(model).values():
        assert is_mapped(tensor, path)
        # Each tensor has a storage of its own: pickling one layer does not write the whole file.
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    del model, tensor
    assert not mapped_ranges(path)


def test_writing_to_a_tensor_does_not_reach_the_file(saved):
    _, path = saved
    before = path.read_bytes()
    model = load_deployed(path, on_meta(Model))
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            tensor.zero_()
    assert not any(tensor.any() for tensor in tensors_of(model).values())
    assert path.read_bytes() == before


@linux
def test_the_file_can_be_deleted_or_replaced(saved, tmp_path):
    model, path = saved
    loaded = load_deployed(path, on_meta(Model))
    save_model(bitlinear.deploy(Model()), str(tmp_path / "other.safetensors"))
    os.replace(tmp_path / "other.safetensors", path)
    assert torch.equal(loaded(IDS), model(IDS))
    path.unlink()
    assert torch.equal(loaded(IDS), model(IDS))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_ordinary_models(clone, saved):
    model, path = saved
    copied = clone(load_deployed(path, on_meta(Model)))
    if sys.platform == "linux":
        assert not any(is_mapped(tensor, path) for tensor in tensors_of(copied).values())
    assert torch.equal(copied(IDS), model(IDS))


def test_a_loaded_model_saves_trains_and_casts_as_any_other(saved, tmp_path):
    model, path = saved
    loaded = load_deployed(path, on_meta(Model))
    for save in (save_model, lambda m, p: torch.save(m.state_dict(), p)):
        save(loaded, str(tmp_path / "again"))
        assert abs((tmp_path / "again").stat().st_size - path.stat().st_size) < 16 * 1024
    assert torch.equal(load_deployed(path, loaded)(IDS), model(IDS))
    loaded.lm_head(torch.randn(2, 24)).sum().backward()
    assert loaded.lm_head.weight.grad is not None
    loaded.half()
    assert loaded.blocks[0].up.w_scale.dtype == torch.float32
    loaded.float().blocks[0].up.undeploy()(torch.randn(2, 24)).sum().backward()
    loaded.load_state_dict(model.state_dict())


def test_loading_in_inference_mode_and_under_a_default_device(saved):
    model, path = saved
    with torch.inference_mode():
        loaded = load_deployed(path, on_meta(Model))
    assert not any(tensor.is_inference() for tensor in tensors_of(loaded).values())
    with torch.device("meta"):
        loaded = load_deployed(path, Model())
    assert torch.equal(loaded(IDS), model(IDS))


@pytest.mark.cuda
@pytest.mark.parametrize("make", [Model, lambda: on_meta(Model)], ids=["cuda", "meta"])
def test_loading_on_a_gpu(make, saved):
    model, path = saved
    built = make()
    if not built.lm_head.weight.is_meta:
        built.cuda()
    loaded = load_deployed(path, built)
    assert {t.device.type for t in tensors_of(loaded).values()} == (
        {"cuda"} if built.lm_head.weight.is_cuda else {"cpu"}
    )
    for tensor in tensors_of(loaded.cuda()).values():
        assert tensor.is_cuda
    layer, x = model.blocks[0].up, torch.randn(4, 24)
    assert torch.equal(loaded.blocks[0].up(x.cuda()).cpu(), layer(x))


# --- Tied weights ---


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.a = BitLinear(24, 24)
        self.b = BitLinear(24, 24, bias=False)
        self.lm_head = nn.Linear(24, 11, bias=False)
        self.b.weight = self.a.weight
        self.lm_head.weight = self.embed.weight
        self.again = self.a

    def forward(self, ids):
        return self.lm_head(self.again(self.b(self.a(self.embed(ids)))))


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("make", [Tied, lambda: on_meta(Tied)], ids=["cpu", "meta"])
def test_tied_weights_stay_tied(make, metadata, tmp_path):
    model, path = bitlinear.deploy(Tied()), tmp_path / "model.safetensors"
    save_model(model, str(path))
    if not metadata:  # Hugging Face records no ties, so the ties of the model count
        save_file(safetensors.torch.load_file(path), path)
    loaded = load_deployed(path, make())
    assert loaded.lm_head.weight is loaded.embed.weight
    assert loaded.lm_head.weight.requires_grad
    assert loaded.a.w_packed.data_ptr() == loaded.b.w_packed.data_ptr()
    assert torch.equal(loaded(IDS), model(IDS))
    save_model(loaded, str(tmp_path / "again.safetensors"))
    assert torch.equal(load_deployed(tmp_path / "again.safetensors", make())(IDS), model(IDS))


def test_tensors_that_save_model_omitted_are_found_for_a_model_without_ties(tmp_path):
    class Untied(Tied):
        def __init__(self):
            super().__init__()
            self.b = BitLinear(24, 24, bias=False)
            self.lm_head = nn.Linear(24, 11, bias=False)

    model = bitlinear.deploy(Tied())
    save_model(model, str(tmp_path / "model.safetensors"))
    loaded = load_deployed(tmp_path / "model.safetensors", on_meta(Untied))
    assert loaded.lm_head.weight is not loaded.embed.weight
    assert torch.equal(loaded(IDS), model(IDS))


def test_tied_tensors_with_different_values_in_the_file_are_untied(tmp_path):
    state = {name: t.clone() for name, t in bitlinear.deploy(Tied()).state_dict().items()}
    state["lm_head.weight"] += 1
    save_file(state, tmp_path / "model.safetensors", metadata={"note": "embed.weight"})
    loaded = load_deployed(tmp_path / "model.safetensors", Tied())
    assert torch.equal(loaded.lm_head.weight, loaded.embed.weight + 1)


# --- Errors ---


def test_missing_files_raise(tmp_path):
    for path in (tmp_path / "model.safetensors", tmp_path / "x.safetensors.index.json"):
        with pytest.raises(FileNotFoundError, match=re.escape(path.name)):
            load_deployed(path, Model())
    with pytest.raises(FileNotFoundError, match=r"contains neither \*\.safetensors nor"):
        load_deployed(tmp_path, Model())


def damage(kind, path):
    data = path.read_bytes()
    if kind == "torch.save":
        torch.save(Model().state_dict(), path)
    else:
        path.write_bytes(
            {"empty": b"", "text": b"no model" * 9, "short": data[:-9], "header": data[:99]}[kind]
        )


@pytest.mark.parametrize("kind", ["empty", "text", "short", "header", "torch.save"])
def test_damaged_and_foreign_files_raise(kind, saved):
    _, path = saved
    damage(kind, path)
    model = Model()
    before = tensors_of(model)
    with pytest.raises(
        ValueError, match=r"model\.safetensors is not a safetensors file, or is dam"
    ):
        load_deployed(path, model)
    assert all(tensor is before[name] for name, tensor in tensors_of(model).items())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_invalid_index_raises(text, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is not an index of safetensors files .*'weight_map'"):
        load_deployed(path, Model())


def test_an_index_of_other_files_raises(tmp_path):
    index = sharded(bitlinear.deploy(Model()), tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "model-00002.safetensors")
    with pytest.raises(ValueError, match=r"names tensors that are not in their files.* and 6 more"):
        load_deployed(index, Model())
    (tmp_path / "model-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002\.safetensors"):
        load_deployed(index, Model())


def rewrite(path, change):
    state = safetensors.torch.load_file(path)
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "blocks.1.up.w_packed",
            torch.full((50, 7), 0b01010101, dtype=torch.uint8),
            r"blocks\.1\.up: size mismatch for w_packed: .*\[50, 7\], .* needs \[50, 6\]",
        ),
        ("blocks.1.up.w_packed", torch.full((50, 6), 255, dtype=torch.uint8), "invalid code 3"),
        ("blocks.1.up.w_scale", torch.ones(1).half(), "w_scale must be float32"),
        ("blocks.0.norm.weight", torch.ones(23), r"size mismatch for blocks\.0\.norm\.weight"),
        ("blocks.0.up.extra", torch.ones(1), r"Unexpected key.*blocks\.0\.up\.extra"),
    ],
)
def test_tensors_that_do_not_fit_raise(name, tensor, message, saved):
    _, path = saved
    rewrite(path, lambda state: state.update({name: tensor}))
    with pytest.raises(RuntimeError, match=message):
        load_deployed(path, on_meta(Model))


@pytest.mark.parametrize("name", ["blocks.1.norm.bias", "blocks.0.up.bias", "blocks.0.up.w_scale"])
def test_missing_tensors_are_named(name, saved):
    _, path = saved
    rewrite(path, lambda state: state.pop(name))
    message = "w_scale is missing" if "w_scale" in name else f"Missing key.*{re.escape(name)}"
    with pytest.raises(RuntimeError, match=message):
        load_deployed(path, on_meta(Model))


def test_not_strict_logs_the_differences(saved, caplog):
    model, path = saved

    def change(state):
        for name in [name for name in state if name.startswith("blocks.1.up.")]:
            del state[name]
        state["other"] = torch.ones(1)

    rewrite(path, change)
    with caplog.at_level(logging.WARNING, logger="bitlinear"):
        loaded = load_deployed(path, on_meta(Model), strict=False)
    up = loaded.blocks[1].up
    assert not up.is_deployed
    assert up.weight.is_meta
    assert torch.equal(loaded.blocks[0](torch.ones(24)), model.blocks[0](torch.ones(24)))
    lines = [record.getMessage().removeprefix(f"{path}: ") for record in caplog.records]
    names = "blocks.1.up.weight, blocks.1.up.bias"
    assert lines == [
        f"not in the file: {names}",
        "not in the model: other",
        f"left on the meta device: {names}",
    ]


def test_non_persistent_buffers_on_meta_raise(tmp_path):
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = BitLinear(20, 6)
            self.register_buffer("frequencies", torch.ones(3), persistent=False)

    save_model(bitlinear.deploy(Rotary()), str(tmp_path / "model.safetensors"))
    with pytest.raises(
        RuntimeError, match=r"no values for frequencies, on the meta.*before load_dep"
    ):
        load_deployed(tmp_path, on_meta(Rotary))
    model = on_meta(Rotary)
    model.frequencies = torch.ones(3)
    assert load_deployed(tmp_path, model).frequencies is model.frequencies


@pytest.mark.parametrize("strict", [True, False])
def test_a_file_with_other_kinds_of_layers_raises(strict, tmp_path):
    path = tmp_path / "model.safetensors"
    model = Model()
    before = tensors_of(model)
    save_model(Model(), str(path))
    with pytest.raises(ValueError, match=r"floating-point weights of BitLinear.* and 1 more.*dep"):
        load_deployed(path, model, strict=strict)
    save_file(BitLinear(20, 6).deploy().state_dict(), path)
    with pytest.raises(ValueError, match=r"packed weights, w_packed, .*bitlinear\.convert\(model"):
        load_deployed(path, nn.Linear(20, 6), strict=strict)
    assert all(tensor is before[name] for name, tensor in tensors_of(model).items())


def test_without_safetensors_the_error_names_it(saved, monkeypatch):
    _, path = saved
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install safetensors$"):
        load_deployed(path, Model())


# --- Memory ---

LOAD = """
import sys
import torch
import bitlinear
from tests.memory import reset_peak, resident

small, large, layers = sys.argv[1], sys.argv[2], int(sys.argv[3])

def run(path, layers):
    with torch.device("meta"):
        model = [bitlinear.BitLinear(8192, 8192, bias=False) for _ in range(layers)]
        model = torch.nn.Sequential(*model)
    with torch.inference_mode():
        y = bitlinear.load_deployed(path, model)(x)
    assert y.shape == (1, 8192) and y.isfinite().all()
    return model

x = torch.randn(1, 8192)
run(small, 1)  # warm up: code, threads and their stacks
rss, anonymous = reset_peak(), resident("RssAnon")
model = run(large, layers)
print(resident("RssAnon") - anonymous, resident("VmHWM") - rss)
"""


@linux
@pytest.mark.parametrize("layers", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_loading_takes_no_memory_beyond_the_file(layers, tmp_path):
    """64 MB (slow: 1 GB) of packed weights, and one token through all of them."""
    if not bitlinear.HAS_BITLINEAR:
        pytest.skip("the reference implementation expands a few rows at a time")
    paths = {1: tmp_path / "small.safetensors", layers: tmp_path / "large.safetensors"}
    for count, path in paths.items():
        state = {}
        for i in range(count):
            state[f"{i}.w_packed"] = torch.full((8192, 2048), 0b10010110, dtype=torch.uint8)
            state[f"{i}.w_scale"] = torch.full((1,), 1 / 8192)
        save_file(state, path)
    file = paths[layers].stat().st_size
    assert file > layers * 2**24
    anonymous, peak = map(int, output_of(LOAD, *paths.values(), layers).split())
    print(f"anonymous {anonymous / 2**20:.1f} MB, peak {peak / 2**20:.1f} of {file / 2**20:.1f} MB")
    # The limit is one layer: a few freed temporaries can still be in the heap.
    assert anonymous < 2**24
    # Every page of the file was resident. With a copy, the peak would be twice the file.
    assert peak < file + 2**25
    paths[layers].unlink()  # pytest keeps the folders of three runs
