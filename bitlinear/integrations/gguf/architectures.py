"""The architectures of GGUF files beside those of transformers: names, order of rows, settings."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reader import GgufFile


class Architecture(NamedTuple):
    """An architecture of llama.cpp.

    Attributes:
        model_type: ``config.model_type`` of transformers.
        interleaves: Whether the rows of queries and keys are in the order of a rotation of
            neighbours (RoPE), which differs from the order in transformers.
        biases: The linear layers whose bias llama.cpp reads.
        scaled: The linear layers whose ``.scale`` tensor llama.cpp reads.
        activations: The values of ``config.hidden_act`` that llama.cpp computes.
    """

    model_type: str
    interleaves: bool
    biases: tuple[str, ...]
    scaled: tuple[str, ...]
    activations: tuple[str, ...] = ("silu",)


_QKV = ("attn_q", "attn_k", "attn_v")
_ATTENTION = (*_QKV, "attn_output")
_ALL = (*_ATTENTION, "ffn_gate", "ffn_up", "ffn_down")

# Sources: llama_model_rope_type, src/models/*.cpp and the loader of .scale in llama-model.cpp of
# llama.cpp; llama_rope_type in the fork of bitnet.cpp, whose converter for BitNet keeps the order.
_BITNET_CPP = Architecture("bitnet", False, (), _ALL, ("relu2",))
ARCHITECTURES = {
    "llama": Architecture("llama", True, _ALL, _ALL),
    "qwen2": Architecture("qwen2", False, _QKV, _ATTENTION),
    "qwen3": Architecture("qwen3", False, _QKV, _ALL),
    "bitnet": Architecture("bitnet", False, (), _ALL, ("silu", "relu2")),
    "bitnet-25": _BITNET_CPP,
    "bitnet-b1.58": _BITNET_CPP,
}
"""By ``general.architecture``; the last two are those of bitnet.cpp."""

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}

# Tensors that follow from the config: the factors of rotations for long contexts.
DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def file_name(name: str) -> str | None:
    """The name in a file of a tensor of a model, or None if there is none."""
    module, _, tensor = name.rpartition(".")
    if tensor not in ("weight", "bias"):
        return None
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if block is None:
        found = _NAMES.get(module)
    else:
        found = _BLOCK_NAMES.get(block[2])
        found = found and f"blk.{block[1]}.{found}"
    return found and f"{found}.{tensor}"


def part_of(name: str) -> str:
    """The part of a name in a file that names the layer, such as ``"attn_q"``."""
    return name.split(".")[-2]


def file_order(architecture: Architecture, name: str, config: Any) -> Tensor | None:
    """The rows of a tensor of a model in the order of the file, or None if it is the same.

    Args:
        architecture: Of the file.
        name: The name in the file.
        config: Of the model.

    Returns:
        int64, ``(N,)``: row ``r`` of the file is row ``order[r]`` of the model. transformers
        rotates the first half of each head with the second; here the pairs are neighbours.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = part_of(name)
    if not architecture.interleaves or part not in heads:
        return None
    rows = torch.arange(heads[part] * head_dim(config), device="cpu")
    return rows.view(heads[part], 2, -1).transpose(1, 2).flatten()


def settings(name: str, config: Any) -> dict[str, Any]:
    """The metadata of a file of this architecture that belong to a config of transformers."""
    return {
        f"{name}.{key}": value
        for key, value in {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": head_dim(config),
            "attention.value_length": head_dim(config),
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.dimension_count": head_dim(config),
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
            "hidden_activation": config.hidden_act,
            "vocab_size": config.vocab_size,
        }.items()
    }


def head_dim(config: Any) -> int:
    """The size of an attention head."""
    size: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return size


def check_model(model: object, function: str, remedy: str) -> None:
    """Raise TypeError, with the remedy, unless it is a model of transformers."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{function}() needs a model of transformers, but got a {type(model).__name__}: "
            f"{remedy}"
        )


def check_config(file: GgufFile, model: Any) -> Architecture:
    """Find the architecture of a file, and compare its metadata with the config of a model.

    Raises:
        ValueError: The architecture is not supported, or the model is another one. The message has
            every difference.
    """
    name = file.metadata("general.architecture")
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise ValueError(
            f"{file.path} has the architecture {name!r}, but load() knows only "
            f"{[*ARCHITECTURES]}: tensors() reads the ternary tensors of any architecture"
        )
    config = model.config
    if config.model_type != architecture.model_type:
        raise ValueError(
            f"{file.path} has the architecture {name!r}, but the model is of type "
            f"{config.model_type!r}: make a model of type {architecture.model_type!r}"
        )
    problems = []
    if config.hidden_act not in architecture.activations:
        problems.append(
            f"models of this architecture compute {' or '.join(architecture.activations)}, but the "
            f"config of the model has hidden_act={config.hidden_act!r}"
        )
    for key, wanted in settings(name, config).items():
        # The context may be extended, and a vocabulary can have been padded in the file.
        if key.endswith(("context_length", "vocab_size")):
            continue
        found = file.metadata(key)
        if isinstance(wanted, float) and isinstance(found, float):
            differs = abs(found - wanted) > 1e-6 * wanted  # The file has fp32.
        else:
            differs = found is not None and found != wanted
        if differs:
            problems.append(f"{key} is {found!r}, but the config of the model has {wanted!r}")
    if architecture.interleaves and file.metadata(f"{name}.attention.head_count") is None:
        problems.append(
            f"it has no {name}.attention.head_count, on which the order of rows depends"
        )
    problems += _rotation_differences(file, name, config.rope_parameters)
    if problems:
        raise ValueError(
            f"{file.path} is not a file of this model; make the model from the config of the "
            f"original checkpoint:\n  " + "\n  ".join(problems)
        )
    return architecture


def _rotation_differences(file: GgufFile, name: str, parameters: Any) -> list[str]:
    """How the scaling of rotations (RoPE) in a file differs from that of a config."""
    kind = file.metadata(f"{name}.rope.scaling.type") or "none"
    factor = file.metadata(f"{name}.rope.scaling.factor") or file.metadata(
        f"{name}.rope.scale_linear"
    )
    if any(key in file.tensors for key in DERIVED):
        kind = "llama3" if "rope_freqs.weight" in file.tensors else "longrope"
    elif kind == "none":
        kind = "default" if factor in (None, 0.0, 1.0) else "linear"
    wanted = parameters["rope_type"]
    if kind != wanted:
        return [
            f"its rotations are scaled by {kind!r}, but the config of the model has "
            f"rope_parameters={parameters}"
        ]
    if kind in ("linear", "yarn") and factor != parameters["factor"]:
        return [
            f"its rotations are scaled by the factor {factor}, but the config of the model has "
            f"{parameters['factor']}"
        ]
    return []
