"""BitLinear, the module: trains in floating point, deploys to packed ternary weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from . import foreign, ties
from .arguments import (
    check_eps,
    check_features,
    check_quant_type,
    check_strength,
)
from .deployed import deployed_linear
from .latent_weight import latent_weight
from .packable import PackableLinear, pack_together
from .preconditions import GATHER, is_distributed, why_no_plain_weight, why_not_deployable
from .training import blended_linear, straight_through_linear

# Resolved once: a small layer at batch 1 notices every attribute access on the way to its kernel.
_linear = torch.ops.bitlinear.linear.default

_DEFAULT_EPS = 1e-6


class BitLinear(PackableLinear):
    """``nn.Linear`` with ternary weights {-1, 0, +1} and activations of 8 or 16 bits.

    It trains like ``nn.Linear``: ``weight`` stays a floating-point parameter, which the forward
    pass quantises (quantisation-aware training with a straight-through estimator). :meth:`deploy`
    packs the weights, 2 bits each, and drops the floating-point ones; the layer then runs on the
    compiled kernel, and its weights are constants. Gradients of the input pass through it, so that
    adapters and the layers in front of it train.

    ``y = (q @ t.T) * (s_x * s_w) + bias``, with ``q, s_x`` the activations quantised per token
    (absmax) and ``t, s_w`` the weights quantised to {-1, 0, +1} (absmean), as in BitNet b1.58
    (arXiv 2402.17764).

    Args:
        in_features: ``K``, from 1 to 500,000.
        out_features: ``N``, at least 1.
        bias: Whether the layer learns an additive bias.
        eps: Lower bound of the absmax of a token and of the absmean of the weights; at least 2e-36,
            and 4e-34 with activations of 16 bits.
        quant_type: ``"ai8pc_wpt"``: activations of 8 bits, one scale per token; ternary weights,
            one scale per tensor. ``ai16pc``: 16 bits (15 and a sign, in steps of absmax / 32385),
            for models that were not trained with quantised activations. ``wpc``: one scale of the
            weights per output feature.
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
        w_scale: fp32 buffer ``(1,)`` of a deployed layer, or ``(N, 1)`` with a scale per output
            feature. It stays fp32 through ``half()`` or ``to(dtype)``. Loading the other shape
            changes ``quant_type``.

    Raises:
        TypeError: ``in_features`` or ``out_features`` is not an integer, ``eps`` is not a number
            (``eps`` and ``quant_type`` come before ``device`` and ``dtype``: pass these by name),
            or ``dtype`` is not floating point.
        ValueError: ``in_features``, ``out_features``, ``eps`` or ``quant_type`` is not as above.

    A token that holds a NaN or an infinity gives a row of NaN and changes no other row. The
    forward pass raises TypeError for another dtype of the input, and ValueError for a wrong last
    dimension or device.
    """

    _strength = 1.0
    _blend: Tensor | None = None  # the strength if it is below 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = _DEFAULT_EPS,
        quant_type: str = "ai8pc_wpt",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_features(in_features, out_features)
        check_eps(eps)  # first: its message helps those who pass device and dtype by position
        check_quant_type(quant_type)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if not self.weight.is_floating_point():
            raise TypeError(f"bitlinear: dtype must be floating point, but it is {dtype}")
        self.eps = float(eps)
        self.quant_type = quant_type
        self._weight_dtype = self.weight.dtype
        ties.register(self)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: str = "ai8pc_wpt", eps: float = _DEFAULT_EPS
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
        if not isinstance(linear, BitLinear):
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
    def quantization_strength(self) -> float:
        """How much the layer is quantised: from 0, a plain linear layer, to 1, the default.

        In between, operands are ``x + strength * (quantised x - x)``, and the weight likewise, with
        straight-through gradients. Fine-tuning recipes of pretrained models raise the strength from
        0 to 1 over the first steps. It is not part of ``state_dict``.

        Raises:
            TypeError: The new value is not a number.
            ValueError: The new value is not between 0 and 1, or it is below 1 and the layer is
                deployed.
        """
        return self._strength

    @quantization_strength.setter
    def quantization_strength(self, strength: float) -> None:
        check_strength(strength)
        if strength < 1 and self.is_deployed:
            raise ValueError(
                f"this BitLinear is deployed, so its quantization_strength is 1 and cannot be "
                f"{strength}: call undeploy() first"
            )
        self._strength = float(strength)
        if strength == 1:
            self._blend = None
            return
        # A compiled model reads the value of this tensor in every call; a new number would make it
        # compile again. The tensor is an ordinary one, even if a mode is on.
        with _disable_current_modes(), torch.inference_mode(False):
            if self._blend is None:
                self._blend = torch.tensor(self._strength, dtype=torch.float32, device="cpu")
            else:
                self._blend.fill_(self._strength)

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
        K, eps, act_bits = self.in_features, self.eps, self._act_bits
        if torch.is_grad_enabled():
            return deployed_linear(input, w_packed, w_scale, bias, K, eps, act_bits)
        output: Tensor = _linear(input, w_packed, w_scale, bias, K, eps, 0, act_bits)
        return output

    def _forward_in_training(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.__dict__["_called"] = True  # nn.Module.__setattr__ takes longer.
        weight, bias = self.weight, self.bias
        quantisation = self._act_bits, self._group_size
        if self._blend is not None:
            return blended_linear(input, weight, bias, self._blend, self.eps, *quantisation)
        if type(weight) is not nn.Parameter and is_distributed(weight):
            raise TypeError(
                "BitLinear cannot be trained with a weight that is a DTensor in its forward pass "
                "(tensor parallelism), because the scale needs the whole weight: train with FSDP2 "
                "(fully_shard) or DDP; bitlinear.tensor_parallel is for deployed layers"
            )
        return straight_through_linear(input, weight, bias, self.eps, *quantisation)

    def _forward_special(self, input: Any) -> Any:
        """Apply the layer to a proxy or a jagged tensor; return None for other tensors.

        Raises:
            TypeError: ``input`` is not a tensor.
        """
        if isinstance(input, fx.Proxy):
            return self._trace(input)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"BitLinear needs a torch.Tensor, but got {type(input).__name__}: convert it, for "
                f"example with torch.as_tensor(x)"
            )
        if input.is_nested and input.layout == torch.jagged:
            nested: Any = input
            if nested._ragged_idx == input.dim() - 1:
                raise ValueError(
                    f"the last dimension of x must be in_features = {self.in_features}, but it is "
                    f"the jagged one of a nested tensor: transpose it first"
                )
            values = self(input.values())
            return torch.nested.nested_tensor_from_jagged(
                values, nested.offsets(), nested.lengths(), jagged_dim=nested._ragged_idx
            )
        return None

    def _trace(self, input: fx.Proxy) -> Any:
        """Add a call of the layer to the graph of a symbolic trace, as ``nn.Linear`` does."""
        tracer: Any = input.tracer
        if tracer.root is self:
            raise TypeError(
                "a BitLinear is a leaf of a symbolic trace, so it cannot be traced alone: trace a "
                "module that holds it, such as torch.nn.Sequential(layer)"
            )
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})

    def __prepare_scriptable__(self) -> Any:
        """Raise for ``torch.jit.script``, whose own error is about an annotation."""
        raise NotImplementedError(
            "torch.jit.script cannot compile a BitLinear: use torch.export, or torch.jit.trace "
            "under torch.no_grad()"
        )

    def __setstate__(self, saved: dict[str, Any]) -> None:
        super().__setstate__(saved)
        if self._blend is not None:  # copy.copy would share it
            self._blend = self._blend.clone()

    def deploy(self) -> BitLinear:
        """Quantise and pack the weights, in place, and drop the floating-point ones.

        Idempotent. The packed layer gives the same outputs as before, in a sixteenth of the memory.
        Its parameters become buffers, which no optimizer changes: if all layers of a model are
        deployed, it has nothing to train and ``loss.backward()`` raises. Another layer that has the
        same weight keeps it; :func:`bitlinear.deploy` deploys tied layers together. Packing needs a
        few MB beyond the packed weight.

        Returns:
            The layer.

        Raises:
            ValueError: A weight is NaN or infinite, the weight is not an ordinary parameter
                (parametrised, pruned, sharded, offloaded), or :attr:`quantization_strength` is
                below 1. The layer is unchanged.
        """
        if not self.is_deployed:
            reason = why_not_deployable(self)
            if reason:
                raise ValueError(f"BitLinear cannot be deployed: {reason}")
            pack_together([self])
        return self

    def _become_packed(self, w_packed: Tensor, w_scale: Tensor, shared: bool = False) -> None:
        super()._become_packed(w_packed, w_scale, shared)
        self.quantization_strength = 1.0

    def undeploy(self) -> BitLinear:
        """Make a deployed layer trainable again, in place. Idempotent.

        The new ``weight`` is ``ternary * (w_scale / mean|ternary|)``, so that it quantises to the
        same ternary weights and the same scale, and the layer gives the same outputs. (If their
        mean would not round to ``w_scale``, some values are one unit in the last place larger or
        smaller. In 16 bits, the mean of a small weight is no closer than their precision.) The
        weight from before :meth:`deploy` is lost.

        The new parameters require gradients, and an optimizer that was made before does not hold
        them. ``weight`` has the dtype that it had before deployment. Layers that share one packed
        weight become trainable together, and share the new one.

        Returns:
            The layer.

        Raises:
            ValueError: The layer is divided among processes (:mod:`bitlinear.tensor_parallel`), its
                scale is below ``eps``, a packed byte is not valid, or the weight would overflow its
                dtype. The layer is unchanged.
        """
        if self.is_deployed:
            if is_distributed(self.w_packed):
                raise ValueError(
                    f"this BitLinear is divided among processes, for inference only: {GATHER}, "
                    f"which can be trained"
                )
            with torch.inference_mode(False):
                weight = nn.Parameter(
                    latent_weight(
                        self.w_packed, self.w_scale, self.in_features, self.eps, self._weight_dtype
                    )
                )
            for layer in self._sharing_layers():
                layer._become_float(weight)
        return self

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The scale times the ternary weights, of a deployed layer or not.

        Returns:
            fp32, shape ``(N, K)``: a new tensor.

        Raises:
            ValueError: A packed byte is not valid.
        """
        w_packed, w_scale = (self.w_packed, self.w_scale) if self.is_deployed else self._pack()
        return self._dequantize(w_packed, w_scale)

    def extra_repr(self) -> str:
        """The text of ``nn.Linear``, the quantisation, and whether the layer is deployed."""
        parts = [super().extra_repr(), f"quant_type={self.quant_type}"]
        if self.eps != _DEFAULT_EPS:
            parts.append(f"eps={self.eps}")
        if self.quantization_strength < 1:
            parts.append(f"quantization_strength={self.quantization_strength:g}")
        if self.is_deployed:
            parts.append("deployed=True")
        return ", ".join(parts)
