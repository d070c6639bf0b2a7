"""What the tensors of BitNet layers mean, for each class of layer that :func:`convert` takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import packing
from ...conversion.repacking import check_codes, repack
from ...conversion.ternary import NotTernary, find_scales
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
            self.check()
        except (TypeError, ValueError) as error:
            return str(error)
        return ""

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
        bias = self.layer.bias
        return None if bias is None else bias.detach().to(torch.float32, copy=True)


class _Stored(Source):
    """A layer with ternary weights, and their scales in ``weight_scale``."""

    def check(self) -> None:
        scale = self.layer.weight_scale
        out_features = self.layer.out_features
        if scale.numel() != 1 and list(scale.squeeze().shape) != [out_features]:
            raise ValueError(
                f"weight_scale must be one number, or one for each of {out_features} output "
                f"features, but it has shape {list(scale.shape)}"
            )
        used = self._factor()
        if not bool((used.isfinite() & (used > 0)).all()):
            raise ValueError(
                f"weight_scale must be positive, but it is {_first_bad(scale)}: the file is damaged"
            )

    def _factor(self) -> Tensor:
        """``weight_scale`` as a factor of the product: fp32, shape ``(1,)`` or ``(N, 1)``."""
        stored = self.layer.weight_scale.detach().float()
        return cast(Tensor, stored.reshape((1,) if stored.numel() == 1 else (-1, 1)).clone())


class _Packed(_Stored):
    """``BitLinear`` of transformers: packed weights; it divides by ``weight_scale``."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.dtype = layer.dtype

    def check(self) -> None:
        super().check()
        check_codes(self.layer.weight, self.layer.out_features, self.layer.in_features)

    def _factor(self) -> Tensor:
        return 1.0 / super()._factor()  # rounded once, in fp32

    def weights(self) -> tuple[Tensor, Tensor]:
        layer = self.layer
        return repack(layer.weight, layer.out_features, layer.in_features), self._factor()


class _Offline(_Stored):
    """``AutoBitLinear``, offline: -1, 0 and 1; it multiplies, the bias included."""

    def check(self) -> None:
        Source.check(self)
        super().check()
        for first, rows in packing.enumerate_chunks(self.layer.weight):
            if not torch.equal(rows, rows.sign()):
                row, column = (int(i) for i in (rows != rows.sign()).nonzero()[0])
                raise ValueError(
                    f"weight[{first + row}, {column}] is {rows[row, column].item()}, but weights "
                    f"of quantization_mode='offline' are -1, 0 or 1: if they are not quantised "
                    f"yet, load them with quantization_mode='online'"
                )

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
        scales = find_scales(self._quantized())
        if isinstance(scales, NotTernary):
            raise ValueError(
                f"its weight is not ternary after the function for it: {scales.reason}"
            )

    def weights(self) -> tuple[Tensor, Tensor]:
        quantized = self._quantized()
        scales = find_scales(quantized)
        assert not isinstance(scales, NotTernary)
        return pack_signs(quantized), scales.values.clone()

    def _quantized(self) -> Tensor:
        weight = self.layer.weight.detach()
        quantized = self._quantizer(weight.clone())  # Such functions like to work in place.
        if quantized.shape != weight.shape or not quantized.is_floating_point():
            raise ValueError(
                f"the function for its weight must return a floating-point tensor of shape "
                f"{list(weight.shape)}, but it returned {quantized.dtype}, {list(quantized.shape)}"
            )
        return quantized


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


def _first_bad(scale: Tensor) -> str:
    values = scale.detach().float().flatten()
    bad = values[~(values.isfinite() & (values > 0))]
    return f"{float(bad[0] if len(bad) else values[0]):g}"
