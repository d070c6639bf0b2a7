"""Models of Hugging Face transformers: BitNet on these kernels, and deployed models on disk.

:func:`convert` replaces the BitNet layers of a loaded model by deployed layers of ours. And
``from_pretrained`` loads what ``save_pretrained`` writes of a model with deployed layers, by a
quantisation method of the name ``"bitlinear"``: of a model from :func:`convert`, and of every
other after ``bitlinear.convert`` and ``bitlinear.deploy``, which calls :func:`attach`.

``import bitlinear`` has this module loaded as soon as transformers has quantisers. Without that
import, transformers warns of an "unknown quantization type", and makes up the weights.

Where the numbers differ: transformers computes in the dtype of the model. In bf16 it rounds the
scales, the scaled activations, the product and the result, each to 8 bits; here the product is
exact and only the result is rounded. In fp32 both agree to rounding, unless a scaled activation is
a tie to within an ulp.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ... import packing
from ...conversion.replacement import CALL_HOOKS
from ...linear import BitLinear
from ...quantize import dtype_name
from ...state import check_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

if int(transformers.__version__.split(".")[0]) < 5:  # whose from_pretrained was another
    raise ImportError(
        f"bitlinear needs transformers 5.23 or later, but this is {transformers.__version__}: "
        f"upgrade it with pip install -U transformers"
    )

# This module is loaded with transformers.quantizers.auto. Other parts of transformers may not be
# there yet, or take long: functions import them.

__all__ = ["BitLinearConfig", "BitLinearQuantizer", "NormedBitLinear", "attach", "convert"]

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)

_METHOD = "bitlinear"
# The lower bound that transformers has for the absmax of a token and the absmean of a weight.
_EPS = 1e-5


def register() -> None:
    """Nothing: to import this module is to register its classes with transformers."""


class NormedBitLinear(BitLinear):
    """A :class:`BitLinear` with an RMSNorm before it, as ``use_rms_norm`` asks for.

    Attributes:
        rms_norm: The norm, over the last dimension of the input, in the input's dtype.
    """

    rms_norm: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Applies the norm, then the layer, to ``input`` of shape ``(..., K)``."""
        if isinstance(input, fx.Proxy):
            return self._as_leaf(input)
        return super().forward(self.rms_norm(input))


def convert(model: _Model) -> _Model:
    """Replaces the BitNet layers of a model of transformers by deployed ones, in place.

    These are ``BitLinear``, whose packed bytes are rearranged, and ``AutoBitLinear``, offline and
    online, whose float weights are packed. The new layers compute with the same ternary weights
    and scales; an RMSNorm inside a layer (``use_rms_norm``) is kept. Every other module is left
    alone, and so are forward and backward hooks. A converted model is for inference only.

    Beyond the model, this takes the packed weights of one layer and a few MB: the old weight of a
    layer is released before the next one is converted. The mean of a weight that is quantised
    online takes copies of that weight besides, as it does in every forward pass of transformers.

    Args:
        model: The model, on any devices. A ``PreTrainedModel`` can be saved afterwards with
            ``save_pretrained``, and loaded by ``from_pretrained`` wherever this module has been
            imported.

    Returns:
        ``model``.

    Raises:
        ValueError: The model itself is such a layer, has none, or has one that cannot be taken:
            on the meta device (offloaded, not loaded yet), of a subclass, of the wrong shape or
            dtype, with a damaged scale, with weights that are not ternary or not finite. The
            message names every such layer; the model is unchanged.
    """
    from transformers.integrations import bitnet

    kinds = (bitnet.BitLinear, bitnet.AutoBitLinear)
    if isinstance(model, kinds):
        raise ValueError("convert needs the model that holds this layer, to replace it there")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not layers:
        raise ValueError(
            f"this {type(model).__name__} has no BitNet layer of transformers: for nn.Linear "
            f"layers use bitlinear.convert"
        )
    problems = {name: _why_not_convertible(layer) for name, layer in layers.items()}
    refused = [f"{name}: {reason}" for name, reason in problems.items() if reason]
    if refused:
        raise ValueError("BitNet layers cannot be converted:\n  " + "\n  ".join(refused))
    places = _places(model)
    names = list(layers)
    for name in names:
        old = layers.pop(name)  # the last reference beside the model's: its weight has to go
        new = _deployed(old)
        for parent, key in places[id(old)]:
            parent._modules[key] = new
        del old
        _logger.info("%s: converted to %s", name, new)
    _logger.info("converted %d BitNet layers", len(names))
    for inner in _pretrained_models(model):
        _forget_quantizer(inner)
    attach(model)
    return model


