"""BitLinear, the module: trains in floating point, deploys to packed ternary weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.utils import parametrize

from . import foreign, packing
from .ops import inference_only_backward
from .quantize import (
    MAX_IN_FEATURES,
    absmean_scale,
    blended_linear,
    check_eps,
    check_quant_type,
    check_strength,
    straight_through_linear,
)

# Looked up once: a small layer at batch 1 notices every attribute on the way to its kernel.
_linear = torch.ops.bitlinear.linear.default
_quantize_weight = torch.ops.bitlinear.quantize_weight.default

_DEFAULT_EPS = 1e-6

_GATHER = (
    "gather its state with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)) and load it into a model that is not sharded"
)


class _InferenceOnly(torch.autograd.Function):
    """The operator, with an output that says so when somebody differentiates it."""

    @staticmethod
    def forward(
        x: Tensor,
        w_packed: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        in_features: int,
        eps: float,
    ) -> Tensor:
        output: Tensor = _linear(x, w_packed, w_scale, bias, in_features, eps)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.in_features = inputs[4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return inference_only_backward(grad, ctx.in_features), None, None, None, None, None


class _QuantizedWeight(NamedTuple):
    """A weight as it was when it was quantised, and what came of it."""

    weight: Tensor
    version: int
    shape: torch.Size
    places: Tensor
    sample: Tensor
    packed: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, weight: Tensor, packed: tuple[Tensor, Tensor]) -> _QuantizedWeight:
        """That of ``weight`` as it is now."""
        # Some values tell what changes a weight past its version counter (``.data``, FSDP).
        rows, columns = (
            torch.arange(0, size, max(1, size // 16), device=weight.device) for size in weight.shape
        )
        places = rows[:, None] * weight.shape[1] + columns
        sample = torch.take(weight.detach(), places)
        return cls(weight, weight._version, weight.shape, places, sample, packed)

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is that of ``weight``, unchanged."""
        return (
            self.weight is weight
            and self.version == weight._version
            and self.shape == weight.shape
            and torch.equal(self.sample, torch.take(weight.detach(), self.places))
        )


def _is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor, of whose class this module need not know."""
    return hasattr(tensor, "full_tensor")


def _local_part(tensor: Any) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor as it is."""
    part: Tensor = tensor.to_local() if _is_distributed(tensor) else tensor
    return part


def _may_keep(weight: Tensor) -> bool:
    """Whether what comes of ``weight`` may be kept for the next call.

    On other devices than a CPU, to quantise it again costs less than to wait for the answer whether
    it has changed.
    """
    return (
        type(weight) is nn.Parameter
        and weight.is_cpu
        and not weight.is_inference()
        and not torch._C._is_tracing()
    )


