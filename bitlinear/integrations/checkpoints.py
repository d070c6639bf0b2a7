"""Deployed states of other projects: TeTRA-VPR, the first BitLinear project, transformers.

transformers loads its own checkpoints into layers of its own, which
:func:`bitlinear.integrations.transformers.convert` replaces. :func:`load` reads those that its
layers cannot hold (a scale for each output feature), and those of projects outside of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import packing
from ..conversion.repacking import repack
from ..conversion.ternary import pack as pack_signs
from ..filling import PackedTensors, fill
from ..mapped import map_tensors
from ..messages import list_names

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Format:
    """How the ternary weight of a layer is stored.

    A weight is packed, four weights to a byte, or holds -1, 0 and 1 in floating point.

    Attributes:
        weight: The name of the weight within the layer.
        scale: The name of the scale: one number, or one for each output feature.
        divides: Whether the product is divided by the scale; otherwise it is multiplied.
        packs_rows: Whether a packed byte holds weights of four output features, as in transformers;
            otherwise it holds weights of four inputs, as in :mod:`bitlinear.packing`.
        scales_bias: Whether the scale also multiplies the bias.
        eps: Lower bound of the absmax of a token.
    """

    weight: str
    scale: str
    divides: bool
    packs_rows: bool = False
    scales_bias: bool = False
    eps: float = 1e-5


FORMATS = {
    "transformers-bitlinear": Format("weight", "weight_scale", divides=True, packs_rows=True),
    "transformers-autobitlinear": Format(
        "weight", "weight_scale", divides=False, packs_rows=True, scales_bias=True
    ),
    "tetra-vpr": Format("weight", "scale", divides=True),
    "bitlinear-original": Format("w_packed", "w_scale", divides=False, eps=1e-6),
}
"""``transformers-...``: the ``linear_class`` of a ``bitnet`` config. ``tetra-vpr``: models that
``deploy(use_bitblas=False)`` of TeTRA-VPR has packed. ``bitlinear-original``: deployed layers of
the first project of the name BitLinear, by the author of TeTRA-VPR."""


def load(
    source: str | os.PathLike[str] | Mapping[str, Tensor], model: _Model, format: str | Format
) -> _Model:
    """Load a model whose ternary layers another project has packed.

    The layers for which the state has a scale become deployed layers; every other tensor is
    assigned, with the dtype that it has in the file::

        model = vit_with_linear_layers()  # nn.Linear in place of the project's own layers
        model = checkpoints.load("tetra.pth", model, "tetra-vpr")

    Args:
        source: The path of a safetensors file, as for :func:`bitlinear.load_deployed`; that of a
            file of ``torch.save`` with a state; or a state.
        model: A model whose names are those of the state, with ``nn.Linear`` (or a BitLinear) where
            the state has packed weights. It may be on the meta device.
        format: A name in :data:`FORMATS`, or a format of your own.

    Returns:
        ``model``.

    Raises:
        OSError: The file cannot be opened.
        TypeError: The source is not a state.
        ValueError: ``format`` is unknown; the state has no layer of this format; a name, a shape, a
            dtype, a scale or a code of a weight is not as the format and the model need it. The
            message names every such layer; the model is unchanged.
    """
    if isinstance(format, str):
        if format not in FORMATS:
            raise ValueError(f"format must be one of {[*FORMATS]}, but it is {format!r}")
        format = FORMATS[format]
    name = "the state"
    if isinstance(source, (str, os.PathLike)):
        name, source = str(source), _read(Path(source))
    packed, dense = _translate(dict(source), model, format, name)
    return fill(model, packed, dense, source=name, eps=format.eps)


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        tensors, omitted = map_tensors(path)
        names = [name for name, kept in omitted.items() if kept in tensors]
        return {**{name: tensors[omitted[name]] for name in names}, **tensors}
    state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # of Lightning
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise TypeError(
            f"{path} must hold a state, a dictionary of tensors, but it holds a "
            f"{type(state).__name__} of other values: load it yourself, and pass the state"
        )
    return state


def _translate(
    tensors: dict[str, Tensor], model: nn.Module, format: Format, source: str
) -> tuple[dict[str, PackedTensors], dict[str, Tensor]]:
    """The packed weights by the names of the layers, and the other tensors."""
    suffix = f".{format.scale}"
    names = [key.removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    if not names:
        raise ValueError(
            f"{source} has no packed layer of this format: no name ends in {suffix!r}, only "
            f"{list_names(tensors)}"
        )
    packed: dict[str, PackedTensors] = {}
    problems = []
    for name in names:
        try:
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"in the model it is a {type(layer).__name__}, not an nn.Linear")
            scale = tensors.pop(f"{name}{suffix}")
            weight = tensors.pop(f"{name}.{format.weight}", None)
            if weight is None:
                raise ValueError(f"it has a scale, but no {format.weight}")
            w_scale = _scale(scale, format, layer.out_features)
            w_packed = _pack(weight, format, layer.out_features, layer.in_features)
            packed[name] = PackedTensors(w_packed, w_scale)
            if format.scales_bias and f"{name}.bias" in tensors:
                bias = tensors[f"{name}.bias"].float() * w_scale.reshape(-1)
                tensors[f"{name}.bias"] = bias
        except (AttributeError, TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError(f"{source} cannot be loaded:\n  " + "\n  ".join(problems))
    return packed, tensors


def _scale(scale: Tensor, format: Format, out_features: int) -> Tensor:
    """The factor of the product: fp32, shape ``(1,)`` or ``(N, 1)``."""
    if scale.numel() != 1 and list(scale.squeeze().shape) != [out_features]:
        raise ValueError(
            f"{format.scale} must be one number, or one for each of {out_features} output "
            f"features, but it has shape {list(scale.shape)}"
        )
    values = scale.float().reshape((1,) if scale.numel() == 1 else (-1, 1)).clone()
    return 1.0 / values if format.divides else values


def _pack(weight: Tensor, format: Format, out_features: int, in_features: int) -> Tensor:
    if weight.is_floating_point():
        if list(weight.shape) != [out_features, in_features] or not torch.equal(
            weight, weight.sign()
        ):
            raise ValueError(
                f"{format.weight} must hold -1, 0 and 1 in shape {[out_features, in_features]}, or "
                f"be packed, but it is {weight.dtype} of shape {list(weight.shape)} with values "
                f"from {float(weight.min()):g} to {float(weight.max()):g}"
            )
        return pack_signs(weight)
    if weight.dtype == torch.int8:  # TeTRA-VPR packs in int8; the bits are the same.
        weight = weight.view(torch.uint8)
    if format.packs_rows:
        return repack(weight, out_features, in_features)
    packing.check_packed(weight, in_features)
    return weight
