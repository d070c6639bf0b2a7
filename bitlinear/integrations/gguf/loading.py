"""``load``: a model of transformers filled from a GGUF file."""

from __future__ import annotations

import logging
import os
from collections.abc import Container
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...arguments import check_act_bits, check_eps, weight_type_name
from ...embedding import Embedding
from ...filling import PackedTensors, fill, unchanged_on_error
from ...packing import describe_memory
from .architectures import check_model
from .reader import GgufFile
from .sources import Source, check_sources, computed_buffers, find_sources, read_into
from .ternary import TernaryTensor, check_i2_s_layout, read_ternary

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)


def load(
    path: str | os.PathLike[str],
    model: _Model,
    *,
    i2_s_layout: str | None = None,
    act_bits: int = 8,
    eps: float = 1e-5,
    pack_embedding: bool = False,
) -> _Model:
    """Fill a model of transformers from a GGUF file, with deployed layers for ternary tensors.

    The linear layers whose tensors are ternary become deployed
    :class:`~bitlinear.BitLinear` layers, with the weights and scales of the file; see
    :func:`tensors`. Their biases stay in fp32. All other parameters get the values of the file in
    their own dtype: F32, F16 and BF16, and for the embedding and the head every type that the
    package gguf can dequantise, such as Q6_K. A ternary embedding becomes a dense one, unless
    ``pack_embedding`` is set. A file without ``output.weight`` has a head with the values of the
    embedding. For the architecture ``llama`` the rows of queries and keys are put back into the
    order of transformers.

    The architectures are ``llama``, ``qwen2``, ``qwen3``, ``bitnet`` and those of bitnet.cpp,
    ``bitnet-b1.58`` and ``bitnet-25``. Make the model from the config of the original checkpoint::

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
        model = load("model.gguf", model).eval()

    On the meta device the model takes no memory before the load, and is on the CPU after it.
    Other models keep their devices, and their old values until the new ones are read. Beyond the
    tensors themselves, which are read into the memory of the CPU first, the load takes a few MB.

    Args:
        path: The file.
        model: The model, for causal language modelling.
        i2_s_layout: As for :func:`tensors`.
        act_bits: The bits of quantised activations, 8 or 16; the file does not tell.
        eps: The lower bound of the absmax of a token; see :class:`~bitlinear.BitLinear`. The
            default is that of BitNet models in transformers.
        pack_embedding: Whether a ternary embedding becomes a deployed
            :class:`bitlinear.Embedding`, of 2 bits a value, and a head that has its values a
            deployed layer with the same packed weight, which quantises activations as the others
            do. Embeddings of other types stay dense.

    Returns:
        ``model``, which ``save_pretrained`` can save if no embedding is packed.

    Raises:
        OSError: The file cannot be opened.
        TypeError: ``model`` is not a model of transformers.
        ValueError: As for :func:`tensors`; or the file is one of another model, its config differs,
            a tensor is missing or not used, or has a type or shape that does not fit. The model is
            unchanged.
    """
    check_i2_s_layout(i2_s_layout)
    check_act_bits(act_bits)
    check_eps(eps, act_bits)
    check_model(model, "load", "tensors() reads the ternary tensors for any other")
    file = GgufFile(path)
    sources = find_sources(file, model)
    ternary = check_sources(file, model, sources, i2_s_layout, pack_embedding)
    buffers = computed_buffers(model)
    read: dict[str, TernaryTensor] = {}  # once, where embedding and head share a tensor
    packed: dict[str, TernaryTensor] = {}
    for name in ternary:
        info, order, _ = sources[name]
        if info.name not in read:
            read[info.name] = read_ternary(file, info, i2_s_layout, order)
        packed[name.removesuffix(".weight")] = read[info.name]
    dense = _read_floats(
        file, model, {n: s for n, s in sources.items() if n not in ternary}, packed
    )
    tensors = {
        name: PackedTensors(t.w_packed, t.w_scale, t.group_size) for name, t in packed.items()
    }
    with unchanged_on_error(model):
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for name, tensor in tensors.items():
            _make_ternary(model, name, tensor, eps)
        fill(model, tensors, dense, source=str(path), act_bits=act_bits, eps=eps)
    memory = describe_memory((t.w_packed, t.w_scale) for t in read.values())
    _logger.info("%s: loaded %d deployed layers: %s", path, len(ternary), memory)
    return model


def _make_ternary(model: nn.Module, name: str, tensors: PackedTensors, eps: float) -> None:
    """Replace the module of this name, if it is an embedding, by one that can be deployed."""
    old = model.get_submodule(name)
    if isinstance(old, nn.Embedding):
        weight_type = weight_type_name(tensors.own_group_size)
        parent, _, key = name.rpartition(".")
        new = Embedding.from_embedding(old, weight_type, eps)
        setattr(model.get_submodule(parent), key, new)


@torch.inference_mode(False)  # Nothing could be loaded into tensors made in inference mode.
@torch.no_grad()
def _read_floats(
    file: GgufFile, model: nn.Module, sources: dict[str, Source], packed: Container[str]
) -> dict[str, Tensor]:
    """The values of parameters, in their own dtypes; tied ones are read once."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read: dict[int, str] = {}
    values: dict[str, Tensor] = {}
    for name, source in sources.items():
        old = parameters[name]
        layer, _, key = name.rpartition(".")
        if read.setdefault(id(old), name) != name:
            continue
        dtype = torch.float32 if key == "bias" and layer in packed else old.dtype
        values[name] = torch.empty(old.shape, dtype=dtype, device="cpu")
        read_into(values[name], file, source)
    return values
