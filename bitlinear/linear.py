"""BitLinear, the module: trains in floating point, deploys to packed ternary weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import foreign, ties
from .arguments import QuantType, check_eps, check_features, parse_quant_type
from .deployed import deployed_linear
from .preconditions import why_no_plain_weight
from .ternary_layer import DEFAULT_EPS, TernaryLayer, is_jagged
from .training import blended_linear, straight_through_linear

# Resolved once: a small layer at batch 1 notices every attribute access on the way to its kernel.
_linear = torch.ops.bitlinear.linear.default


class BitLinear(TernaryLayer, nn.Linear):
    """``nn.Linear`` with ternary weights {-1, 0, +1} and activations of 8 or 16 bits.

    It trains like ``nn.Linear``: ``weight`` stays a floating-point parameter, which the forward
    pass quantises (quantisation-aware training with a straight-through estimator). :meth:`deploy`
    packs the weights, 2 bits each, and drops the floating-point ones; the layer then runs on the
    compiled kernel, and its weights are constants. Gradients of the input pass through it, so that
    adapters and the layers in front of it train.

    ``y = (q @ t.T) * (s_x * s_w) + bias``, with ``q, s_x`` the activations quantised per token
    (absmax) and ``t, s_w`` the weights quantised to {-1, 0, +1} (absmean), as in BitNet b1.58
    (arXiv 2402.17764). With scales of groups the sums of groups are multiplied by integers first;
    see :mod:`bitlinear.groups`.

    Args:
        in_features: ``K``, from 1 to 500,000.
        out_features: ``N``, at least 1.
        bias: Whether the layer learns an additive bias.
        eps: Lower bound of the absmax of a token and of the absmean of the weights; at least 2e-36,
            and 4e-34 with activations of 16 bits.
        quant_type: ``"ai8pc_wpt"``: activations of 8 bits, one scale per token; ternary weights,
            one scale per tensor. ``ai16pc``: 16 bits (15 and a sign, in steps of absmax / 32385),
            for models that were not trained with quantised activations. ``wpc``: one scale of the
            weights per output feature. ``wpg128``, or another multiple of 32: one for each group of
            so many inputs of an output feature; see :mod:`bitlinear.groups`.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Shape:
        Input ``(..., K)``, output ``(..., N)``. The input is fp32, fp16 or bf16, for any dtype of
        the parameters, and the output has its dtype; under autocast, the dtype that ``nn.Linear``
        would give.

    Attributes:
        weight: Parameter ``(N, K)``. In a deployed layer, a read-only tensor without memory (see
            :mod:`bitlinear.packed_weight`), neither parameter nor buffer.
        bias: Parameter ``(N,)`` or None. In a deployed layer, a buffer.
        w_packed: uint8 buffer ``(N, ceil(K/4))`` of a deployed layer; see
            :mod:`bitlinear.packing`.
        w_scale: fp32 buffer ``(1,)`` of a deployed layer, ``(N, 1)`` with a scale per output
            feature, or ``(N, ceil(K/128))`` with groups of 128. It stays fp32 through ``half()`` or
            ``to(dtype)``. Loading ``(1,)`` or ``(N, 1)`` changes ``quant_type``, unless the state
            has metadata, which then must fit.

    Raises:
        TypeError: ``in_features`` or ``out_features`` is not an integer, ``eps`` is not a number
            (``eps`` and ``quant_type`` come before ``device`` and ``dtype``: pass these by name),
            or ``dtype`` is not floating point.
        ValueError: ``in_features``, ``out_features``, ``eps`` or ``quant_type`` is not as above.

    A token that holds a NaN or an infinity gives a row of NaN and changes no other row. The
    forward pass raises TypeError for another dtype of the input, and ValueError for a wrong last
    dimension or device.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = DEFAULT_EPS,
        quant_type: str = "ai8pc_wpt",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_features(in_features, out_features)
        check_eps(eps)  # first: its message helps those who pass device and dtype by position
        parse_quant_type(quant_type)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if not self.weight.is_floating_point():
            raise TypeError(f"bitlinear: dtype must be floating point, but it is {dtype}")
        self.eps = float(eps)
        self.quant_type = quant_type
        self._weight_dtype = self.weight.dtype
        ties.register(self)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: str = "ai8pc_wpt", eps: float = DEFAULT_EPS
    ) -> BitLinear:
        """Make a BitLinear that shares the parameters of an ``nn.Linear``.

        The parameters are the same objects, so tied weights stay tied and an optimizer that holds
        them keeps working. Device, dtype, ``training`` and ``requires_grad`` stay the same. The
        ``Conv1D`` of transformers, whose weight is ``(K, N)``, gives a new weight parameter.

        Args:
            linear: The layer to convert; not modified. An ``nn.Linear``, a subclass that computes
                the same (see :func:`bitlinear.convert`), or a ``Conv1D`` of transformers. Its
                weight must be an ordinary parameter.
            quant_type: As for :class:`BitLinear`.
            eps: As for :class:`BitLinear`.

        Raises:
            TypeError: ``linear`` is not a linear layer, computes something else, or its weight is
                not an ordinary parameter (parametrised, pruned, lazy, quantised, deployed).
            ValueError: ``eps`` or ``quant_type`` is not valid.
        """
        if not foreign.is_linear(linear):
            raise TypeError(
                f"from_linear needs a torch.nn.Linear, but got {type(linear).__name__}: use "
                f"bitlinear.convert(model) for the linear layers inside a model"
            )
        reason = why_no_plain_weight(linear)
        if type(linear) is not BitLinear:
            reason = reason or foreign.why_not_linear(linear)
        if reason:
            raise TypeError(f"from_linear cannot convert this {type(linear).__name__}: {reason}")
        weight = foreign.linear_weight(linear)
        layer = cls(
            weight.shape[1],
            weight.shape[0],
            bias=linear.bias is not None,
            eps=eps,
            quant_type=quant_type,
            device="meta",  # Draws nothing from the random number generator.
        )
        layer.weight = weight
        layer.bias = linear.bias
        layer._weight_dtype = weight.dtype
        layer._was_conv1d = foreign.is_conv1d(linear)
        return layer.train(linear.training)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(N, K)``: ``(out_features, in_features)``."""
        return self.out_features, self.in_features

    @property
    def quant_type(self) -> str:
        """The quantisation type, such as ``"ai8pc_wpt"``; see :class:`BitLinear`.

        Raises:
            ValueError: The new value is not a type, ``eps`` is too small for it, or the layer is
                deployed with scales of another shape.
        """
        return QuantType(self._act_bits, self._group_size).name

    @quant_type.setter
    def quant_type(self, name: str) -> None:
        new = parse_quant_type(name)
        check_eps(self.eps, new.act_bits)
        self._set_group_size(new.group_size, name)
        self._act_bits = new.act_bits

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``input`` of shape ``(..., K)``; see :class:`BitLinear`."""
        if type(input) is not Tensor:
            special: Tensor | None = self._forward_special(input)
            if special is not None:
                return special
        buffers = self._buffers
        if "w_packed" not in buffers:
            return self._forward_in_training(input)
        bias = buffers["bias"] if "bias" in buffers else self.bias  # noqa: SIM401
        w_packed: Any = buffers["w_packed"]
        w_scale: Any = buffers["w_scale"]
        K, eps, group_size, act_bits = self.in_features, self.eps, self._group_size, self._act_bits
        if torch.is_grad_enabled():
            return deployed_linear(input, w_packed, w_scale, bias, K, eps, group_size, act_bits)
        output: Tensor = _linear(input, w_packed, w_scale, bias, K, eps, group_size, act_bits)
        return output

    def _forward_in_training(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.__dict__["_called"] = True  # nn.Module.__setattr__ takes longer.
        weight, bias = self.weight, self.bias
        quantisation = self._act_bits, self._group_size
        if self._blend is not None:
            return blended_linear(input, weight, bias, self._blend, self.eps, *quantisation)
        self._check_whole(weight)
        return straight_through_linear(input, weight, bias, self.eps, *quantisation)

    def _forward_special(self, input: Any) -> Any:
        if is_jagged(input) and input._ragged_idx == input.dim() - 1:
            raise ValueError(
                f"the last dimension of x must be in_features = {self.in_features}, but it is the "
                f"jagged one of a nested tensor: transpose it first"
            )
        return super()._forward_special(input)
