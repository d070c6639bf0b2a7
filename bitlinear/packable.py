"""A layer that holds its weight as a parameter, or packed in buffers.

:class:`Packable` switches between the two kinds of weight, moves and converts them, saves them, and
loads either kind into either layer. :class:`~bitlinear.ternary_layer.TernaryLayer` adds the calls
that users make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import packing, state, ties
from .arguments import group_size_of
from .deployed import deployed_linear
from .half_scales import restore_scales
from .lookup import deployed_lookup
from .messages import warn
from .packed_weight import PackedWeight, warn_of_dequantization
from .packing import PACKED_NAMES

_WEIGHT_IS_PACKED = (
    "this layer is deployed and a weight assigned to it would be ignored; call undeploy() first"
)


class Packable(nn.Module):
    """A module whose ``weight`` of two dimensions is a parameter or packed.

    Trainable, it has the parameters of the class that it is mixed into: ``weight``, and ``bias`` if
    that class has one. Deployed, it has the buffers ``w_packed``, ``w_scale`` and ``bias``, and
    :class:`PackedWeight` takes the place of ``weight``.
    """

    # nn.Module stores it in the metadata of state_dict.
    _version = packing.FORMAT_VERSION

    weight: Any  # as the class declares it that this one is mixed into
    w_packed: Tensor
    w_scale: Tensor
    eps: float

    # What quant_type says; see arguments.QuantType.
    _act_bits = 8
    _group_size = 0

    # What the class calls the rows of the weight and the values in each.
    _dimensions = ("out_features", "in_features")

    # Whether the forward pass ran before deployment; bitlinear.deploy() warns if it did not.
    _called = False
    # Whether other layers have the same w_packed.
    _shares_packed = False
    _has_warned_of_values = False
    # Whether the layer was made from a Conv1D of transformers, which has a (K, N) weight.
    _was_conv1d = False
    # The dtype that the weight of a deployed layer had, and gets back from undeploy().
    _weight_dtype: torch.dtype

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(N, K)``: the rows of the weight and the values in each."""
        raise NotImplementedError

    @property
    def quant_type(self) -> str:
        """The name of the quantisation type."""
        raise NotImplementedError

    @property
    def is_deployed(self) -> bool:
        """Whether the layer holds packed weights, which are constants."""
        return "w_packed" in self._buffers

    def _set_group_size(self, group_size: int, quant_type: str) -> None:
        """Set what a new ``quant_type`` says of the scales; raise ValueError if they differ."""
        if self.is_deployed and group_size != self._group_size:
            raise ValueError(
                f"this layer is deployed with w_scale of shape {list(self.w_scale.shape)}, so its "
                f"quant_type cannot be {quant_type!r}: call undeploy() first"
            )
        self._group_size = group_size

    def __setstate__(self, saved: dict[str, Any]) -> None:
        super().__setstate__(saved)  # type: ignore[no-untyped-call]
        if self.is_deployed:
            if "_group_size" not in saved:  # Layers of version 0.2 did not say it.
                self._group_size = group_size_of(self.w_scale)
            for name, buffer in self._buffers.items():  # of a copy made in inference mode
                if buffer is not None:
                    self._buffers[name] = state.as_buffer_of_copies(buffer)
        ties.register(self)

    # --- The weight as an attribute ---

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; raise AttributeError for the weight of a deployed layer."""
        if "w_packed" in self._buffers and (name == "weight" or isinstance(param, PackedWeight)):
            raise AttributeError(_WEIGHT_IS_PACKED)
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "w_packed" in self.__dict__.get("_buffers", ()):
            raise AttributeError(_WEIGHT_IS_PACKED)
        if type(value) is Tensor and name in self.__dict__.get("_buffers", ()):
            value = state.as_buffer(value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "w_packed" in self.__dict__.get("_buffers", ()):
            return self._make_packed_weight()
        return super().__getattr__(name)

    def _make_packed_weight(self) -> PackedWeight:
        w_packed, w_scale = self.w_packed, self.w_scale
        dtype, shape = self._weight_dtype, self.weight_shape
        columns, group_size = shape[1], self._group_size

        def dequantize() -> Tensor:
            if not self._has_warned_of_values:
                self._has_warned_of_values = True
                warn_of_dequantization(type(self).__name__, shape)
            with torch.no_grad():
                return self._dequantize(w_packed, w_scale).to(dtype)

        def linear(x: Tensor, bias: Tensor | None) -> Tensor:
            quantisation = self.eps, group_size, self._act_bits
            return deployed_linear(x, w_packed, w_scale, bias, columns, *quantisation)

        def lookup(ids: Tensor) -> Tensor:
            return deployed_lookup(ids, w_packed, w_scale, columns, dtype, group_size)

        return PackedWeight(shape, dtype, w_packed.device, dequantize, linear, lookup)

    def _dequantize(self, w_packed: Tensor, w_scale: Tensor) -> Tensor:
        """Scale times ternary weights, fp32; raises ValueError for an invalid code."""
        columns = self.weight_shape[1]
        packing.check_packed(w_packed, columns)
        weight: Tensor = torch.ops.bitlinear.expand_weight.default(
            w_packed, columns, w_scale, torch.float32, self._group_size
        )
        return weight

    # --- From one kind of weight to the other ---

    @torch.inference_mode(False)  # No state could be loaded into buffers made in inference mode.
    @torch.no_grad()
    def _pack(self) -> tuple[Tensor, Tensor]:
        """``(w_packed, w_scale)`` of the current weight."""
        return cast(
            "tuple[Tensor, Tensor]",
            torch.ops.bitlinear.quantize_weight.default(self.weight, self.eps, self._group_size),
        )

    def _become_packed(
        self, w_packed: Tensor, w_scale: Tensor, group_size: int, shared: bool = False
    ) -> None:
        """Replace the parameters by the buffers of a deployed layer.

        ``shared`` tells whether other layers get the same buffers.
        """
        if self.is_deployed:  # A shallow copy has the same dictionaries.
            return
        self._weight_dtype = self.weight.dtype
        del self.weight
        self.register_buffer("w_packed", w_packed)
        self.register_buffer("w_scale", w_scale)
        self._group_size = group_size
        if "bias" in self._parameters:
            bias = self._parameters.pop("bias")
            # A copy: an optimizer that still holds the parameter must not reach the deployed layer.
            with torch.inference_mode(False):
                self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._shares_packed = shared

    def _become_float(self, weight: nn.Parameter) -> None:
        """Replace the buffers of a deployed layer by parameters."""
        if not self.is_deployed:  # A shallow copy has the same dictionaries.
            return
        del self.w_packed, self.w_scale
        self.weight = weight
        if "bias" in self._buffers:
            bias = self._buffers.pop("bias")
            # A tensor made in inference mode could never require gradients.
            with torch.inference_mode(False):
                parameter = None if bias is None else nn.Parameter(bias.detach().clone())
            self.register_parameter("bias", parameter)
        self._shares_packed = False

    def _sharing_layers(self) -> list[Packable]:
        """This layer, and the others with the same packed weight."""
        others = ties.layers_with(self.w_packed) if self._shares_packed else []
        return [self, *(layer for layer in others if layer is not self)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packable:
        """Move and convert all tensors; ``w_packed`` and ``w_scale`` keep their dtypes."""
        if not self.is_deployed:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        sharing = self._sharing_layers()
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.w_scale.device
        self._weight_dtype = fn(torch.empty(0, dtype=self._weight_dtype, device=device)).dtype
        for name in PACKED_NAMES:
            old: Any = before[name]
            new: Any = self._buffers[name]
            tensor = state.as_buffer(new if new.dtype == old.dtype else old.to(new.device))
            for layer in sharing:
                layer._buffers[name] = tensor
        bias = self._buffers.get("bias")
        if bias is not None:
            self._buffers["bias"] = state.as_buffer(bias)
        return self

    # --- States ---

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata[prefix[:-1]].update(state.metadata_of(self))

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
        """Load packed or float weights into a layer of either kind; a bad state changes nothing."""
        # The last of the hooks, because other hooks can rename or convert tensors of the state.
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
            error_msgs.append(f"While loading {prefix.rstrip('.') or type(self).__name__}: {error}")
        finally:
            handle.remove()
        ties.rename_missing(self, prefix, missing_keys)

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
        """Check the state, then give the layer and those tied to it the state's kind of weights.

        Raises:
            TypeError, ValueError, state.IncompleteState: See :func:`state.check` and
                :func:`restore_scales`; the layer is unchanged.

        Warns:
            UserWarning: The layer is deployed, and the state has float weights.
        """
        assigns = local_metadata.get("assign_to_params_buffers", False)
        tied = [] if assigns else ties.tied_layers(self, missing_keys)
        restore_scales(state_dict)
        tensors, kind = state.check(
            self, state_dict, prefix, local_metadata, strict=strict, was_conv1d=self._was_conv1d
        )
        different = [t for t in tied if (t.eps, t._group_size) != (self.eps, self._group_size)]
        if kind == "packed" and different:
            raise ValueError(
                f"it has packed weights for this layer alone, but a layer with the same weight has "
                f"another quantisation (eps={different[0].eps:g} and "
                f"quant_type={different[0].quant_type!r}): make eps and the kind of scale equal"
            )
        # load_state_dict has made this dictionary for this module alone.
        state_dict.update({prefix + name: tensor for name, tensor in tensors.items()})
        if kind == "packed":
            self._prepare_packed(tensors["w_packed"], tensors["w_scale"], tied, assigns)
        elif kind == "float" and self.is_deployed:
            warn(
                "bitlinear: a state with float weights makes deployed layers trainable again, and "
                "slow: call deploy() after loading it"
            )
            weight = tensors["weight"].detach()
            if not assigns:
                weight = weight.to(self.w_packed.device, self._weight_dtype, copy=True)
            parameter = nn.Parameter(weight)
            for layer in (self, *tied):
                layer._become_float(parameter)

    def _prepare_packed(
        self, w_packed: Tensor, w_scale: Tensor, tied: list[Packable], assigns: bool
    ) -> None:
        """Give this layer and those tied to it packed weights of the shapes of these."""
        layers = (self, *tied)
        group_size = state.group_size_in(self, w_scale)
        if not self.is_deployed:
            device = self.weight.device
            if not assigns:
                w_packed, w_scale = (t.to(device, copy=True) for t in (w_packed, w_scale))
            for layer in layers:
                layer._become_packed(w_packed, w_scale, group_size, shared=bool(tied))
        elif self.w_scale.shape != w_scale.shape:
            if not assigns:
                w_scale = w_scale.to(self.w_scale.device, copy=True)
            for layer in layers:
                layer._buffers["w_scale"] = w_scale
        for layer in layers:
            layer._group_size = group_size  # one group of a row has the shape of a scale per row


def pack_together(layers: Sequence[Packable]) -> None:
    """Deploy layers that share one weight: they share the packed one too."""
    w_packed, w_scale = layers[0]._pack()
    for layer in layers:
        layer._become_packed(w_packed, w_scale, layers[0]._group_size, shared=len(layers) > 1)


def update_ties(layers: Iterable[Packable]) -> None:
    """Record which of ``layers`` share one packed weight, after a load has assigned tensors."""
    for group in ties.tied_groups(layers):
        for layer in group:
            layer._shares_packed = layer.is_deployed


def was_called(layer: Packable) -> bool:
    """Whether the forward pass of ``layer`` has run in training form, outside of torch.compile."""
    return layer._called