def attach(model: _Model) -> _Model:
    """Makes ``save_pretrained`` write deployed layers so that ``from_pretrained`` loads them.

    ``bitlinear.deploy`` and :func:`convert` call it. The layers are described in ``config.json``
    when the model is saved, as they are then: which linear layers are deployed, their ``eps``, and
    so on. Whoever loads the model imports bitlinear first.

    Args:
        model: A ``PreTrainedModel``, or a module around one or several. Those without a deployed
            layer are left as they are, and so are those that another method has quantised, of
            which a warning is logged.

    Returns:
        ``model``.
    """
    outer: list[PreTrainedModel] = []
    for inner in _pretrained_models(model):
        if not any(layer.is_deployed for layer in _layers(inner).values()):
            continue
        quantizer = getattr(inner, "hf_quantizer", None)
        if quantizer is not None and not isinstance(quantizer, BitLinearQuantizer):
            _logger.warning(
                "this %s is quantised by transformers, with %s, beside its deployed BitLinear "
                "layers: what save_pretrained writes of it cannot be loaded by from_pretrained; "
                "save its state_dict instead",
                type(inner).__name__,
                type(quantizer).__name__,
            )
            continue
        # is_quantized stays as it is: where it is set, float(), half() and Trainer refuse.
        inner.hf_quantizer = BitLinearQuantizer(_describe(inner))
        if not any(inner in model.modules() for model in outer):
            outer.append(inner)
            inner.config.quantization_config = inner.hf_quantizer.quantization_config
    return model


