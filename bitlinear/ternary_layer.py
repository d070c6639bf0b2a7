"""What users call on a layer with ternary weights, linear or embedding."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from .arguments import check_strength
from .latent_weight import latent_weight
from .packable import Packable, pack_together
from .preconditions import GATHER, is_distributed, why_not_deployable

_Layer = TypeVar("_Layer", bound="TernaryLayer")

DEFAULT_EPS = 1e-6


class TernaryLayer(Packable):
    """The calls that :class:`~bitlinear.BitLinear` and :class:`~bitlinear.Embedding` share."""

    _strength = 1.0
    _blend: Tensor | None = None  # the strength if it is below 1

    @property
    def quantization_strength(self) -> float:
        """How much the layer is quantised: from 0, a plain layer, to 1, the default.

        In between, a weight is ``w + strength * (quantised w - w)``, and the input of a linear
        layer likewise, with straight-through gradients. Fine-tuning recipes of pretrained models
        raise the strength from 0 to 1 over the first steps. It is not part of ``state_dict``.

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
                f"this {type(self).__name__} is deployed, so its quantization_strength is 1 and "
                f"cannot be {strength}: call undeploy() first"
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

    def __setstate__(self, saved: dict[str, Any]) -> None:
        super().__setstate__(saved)
        if self._blend is not None:  # copy.copy would share it
            self._blend = self._blend.clone()

    def deploy(self: _Layer) -> _Layer:
        """Quantise and pack the weights, in place, and drop the floating-point ones.

        Idempotent. The packed layer gives the same outputs as before, in a sixteenth of the memory
        of fp32 weights.
        Its parameters become buffers, which no optimizer changes: if all layers of a model are
        deployed, it has nothing to train and ``loss.backward()`` raises. Another layer that has the
        same weight keeps it; :func:`bitlinear.deploy` deploys tied layers together. Packing needs a
        few MB beyond the packed weight (for fp64 weights, a copy in fp32).

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
                raise ValueError(f"{type(self).__name__} cannot be deployed: {reason}")
            pack_together([self])
        return self

    def _become_packed(
        self, w_packed: Tensor, w_scale: Tensor, group_size: int, shared: bool = False
    ) -> None:
        super()._become_packed(w_packed, w_scale, group_size, shared)
        self.quantization_strength = 1.0

    def undeploy(self: _Layer) -> _Layer:
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
                    f"this {type(self).__name__} is divided among processes, for inference only: "
                    f"{GATHER}, which can be trained"
                )
            with torch.inference_mode(False):
                weight = nn.Parameter(
                    latent_weight(
                        *(self.w_packed, self.w_scale, self.weight_shape[1]),
                        *(self.eps, self._weight_dtype, self._group_size),
                    )
                )
            for layer in self._sharing_layers():
                layer._become_float(weight)
        return self

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The scale times the ternary weights, of a deployed layer or not.

        Returns:
            fp32, in the shape of ``weight``: a new tensor.

        Raises:
            ValueError: A packed byte is not valid.
        """
        w_packed, w_scale = (self.w_packed, self.w_scale) if self.is_deployed else self._pack()
        return self._dequantize(w_packed, w_scale)

    def extra_repr(self) -> str:
        """The text of torch's layer, the quantisation, and whether the layer is deployed."""
        parts = [super().extra_repr(), f"quant_type={self.quant_type}"]
        if self.eps != DEFAULT_EPS:
            parts.append(f"eps={self.eps}")
        if self.quantization_strength < 1:
            parts.append(f"quantization_strength={self.quantization_strength:g}")
        if self.is_deployed:
            parts.append("deployed=True")
        return ", ".join(parts)

    def _check_whole(self, weight: Tensor) -> None:
        """Raise TypeError if the weight of a layer in training is a DTensor."""
        if type(weight) is not nn.Parameter and is_distributed(weight):
            raise TypeError(
                f"{type(self).__name__} cannot be trained with a weight that is a DTensor in its "
                f"forward pass (tensor parallelism), because the scale needs the whole weight: "
                f"train with FSDP2 (fully_shard) or DDP; bitlinear.tensor_parallel is for deployed "
                f"layers"
            )

    def _forward_special(self, input: Any) -> Any:
        """Apply the layer to a proxy or a jagged tensor; return None for other tensors.

        Raises:
            TypeError: ``input`` is not a tensor.
        """
        if isinstance(input, fx.Proxy):
            return self._trace(input)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"{type(self).__name__} needs a torch.Tensor, but got {type(input).__name__}: "
                f"convert it, for example with torch.as_tensor(x)"
            )
        if is_jagged(input):
            nested: Any = input
            return torch.nested.nested_tensor_from_jagged(
                *(self(input.values()), nested.offsets(), nested.lengths()),
                jagged_dim=nested._ragged_idx,
            )
        return None

    def _trace(self, input: fx.Proxy) -> Any:
        """Add a call of the layer to the graph of a symbolic trace, as torch's layers do."""
        tracer: Any = input.tracer
        if tracer.root is self:
            raise TypeError(
                f"{type(self).__name__} is a leaf of a symbolic trace, so it cannot be "
                f"traced alone: trace a module that holds it, such as torch.nn.Sequential(layer)"
            )
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})

    def __prepare_scriptable__(self) -> Any:
        """Raise for ``torch.jit.script``, whose own error is about an annotation."""
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.export, or "
            f"torch.jit.trace under torch.no_grad()"
        )


def is_jagged(input: Any) -> bool:
    """Whether it is a nested tensor of the layout ``torch.jagged``."""
    return isinstance(input, Tensor) and input.is_nested and input.layout == torch.jagged
