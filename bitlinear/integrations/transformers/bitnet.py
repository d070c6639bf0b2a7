"""The replacement of BitNet layers by deployed BitLinear layers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from ...conversion.replacement import CALL_HOOKS, find_parents, set_child
from ...linear import BitLinear
from .bitnet_layers import Source, WeightQuantizers, bitnet_layers
from .config import METHOD
from .fusion import fuse as fuse_model
from .head import find_head, quantize_head
from .layers import BITNET_EPS, bitlinear_layers, empty_layer, pretrained_models
from .mapped_files import release_files
from .quantizer import attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)


def convert(
    model: _Model,
    *,
    head: str | None = None,
    fuse: bool = True,
    weight_quantizers: WeightQuantizers | None = None,
) -> _Model:
    """Replace the BitNet layers of a model by deployed ones, in place.

    These are the layers of transformers, in a model of any class that was loaded with a ``bitnet``
    quantisation config (BitNet, Llama, Falcon, Qwen, and so on): ``BitLinear``, whose packed bytes
    are rearranged and whose scales divide, and ``AutoBitLinear``, offline (its scales multiply, the
    bias included) and online, whose float weights are packed. ``weight_scale`` is one number or one
    for each output feature. Also ``BitNetLinear`` of onebitllms, and layers of a model's own class,
    if ``weight_quantizers`` has a function for it. The new layers compute with the same ternary
    weights and scales, and keep an RMSNorm inside a layer. All other modules stay as they are (a
    fused decoder layer gets another ``forward``), and so do forward and backward hooks. References
    to a layer that are not submodules (in a list, for example) keep the old layer. The weights of a
    converted model are constants; adapters beside them can train.

    A checkpoint that names the norm inside its projections ``q_proj.norm.weight`` and so on is
    loaded into the layers of transformers with the norm that those have::

        config = AutoConfig.from_pretrained(path)
        config.quantization_config = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
            "use_rms_norm": True,
        }
        names = {"_proj.norm.weight": "_proj.rms_norm.weight"}
        model = convert(AutoModel.from_pretrained(path, config=config, key_mapping=names))

    Beyond the model, this takes the packed weights of one layer and a few MB: the old weight of a
    layer is released before the next layer is converted. (A file that ``from_pretrained`` mapped is
    released as a whole, at the end: :func:`~.mapped_files.release_files`.) The mean of a weight
    that is quantised online also takes copies of that weight, as it does in every forward pass of
    transformers, and a function of ``weight_quantizers`` takes what it needs for one weight.

    Args:
        model: The model, on any devices. ``save_pretrained`` can save a converted
            ``PreTrainedModel``, and ``from_pretrained`` loads it in any process that has imported
            bitlinear.
        head: ``"int8"`` also quantises the head, by :func:`quantize_head`; None leaves it.
        fuse: Whether to fuse the decoder layers that can be, as :func:`~.fusion.fuse` does.
        weight_quantizers: For each class of layers of the model's own, its function that quantises
            a weight: from ``(N, K)`` to ternary values times scales in the same shape, such as
            ``lambda w: w + (weight_quant(w) - w)`` without the straight-through terms. Scales are
            found in the values, as by :func:`bitlinear.pack`. Such a layer has ``weight``,
            ``bias``, ``in_features`` and ``out_features`` as ``nn.Linear``, applies its module
            ``norm`` or ``rms_norm``, if it has one, to its input, and quantises activations as
            BitNet does: 8 bits, absmax per token, at least 1e-5.

    Returns:
        ``model``.

    Raises:
        ValueError: The model is a BitNet layer itself, has none, or has one that cannot be
            converted: on the meta device (offloaded, not loaded yet), of a subclass, of the wrong
            shape or dtype, with a damaged scale, with weights that are not ternary or not finite.
            The message names every such layer; the model is unchanged.
    """
    from .decoding import speed_up_decoding

    if head is not None:
        find_head(model, head)
    layers = bitnet_layers(model, weight_quantizers or {})
    if "" in layers:
        raise ValueError(
            f"the model is a single {type(model).__name__}, which convert cannot replace in "
            f"place: pass the model that holds this layer"
        )
    if not layers:
        converted = bitlinear_layers(model).values()
        if any(layer.is_deployed for layer in converted):
            raise ValueError(
                f"this {type(model).__name__} is converted already: quantize_head(model) and "
                f"fuse(model) do the rest of what convert does"
            )
        if converted:
            raise ValueError(
                f"the BitLinear layers of this {type(model).__name__} are not deployed: "
                f"bitlinear.deploy(model) packs them, fuse(model) and speed_up_decoding(model) do "
                f"the rest of what convert does"
            )
        raise ValueError(
            f"this {type(model).__name__} has no BitNet layer: for nn.Linear layers use "
            f"bitlinear.convert, or bitlinear.pack if their weights are ternary already; for "
            f"layers of the model's own class pass weight_quantizers"
        )
    reasons = {name: layer.why_bad() for name, layer in layers.items()}
    problems = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    if problems:
        raise ValueError("BitNet layers cannot be converted:\n  " + "\n  ".join(problems))
    parents = find_parents(model)
    names = list(layers)
    for name in names:
        # Only the model refers to the layer now, so that its weight is released with it.
        source = layers.pop(name)
        new = _deployed_layer(source)
        set_child(parents[id(source.layer)], new)
        del source
        _logger.info("%s: converted to %s", name, new)
    _logger.info("converted %d BitNet layers", len(names))
    for inner in pretrained_models(model):
        _remove_quantizer(inner)
    attach(model)
    if head is not None:
        quantize_head(model, head)
    if fuse:
        fuse_model(model)
    release_files(model)
    speed_up_decoding(model)
    return model


@torch.inference_mode(False)  # Nothing could be loaded into buffers made in inference mode.
@torch.no_grad()
def _deployed_layer(source: Source) -> BitLinear:
    """Make the layer that replaces a BitNet layer."""
    old = source.layer
    w_packed, w_scale = source.weights()
    state = {"w_packed": w_packed, "w_scale": w_scale}
    bias = source.bias(w_scale)
    if bias is not None:
        state["bias"] = bias
    new = empty_layer(
        old.in_features,
        old.out_features,
        bias_dtype=None if bias is None else bias.dtype,
        use_rms_norm=source.norm is not None,
        eps=BITNET_EPS,
        dtype=source.dtype,
    )
    new.load_state_dict(state, assign=True)
    if source.norm is not None:
        new.rms_norm = source.norm
    for name in (*CALL_HOOKS, "_is_hf_initialized"):
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    return new.train(old.training)


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
