"""The memory of models while their heads are quantised, while they are loaded, and after that."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import bitlinear
from tests import oracle
from tests.integrations.transformers.checkpoints import (
    IDS,
    convert,
    load,
    logits,
    save_checkpoint,
)
from tests.integrations.transformers.models import make_llama
from tests.memory import growth_of, linux

from bitlinear.integrations.transformers import mapped_files, quantize_head  # isort: skip

pytestmark = linux

MB = 2**20
# glibc gives blocks of more than 32 MB back to the system at once.
ROWS, COLUMNS = 32_000, 1280
INT8_TABLE, BF16_TABLE = ROWS * (COLUMNS + 4), ROWS * COLUMNS * 2


def save_int8_model(folder, **sizes):
    """Save a model with an int8 head; return the memory that the quantisation took."""
    model = make_llama(num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    bitlinear.deploy(bitlinear.convert(model.bfloat16().eval()))
    growth = growth_of(lambda: quantize_head(model))
    model.save_pretrained(folder)
    return growth


@torch.inference_mode()
def load_and_run(folder):
    load(folder)(IDS, logits_to_keep=1)


@pytest.fixture(scope="module")
def growth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_int8_model(folder / "0")
    load_and_run(folder / "0")  # code, threads and their stacks
    quantising = save_int8_model(folder / "1", vocab_size=ROWS, hidden_size=COLUMNS)
    return {"quantising": quantising, "loading": growth_of(lambda: load_and_run(folder / "1"))}


def test_quantising_takes_the_new_table_and_a_few_megabytes(growth):
    """Blocks of 4096 rows would take 85 MB more than the table."""
    assert INT8_TABLE - MB < growth["quantising"] < INT8_TABLE + 40 * MB


def test_a_saved_int8_model_never_has_a_table_of_16_bits(growth):
    """All of it is read: the file is mapped, and lies in memory once."""
    assert INT8_TABLE - MB < growth["loading"] < INT8_TABLE + 24 * MB < BF16_TABLE


# --- Files that from_pretrained has mapped ---


def is_mapped(folder):
    return str(folder / "model.safetensors") in Path("/proc/self/maps").read_text(errors="replace")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(
    ("kind", "head", "stays"),
    [
        ("online", None, False),  # An eighth of the file is in use.
        ("online", "int8", False),
        ("bitlinear", None, True),  # Two thirds
        ("bitlinear", "int8", True),
    ],
)
def test_a_converted_model_lets_go_of_its_file(kind, head, stays, mode, tmp_path):
    save_checkpoint(tmp_path, kind)
    expected = convert(load(tmp_path, disable_mmap=True), head=head)
    assert not is_mapped(tmp_path)
    model = load(tmp_path)
    assert is_mapped(tmp_path)
    norm = model.model.norm.weight
    with mode():
        convert(model, head=head)
    assert is_mapped(tmp_path) == stays
    assert model.model.norm.weight is norm
    assert [p.requires_grad for p in model.parameters()] == [True] * len([*model.parameters()])
    assert not any(p.is_inference() for p in model.parameters())
    for name, tensor in model.state_dict().items():
        oracle.assert_same_bits(tensor, expected.state_dict()[name])
    oracle.assert_same_bits(logits(model), logits(expected))


def test_a_quantised_head_lets_go_of_its_file(tmp_path):
    model = make_llama(vocab_size=10_000, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert is_mapped(tmp_path)
    quantize_head(model)
    assert not is_mapped(tmp_path)


def test_files_with_odd_names_do_not_matter(tmp_path):
    odd = tmp_path / os.fsdecode(b"a \xff\x0b\n\x1c 7")
    odd.write_bytes(bytes(4096))
    save_checkpoint(tmp_path, "online")
    with odd.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        convert(load(tmp_path))
    assert not is_mapped(tmp_path)


def test_tensors_that_share_memory_keep_sharing_it(tmp_path):
    save_checkpoint(tmp_path, "online")
    model = load(tmp_path)
    model.alias = nn.Parameter(model.model.norm.weight.data)
    convert(model)
    assert is_mapped(tmp_path)
    assert model.alias.data_ptr() == model.model.norm.weight.data_ptr()


def test_memory_shared_with_other_processes_stays(tmp_path):
    save_checkpoint(tmp_path, "online")
    model = load(tmp_path).share_memory()
    convert(model)
    assert model.model.norm.weight.is_shared()


def test_other_layouts_stay(tmp_path):
    save_checkpoint(tmp_path, "online")
    model = load(tmp_path)
    model.register_buffer("sparse", torch.eye(3).to_sparse(), persistent=False)
    convert(model)
    assert model.sparse.is_sparse
    assert not is_mapped(tmp_path)


def test_systems_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_files, "_MAPS", tmp_path / "maps")
    save_checkpoint(tmp_path, "online")
    model = load(tmp_path)
    oracle.assert_same_bits(logits(convert(model)), logits(convert(load(tmp_path))))
    assert is_mapped(tmp_path)
