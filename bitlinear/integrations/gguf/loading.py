"""``load``: a model of transformers filled from a GGUF file."""

from __future__ import annotations

import logging
import os
from typing import Any, TypeVar

import torch
from torch import nn

from ...arguments import QuantType, check_act_bits, check_eps, group_size_of
from ...conversion.replacement import CALL_HOOKS, find_parents, set_child
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
) -> _Model:
    """Fill a model of transformers from a GGUF file, with deployed layers for ternary tensors.

    The linear layers whose tensors have the type TQ1_0, TQ2_0 or I2_S become deployed
    :class:`~bitlinear.BitLinear` layers, with the weights and scales of the file; see
    :func:`tensors`. Their biases stay in fp32. All other parameters get the values of the file in
    their own dtype: F32, F16 and BF16, and for the embedding and the head every type that the
    package gguf can dequantise, such as Q6_K. A file without ``output.weight`` has a head with the
    values of the embedding. For the architecture ``llama`` the rows of queries and keys are put
    back into the order of transformers.

    The architectures are ``llama``, ``qwen2``, ``qwen3``, ``bitnet`` and those of bitnet.cpp,
    ``bitnet-b1.58`` and ``bitnet-25``. Make the model from the config of the original checkpoint::

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
        model = load("model.gguf", model).eval()

    On the meta device the model takes no memory before the load, and is on the CPU after it.
    Other models keep their devices, and their old weights until the ternary tensors are read.
    Beyond the tensors themselves, the load takes a few MB.

    Args:
        path: The file.
        model: The model, for causal language modelling.
        i2_s_layout: As for :func:`tensors`.
        act_bits: The bits of quantised activations, 8 or 16; the file does not tell.
        eps: The lower bound of the absmax of a token; see :class:`~bitlinear.BitLinear`. The
            default is that of BitNet models in transformers.

    Returns:
        ``model``, which ``save_pretrained`` can save.

    Raises:
        OSError: The file cannot be opened.
        TypeError: ``model`` is not a model of transformers.
        ValueError: As for :func:`tensors`; or the file is one of another model, its config differs,
            a tensor is missing or not used, or has a type or shape that does not fit. The model is
            unchanged.
    """
    from ..transformers.quantizer import attach

    check_i2_s_layout(i2_s_layout)
    check_act_bits(act_bits)
    check_eps(eps, act_bits)
    if not hasattr(model, "config"):
        raise TypeError(
            f"load() needs a model of transformers, but got a {type(model).__name__}: tensors() "
            f"reads the ternary tensors for any other"
        )
    file = GgufFile(path)
    sources = find_sources(file, model)
    ternary = check_sources(file, model, sources, i2_s_layout)
    buffers = computed_buffers(model)
    packed = {
        name: read_ternary(file, sources[name].info, i2_s_layout, sources[name].order)
        for name in ternary
    }
    _replace_layers(file, model, sources, packed, act_bits, eps)
    _fill_parameters(file, model, sources)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer
    _logger.info("%s: loaded %d deployed layers", path, len(ternary))
    return attach(model)


@torch.inference_mode(False)  # Nothing could be loaded into buffers made in inference mode.
@torch.no_grad()
def _replace_layers(
    file: GgufFile,
    model: nn.Module,
    sources: dict[str, Source],
    packed: dict[str, TernaryTensor],
    act_bits: int,
    eps: float,
) -> None:
    """Put deployed layers in place of the linear layers with these weights; empties ``packed``."""
    from ..transformers.layers import empty_layer

    parents = find_parents(model)
    while packed:
        name, tensor = packed.popitem()
        prefix = name.rpartition(".")[0]
        old: Any = model.get_submodule(prefix)
        state = {"w_packed": tensor.w_packed, "w_scale": tensor.w_scale}
        if old.bias is not None:
            state["bias"] = torch.empty(old.out_features, device="cpu")
            read_into(state["bias"], file, sources[f"{prefix}.bias"])
        new = empty_layer(
            old.in_features,
            old.out_features,
            bias_dtype=None if old.bias is None else torch.float32,
            use_rms_norm=False,
            eps=eps,
            dtype=old.weight.dtype,
            quant_type=QuantType(act_bits, group_size_of(tensor.w_scale)).name,
        )
        new.load_state_dict(state, assign=True)
        if not old.weight.is_meta:
            new.to(old.weight.device)
        for key in CALL_HOOKS:
            if key in vars(old):
                vars(new)[key] = vars(old)[key]
        set_child(parents[id(old)], new.train(old.training))


@torch.inference_mode(False)
@torch.no_grad()
def _fill_parameters(file: GgufFile, model: nn.Module, sources: dict[str, Source]) -> None:
    """Write the values of the parameters that the model still has; tied ones stay tied."""
    filled: dict[int, nn.Parameter] = {}
    owners = [
        (module, key, parameter, sources[f"{prefix}.{key}"])
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    for module, key, old, source in owners:
        if id(old) not in filled:
            new = old
            if old.is_meta or old.is_inference():
                device = "cpu" if old.is_meta else old.device
                values = torch.empty(old.shape, dtype=old.dtype, device=device)
                new = nn.Parameter(values, requires_grad=old.requires_grad)
            read_into(new, file, source)
            filled[id(old)] = new
        module._parameters[key] = filled[id(old)]
