"""Deployed states of other projects: TeTRA-VPR, the first BitLinear project, transformers.

transformers loads its own checkpoints into layers of its own, which
:func:`bitlinear.integrations.transformers.convert` replaces. :func:`load` reads those that its
layers cannot hold (a scale for each output feature), and those of projects outside of it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import packing
from ..conversion.repacking import repack
from ..conversion.ternary import check_signs, scale_factor
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
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    model: _Model,
    format: str | Format,
    *,
    act_bits: int = 8,
    eps: float | None = None,
) -> _Model:
    """Load a model whose ternary layers another project has packed.

    The layers for which the state has a scale become deployed layers; every other tensor is
    assigned, with the dtype that it has in the file::

        model = vit_with_linear_layers()  # nn.Linear in place of the project's own layers
        model = checkpoints.load("tetra.pth", model, "tetra-vpr")

    A safetensors file stays mapped, as by :func:`bitlinear.load_deployed`: do not write into it
    while the model is in use.

    Args:
        source: The path of a safetensors file, as for :func:`bitlinear.load_deployed`; that of a
            file of ``torch.save`` with a state; or a state.
        model: A model whose names are those of the state, with ``nn.Linear`` (or a BitLinear) where
            the state has packed weights. It may be on the meta device.
        format: A name in :data:`FORMATS`, or a format of your own.
        act_bits: The bits of quantised activations, 8 or 16.
        eps: Lower bound of the absmax of a token; None for that of the format.

    Returns:
        ``model``.

    Raises:
        OSError: The file cannot be opened.
        TypeError: The source is not a state.
        ValueError: ``format`` is unknown; the file is damaged; the state has no layer of this
            format; or a name, a shape, a dtype, a scale or a code of a weight is not as the format
            and the model need it. The message names every such layer; the model is unchanged.
    """
    if isinstance(format, str):
        if format not in FORMATS:
            raise ValueError(f"format must be one of {[*FORMATS]}, but it is {format!r}")
        format = FORMATS[format]
    is_path = isinstance(source, (str, os.PathLike))
    name = str(source) if is_path else "the state"
    state: Any = _read(Path(name)) if is_path else source
    _check_state(state, name)
    packed, dense = _translate(dict(state), model, format, name)
    eps = format.eps if eps is None else eps
    return fill(model, packed, dense, source=name, act_bits=act_bits, eps=eps)


def _read(path: Path) -> Any:
    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        tensors, omitted = map_tensors(path)
        names = [name for name, kept in omitted.items() if kept in tensors]
        return {**{name: tensors[omitted[name]] for name in names}, **tensors}
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read as a state that torch.save wrote ({type(error).__name__}): if "
            f"it holds other objects than tensors (a module, hyperparameters), load it with the "
            f"project's own code, and pass the state"
        ) from error
    # Lightning has the state inside of its own dictionary.
    return state["state_dict"] if isinstance(state, dict) and "state_dict" in state else state


def _check_state(state: Any, source: str) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"{source} must be a dictionary of tensors, but it is a {type(state)}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"{source} must have a tensor for each name, but for {name!r} it has a "
                f"{type(value).__name__}: pass the state itself"
            )


def _translate(
    tensors: dict[str, Tensor], model: nn.Module, format: Format, source: str
) -> tuple[dict[str, PackedTensors], dict[str, Tensor]]:
    """The packed weights by the names of the layers, and the other tensors."""
    suffix = f".{format.scale}"
    # Another kind of module can have a tensor that is called a scale.
    others = {
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear) and hasattr(module, format.scale)
    }
    names = [key[: -len(suffix)] for key in tensors if key.endswith(suffix)]
    names = [name for name in names if name not in others]
    if not names:
        raise ValueError(
            f"{source} has no packed layer of this format: no linear layer has a {format.scale}; "
            f"it has {list_names(tensors)}"
        )
    packed: dict[str, PackedTensors] = {}
    problems = []
    for name in names:
        scale = tensors.pop(f"{name}{suffix}")
        weight = tensors.pop(f"{name}.{format.weight}", None)
        try:
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"in the model it is a {type(layer).__name__}, not an nn.Linear")
            if weight is None:
                raise ValueError(f"it has a scale, but no {format.weight}")
            if weight.is_meta or scale.is_meta:
                raise ValueError("it is on the meta device, without values")
            shape = (layer.out_features, layer.in_features)
            w_scale = scale_factor(scale, shape[0], format.divides, format.scale)
            packed[name] = PackedTensors(_pack(weight, format, *shape), w_scale)
            if format.scales_bias and f"{name}.bias" in tensors:
                bias = tensors[f"{name}.bias"].float() * w_scale.reshape(-1)
                tensors[f"{name}.bias"] = bias
        except (AttributeError, TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError(
            f"{source} cannot be loaded; its names must be those of the model, without a prefix:"
            f"\n  " + "\n  ".join(problems)
        )
    return packed, tensors


def _pack(weight: Tensor, format: Format, out_features: int, in_features: int) -> Tensor:
    if weight.is_floating_point():
        if list(weight.shape) != [out_features, in_features]:
            raise ValueError(
                f"{format.weight} must have shape {[out_features, in_features]}, or be packed, but "
                f"it is {weight.dtype} of shape {list(weight.shape)}"
            )
        weight = weight if weight.element_size() > 1 else weight.to(torch.bfloat16)
        check_signs(weight, format.weight)
        return pack_signs(weight)
    if weight.dtype == torch.int8:  # TeTRA-VPR packs in int8; the bits are the same.
        weight = weight.view(torch.uint8)
    if format.packs_rows:
        return repack(weight, out_features, in_features)
    packing.check_packed(weight, in_features)
    return weight.contiguous()
