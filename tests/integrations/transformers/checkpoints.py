"""Small random BitNet checkpoints and layers, made by transformers' own files and classes.

The tests import transformers and the integration from this module, which skips them if transformers
is not installed.
"""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from bitlinear import BitLinear

transformers = pytest.importorskip("transformers")

from transformers.integrations import bitnet  # noqa: E402

from bitlinear.integrations.transformers import (  # noqa: E402
    NormedBitLinear,  # noqa: F401
    convert,  # noqa: F401
    repack,  # noqa: F401
)

KINDS = {
    "bitlinear": {"linear_class": "bitlinear", "quantization_mode": "offline"},
    "autobitlinear": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
}


IDS = torch.arange(18).reshape(2, 9) * 5


FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "bitnet": (transformers.BitNetConfig, transformers.BitNetForCausalLM),
    "falcon": (transformers.FalconConfig, transformers.FalconForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def save_checkpoint(
    folder,
    kind,
    norm=False,
    bias=False,
    dtype=torch.float32,
    family="llama",
):
    """Save a random BitNet checkpoint in the format of the Hub."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.1,
        "dtype": dtype,
    }
    biases = {"attention_bias": bias, "mlp_bias": bias} if family == "llama" else {}
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**sizes, **biases))
    body = model.base_model
    embedding = body.get_input_embeddings()
    with torch.no_grad():
        # Each token resembles the head of the next token, so that one logit is clearly the
        # largest: greedy decoding must not depend on roundings.
        head = embedding.weight.roll(1, dims=0)
        model.lm_head.weight = nn.Parameter(head)
        embedding.weight.mul_(10)
    state = dict(model.to(dtype).state_dict())
    for name, linear in body.named_modules(prefix=model.base_model_prefix):
        if isinstance(linear, nn.Linear):
            if linear.bias is not None:
                state[f"{name}.bias"] = (0.05 * torch.randn(linear.out_features)).to(dtype)
            if norm:
                state[f"{name}.rms_norm.weight"] = (torch.rand(linear.in_features) + 0.5).to(dtype)
            if kind != "online":
                weight = linear.weight.detach().float()
                scale = weight.abs().mean()
                ternary = (weight / scale).round().clamp(-1, 1)
                factor = 1 / scale if kind == "bitlinear" else scale
                state[f"{name}.weight"] = bitnet.pack_weights(ternary)
                state[f"{name}.weight_scale"] = factor.reshape(1).to(dtype)
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = transformers.BitNetQuantConfig(
        **KINDS[kind], use_rms_norm=norm
    )
    model.config.save_pretrained(folder)
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}


def packed_layer(t, bias=None, scale=3.0, dtype=torch.float32, norm=False):
    """The ``BitLinear`` of transformers, with packed weights ``t``."""
    n, k = t.shape
    layer = bitnet.BitLinear(k, n, bias=bias is not None, dtype=dtype, use_rms_norm=norm)
    layer.weight = bitnet.pack_weights(torch.from_numpy(t).to(torch.int8))
    layer.weight_scale.fill_(scale)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def float_layer(weight, bias=None, scale=None, dtype=torch.float32):
    """The ``AutoBitLinear`` of transformers: offline with a scale, online without one."""
    n, k = weight.shape
    layer = bitnet.AutoBitLinear(k, n, bias is not None, dtype=dtype, online_quant=scale is None)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        if bias is not None:
            layer.bias.copy_(bias)
        if scale is not None:
            layer.weight_scale.fill_(scale)
    return layer