def repack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weights of a packed checkpoint of transformers, in our packed format.

    Bytes are made of bytes, on their device, in temporaries of about 1 MB each.

    Args:
        packed: uint8, shape ``(ceil(N/4), K)``: bits ``2i`` and ``2i + 1`` of ``packed[r, k]``
            hold the weight ``[i * ceil(N/4) + r, k]``, plus 1.
        out_features: ``N``. What the bits hold for rows past it is ignored.
        in_features: ``K``.

    Returns:
        uint8, shape ``(N, ceil(K/4))``; see :mod:`bitlinear.packing`.

    Raises:
        TypeError: ``packed`` is not uint8.
        ValueError: The shape does not fit, or a weight has the invalid code 3.
    """
    _check_codes(packed, out_features, in_features)
    stored, columns = len(packed), packing.packed_shape(0, in_features)[1]
    shape = packing.packed_shape(out_features, in_features)
    result = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    for first, chunk in packing.enumerate_chunks(packed):
        # Slots past K hold weight 0, code 1, in each of the four rows.
        padded = F.pad(chunk, (0, 4 * columns - in_features), value=0b01010101)
        # The columns k of one k mod 4 together: they take the same place in a byte.
        planes = padded.reshape(-1, columns, 4).permute(2, 0, 1).contiguous()
        for i in range(4):
            start = i * stored + first
            c0, c1, c2, c3 = (planes[:, : max(0, out_features - start)] >> (2 * i)) & 3
            result[start : start + len(c0)] = (c0 << 6) | (c1 << 4) | (c2 << 2) | c3
    return result


@register_quantization_config(_METHOD)
class BitLinearConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` says of the deployed layers of a model, as ``quantization_config``.

    Args:
        modules_to_not_convert: Qualified names of the linear layers that are not deployed.
        eps: Lower bound of the absmax of a token; see :class:`BitLinear`.
        use_rms_norm: Whether the layers are :class:`NormedBitLinear`.
        rms_norm_eps: What these norms add to the mean square.
        quant_type: As for :class:`BitLinear`.
        bias_dtype: Name of the dtype of the biases.
        layers: By qualified name, what is different in some layers: any of the arguments above,
            and ``w_scale_shape``.
        kwargs: What a later version may have written; ignored.
    """

    def __init__(
        self,
        modules_to_not_convert: list[str] | None = None,
        eps: float = _EPS,
        use_rms_norm: bool = False,
        rms_norm_eps: float = 1e-6,
        quant_type: str = "ai8pc_wpt",
        bias_dtype: str = "float32",
        layers: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = _METHOD
        self.modules_to_not_convert = modules_to_not_convert or []
        self.eps = eps
        self.use_rms_norm = use_rms_norm
        self.rms_norm_eps = rms_norm_eps
        self.quant_type = quant_type
        self.bias_dtype = bias_dtype
        self.layers = layers or {}


@register_quantizer(_METHOD)
class BitLinearQuantizer(HfQuantizer):  # type: ignore[misc]
    """Makes ``from_pretrained`` put deployed layers into a model before it loads the weights."""

    requires_calibration = True  # in transformers' words: the checkpoint has to be converted
    is_trainable = True  # adapters beside the layers, whose own weights are constants
    is_compileable = True

    def is_serializable(self) -> bool:
        """A model with deployed layers can be saved."""
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Called first by ``save_pretrained``: describes the layers as they are now.

        Raises:
            ValueError: A deployed layer cannot be described.
        """
        _check_describable(model)
        layers = _layers(model)
        trainable = [name for name, layer in layers.items() if not layer.is_deployed]
        if trainable:
            _logger.warning(
                "%d of %d BitLinear layers are not deployed (the first is %s): save_pretrained "
                "writes their floating-point weights, and from_pretrained makes plain nn.Linear "
                "layers of them; deploy the model first, or convert it again after loading",
                len(trainable),
                len(layers),
                trainable[0],
            )
        for inner in _pretrained_models(model):
            if isinstance(getattr(inner.config, "quantization_config", None), BitLinearConfig):
                del inner.config.quantization_config
        if len(trainable) < len(layers):
            self.quantization_config = model.config.quantization_config = _describe(model)
        return _without_shared_buffers(model), {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        # In another architecture than the saved one, the last layer may be a new head.
        other = type(model).__name__ not in (model.config.architectures or ())
        kept = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, add_default_skips=other
        )
        prefix = f"{model.base_model_prefix}."
        places = _places(model)
        deployed = set()
        for name, module in list(model.named_modules()):
            names = {name, prefix + name, name.removeprefix(prefix)}
            if _is_linear(module) and names.isdisjoint(kept):
                settings = {key: getattr(config, key) for key in _SETTINGS}
                for key in names & config.layers.keys():
                    settings.update(config.layers[key])
                new = _skeleton_of(module, settings)
                for parent, key in places[id(module)]:
                    parent._modules[key] = new
                    deployed.add(id(new))
        # What was tied to a weight or a bias that is packed now has been saved beside it.
        for inner in _pretrained_models(model):
            tied = getattr(inner, "all_tied_weights_keys", {})
            for pair in list(tied.items()):
                owners = (inner.get_submodule(key.rpartition(".")[0]) for key in pair)
                if any(id(owner) in deployed for owner in owners):
                    del tied[pair[0]]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # transformers sets tensors one by one, and makes up those that are missing.
        for name, module in _layers(model).items():
            state = module.state_dict(keep_vars=True)
            made_up = [key for key in state if not hasattr(state[key], "_is_hf_initialized")]
            # A hook of accelerate, where there are several devices, has moved the tensors.
            if made_up and not hasattr(module, "_hf_hook"):
                raise ValueError(
                    f"{name}: the checkpoint has no {', '.join(made_up)} for this layer: it is "
                    f"incomplete, or of another model"
                )
            try:
                check_packed(module, state)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from error
        attach(model)  # to the models inside, which can be saved by themselves


def _why_not_convertible(layer: Any) -> str:
    """Why :func:`convert` would refuse, or ``""``."""
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
    online = getattr(layer, "online_quant", False)
    if not online and layer.weight_scale.numel() != 1:
        return f"weight_scale must be one number, but it has shape {list(layer.weight_scale.shape)}"
    w_scale = _scale(layer)
    if not bool(w_scale.isfinite() & (w_scale > 0)):
        if online:
            return "its weight has values that are NaN, infinite, or too large for their sum"
        return (
            f"weight_scale must be positive, but it is {layer.weight_scale.item():g}: the file is "
            f"damaged"
        )
    try:
        if _is_packed(layer):
            _check_codes(layer.weight, layer.out_features, layer.in_features)
        elif not online:
            _check_ternary(layer.weight)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _check_codes(packed: Tensor, out_features: int, in_features: int) -> None:
    """Raises what :func:`repack` raises."""
    if packed.dtype != torch.uint8:
        raise TypeError(f"weight must be uint8, but it is {packed.dtype}")
    shape = [(out_features + 3) // 4, in_features]
    if list(packed.shape) != shape:
        raise ValueError(
            f"weight must have shape {shape} for out_features={out_features} and "
            f"in_features={in_features}, four rows in one, but it has {list(packed.shape)}"
        )
    for first, chunk in packing.enumerate_chunks(packed):
        # A pair of bits is code 3 where both of its bits are set.
        if bool((chunk & (chunk >> 1) & 0b01010101).any()):
            for i in range(4):
                start = i * len(packed) + first
                codes = (chunk[: max(0, out_features - start)] >> (2 * i)) & 3
                for row, column in (codes == 3).nonzero().tolist()[:1]:
                    raise ValueError(
                        f"weight holds the invalid code 3, first in row {start + row} and column "
                        f"{column} of the unpacked weight: the file is damaged, or is no packed "
                        f"checkpoint of transformers"
                    )


def _check_ternary(weight: Tensor) -> None:
    """Raises ValueError unless ``weight``, floating point, holds only -1, 0 and 1."""
    for first, rows in packing.enumerate_chunks(weight):
        if not torch.equal(rows, rows.sign()):
            row, column = (int(i) for i in (rows != rows.sign()).nonzero()[0])
            raise ValueError(
                f"weight[{first + row}, {column}] is {rows[row, column].item()}, but weights of "
                f"quantization_mode='offline' are -1, 0 or 1: if they are not quantised yet, load "
                f"them with quantization_mode='online'"
            )


def _is_packed(layer: Any) -> bool:
    """Whether a BitNet layer of transformers is its ``BitLinear``; else it is ``AutoBitLinear``."""
    from transformers.integrations import bitnet

    return isinstance(layer, bitnet.BitLinear)


def _scale(layer: Any) -> Tensor:
    """fp32, shape ``(1,)``: what the ternary weights of ``layer`` are multiplied by."""
    if _is_packed(layer):  # divides by it; in fp32, 1 / it is rounded once
        scale = 1.0 / layer.weight_scale.detach().float()
    elif layer.online_quant:  # rounds the quantised weights, and so their magnitude, to their dtype
        scale = (1.0 / _online_factor(layer.weight)).to(layer.weight.dtype).float()
    else:
        scale = layer.weight_scale.detach().float()
    return cast(Tensor, scale.reshape(1).clone())


def _online_factor(weight: Tensor) -> Tensor:
    """What ``AutoBitLinear`` multiplies its weights by before it rounds them; fp32, 0-D."""
    factor: Tensor = 1.0 / weight.detach().abs().mean(dtype=torch.float32).clamp_(min=_EPS)
    return factor


@torch.inference_mode(False)  # buffers made in inference mode could never be loaded into
@torch.no_grad()
def _deployed(old: Any) -> BitLinear:
    """The layer that takes the place of ``old``."""
    norm, bias, w_scale = old.rms_norm, old.bias, _scale(old)
    if _is_packed(old):
        w_packed = repack(old.weight, old.out_features, old.in_features)
    else:
        w_packed = _pack_float(old.weight, _online_factor(old.weight) if old.online_quant else None)
    state = {"w_packed": w_packed, "w_scale": w_scale}
    if bias is not None:
        # In fp32: the kernels add it there, and the product with the scale has more than 8 bits.
        scaled = not _is_packed(old) and not old.online_quant
        state["bias"] = bias.float() * w_scale if scaled else bias.float().clone()
    dtype = old.dtype if _is_packed(old) else old.weight.dtype
    new = _skeleton(
        old.in_features, old.out_features, bias is not None, norm is not None, _EPS, dtype
    )
    new.load_state_dict(state, assign=True)
    if norm is not None:
        new.rms_norm = norm
    for name in (*CALL_HOOKS, "_is_hf_initialized"):
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    return new.train(old.training)


def _pack_float(weight: Tensor, factor: Tensor | None) -> Tensor:
    """``weight * factor``, rounded to {-1, 0, 1} as ``AutoBitLinear`` does, in packed format."""

    def to_ternary(rows: Tensor) -> Tensor:
        t = rows if factor is None else rows.float().mul_(factor).round_().clamp_(-1, 1)
        return t.to(torch.int8)

    return packing.pack_quantized(weight, to_ternary)


def _skeleton(
    in_features: int,
    out_features: int,
    bias: bool,
    norm: bool,
    eps: float,
    dtype: torch.dtype,
    quant_type: str = "ai8pc_wpt",
    bias_dtype: torch.dtype = torch.float32,
) -> BitLinear:
    """A layer on the meta device; its norm is for the caller to set."""
    kind = NormedBitLinear if norm else BitLinear
    layer = kind(
        in_features, out_features, bias, eps, quant_type=quant_type, device="meta", dtype=dtype
    )
    if bias:
        layer.bias = nn.Parameter(layer.bias.to(bias_dtype))
    return layer


def _skeleton_of(linear: Any, settings: dict[str, Any]) -> BitLinear:
    """The deployed layer, on the meta device, that takes the place of a linear layer."""
    out_features, in_features = linear.weight.shape
    if not isinstance(linear, nn.Linear):  # Conv1D
        in_features, out_features = out_features, in_features
    norm = settings["use_rms_norm"]
    layer = _skeleton(
        in_features,
        out_features,
        linear.bias is not None,
        norm,
        settings["eps"],
        linear.weight.dtype,
        settings["quant_type"],
        getattr(torch, settings["bias_dtype"]),
    ).deploy()
    if "w_scale_shape" in settings:
        layer.w_scale = layer.w_scale.new_empty(settings["w_scale_shape"])
    if norm:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        with torch.device("meta"):
            layer.rms_norm = LlamaRMSNorm(in_features, settings["rms_norm_eps"])
    return layer


# --- What is in a model ---

# What BitLinearConfig says of all layers and, where it is different, of one.
_SETTINGS = ("eps", "use_rms_norm", "rms_norm_eps", "quant_type", "bias_dtype")


def _pretrained_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The models of transformers inside ``model``, outer ones first; itself too, if it is one."""
    from transformers import PreTrainedModel

    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _layers(model: nn.Module) -> dict[str, BitLinear]:
    """The BitLinear layers inside, by their first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}


def _is_linear(module: nn.Module) -> bool:
    """Whether ``bitlinear.convert`` may have made a layer of such a module."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, BitLinear)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module hangs, by its ``id``: in which modules, under which names."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, key))
    return places


