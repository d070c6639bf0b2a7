"""Small models of transformers with known ternary weights, and their GGUF files.

The files are written here, with the names of the package gguf and the order of rows by a loop.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.integrations.gguf.files import Writer, gguf

transformers = pytest.importorskip("transformers")

IDS = torch.arange(18).reshape(2, 9) * 5
SCALE = 37.0

CONFIGS = {
    "llama": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "bitnet": (transformers.BitNetConfig, {"tie_word_embeddings": True}),
}
# The package gguf has no names for these of BitNet.
EXTRA_NAMES = {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}


def config_of(kind, **kwargs):
    cls, own = CONFIGS[kind]
    sizes = {
        "vocab_size": 96,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return cls(**{**sizes, **own, **kwargs})


def make(kind, dtype=torch.float32, device="cpu", **kwargs):
    """A model with random parameters, among them norms and biases."""
    with torch.device(device):
        config = config_of(kind, **kwargs)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def ternary_model(kind, scale=SCALE, **kwargs):
    """A model whose linear layers, except for the head, are ternary times ``scale``."""
    model = make(kind, **kwargs)
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            t = torch.randint(-1, 2, module.weight.shape)
            module.weight.data = (t * scale).to(module.weight.dtype)
    return model


def name_in_file(name, kind):
    arch = gguf.MODEL_ARCH[kind.upper()]
    found = gguf.get_tensor_name_map(arch, 2).get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        module, _, suffix = name.rpartition(".")
        if module == "lm_head":
            return f"output.{suffix}"
        _, _, number, rest = module.split(".", 3)
        found = f"blk.{number}.{EXTRA_NAMES[rest]}.{suffix}"
    return found


def permuted(array, heads):
    """The rows of ``array`` in llama.cpp's order: row 2 i + h of a head is row i + h * half."""
    size = len(array) // heads
    result = np.empty_like(array)
    for head in range(heads):
        for i in range(size // 2):
            for h in range(2):
                result[head * size + 2 * i + h] = array[head * size + i + h * size // 2]
    return result


def write_model(path, kind, model, tensor_kind="TQ2_0", architecture=None, skip=(), floats="F32"):
    """Write a model from :func:`ternary_model`; ``skip`` leaves out tensors by their names."""
    architecture = architecture or kind
    writer = Writer(path, architecture)
    config = model.config
    w = writer.writer
    w.add_block_count(config.num_hidden_layers)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(config.rope_parameters["rope_theta"])
    w.add_token_list(["a"] * config.vocab_size)
    for name, parameter in model.named_parameters():
        found = name_in_file(name, kind)
        if found in skip:
            continue
        values = parameter.detach().float().numpy()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads
            if "k_proj" in name:
                heads = config.num_key_value_heads
            values = permuted(values, heads)
        if "_proj.weight" in name:
            scale = np.abs(values).max()
            writer.add_ternary(found, np.rint(values / scale).astype(np.int64), scale, tensor_kind)
        elif values.ndim == 1:
            writer.add(found, values)
        else:
            number = gguf.GGMLQuantizationType[floats]
            writer.add(found, gguf.quantize(values, number), floats)
    return writer
