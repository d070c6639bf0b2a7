"""Small ternary checkpoints in the formats that people have, with known weights.

Each ``write_*`` function takes a model from :func:`ternary_llama` and writes it as the project that
is named in its docstring would, with that project's own library where it can be installed. The
scales are powers of two far from 1, so that every format holds them exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scripts import tools
from scripts.bench.generation import models

with tools.importing("dev"):
    import gguf
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations import bitnet

CONFIG = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


def ternary_llama(per_row: bool = False, seed: int = 0) -> Any:
    """A Llama in fp32 whose projections hold ternary weights times scales.

    Args:
        per_row: Whether each output feature has a scale of its own.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    for index, linear in enumerate(projections(model).values()):
        t = torch.randint(-1, 2, linear.weight.shape).float()
        shape = (len(t), 1) if per_row else (1,)
        linear.weight.data = t * 2.0 ** -(4.0 + (index + torch.arange(shape[0])) % 3).view(shape)
    return model


def projections(model: nn.Module) -> dict[str, Any]:
    """The linear layers other than the head, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The ternary weights, and the scale of each row: ``(N, K)`` and ``(N,)``."""
    return weight.sign(), weight.abs().amax(dim=1)


def write(
    model: Any,
    folder: Path,
    state: dict[str, Tensor] | None = None,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Write a folder as the Hub has it, with another state and quantisation config."""
    model.config.quantization_config = quantization
    if quantization is None:
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    state = {name: t.contiguous() for name, t in (state or model.state_dict()).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_bitnet(model: Any, folder: Path) -> None:
    """Packed by transformers: BitNet-b1.58-2B-4T, Falcon-E, Falcon3-1.58bit, Llama3-8B-1.58."""
    state = dict(model.state_dict())
    for name, linear in projections(model).items():
        t, scales = ternary(linear.weight.detach())
        state[f"{name}.weight"] = bitnet.pack_weights(t)
        stored = scales if len(scales.unique()) > 1 else scales[:1]
        state[f"{name}.weight_scale"] = 1 / stored  # it divides
    write(model, folder, state, {"quant_method": "bitnet", "linear_class": "bitlinear"})


def write_random_bitnet(folder: Path) -> Path:
    """A BitNet model with random weights in bf16, packed by transformers: 45 MB, 4 layers.

    Args:
        folder: Is created.

    Returns:
        The folder.
    """
    folder.mkdir()
    config = models.make_config("small", layers=4)
    model = models.packed(models.random_embedding(config, "cpu"), config)
    state = dict(model.state_dict())
    del state["lm_head.weight"]  # The embedding has the same tensor.
    write(model, folder, state, {"quant_method": "bitnet", "linear_class": "bitlinear"})
    return folder


def write_masters(model: Any, folder: Path) -> None:
    """Float weights that are quantised in every call, with norms inside: BitNet-embedding."""
    state = dict(model.state_dict())
    for name, linear in projections(model).items():
        state[f"{name}.norm.weight"] = torch.ones(linear.in_features)
    write(model, folder, state)


def write_dense(model: Any, folder: Path) -> None:
    """Ternary values in bf16: TriLM unpacked, BitCPM4, any model quantised in simulation."""
    write(model.to(torch.bfloat16), folder)


def write_paretoq(model: Any, folder: Path) -> None:
    """Latent weights and a learned range ``weight_clip_val`` per row: ParetoQ at 1.58 bits."""
    state = dict(model.state_dict())
    for name, linear in projections(model).items():
        t, scales = ternary(linear.weight.detach())
        alpha = 1.5 * scales[:, None]
        state[f"{name}.weight"] = alpha * (t * 0.6 + 0.1 * (torch.rand(t.shape) - 0.5))
        state[f"{name}.weight_clip_val"] = alpha
    write(model, folder, state)


def write_tetra(model: Any, folder: Path) -> None:
    """Deployed by TeTRA-VPR: packed along the inputs, in int8; the scale divides."""
    state = dict(model.state_dict())
    for name, linear in projections(model).items():
        t, scales = ternary(linear.weight.detach())
        codes = (t + 1).to(torch.uint8).reshape(len(t), -1, 4)
        packed = codes[..., 0] << 6 | codes[..., 1] << 4 | codes[..., 2] << 2 | codes[..., 3]
        state[f"{name}.weight"] = packed.view(torch.int8)
        state[f"{name}.scale"] = 1 / scales[0]
    model.config.save_pretrained(folder)
    torch.save(state, folder / "tetra.pth")


I2_S = 36  # bitnet.cpp's number, which the package gguf does not know
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    if layer in GGUF_NAMES:
        return f"{GGUF_NAMES[layer]}.{kind}"
    _, _, index, part = layer.split(".", 3)
    return f"blk.{index}.{GGUF_NAMES[part]}.{kind}"


def rotated_rows(weight: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys in the order of llama.cpp, which rotates neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def i2_s_bytes(weight: Tensor) -> np.ndarray[Any, Any]:
    """A weight as bitnet.cpp writes it on x86: blocks of 128, and one scale at the end."""
    t, scales = ternary(weight)
    codes = (t + 1).to(torch.uint8).numpy().reshape(-1, 4, 32)
    packed = codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]
    tail = np.zeros(8, dtype=np.float32)
    tail[0] = scales[0]
    return np.concatenate([packed.reshape(-1), tail.view(np.uint8)])


def write_gguf(model: Any, folder: Path, kind: str = "TQ2_0") -> None:
    """A GGUF file of llama.cpp (TQ1_0, TQ2_0) or bitnet.cpp (I2_S), beside the config."""
    config = model.config
    config.save_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    ternary_names = {f"{name}.weight" for name in projections(model)}
    tensors = []
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        for part, count in heads.items():
            values = rotated_rows(values, count) if part in name else values
        number: Any = gguf.GGMLQuantizationType.F32
        data = values.numpy()
        if name in ternary_names and kind == "I2_S":
            number, data = I2_S, i2_s_bytes(values)
        elif name in ternary_names:
            number = gguf.GGMLQuantizationType[kind]
            data = gguf.quantize(data, number)
        tensors.append(data)
        # The library takes a shape as it is if the dtype is not uint8.
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(gguf_name(name), values.shape, dtype, data.nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data in tensors:
        writer.write_tensor_data(data)
    writer.close()