def _check_describable(model: PreTrainedModel) -> None:
    """Raises ValueError for deployed layers of which :func:`_describe` cannot say all."""
    refused = [
        f"{name}: it is a {type(layer).__name__}"
        for name, layer in _layers(model).items()
        if layer.is_deployed and type(layer) not in (BitLinear, NormedBitLinear)
    ]
    if refused:
        raise ValueError(
            "from_pretrained could not make these deployed layers again: save the state_dict of "
            "the model instead\n  " + "\n  ".join(refused)
        )


def _describe(model: PreTrainedModel) -> BitLinearConfig:
    """What a saved model has to say of its layers, so that it can be loaded."""
    layers = {name: layer for name, layer in _layers(model).items() if layer.is_deployed}
    each = {name: _settings(layer) for name, layer in layers.items()}
    # What most layers have, of those that have it.
    common = {
        key: Counter(values).most_common(1)[0][0]
        for key in _SETTINGS
        if (values := [settings[key] for settings in each.values() if key in settings])
    }
    different = {
        name: {key: value for key, value in settings.items() if common.get(key) != value}
        for name, settings in each.items()
    }
    return BitLinearConfig(
        sorted(
            name
            for name, module in model.named_modules()
            if (_is_linear(module) or isinstance(module, BitLinear)) and name not in layers
        ),
        layers={name: settings for name, settings in different.items() if settings},
        **common,
    )


