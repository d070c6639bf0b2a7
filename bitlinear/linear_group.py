"""LinearGroup: layers that read one input, as one module and, once deployed, as one product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import MAX_WEIGHTS
from .fusable import fused_products, why_not_fused, why_not_norm
from .prologue import ACTIVATIONS

_NORM = "norm"


class LinearGroup(nn.Module):
    """Layers that read one input, with a gate and an RMSNorm in front and a residual behind.

    Deployed :class:`~bitlinear.BitLinear` layers are computed by one operator,
    :func:`bitlinear.fused.fused_linear`. It quantises the input once, and reads and writes each
    value once. The state, the parameters and the children have the names that the layers are given
    here, and each call reads the children as they are then.

    If the children cannot be computed as one product, they are called one after the other, which
    is the same function: layers in training, layers with adapters or hooks, layers that differ in
    ``eps`` or in the bits of activations, a norm of another kind. :meth:`why_not_fused` says why.

    As one product, everything between ``x`` and the output is computed in fp32. One after the
    other, each step is rounded to the dtype of ``x``. So for 16-bit inputs the outputs differ by
    that rounding. For fp32 inputs they differ by the order in which the norm adds squares, which
    can move an activation to the next integer of its quantisation.

    Args:
        layers: 1 to 4 layers, ``nn.Linear`` or BitLinear, by the names that they get as children.
        norm: The norm in front of the layers, behind the gate; it becomes the child ``norm``. An
            ``nn.RMSNorm`` with an ``eps``, or an RMSNorm that computes as that of Llama in
            transformers, can be a part of the product. None for no norm.
        activation: ``"silu"``; ``"relu2"``, the square of ReLU; or None for no gate.

    Shape:
        Input ``(..., K)``; with an activation ``(..., 2 K)``: two halves ``a`` and ``b``, of which
        the norm or the layers read ``activation(a) * b``. Or the two halves as a pair of tensors
        ``(..., K)``, such as the outputs of another group, which are not copied. Output
        ``(..., N)`` of each layer.

    Raises:
        TypeError: ``layers`` is no mapping, a layer is not an ``nn.Linear``, or the norm is not a
            module.
        ValueError: The number of layers, a name or the activation is not as above, or the layers
            differ in ``in_features``.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        norm: nn.Module | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layers, (Mapping, nn.ModuleDict)):
            raise TypeError(
                f"layers must be a mapping from names to layers, such as {{'q': layer}}, but it is "
                f"a {type(layers).__name__}"
            )
        if not 1 <= len(layers) <= MAX_WEIGHTS:
            raise ValueError(
                f"a LinearGroup has 1 to {MAX_WEIGHTS} layers, but got {len(layers)}: make several "
                f"groups"
            )
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be None or one of {', '.join(ACTIVATIONS)}, but it is "
                f"{activation!r}"
            )
        if norm is not None and not isinstance(norm, nn.Module):
            raise TypeError(f"norm must be a module or None, but it is a {type(norm).__name__}")
        for name, layer in layers.items():
            if not isinstance(layer, nn.Linear):
                raise TypeError(
                    f"layers must be nn.Linear or BitLinear, but {name} is a {type(layer).__name__}"
                )
            if name == _NORM or "." in name or not name or hasattr(self, name):
                raise ValueError(f"a layer cannot have the name {name!r}: choose another one")
            self.add_module(name, layer)
        widths = {name: layer.in_features for name, layer in layers.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"the layers must have the same in_features, but they have {widths}")
        self._names = tuple(layers)
        self.activation = activation
        self.add_module(_NORM, norm)
        if norm is not None:
            why_not_norm(norm)  # It examines a new class, which an older torch.compile cannot do.

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor], residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Apply the layers.

        Args:
            x: fp32, fp16 or bf16, shape ``(..., K)``; with an activation ``(..., 2 K)``, or two
                tensors ``(..., K)``.
            residual: Added to the outputs: fp32, fp16 or bf16, in the shape of all outputs side by
                side, ``(..., N_0 + N_1 + ...)``. Or None.

        Returns:
            The output of a single layer, shape ``(..., N)``. Of several layers, a tuple of their
            outputs in order: views of one tensor, if there is a residual or they were one product.

        Raises:
            TypeError, ValueError: An input does not fit; see
                :func:`bitlinear.arguments.check_fused_linear`.
        """
        names, modules = self._names, self._modules
        if isinstance(x, (tuple, list)):
            x = self._join(x)
        output = fused_products(self, names, x, modules[_NORM], self.activation, residual)
        if output is not None:
            layers: list[Any] = [modules[name] for name in names]
            widths = [layer.out_features for layer in layers]
        else:
            outputs = self._call_layers(x)
            if residual is None:
                return outputs[0] if len(outputs) == 1 else outputs
            output = torch.cat(outputs, dim=-1)
            if residual.shape != output.shape:
                raise ValueError(
                    f"residual must have the shape of the output, {list(output.shape)}, but it has "
                    f"shape {list(residual.shape)}"
                )
            output = residual + output
            widths = [each.shape[-1] for each in outputs]
        return output if len(names) == 1 else output.split(widths, dim=-1)

    def _join(self, halves: Sequence[Tensor]) -> Tensor:
        if self.activation is None or len(halves) != 2:
            raise TypeError(
                f"x must be a tensor, or with an activation a pair of tensors, but it is a "
                f"{type(halves).__name__} of {len(halves)}, and the activation is "
                f"{self.activation!r}"
            )
        return _side_by_side(*halves)

    def _call_layers(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.activation is not None:
            a, b = x.chunk(2, dim=-1)
            x = (F.silu(a) if self.activation == "silu" else F.relu(a).square()) * b
        modules: dict[str, Any] = self._modules
        if modules[_NORM] is not None:
            x = modules[_NORM](x)
        return tuple(modules[name](x) for name in self._names)

    def why_not_fused(self) -> str:
        """Why the layers are called one after the other, or ``""`` if they are one product.

        A call with an input that is nested or distributed, or whose dtype is not that of the norm
        and of the residual, calls them one after the other in any case.
        """
        return why_not_fused(self, self._names, self._modules[_NORM])

    def unfuse(self) -> dict[str, nn.Module]:
        """Return the children by their names, to be used without the group."""
        return dict(self.named_children())

    def extra_repr(self) -> str:
        """The activation, if there is one."""
        return "" if self.activation is None else f"activation={self.activation!r}"


def _side_by_side(a: Tensor, b: Tensor) -> Tensor:
    """``cat([a, b], -1)``; without a copy if ``b`` follows ``a`` in each row of one tensor."""
    if (
        type(a) is type(b) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # its tensors have no address
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        and a.shape == b.shape
        and a.dim() > 1
        and a.dtype == b.dtype
        and a.is_neg() == b.is_neg()
        and a.stride() == b.stride()
        and a.stride(-1) == 1
        and a.data_ptr() + a.shape[-1] * a.element_size() == b.data_ptr()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    ):
        return a.as_strided((*a.shape[:-1], 2 * a.shape[-1]), a.stride())
    return torch.cat([a, b], dim=-1)