class BitLinear(nn.Linear):
    """``nn.Linear`` with ternary weights {-1, 0, +1} and 8-bit activations.

    It trains like ``nn.Linear``: ``weight`` stays a floating-point parameter, which the forward
    pass quantises (quantisation-aware training with a straight-through estimator). :meth:`deploy`
    packs the weights, 2 bits each, and drops the floating-point ones; the layer then runs on the
    compiled kernel, for inference only.

    ``y = (q @ t.T) * (s_x * s_w) + bias``, with ``q, s_x`` the activations quantised to int8 per
    token (absmax) and ``t, s_w`` the weights quantised to {-1, 0, +1} per tensor (absmean), as in
    BitNet b1.58 (arXiv 2402.17764).

    Args:
        in_features: ``K``, at least 1; to be deployed, at most 500,000.
        out_features: ``N``, at least 1.
        bias: Whether the layer learns an additive bias.
        eps: Lower bound of the absmax of a token and of the absmean of the weights; at least 1e-36.
        quant_type: ``"ai8pc_wpt"``: int8 activations per token, ternary weights per tensor.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Shape:
        Input ``(..., K)``, output ``(..., N)``. The input is fp32, fp16 or bf16, whatever the
        dtype of the parameters, and the output has its dtype; under autocast, the dtype that
        ``nn.Linear`` would give.

    Attributes:
        weight: Parameter ``(N, K)``. Absent from a deployed layer.
        bias: Parameter ``(N,)`` or None. A buffer of a deployed layer.
        w_packed: uint8 buffer ``(N, ceil(K/4))`` of a deployed layer; see
            :mod:`bitlinear.packing`.
        w_scale: fp32 buffer ``(1,)`` of a deployed layer (``(N, 1)`` where a checkpoint has a
            scale per output feature). It stays fp32 through ``half()`` or ``to(dtype)``.

    Raises:
        ValueError: ``in_features``, ``out_features``, ``eps`` or ``quant_type`` is not as above.

    A token that holds a NaN or an infinity gives a row of NaN and touches no other row. The
    forward pass raises TypeError for any other dtype, and ValueError for a wrong last dimension
    or device.
    """

    # Stored in the metadata of state_dict, by nn.Module.
    _version = packing.FORMAT_VERSION

    w_packed: Tensor
    w_scale: Tensor

    _quantized: _QuantizedWeight | None = None
    _blend: Tensor | None = None

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
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"bitlinear: in_features and out_features must be at least 1, but they are "
                f"{in_features} and {out_features}"
            )
        check_eps(eps)
        check_quant_type(quant_type)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.eps = float(eps)
        self.quant_type = quant_type
        # The dtype of the weight that a deployed layer gets back from undeploy().
        self._weight_dtype = self.weight.dtype

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
        return 1.0 if self._blend is None else float(self._blend)

    @quantization_strength.setter
    def quantization_strength(self, strength: float) -> None:
        check_strength(strength)
        if strength < 1 and self.is_deployed:
            raise ValueError(
                f"this BitLinear is deployed, so its quantization_strength is 1 and cannot be "
                f"{strength}: call undeploy() first"
            )
        if strength == 1:
            self._blend = None
        elif self._blend is None:
            # A tensor, which a compiled model reads anew, where it would be compiled for a number.
            with torch.inference_mode(False):  # or it could be set again in that mode only
                self._blend = torch.tensor(float(strength), device="cpu")
        else:
            self._blend.fill_(float(strength))

    @property
    def is_deployed(self) -> bool:
        """Whether the layer holds packed weights, for inference only."""
        return "w_packed" in self._buffers

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer to ``input`` of shape ``(..., K)``; see :class:`BitLinear`."""
        buffers = self._buffers
        if "w_packed" not in buffers:
            return self._forward_in_training(input)
        arguments = (
            input,
            buffers["w_packed"],
            buffers["w_scale"],
            buffers["bias"],
            self.in_features,
            self.eps,
        )
        if torch.is_grad_enabled() and input.requires_grad:
            output: Tensor = _InferenceOnly.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            output = _linear(*arguments)
        return output

    def _forward_in_training(self, input: Tensor) -> Tensor:
        weight = self.weight
        if self._blend is not None:
            return blended_linear(input, weight, self.bias, self._blend, self.eps)
        packed = None if torch.compiler.is_compiling() else self._quantize(weight)
        if (  # as a deployed layer
            packed is not None
            and self.in_features <= MAX_IN_FEATURES
            and input.is_cpu
            and not torch.is_grad_enabled()
        ):
            output: Tensor = _linear(input, *packed, self.bias, self.in_features, self.eps)
            return output
        return straight_through_linear(input, weight, self.bias, self.eps, packed)

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """``(w_packed, w_scale)``, kept as long as the weight is unchanged; or None."""
        if not _may_keep(weight):
            if _is_distributed(weight):
                raise TypeError(
                    "BitLinear cannot be trained with a weight that is a DTensor in its forward "
                    "pass (tensor parallelism), as its scale is that of the whole weight: train "
                    "with FSDP2 (fully_shard) or DDP; bitlinear.tensor_parallel is for deployed "
                    "layers"
                )
            return None
        known = self._quantized
        if known is None or not known.is_of(weight):
            # Tensors made in inference mode could not be saved for a backward pass later on.
            with torch.inference_mode(False), torch.no_grad():
                packed = _quantize_weight(weight, self.eps)
                known = _QuantizedWeight.of(weight, packed)
            self._quantized = known
        return known.packed

    def __prepare_scriptable__(self) -> Any:
        """Called by ``torch.jit.script``, which would fail on the first annotation."""
        raise NotImplementedError(
            "torch.jit.script cannot compile a BitLinear: use torch.export, or torch.jit.trace "
            "under torch.no_grad()"
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_quantized", None)
        return state

    def deploy(self) -> BitLinear:
        """Quantises and packs the weights, in place, and drops the floating-point ones.

        Idempotent. The packed layer computes what the layer computed before, in a sixteenth of
        the memory. Parameters become buffers: make a new optimizer if training goes on around it.

        Returns:
            The layer.

        Raises:
            ValueError: A weight is NaN or infinite, ``in_features`` exceeds 500,000, or the weight
                is no ordinary parameter (parametrised, pruned, sharded). The layer is unchanged.
        """
        if not self.is_deployed:
            reason = self._why_not_deployable()
            if reason:
                raise ValueError(f"BitLinear cannot be deployed: {reason}")
            self._drop_weight(*self._pack())
        return self

    def undeploy(self) -> BitLinear:
        """Makes a deployed layer trainable again, in place. Idempotent.

        The new ``weight`` is ``w_scale * ternary``: what ``deploy`` rounded away does not come
        back. Nor does the scale, where some weights are 0: the absmean of the new weight, which
        quantises it again, is ``w_scale`` times the fraction of weights that are not 0. The new
        parameters require gradients; ``weight`` has the dtype of ``bias``, or else the dtype that
        it had before.

        Returns:
            The layer.

        Raises:
            ValueError: The layer is divided among processes (:mod:`bitlinear.tensor_parallel`).
        """
        if self.is_deployed:
            w_packed, w_scale = self.w_packed, self.w_scale
            weight = self._restore_weight()
            with torch.no_grad():
                for first, rows in packing.enumerate_chunks(w_packed):
                    scale = w_scale[first : first + len(rows)] if w_scale.dim() == 2 else w_scale
                    weight[first : first + len(rows)] = (
                        packing.expand(rows, self.in_features).to(torch.float32) * scale
                    )
        return self

    def extra_repr(self) -> str:
        """``nn.Linear``'s, with the quantisation and whether the layer is deployed."""
        parts = [super().extra_repr(), f"quant_type={self.quant_type}"]
        if self.eps != _DEFAULT_EPS:
            parts.append(f"eps={self.eps}")
        if self.is_deployed:
            parts.append("deployed=True")
        return ", ".join(parts)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``nn.Module``; raises AttributeError for ``weight`` of a deployed layer."""
        if name == "weight" and param is not None and "w_packed" in self._buffers:
            raise AttributeError(
                "this BitLinear is deployed: a weight assigned to it would be ignored; call "
                "undeploy() first"
            )
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 assigns the weight each time that it has gathered it (past its version counter) and
        # each time that it frees it, so that what is kept ends there. It does so only where a
        # class has its own __setattr__; it writes past nn.Module's.
        if name == "weight":
            self._quantized = None
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "w_packed" in self.__dict__.get("_buffers", ()):
            raise AttributeError(
                "this BitLinear is deployed and has no floating-point 'weight', only 'w_packed' "
                "and 'w_scale': call undeploy() to get one back, or put an nn.Linear where another "
                "module reads the weight and never calls the layer"
            )
        return super().__getattr__(name)

    def _why_not_deployable(self) -> str:
        """Why :meth:`deploy` would refuse, or ``""``."""
        if self.in_features > MAX_IN_FEATURES:
            return (
                f"in_features is {self.in_features}, but the kernels' int32 sums are exact only "
                f"up to {MAX_IN_FEATURES}; split the layer along in_features"
            )
        if self._blend is not None:
            return (
                f"its quantization_strength is {self.quantization_strength:g}, and a deployed "
                f"layer's is 1: set that first"
            )
        reason = why_no_plain_weight(self)
        if reason:
            return reason
        # The mean of |weight| is finite only if every weight is: no mask as large as the weight.
        if not self.weight.is_meta and not bool(absmean_scale(self.weight.detach()).isfinite()):
            return "its weight has values that are NaN, infinite, or too large for their sum"
        return ""

    @torch.inference_mode(False)  # buffers made in inference mode could never be loaded into
    @torch.no_grad()
    def _pack(self) -> tuple[Tensor, Tensor]:
        """``(w_packed, w_scale)`` of the current weight."""
        packed: tuple[Tensor, Tensor] = _quantize_weight(self.weight, self.eps)
        return packed

    def _drop_weight(self, w_packed: Tensor, w_scale: Tensor) -> None:
        """Turns the parameters into the buffers of a deployed layer."""
        bias = self.bias
        self._quantized = None
        self._weight_dtype = self.weight.dtype
        del self.weight, self.bias
        self.register_buffer("w_packed", w_packed)
        self.register_buffer("w_scale", w_scale)
        # A copy: an optimizer that still holds the parameter must not reach the deployed layer.
        with torch.inference_mode(False):
            self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def _restore_weight(self) -> Tensor:
        """Turns the buffers into parameters; the values of the weight are for the caller to set.

        Raises:
            ValueError: The buffers are DTensors. Nothing was done.
        """
        if _is_distributed(self.w_packed):
            raise ValueError(
                f"this BitLinear is divided among processes, for inference only: {_GATHER}, which "
                f"can be trained"
            )
        device, bias = self.w_packed.device, self.bias
        dtype = self._weight_dtype if bias is None else bias.dtype
        shape = (self.out_features, self.in_features)
        # Both are made before anything is dropped, and outside inference mode, where a tensor could
        # never require gradients.
        with torch.inference_mode(False):
            weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            addend = None if bias is None else nn.Parameter(bias.detach().clone())
        del self.w_packed, self.w_scale, self.bias
        self.weight = weight
        self.register_parameter("bias", addend)
        return self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BitLinear:
        """Keeps ``w_packed`` and ``w_scale`` in their dtypes, whatever ``fn`` converts to."""
        before = {name: self._buffers.get(name) for name in ("w_packed", "w_scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            after = self._buffers.get(name)
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
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
        except (TypeError, ValueError) as error:
            error_msgs.append(f"While loading {prefix.rstrip('.') or 'BitLinear'}: {error}")
        finally:
            handle.remove()

    def _prepare_to_load(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
    ) -> None:
        """Gives the layer the parameters or buffers, still unset, that ``state_dict`` has for it.

        Raises:
            TypeError, ValueError: The state is newer, incomplete or damaged, or does not fit.
                Nothing was done.
        """
        version = local_metadata.get("version") or 1  # What has no version is version 1.
        if version > packing.FORMAT_VERSION:
            raise ValueError(
                f"it is in format version {version}, but this bitlinear reads up to version "
                f"{packing.FORMAT_VERSION}: upgrade bitlinear"
            )
        names = ("weight", "w_packed", "w_scale", "bias")
        state = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        for name, value in state.items():
            if not torch.overrides.is_tensor_like(value):
                raise TypeError(f"{name} must be a tensor, but it is a {type(value).__name__}")
        if "w_packed" in state or "w_scale" in state:
            state = self._check_deployed_state(state)
            # The dictionary is this module's own copy: load_state_dict sees to that.
            state_dict.update({prefix + name: tensor for name, tensor in state.items()})
            w_packed, w_scale = state["w_packed"], state["w_scale"]
            if not self.is_deployed:
                device = self.weight.device
                self._drop_weight(
                    torch.empty_like(w_packed, device=device),
                    torch.empty_like(w_scale, device=device),
                )
            elif self.w_scale.shape != w_scale.shape:
                self.w_scale = torch.empty_like(w_scale, device=self.w_scale.device)
        elif "weight" in state and self.is_deployed:
            _check_shape("weight", state["weight"], [self.out_features, self.in_features])
            self._restore_weight()

    def _check_deployed_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a deployed state, ready to be loaded.

        Raises:
            TypeError, ValueError: The state is incomplete, damaged, or does not fit the layer.
        """
        if "weight" in state:
            raise ValueError(
                "it holds both 'weight' and packed weights: remove the ones that are not meant"
            )
        absent = {"w_packed", "w_scale"} - set(state)
        if absent:
            raise ValueError(
                f"{absent.pop()} is missing: a deployed layer has w_packed and w_scale"
            )
        reason = "" if self.is_deployed else why_no_plain_weight(self)
        if reason:
            raise ValueError(f"the layer cannot become a deployed one: {reason}")
        sharded = _is_distributed(state["w_packed"])
        divided = _is_distributed(self._buffers.get("w_packed"))
        if sharded and not divided:
            raise ValueError(f"its tensors are sharded, but those of the layer are not: {_GATHER}")
        if divided and not sharded:
            raise ValueError(
                "the layer is divided among processes, but the state is not: load it with "
                "torch.distributed.checkpoint.state_dict.set_model_state_dict(model, state, "
                "options=StateDictOptions(full_state_dict=True)), or before parallelize_module"
            )
        # Detached: with assign=True a Parameter would be registered as one.
        tensors = {name: value.detach() for name, value in state.items()}
        _check_shape(
            "w_packed",
            tensors["w_packed"],
            list(packing.packed_shape(self.out_features, self.in_features)),
        )
        w_packed = _local_part(tensors["w_packed"])
        # A part of the columns is a whole number of bytes.
        packing.check_packed(w_packed, min(self.in_features, 4 * w_packed.shape[1]))
        tensors["w_scale"] = _checked_scale(tensors["w_scale"], self.out_features)
        if "bias" in tensors and self.bias is not None:
            _check_shape("bias", tensors["bias"], [self.out_features])
            if not tensors["bias"].is_floating_point():
                raise TypeError(f"bias must be floating point, but it is {tensors['bias'].dtype}")
        return tensors


