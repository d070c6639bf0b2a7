"""The description of deployed layers in ``config.json``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ... import foreign
from ...arguments import dtype_name
from ...linear import BitLinear
from .fusion import fused_layers
from .int8_head import Int8Head, int8_modules
from .layers import BITNET_EPS, NormedBitLinear, bitlinear_layers, empty_layer, ternary_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "bitlinear"

# The arguments of BitLinearConfig that hold for all layers, unless `layers` overrides them for one.
_SETTINGS = ("eps", "use_rms_norm", "rms_norm_eps", "quant_type", "bias_dtype")


@register_quantization_config(METHOD)
class BitLinearConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a model with deployed layers.

    Args:
        modules_to_not_convert: Qualified names of the linear layers that are not deployed.
        eps: Lower bound of the absmax of a token; see :class:`BitLinear`.
        use_rms_norm: Whether the layers are :class:`NormedBitLinear`.
        rms_norm_eps: The number that these norms add to the mean square.
        quant_type: As for :class:`BitLinear`.
        bias_dtype: Name of the dtype of the biases.
        fuse: Whether the decoder layers are fused; see :func:`~.fusion.fuse`.
        int8_head: Whether the head has int8 weights, as :func:`quantize_head` makes it.
        int8_embedding: Whether the input embedding has; the head then shares them.
        layers: The settings of layers that differ from the others, by qualified name: any of the
            arguments above, and ``w_scale_shape``.
        kwargs: Settings of a later version; ignored.
    """

    def __init__(
        self,
        modules_to_not_convert: list[str] | None = None,
        eps: float = BITNET_EPS,
        use_rms_norm: bool = False,
        rms_norm_eps: float = 1e-6,
        quant_type: str = "ai8pc_wpt",
        bias_dtype: str = "float32",
        fuse: bool = False,
        int8_head: bool = False,
        int8_embedding: bool = False,
        layers: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.modules_to_not_convert = modules_to_not_convert or []
        self.eps = eps
        self.use_rms_norm = use_rms_norm
        self.rms_norm_eps = rms_norm_eps
        self.quant_type = quant_type
        self.bias_dtype = bias_dtype
        self.fuse = fuse
        self.int8_head = int8_head
        self.int8_embedding = int8_embedding
        self.layers = layers or {}

    def settings_of(self, names: set[str]) -> dict[str, Any]:
        """The settings of the layer with one of these names."""
        settings = {key: getattr(self, key) for key in _SETTINGS}
        for name in names & self.layers.keys():
            settings.update(self.layers[name])
        return settings


def describe(model: PreTrainedModel) -> BitLinearConfig:
    """Describe the deployed layers of a model, so that :func:`layer_from_settings` can make them.

    Settings that most layers share are stated once.
    """
    layers = {name: layer for name, layer in bitlinear_layers(model).items() if layer.is_deployed}
    settings = {name: _settings(layer) for name, layer in layers.items()}
    common = {
        key: Counter(values).most_common(1)[0][0]
        for key in _SETTINGS
        if (values := [each[key] for each in settings.values() if key in each])
    }
    different = {
        name: {key: value for key, value in each.items() if common.get(key) != value}
        for name, each in settings.items()
    }
    int8 = int8_modules(model)
    int8_heads = {name for name, module in int8.items() if isinstance(module, Int8Head)}
    return BitLinearConfig(
        sorted(
            name
            for name, module in model.named_modules()
            if (foreign.is_linear(module) and name not in layers) or name in int8_heads
        ),
        fuse=bool(fused_layers(model)),
        int8_head=bool(int8_heads),
        int8_embedding=len(int8) > len(int8_heads),
        layers={name: each for name, each in different.items() if each},
        **common,
    )


def check_describable(model: PreTrainedModel) -> None:
    """Raise ValueError for deployed layers that :func:`describe` cannot express.

    An :class:`~bitlinear.Embedding` is one of them.
    """
    problems = []
    for name, layer in ternary_layers(model).items():
        if layer.is_deployed and type(layer) not in (BitLinear, NormedBitLinear):
            problems.append(f"{name} is of the class {type(layer).__name__}")
        elif isinstance(layer, NormedBitLinear) and _norm_eps(layer.rms_norm) is None:
            problems.append(f"the norm of {name} is of the class {type(layer.rms_norm).__name__}")
    if problems:
        raise ValueError(
            "from_pretrained cannot make these deployed layers: save the state_dict with "
            "safetensors, and load it with bitlinear.load_deployed into a model made as this one "
            "was\n  " + "\n  ".join(problems)
        )


def layer_from_settings(linear: Any, settings: dict[str, Any]) -> BitLinear:
    """Make the deployed layer, on the meta device, that replaces a linear layer.

    Args:
        linear: An ``nn.Linear`` or a ``Conv1D``.
        settings: See :meth:`BitLinearConfig.settings_of`.
    """
    out_features, in_features = linear.weight.shape
    if foreign.is_conv1d(linear):
        in_features, out_features = out_features, in_features
    use_rms_norm = settings["use_rms_norm"]
    layer = empty_layer(
        in_features,
        out_features,
        bias_dtype=None if linear.bias is None else getattr(torch, settings["bias_dtype"]),
        use_rms_norm=use_rms_norm,
        eps=settings["eps"],
        dtype=linear.weight.dtype,
        quant_type=settings["quant_type"],
    ).deploy()
    if "w_scale_shape" in settings:
        layer.w_scale = layer.w_scale.new_empty(settings["w_scale_shape"])
    if use_rms_norm:
        layer.rms_norm = _empty_norm(in_features, settings["rms_norm_eps"])
    return layer


def _empty_norm(in_features: int, eps: float) -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with torch.device("meta"):
        norm: nn.Module = LlamaRMSNorm(in_features, eps)
    return norm


def _norm_eps(norm: Any) -> float | None:
    """What an RMSNorm of transformers adds to the mean square; None for another module."""
    eps: float | None = getattr(norm, "variance_epsilon", None)
    return eps if type(norm).__module__.startswith("transformers.") else None


def _settings(layer: BitLinear) -> dict[str, Any]:
    """The settings from which :func:`layer_from_settings` makes ``layer`` again."""
    norm = layer.rms_norm if isinstance(layer, NormedBitLinear) else None
    settings = {"eps": layer.eps, "quant_type": layer.quant_type, "use_rms_norm": norm is not None}
    if norm is not None:
        settings["rms_norm_eps"] = _norm_eps(norm)
    if layer.bias is not None:
        settings["bias_dtype"] = dtype_name(layer.bias.dtype)
    if list(layer.w_scale.shape) != [1]:
        settings["w_scale_shape"] = list(layer.w_scale.shape)
    return settings
