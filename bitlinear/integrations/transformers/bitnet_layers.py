"""What the tensors of BitNet layers mean, for each class of layer that :func:`convert` takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import packing
from ...conversion.repacking import check_codes, repack
from ...conversion.ternary import NotTernary, Scales, check_signs, find_scales, scale_factor
from ...conversion.ternary import pack as pack_signs
from .layers import BITNET_EPS

WeightQuantizers = Mapping[type, Callable[[Tensor], Tensor]]


class Source(ABC):
    """A BitNet layer, and what its tensors mean.

    Attributes:
        layer: The layer.
        norm: The norm that it applies to its input, or None.
        dtype: The dtype of its computations.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.norm: nn.Module | None = getattr(layer, "rms_norm", None)
        self.dtype: torch.dtype = layer.weight.dtype

    def why_bad(self) -> str:
        """Why the layer cannot be converted, or ``""``."""
        layer = self.layer
        if "forward" in vars(layer):
            return (
                "its forward has been replaced on the instance: load the model on one device, "
                "without offloading"
            )
        if any(tensor.is_meta for tensor in layer.state_dict().values()):
            return "it is on the meta device: load its weights first, without offloading"
        try:
            self._check_bias()
            self.check()
        except (TypeError, ValueError) as error:
            return str(error)
        return ""

    def _check_bias(self) -> None:
        bias = getattr(self.layer, "bias", None)
        if bias is None:
            return
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise TypeError(f"bias must be a floating-point tensor, but it is {bias!r:.80}")
        if list(bias.shape) != [self.layer.out_features]:
            raise ValueError(
                f"bias must have shape {[self.layer.out_features]}, but it has {list(bias.shape)}"
            )

    def check(self) -> None:
        """Raise TypeError or ValueError unless the layer's tensors can be converted."""
        shape = [self.layer.out_features, self.layer.in_features]
        if list(self.layer.weight.shape) != shape:
            raise ValueError(
                f"weight must have shape {shape}, but it has {list(self.layer.weight.shape)}"
            )

    @abstractmethod
    def weights(self) -> tuple[Tensor, Tensor]:
        """``w_packed``, and ``w_scale`` that multiplies: fp32, shape ``(1,)`` or ``(N, 1)``."""

    def bias(self, w_scale: Tensor) -> Tensor | None:
        """What the layer adds to a scaled product, as a new tensor; or None."""
        # In fp32: the kernels add it in fp32, and its product with the scale has more than 8 bits.
        bias = getattr(self.layer, "bias", None)
        return None if bias is None else bias.detach().to(torch.float32, copy=True)


class _Stored(Source):
    """A layer with ternary weights, and their scales in ``weight_scale``."""

    divides = False

    def check(self) -> None:
        self._factor()

    def _factor(self) -> Tensor:
        """``weight_scale`` as a factor of the product: fp32, shape ``(1,)`` or ``(N, 1)``."""
        layer = self.layer
        return scale_factor(layer.weight_scale, layer.out_features, self.divides, "weight_scale")


class _Packed(_Stored):
    """``BitLinear`` of transformers: packed weights; it divides by ``weight_scale``."""

    divides = True

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.dtype = layer.dtype

    def check(self) -> None:
        super().check()
        check_codes(self.layer.weight, self.layer.out_features, self.layer.in_features)

    def weights(self) -> tuple[Tensor, Tensor]:
        layer = self.layer
        return repack(layer.weight, layer.out_features, layer.in_features), self._factor()


class _Offline(_Stored):
    """``AutoBitLinear``, offline: -1, 0 and 1; it multiplies, the bias included."""

    def check(self) -> None:
        Source.check(self)
        super().check()
        try:
            check_signs(self.layer.weight.detach())
        except ValueError as error:
            raise ValueError(
                f"{error} in quantization_mode='offline': if the weights are not quantised yet, "
                f"load them with quantization_mode='online'"
            ) from error

    def weights(self) -> tuple[Tensor, Tensor]:
        return pack_signs(self.layer.weight.detach()), self._factor()

    def bias(self, w_scale: Tensor) -> Tensor | None:
        bias = super().bias(w_scale)
        return None if bias is None else bias * w_scale.reshape(-1)


