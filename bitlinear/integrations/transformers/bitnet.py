"""The BitNet layers of transformers, and their replacement by deployed BitLinear layers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ... import packing
from ...conversion.replacement import CALL_HOOKS, find_parents, set_child
from ...linear import BitLinear
from .config import METHOD
from .layers import BITNET_EPS, empty_layer, pretrained_models
from .quantizer import attach
from .repacking import check_codes, repack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)


def convert(model: _Model) -> _Model:
    """Replace the BitNet layers of a model of transformers by deployed ones, in place.

    These are ``BitLinear``, whose packed bytes are rearranged, and ``AutoBitLinear``, offline and
    online, whose float weights are packed. The new layers compute with the same ternary weights
    and scales, and keep an RMSNorm inside a layer (``use_rms_norm``). All other modules stay as
    they are, and so do forward and backward hooks. A converted model is for inference only.

    Beyond the model, this takes the packed weights of one layer and a few MB: the old weight of a
    layer is released before the next layer is converted. The mean of a weight that is quantised
    online also takes copies of that weight, as it does in every forward pass of transformers.

    Args:
        model: The model, on any devices. ``save_pretrained`` can save a converted
            ``PreTrainedModel``, and ``from_pretrained`` loads it in any process that has imported
            bitlinear.

    Returns:
        ``model``.

    Raises:
        ValueError: The model is a BitNet layer itself, has none, or has one that cannot be
            converted: on the meta device (offloaded, not loaded yet), of a subclass, of the wrong
            shape or dtype, with a damaged scale, with weights that are not ternary or not finite.
            The message names every such layer; the model is unchanged.
    """
    from transformers.integrations import bitnet

    kinds = (bitnet.BitLinear, bitnet.AutoBitLinear)
    if isinstance(model, kinds):
        raise ValueError(
            f"the model is a single {type(model).__name__}, which convert cannot replace in "
            f"place: pass the model that holds this layer"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not layers:
        raise ValueError(
            f"this {type(model).__name__} has no BitNet layer of transformers: for nn.Linear "
            f"layers use bitlinear.convert"
        )
    reasons = {name: _why_not_convertible(layer) for name, layer in layers.items()}
    problems = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    if problems:
        raise ValueError("BitNet layers cannot be converted:\n  " + "\n  ".join(problems))
    parents = find_parents(model)
    names = list(layers)
    for name in names:
        # Only the model refers to the layer now, so that its weight is released with it.
        old = layers.pop(name)
        new = _deployed_layer(old)
        set_child(parents[id(old)], new)
        del old
        _logger.info("%s: converted to %s", name, new)
    _logger.info("converted %d BitNet layers", len(names))
    for inner in pretrained_models(model):
        _remove_quantizer(inner)
    attach(model)
    return model


def _why_not_convertible(layer: Any) -> str:
    """Why :func:`convert` cannot convert a BitNet layer, or ``""``."""
    from transformers.integrations import bitnet

    if type(layer) not in (bitnet.BitLinear, bitnet.AutoBitLinear):
        return f"it is a {type(layer).__name__}, whose use of the weight is unknown"
    if "forward" in vars(layer):
        return (
            "its forward has been replaced on the instance: load the model on one device, without "
            "offloading"
        )
    if any(tensor.is_meta for tensor in layer.state_dict().values()):
        return "it is on the meta device: load its weights first, without offloading"
    shape = [layer.out_features, layer.in_features]
    if not _is_packed(layer) and list(layer.weight.shape) != shape:
        return f"weight must have shape {shape}, but it has {list(layer.weight.shape)}"
    return _why_bad_scale(layer) or _why_bad_weight(layer)


def _why_bad_scale(layer: Any) -> str:
    is_online = getattr(layer, "online_quant", False)
    if not is_online and layer.weight_scale.numel() != 1:
        return f"weight_scale must be one number, but it has shape {list(layer.weight_scale.shape)}"
    w_scale = _scale(layer)
    if bool(w_scale.isfinite() & (w_scale > 0)):
        return ""
    if is_online:
        return "its weight has values that are NaN, infinite, or too large for their sum"
    return (
        f"weight_scale must be positive, but it is {layer.weight_scale.item():g}: the file is "
        f"damaged"
    )


def _why_bad_weight(layer: Any) -> str:
    try:
        if _is_packed(layer):
            check_codes(layer.weight, layer.out_features, layer.in_features)
        elif not layer.online_quant:
            _check_ternary(layer.weight)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _check_ternary(weight: Tensor) -> None:
    """Raise ValueError unless ``weight``, floating point, holds only -1, 0 and 1."""
    for first, rows in packing.enumerate_chunks(weight):
        if not torch.equal(rows, rows.sign()):
            row, column = (int(i) for i in (rows != rows.sign()).nonzero()[0])
            raise ValueError(
                f"weight[{first + row}, {column}] is {rows[row, column].item()}, but weights of "
                f"quantization_mode='offline' are -1, 0 or 1: if they are not quantised yet, load "
                f"them with quantization_mode='online'"
            )


def _is_packed(layer: Any) -> bool:
    """Whether a BitNet layer is a ``BitLinear`` of transformers; otherwise an ``AutoBitLinear``."""
    from transformers.integrations import bitnet

    return isinstance(layer, bitnet.BitLinear)


def _scale(layer: Any) -> Tensor:
    """The factor of the ternary weights of ``layer``: fp32, shape ``(1,)``."""
    if _is_packed(layer):  # It divides by weight_scale. In fp32, 1 / weight_scale is rounded once.
        scale = 1.0 / layer.weight_scale.detach().float()
    elif layer.online_quant:  # It rounds the quantised weights, and so the scale, to their dtype.
        scale = (1.0 / _online_factor(layer.weight)).to(layer.weight.dtype).float()
    else:
        scale = layer.weight_scale.detach().float()
    return cast(Tensor, scale.reshape(1).clone())


def _online_factor(weight: Tensor) -> Tensor:
    """The factor of the weights in ``AutoBitLinear`` before it rounds them: fp32, 0-D."""
    mean = weight.detach().abs().mean(dtype=torch.float32)
    factor: Tensor = 1.0 / mean.clamp_(min=BITNET_EPS)
    return factor


@torch.inference_mode(False)  # Nothing could be loaded into buffers made in inference mode.
@torch.no_grad()
def _deployed_layer(old: Any) -> BitLinear:
    """Make the layer that replaces the BitNet layer ``old``."""
    norm, bias, w_scale = old.rms_norm, old.bias, _scale(old)
    if _is_packed(old):
        w_packed = repack(old.weight, old.out_features, old.in_features)
    else:
        w_packed = _pack_float(old.weight, _online_factor(old.weight) if old.online_quant else None)
    state = {"w_packed": w_packed, "w_scale": w_scale}
    if bias is not None:
        # In fp32: the kernels add it in fp32, and its product with the scale has more than 8 bits.
        is_scaled = not _is_packed(old) and not old.online_quant
        state["bias"] = bias.float() * w_scale if is_scaled else bias.float().clone()
    new = empty_layer(
        old.in_features,
        old.out_features,
        bias_dtype=None if bias is None else torch.float32,
        use_rms_norm=norm is not None,
        eps=BITNET_EPS,
        dtype=old.dtype if _is_packed(old) else old.weight.dtype,
    )
    new.load_state_dict(state, assign=True)
    if norm is not None:
        new.rms_norm = norm
    for name in (*CALL_HOOKS, "_is_hf_initialized"):
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    return new.train(old.training)


def _pack_float(weight: Tensor, factor: Tensor | None) -> Tensor:
    """Round ``weight * factor`` to {-1, 0, 1} as ``AutoBitLinear`` does, and pack the result."""

    def to_ternary(first: int, rows: Tensor) -> Tensor:
        t = rows if factor is None else rows.float().mul_(factor).round_().clamp_(-1, 1)
        return t.to(torch.int8)

    return packing.pack_quantized(weight, to_ternary)


def _remove_quantizer(model: PreTrainedModel) -> None:
    """Remove the quantiser of BitNet from a model whose layers are converted."""
    model.hf_quantizer = None
    model.quantization_method = METHOD
    # save_pretrained must not undo the conversions that this quantiser did on loading.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(hasattr(op, "hf_quantizer") for op in getattr(conversion, "operations", ()))
        ]