def why_no_plain_weight(linear: nn.Module) -> str:
    """Why the weight of ``linear`` cannot be taken as an ordinary parameter, or ``""``."""
    if isinstance(linear, BitLinear) and linear.is_deployed:
        return "it is a deployed BitLinear; call undeploy() first"
    if parametrize.is_parametrized(linear):
        return "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is computed, not a parameter (weight_norm, pruning); remove that first"
    if linear.bias is not None and "bias" not in linear._parameters:
        return "its bias is computed, not a parameter (pruning); remove that first"
    if nn.parameter.is_lazy(weight):
        return "it is lazy; run it once on an example, so that its weight gets a shape"
    if _is_distributed(weight):
        return (
            f"its weight is sharded (a DTensor); convert before sharding, and to deploy, {_GATHER}"
        )
    if _has_own_operations(weight):
        return (
            f"its weight is a {type(weight).__name__}, a tensor subclass with operations of its "
            f"own: convert the model before it is quantised, or dequantise it first"
        )
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    if weight.dim() != 2 or weight.numel() == 0:
        return f"its weight has shape {list(weight.shape)}; (N, K) with N and K >= 1 is needed"
    return ""


def _has_own_operations(weight: Tensor) -> bool:
    """Whether a tensor subclass (of torchao, optimum-quanto, ...) computes in its own way."""
    own: Any = type(weight).__torch_dispatch__
    return own is not Tensor.__torch_dispatch__ and not isinstance(weight, FakeTensor)


def _check_shape(name: str, tensor: Tensor, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(
            f"size mismatch for {name}: it has shape {list(tensor.shape)}, but this layer needs "
            f"{shape}"
        )


def _checked_scale(w_scale: Tensor, out_features: int) -> Tensor:
    """``w_scale`` of a checkpoint, a scalar reshaped to ``(1,)``."""
    if w_scale.dtype != torch.float32:
        raise TypeError(
            f"w_scale must be float32, but it is {w_scale.dtype}: a tool has converted the "
            f"checkpoint; convert w_scale back with .float()"
        )
    if w_scale.dim() == 0:
        w_scale = w_scale.reshape(1)
    if list(w_scale.shape) not in ([1], [out_features, 1]):
        raise ValueError(
            f"w_scale must have shape [1] or [{out_features}, 1], one scale per tensor or per "
            f"output feature, but it has {list(w_scale.shape)}; scales per group are not supported "
            f"by this version"
        )
    values = _local_part(w_scale)
    if not values.is_meta and not bool((values.isfinite() & (values > 0)).all()):
        raise ValueError("w_scale must be finite and positive: the checkpoint is damaged")
    return w_scale