class _Online(Source):
    """``AutoBitLinear``, online: float weights, quantised by absmean in every forward pass."""

    def check(self) -> None:
        super().check()
        scale = self._scale()
        if not bool(scale.isfinite() & (scale > 0)):
            raise ValueError(
                "its weight has values that are NaN, infinite, or too large for their sum"
            )

    def weights(self) -> tuple[Tensor, Tensor]:
        factor = self._factor()

        def to_ternary(first: int, rows: Tensor) -> Tensor:
            return self._round(rows.float() * factor).clamp_(-1, 1).to(torch.int8)

        weight = self.layer.weight.detach()
        return packing.pack_quantized(weight, to_ternary), self._scale()

    def _factor(self) -> Tensor:
        """The factor of the weights before they are rounded: fp32, 0-D."""
        mean = self.layer.weight.detach().abs().mean(dtype=torch.float32)
        return cast(Tensor, 1.0 / mean.clamp_(min=BITNET_EPS))

    def _scale(self) -> Tensor:
        # The layer rounds the quantised weights, and so the scale, to their dtype.
        return (1.0 / self._factor()).to(self.layer.weight.dtype).float().reshape(1)

    @staticmethod
    def _round(values: Tensor) -> Tensor:
        return values.round_()


class _OneBit(_Online):
    """``BitNetLinear`` of onebitllms, which rounds halves up."""

    @staticmethod
    def _round(values: Tensor) -> Tensor:
        return values.add_(0.5).floor_()


class _Custom(Source):
    """A layer of a model's own class, with the function that quantises its weight."""

    def __init__(self, layer: Any, quantizer: Callable[[Tensor], Tensor]) -> None:
        super().__init__(layer)
        self._quantizer = quantizer
        norms = [getattr(layer, name, None) for name in ("rms_norm", "norm")]
        self.norm = next((norm for norm in norms if isinstance(norm, nn.Module)), None)

    def check(self) -> None:
        super().check()
        others = [n for n, m in self.layer.named_children() if m is not self.norm]
        if others:
            raise ValueError(
                f"it has modules other than a norm, whose use is unknown: {', '.join(others)}"
            )
        self._quantize()

    def weights(self) -> tuple[Tensor, Tensor]:
        quantized, scales = self._quantize()
        return pack_signs(quantized), scales.values.clone()

    def _quantize(self) -> tuple[Tensor, Scales]:
        weight = self.layer.weight.detach()
        try:
            quantized = self._quantizer(weight.clone())  # Such functions like to work in place.
        except Exception as error:
            raise ValueError(
                f"the function for its weight raised {type(error).__name__}: {error}"
            ) from error
        if quantized.shape != weight.shape or not quantized.is_floating_point():
            raise ValueError(
                f"the function for its weight must return a floating-point tensor of shape "
                f"{list(weight.shape)}, but it returned {quantized.dtype}, {list(quantized.shape)}"
            )
        scales = find_scales(quantized)
        if isinstance(scales, NotTernary):
            raise ValueError(
                f"its weight is not ternary after the function for it: {scales.reason}"
            )
        return quantized, scales


class _Unknown(Source):
    """A subclass of a known class."""

    def why_bad(self) -> str:
        return (
            f"it is a {type(self.layer).__name__}, whose use of the weight is unknown: pass "
            f"weight_quantizers if it computes as BitNet does"
        )

    def weights(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def bitnet_layers(model: nn.Module, quantizers: WeightQuantizers) -> dict[str, Source]:
    """The BitNet layers inside ``model``, by their first qualified name."""
    sources = {name: _source(module, quantizers) for name, module in model.named_modules()}
    return {name: source for name, source in sources.items() if source is not None}


def _source(module: Any, quantizers: WeightQuantizers) -> Source | None:
    from transformers.integrations import bitnet

    kind = type(module)
    if kind in quantizers:
        return _Custom(module, quantizers[kind])
    if kind is bitnet.BitLinear:
        return _Packed(module)
    if kind is bitnet.AutoBitLinear:
        return _Online(module) if module.online_quant else _Offline(module)
    # By name: the package needs Triton, so that it is not imported only to ask for its class.
    if (kind.__module__, kind.__qualname__) == ("onebitllms.layers.bitnet", "BitNetLinear"):
        return _OneBit(module)
    if isinstance(module, (bitnet.BitLinear, bitnet.AutoBitLinear)):
        return _Unknown(module)
    return None
