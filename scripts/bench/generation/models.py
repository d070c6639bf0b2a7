"""Whole models with random weights, in every form that is timed.

All of them have the shape of one BitNet model. Their weights are made in place, tensor by tensor,
and the models share the embedding, so that several fit into memory at once. Random values compute
as fast as trained ones. Parameters require gradients, as after ``from_pretrained``: the way in
which torch multiplies by the head depends on it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitlinear.integrations.transformers import convert
from scripts import tools

with tools.importing("dev"):
    from transformers import AutoModelForCausalLM, BitNetConfig, BitNetQuantConfig
    from transformers.integrations import bitnet

DTYPE = torch.bfloat16
# The longest prompt or cache.
MAX_LENGTH = 4096

# The arguments of BitNetConfig. "2b" is BitNet-b1.58-2B-4T.
SHAPES = {
    "2b": {
        "num_hidden_layers": 30,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
        "vocab_size": 128256,
    },
    "small": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}

# The settings of ours: arguments of convert(), by the name of the contestant.
SETTINGS: dict[str, dict[str, Any]] = {
    "bitlinear": {},
    "bitlinear_int8_head": {"head": "int8"},
    "bitlinear_unfused": {"fuse": False},
}

# The bytes that hold four codes from 0 to 2.
_VALID_BYTES = np.array([b for b in range(256) if all(b >> s & 3 < 3 for s in (0, 2, 4, 6))], "u1")


def make_config(shape: str, layers: int | None = None) -> BitNetConfig:
    """Return the config of a model of a shape, with another number of layers if one is given."""
    config = BitNetConfig(
        **SHAPES[shape],
        max_position_embeddings=2 * MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,  # nothing ends a sequence early
    )
    config.num_hidden_layers = layers or config.num_hidden_layers
    return config


def weight_count(
    num_hidden_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    vocab_size: int,
) -> int:
    """Return the number of weights of a shape: of its linear layers and of its embedding."""
    shared = hidden_size // num_attention_heads * num_key_value_heads
    attention = 2 * hidden_size * (hidden_size + shared)
    layer = attention + 3 * hidden_size * intermediate_size
    return num_hidden_layers * layer + vocab_size * hidden_size


def random_embedding(config: BitNetConfig, device: str) -> nn.Parameter:
    """Return the embedding that the models share."""
    weight = torch.empty(config.vocab_size, config.hidden_size, dtype=DTYPE, device=device)
    return nn.Parameter(weight.normal_())


def ours(embedding: nn.Parameter, config: BitNetConfig, **settings: Any) -> nn.Module:
    """Return the packed model of transformers after ``convert(model, **settings)``."""
    return convert(packed(embedding, config), **settings)


def packed(embedding: nn.Parameter, config: BitNetConfig) -> nn.Module:
    """Return transformers' model of packed layers, which unpack their weights in every call."""
    model = _empty_model(embedding, config)
    quantization = BitNetQuantConfig(linear_class="bitlinear")
    bitnet.replace_with_bitnet_linear(model, ["lm_head"], quantization)
    generator = np.random.default_rng(0)
    for layer in _layers(model, bitnet.BitLinear):
        indices = generator.integers(len(_VALID_BYTES), size=tuple(layer.weight.shape), dtype="u1")
        layer.weight = torch.from_numpy(_VALID_BYTES[indices]).to(embedding.device)
        # The scale divides. A power of two is exact in every format.
        scale = 2.0 ** round(math.log2(layer.in_features) / 2)
        layer.weight_scale = torch.full((1,), scale, dtype=DTYPE, device=embedding.device)
    return model


def offline(
    embedding: nn.Parameter, config: BitNetConfig, weights: dict[str, nn.Parameter]
) -> nn.Module:
    """Return transformers' model of layers with ternary weights in bf16, and quantised inputs."""
    model = _empty_model(embedding, config)
    quantization = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="offline")
    bitnet.replace_with_bitnet_linear(model, ["lm_head"], quantization)
    for layer in _layers(model, bitnet.AutoBitLinear):
        layer.weight_scale = torch.ones(1, dtype=DTYPE, device=embedding.device)
    return _with_weights(model, weights)


def floating(
    embedding: nn.Parameter, config: BitNetConfig, weights: dict[str, nn.Parameter]
) -> nn.Module:
    """Return the model with ``nn.Linear`` layers in bf16."""
    return _with_weights(_empty_model(embedding, config), weights)


def ternary_weights(config: BitNetConfig, device: str) -> dict[str, nn.Parameter]:
    """Return the weights in bf16 of all linear layers but the head, by the layer's name."""

    def random(shape: torch.Size) -> nn.Parameter:
        t = torch.randint(-1, 2, shape, dtype=torch.int8, device=device)
        return nn.Parameter(t.to(DTYPE))

    layers = _linears(_meta_model(config))
    return {name: random(layer.weight.shape) for name, layer in layers.items()}


def token_bytes(model: Any) -> int:
    """Return the bytes of the weights that a token reads: all but an embedding that is no head."""
    embedding = _tensors(model.get_input_embeddings())
    head = model.get_output_embeddings()
    # The int8 head of a tied model refers to the table of the embedding.
    read = _tensors(head) | _tensors(getattr(head, "table", head))
    tensors = {key: t for key, t in _tensors(model).items() if key not in embedding} | read
    return sum(tensor.nbytes for tensor in tensors.values())


def _tensors(module: nn.Module) -> dict[int, Tensor]:
    return {id(t): t for t in (*module.parameters(), *module.buffers())}


def cache_bytes(config: BitNetConfig) -> int:
    """Return the bytes of the keys and values of a token, in 16 bits."""
    head_size = config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * config.num_key_value_heads * head_size * 2


def _meta_model(config: BitNetConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE)


def _empty_model(embedding: nn.Parameter, config: BitNetConfig) -> Any:
    """Return a model whose linear layers are on the meta device; all else is in place."""
    model = _meta_model(config).eval()
    model.model.embed_tokens.weight = model.lm_head.weight = embedding
    with torch.device(embedding.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight = nn.Parameter(_ones(module.weight, embedding))
    return model


def _ones(like: Tensor, embedding: Tensor) -> Tensor:
    return torch.ones(like.shape, dtype=like.dtype, device=embedding.device)


def _with_weights(model: Any, weights: dict[str, nn.Parameter]) -> nn.Module:
    for name, layer in _linears(model).items():
        layer.weight = weights[name]
    return model


def _linears(model: Any) -> dict[str, nn.Linear]:
    """Return all linear layers but the head, by their name."""
    return {name: m for name, m in model.model.named_modules() if isinstance(m, nn.Linear)}


def _layers(model: nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]
