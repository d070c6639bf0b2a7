"""BitLinear, the module: trains in floating point, deploys to packed ternary weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from . import foreign, packing, state
from .ops import deployed_linear
from .packed_weight import PackedWeight, warn_of_values
from .quantize import (
    blended_linear,
    check_eps,
    check_features,
    check_quant_type,
    check_strength,
    scale_ternary,
    straight_through_linear,
)
from .state import why_no_plain_weight

# Looked up once: a small layer at batch 1 notices every attribute on the way to its kernel.
_linear = torch.ops.bitlinear.linear.default
_quantize_weight = torch.ops.bitlinear.quantize_weight.default

_DEFAULT_EPS = 1e-6

_NO_PARAMETER = (
    "this BitLinear is deployed and a weight assigned to it would be ignored; call undeploy() first"
)


class BitLinear(nn.Linear):
    """``nn.Linear`` with ternary weights {-1, 0, +1} and 8-bit activations.

    It trains like ``nn.Linear``: ``weight`` stays a floating-point parameter, which the forward
    pass quantises (quantisation-aware training with a straight-through estimator). :meth:`deploy`
    packs the weights, 2 bits each, and drops the floating-point ones; the layer then runs on the
    compiled kernel, and its weights are constants. Gradients of the input pass through it, so that
    adapters and the layers in front of it can be trained.

    ``y = (q @ t.T) * (s_x * s_w) + bias``, with ``q, s_x`` the activations quantised to int8 per
    token (absmax) and ``t, s_w`` the weights quantised to {-1, 0, +1} per tensor (absmean), as in
    BitNet b1.58 (arXiv 2402.17764).

    Args:
        in_features: ``K``, from 1 to 500,000.
        out_features: ``N``, at least 1.
        bias: Whether the layer learns an additive bias.
        eps: Lower bound of the absmax of a token and of the absmean of the weights; at least 2e-36.
        quant_type: ``"ai8pc_wpt"``: int8 activations per token, ternary weights per tensor.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Shape:
        Input ``(..., K)``, output ``(..., N)``. The input is fp32, fp16 or bf16, whatever the
        dtype of the parameters, and the output has its dtype; under autocast, the dtype that
        ``nn.Linear`` would give.

    Attributes:
        weight: Parameter ``(N, K)``. Of a deployed layer, a read-only tensor without memory (see
            :mod:`bitlinear.packed_weight`), neither parameter nor buffer.
        bias: Parameter ``(N,)`` or None. A buffer of a deployed layer.
        w_packed: uint8 buffer ``(N, ceil(K/4))`` of a deployed layer; see
            :mod:`bitlinear.packing`.
        w_scale: fp32 buffer ``(1,)`` of a deployed layer (``(N, 1)`` where a checkpoint has a
            scale per output feature). It stays fp32 through ``half()`` or ``to(dtype)``.

    Raises:
        TypeError: ``in_features`` or ``out_features`` is no integer, or ``eps`` no number: where
            ``nn.Linear`` has ``device`` and ``dtype``, this has ``eps`` and ``quant_type``, so pass
            the former by name.
        ValueError: ``in_features``, ``out_features``, ``eps`` or ``quant_type`` is not as above.

    A token that holds a NaN or an infinity gives a row of NaN and touches no other row. The
    forward pass raises TypeError for any other dtype, and ValueError for a wrong last dimension
    or device.
    """

    # Stored in the metadata of state_dict, by nn.Module.
    _version = packing.FORMAT_VERSION

    w_packed: Tensor
    w_scale: Tensor

    _strength = 1.0
    _blend: Tensor | None = None  # the strength, where it is below 1
    # Whether the forward pass ran before deployment: bitlinear.deploy() warns where it did not.
    _called = False
    # Whether other layers have the same w_packed.
    _shares_packed = False
    _has_warned_of_values = False
    # Whether it was made of transformers' Conv1D, whose weight is (K, N).
    _was_conv1d = False

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
        check_eps(eps)
        check_quant_type(quant_type)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if not self.weight.is_floating_point():
            raise TypeError(f"bitlinear: dtype must be floating point, but it is {dtype}")
        self.eps = float(eps)
        self.quant_type = quant_type
        # The dtype that the weight of a deployed layer had, and gets back from undeploy().
        self._weight_dtype = self.weight.dtype
        state.remember(self)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: str = "ai8pc_wpt", eps: float = _DEFAULT_EPS
    ) -> BitLinear:
        """Makes a BitLinear of an ``nn.Linear``, sharing its parameters.

        The parameters are the same objects, so tied weights stay tied and an optimizer that knows
        them keeps working. Device, dtype, ``training`` and ``requires_grad`` are as they were.
        The ``Conv1D`` of transformers, whose weight is ``(K, N)``, gives a new weight parameter.

        Args:
            linear: The layer to convert; not modified. An ``nn.Linear``, a subclass that computes
                the same (see :func:`bitlinear.convert`), or a ``Conv1D`` of transformers. Its
                weight must be an ordinary parameter.
            quant_type: As for :class:`BitLinear`.
            eps: As for :class:`BitLinear`.

        Raises:
            TypeError: ``linear`` is no linear layer, computes something else, or its weight is no
                ordinary parameter (parametrised, pruned, lazy, quantised, deployed).
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
        """From 0, a plain linear layer, to 1, the quantised one; 1 unless it was set.

        Between, operands are ``x + strength * (quantised x - x)``, and the weight likewise, with
        straight-through gradients: fine-tuning recipes of pretrained models raise it from 0 to 1
        over their first steps. It is not part of ``state_dict``.

        Raises:
            ValueError: It is set to what is not between 0 and 1, or below 1 on a deployed layer.
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
        # One tensor, whose value a compiled model reads in every call: for a number it would be
        # compiled again. An ordinary one, whatever mode is on.
        with _disable_current_modes(), torch.inference_mode(False):
            if self._blend is None:
                self._blend = torch.tensor(self._strength, dtype=torch.float32, device="cpu")
            else:
                self._blend.fill_(self._strength)

    @property
    def is_deployed(self) -> bool:
        """Whether the layer holds packed weights, which are constants."""
        return "w_packed" in self._buffers

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to ``input`` of shape ``(..., K)``; see :class:`BitLinear`."""
        if type(input) is not Tensor:
            special: Tensor | None = self._forward_of_special(input)
            if special is not None:
                return special
        buffers = self._buffers
        if "w_packed" not in buffers:
            return self._forward_in_training(input)
        bias = buffers["bias"] if "bias" in buffers else self.bias  # noqa: SIM401
        arguments: Any = (
            input,
            buffers["w_packed"],
            buffers["w_scale"],
            bias,
            self.in_features,
            self.eps,
        )
        if torch.is_grad_enabled():
            return deployed_linear(*arguments)
        output: Tensor = _linear(*arguments)
        return output

    def _forward_in_training(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.__dict__["_called"] = True
        weight, bias = self.weight, self.bias
        if self._blend is not None:
            return blended_linear(input, weight, bias, self._blend, self.eps)
        if type(weight) is not nn.Parameter and state.is_distributed(weight):
            raise TypeError(
                "BitLinear cannot be trained with a weight that is a DTensor in its forward pass "
                "(tensor parallelism), as its scale is that of the whole weight: train with FSDP2 "
                "(fully_shard) or DDP; bitlinear.tensor_parallel is for deployed layers"
            )
        return straight_through_linear(input, weight, bias, self.eps)

    def _forward_of_special(self, input: Any) -> Any:
        """The output for what is no plain tensor; None if it is to be treated as one.

        Raises:
            TypeError: ``input`` is no tensor.
        """
        if isinstance(input, fx.Proxy):
            return self._as_leaf(input)
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

    def _as_leaf(self, input: fx.Proxy) -> Any:
        """A call of the layer in the graph of a symbolic trace, as an ``nn.Linear`` is."""
        tracer: Any = input.tracer
        if tracer.root is self:
            raise TypeError(
                "a BitLinear is a leaf of a symbolic trace, so it cannot be traced alone: trace a "
                "module that holds it, such as torch.nn.Sequential(layer)"
            )
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})

    def __prepare_scriptable__(self) -> Any:
        """Called by ``torch.jit.script``, which would fail on the first annotation."""
        raise NotImplementedError(
            "torch.jit.script cannot compile a BitLinear: use torch.export, or torch.jit.trace "
            "under torch.no_grad()"
        )

    def __setstate__(self, saved: dict[str, Any]) -> None:
        super().__setstate__(saved)  # type: ignore[no-untyped-call]
        if self._blend is not None:  # of copy.copy, which would share it
            self._blend = self._blend.clone()
        state.remember(self)

    def deploy(self) -> BitLinear:
        """Quantises and packs the weights, in place, and drops the floating-point ones.

        Idempotent. The packed layer computes what the layer computed before, in a sixteenth of
        the memory. Its parameters become buffers, which no optimizer changes: if all layers of a
        model are deployed, it has nothing to train and ``loss.backward()`` raises. Another layer
        that has the same weight keeps it; :func:`bitlinear.deploy` deploys tied layers together.
        Beyond the packed weight, this takes a few MB.

        Returns:
            The layer.

        Raises:
            ValueError: A weight is NaN or infinite, or the weight is no ordinary parameter
                (parametrised, pruned, sharded, offloaded). The layer is unchanged.
        """
        if not self.is_deployed:
            reason = (
                foreign.why_offloaded(self)
                or foreign.why_sharded(self)
                or self._why_not_deployable()
            )
            if reason:
                raise ValueError(f"BitLinear cannot be deployed: {reason}")
            self._drop_weight(*self._pack())
        return self

    def undeploy(self) -> BitLinear:
        """Makes a deployed layer trainable again, in place. Idempotent.

        The new ``weight`` is ``ternary * (w_scale / mean|ternary|)``, so that it quantises to the
        same ternary weights and the same scale, and the layer computes what it computed before.
        (Some of the values differ from this by one unit in the last place where their mean would
        not round to ``w_scale`` otherwise. In 16 bits, the mean of a small weight can be no closer
        than their precision. A layer with a scale per output feature keeps the scale of each row,
        but is quantised with one scale.) What :meth:`deploy` rounded away does not come back.

        The new parameters require gradients, and an optimizer that was made before does not know
        them. ``weight`` has the dtype that it had before deployment. Layers that share one packed
        weight are made trainable together, and share the new one.

        Returns:
            The layer.

        Raises:
            ValueError: The layer is divided among processes (:mod:`bitlinear.tensor_parallel`), a
                packed byte is not valid, or the weight would overflow its dtype. The layer is
                unchanged.
        """
        if self.is_deployed:
            layers = self._sharing_layers()
            weight = self._undeployed_weight()
            for layer in layers:
                layer._take_weight(weight)
        return self

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The scale times the ternary weights, whether the layer is deployed or not.

        Returns:
            fp32, shape ``(N, K)``: a new tensor.
        """
        w_packed, w_scale = (self.w_packed, self.w_scale) if self.is_deployed else self._pack()
        return self._expanded(w_packed, w_scale)

    def _expanded(self, w_packed: Tensor, w_scale: Tensor) -> Tensor:
        """Packed weights times their scale, fp32; raises ValueError for an invalid code."""
        packing.check_packed(w_packed, self.in_features)
        weight: Tensor = torch.ops.bitlinear.expand_weight.default(w_packed, self.in_features)
        return weight.mul_(w_scale)

    def extra_repr(self) -> str:
        """``nn.Linear``'s, with the quantisation and whether the layer is deployed."""
        parts = [super().extra_repr(), f"quant_type={self.quant_type}"]
        if self.eps != _DEFAULT_EPS:
            parts.append(f"eps={self.eps}")
        if self.quantization_strength < 1:
            parts.append(f"quantization_strength={self.quantization_strength:g}")
        if self.is_deployed:
            parts.append("deployed=True")
        return ", ".join(parts)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata[prefix[:-1]].update(state.metadata_of(self))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``nn.Module``; raises AttributeError for the weight of a deployed layer."""
        if "w_packed" in self._buffers and (name == "weight" or isinstance(param, PackedWeight)):
            raise AttributeError(_NO_PARAMETER)
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "w_packed" in self.__dict__.get("_buffers", ()):
            raise AttributeError(_NO_PARAMETER)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "w_packed" in self.__dict__.get("_buffers", ()):
            return self._stand_in()
        return super().__getattr__(name)

    def _stand_in(self) -> PackedWeight:
        """What ``weight`` is while the layer is deployed."""
        w_packed, w_scale = self.w_packed, self.w_scale
        dtype = self._weight_dtype

        def values() -> Tensor:
            if not self._has_warned_of_values:
                self._has_warned_of_values = True
                warn_of_values(f"{self.out_features} x {self.in_features}")
            with torch.no_grad():
                return self._expanded(w_packed, w_scale).to(dtype)

        def linear(x: Tensor, bias: Tensor | None) -> Tensor:
            return deployed_linear(x, w_packed, w_scale, bias, self.in_features, self.eps)

        shape = (self.out_features, self.in_features)
        return PackedWeight(shape, dtype, w_packed.device, values, linear)

    def _why_not_deployable(self) -> str:
        """Why :meth:`deploy` would refuse, or ``""``."""
        if self._blend is not None:
            return (
                f"its quantization_strength is {self.quantization_strength:g}, and a deployed "
                f"layer's is 1: set that first"
            )
        reason = why_no_plain_weight(self)
        if reason:
            return reason
        weight = self.weight.detach()
        shape = (self.out_features, self.in_features)
        if weight.shape != shape:
            return (
                f"its weight has shape {list(weight.shape)}, but out_features and in_features are "
                f"{list(shape)}: set these to the shape of the weight"
            )
        # Both bounds are NaN if any weight is; nothing as large as the weight is made.
        has_values = not (weight.is_meta or isinstance(weight, FakeTensor))
        if has_values and not bool(torch.stack(weight.aminmax()).float().isfinite().all()):
            return "its weight has values that are NaN, infinite, or too large for float32"
        return ""

    @torch.inference_mode(False)  # buffers made in inference mode could never be loaded into
    @torch.no_grad()
    def _pack(self) -> tuple[Tensor, Tensor]:
        """``(w_packed, w_scale)`` of the current weight."""
        packed: tuple[Tensor, Tensor] = _quantize_weight(self.weight, self.eps)
        return packed

    def _drop_weight(self, w_packed: Tensor, w_scale: Tensor, shared: bool = False) -> None:
        """Turns the parameters into the buffers of a deployed layer.

        ``shared`` says whether other layers get the same buffers.
        """
        if self.is_deployed:  # by way of a shallow copy, which has the same dictionaries
            return
        weight, bias = self.weight, self.bias
        del self.weight, self.bias
        self.register_buffer("w_packed", w_packed)
        self.register_buffer("w_scale", w_scale)
        # A copy: an optimizer that still holds the parameter must not reach the deployed layer.
        with torch.inference_mode(False):
            self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._weight_dtype = weight.dtype
        self._shares_packed = shared
        self.quantization_strength = 1.0

    def _take_weight(self, weight: nn.Parameter) -> None:
        """Turns the buffers of a deployed layer into parameters."""
        if not self.is_deployed:  # by way of a shallow copy, which has the same dictionaries
            return
        bias = self.bias
        if bias is not None:
            # Outside of inference mode, where a tensor could never require gradients.
            with torch.inference_mode(False):
                bias = nn.Parameter(bias.detach().clone())
        del self.w_packed, self.w_scale, self.bias
        self.weight = weight
        self.register_parameter("bias", bias)
        self._shares_packed = False

    def _sharing_layers(self) -> list[BitLinear]:
        """This layer, and those with the same packed weight."""
        others = state.layers_with(self.w_packed) if self._shares_packed else []
        return [self, *(layer for layer in others if layer is not self)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _undeployed_weight(self) -> nn.Parameter:
        """What the packed weights came from, as far as :meth:`undeploy` can tell."""
        w_packed, w_scale = self.w_packed, self.w_scale
        if state.is_distributed(w_packed):
            raise ValueError(
                f"this BitLinear is divided among processes, for inference only: {state.GATHER}, "
                f"which can be trained"
            )
        weight = torch.empty(
            (self.out_features, self.in_features), dtype=self._weight_dtype, device=w_packed.device
        )
        if not weight.is_meta:
            least = float(w_scale.min())
            if least < torch.tensor(self.eps, dtype=torch.float32):
                raise ValueError(
                    f"w_scale is {least:g}, but no weight in training has a scale below eps = "
                    f"{self.eps:g}: set layer.eps to at most w_scale first"
                )
            packing.check_packed(w_packed, self.in_features)
            scale_ternary(weight, w_packed, w_scale)
        return nn.Parameter(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BitLinear:
        """Keeps ``w_packed`` and ``w_scale`` in their dtypes, whatever ``fn`` converts to."""
        if not self.is_deployed:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        sharing = self._sharing_layers()
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.w_scale.device
        self._weight_dtype = fn(torch.empty(0, dtype=self._weight_dtype, device=device)).dtype
        for name in state.PACKED:
            old: Any = before[name]
            new: Any = self._buffers[name]
            tensor = state.as_buffer(new if new.dtype == old.dtype else old.to(new.device))
            for layer in sharing:
                layer._buffers[name] = tensor
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes either state into either state of the layer; a bad one leaves it unchanged."""
        # As the last of the hooks: those of others may rename or convert what is in the state.
        handle = self._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            self._prepare_to_load
        )
        try:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        except state.IncompleteState as error:
            missing_keys += [prefix + name for name in error.missing]
            unexpected_keys += [prefix + name for name in error.unexpected]
        except (TypeError, ValueError) as error:
            error_msgs.append(f"While loading {prefix.rstrip('.') or 'BitLinear'}: {error}")
        finally:
            handle.remove()
        state.rename_missing(self, prefix, missing_keys)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _prepare_to_load(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *_: Any,
    ) -> None:
        """Gives the layer the kind of weights that ``state_dict`` has for it.

        Raises:
            TypeError, ValueError, state.IncompleteState: See :func:`state.check`. Nothing was done.
        """
        assigns = local_metadata.get("assign_to_params_buffers", False)
        tied = [] if assigns else state.tied_layers(self, missing_keys)
        tensors, kind = state.check(self, state_dict, prefix, local_metadata, strict)
        # The dictionary is this module's own copy: load_state_dict has made it.
        state_dict.update({prefix + name: tensor for name, tensor in tensors.items()})
        if kind == "packed":
            self._become_packed(tensors["w_packed"], tensors["w_scale"], tied, assigns)
        elif kind == "float" and self.is_deployed:
            weight = tensors["weight"].detach()
            if not assigns:
                weight = weight.to(self.w_packed.device, self._weight_dtype, copy=True)
            parameter = nn.Parameter(weight)
            for layer in (self, *tied):
                layer._take_weight(parameter)

    def _become_packed(
        self, w_packed: Tensor, w_scale: Tensor, tied: list[BitLinear], assigns: bool
    ) -> None:
        """Has this layer and those that share its weight hold packed weights of these shapes."""
        layers = (self, *tied)
        if not self.is_deployed:
            device = self.weight.device
            if not assigns:
                w_packed, w_scale = (t.to(device, copy=True) for t in (w_packed, w_scale))
            for layer in layers:
                layer._drop_weight(w_packed, w_scale, shared=bool(tied))
        elif self.w_scale.shape != w_scale.shape:
            if not assigns:
                w_scale = w_scale.to(self.w_scale.device, copy=True)
            for layer in layers:
                layer._buffers["w_scale"] = w_scale