def _settings(layer: BitLinear) -> dict[str, Any]:
    """What :func:`_skeleton_of` needs to make ``layer`` again."""
    norm = layer.rms_norm if isinstance(layer, NormedBitLinear) else None
    settings = {"eps": layer.eps, "quant_type": layer.quant_type, "use_rms_norm": norm is not None}
    if norm is not None:
        settings["rms_norm_eps"] = norm.variance_epsilon
    if layer.bias is not None:
        settings["bias_dtype"] = dtype_name(layer.bias.dtype)
    if list(layer.w_scale.shape) != [1]:
        settings["w_scale_shape"] = list(layer.w_scale.shape)
    return settings


def _without_shared_buffers(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The state of ``model`` with a copy for each layer that shares its tensors; None if none does.

    transformers refuses to save what is shared, unless the class of the model says that it is.
    """
    owners = Counter(
        layer.w_packed.data_ptr()
        for layer in _layers(model).values()
        if layer.is_deployed and not layer.w_packed.is_meta
    )
    if not any(count > 1 for count in owners.values()):
        return None
    state: dict[str, Tensor] = model.state_dict()
    for name, tensor in state.items():
        if name.endswith((".w_packed", ".w_scale")):
            state[name] = tensor.clone()
    return state


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Removes the quantiser of BitNet, whose layers are converted."""
    model.hf_quantizer = None
    model.quantization_method = _METHOD
    # What it did on loading must not be undone on saving.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(hasattr(op, "hf_quantizer") for op in getattr(conversion, "operations", ()))
        ]
