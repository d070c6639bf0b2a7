"""``load_deployed``: deployed models whose tensors are the mapped bytes of a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import integrations
from .half_scales import restore_scales
from .mapped import map_tensors
from .messages import list_names
from .packable import update_ties
from .ternary_layer import TernaryLayer

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)


@torch.inference_mode(False)  # Nothing could be loaded into tensors made in inference mode.
def load_deployed(path: str | os.PathLike[str], model: _Model, *, strict: bool = True) -> _Model:
    """Load a deployed model from safetensors files, without a copy of them in memory.

    The files hold the packed format itself, so they are mapped, and on the CPU the tensors of the
    model are the mapped bytes. They take no memory of the process, processes that load the same
    file share it, and the system can drop unused pages and read them again. If the model is built
    on the meta device, it takes no other memory either::

        safetensors.torch.save_model(bitlinear.deploy(model), "model.safetensors")

        with torch.device("meta"):
            model = Model()
        model = bitlinear.load_deployed("model.safetensors", bitlinear.convert(model)).eval()

    The file names neither ``eps`` nor ``quant_type``: make the layers with the values that the
    saved model had.

    All tensors of the file are loaded, as by ``load_state_dict(..., assign=True)``: also those of
    other layers than BitLinear, with the dtypes of the file. Each tensor goes to the device of the
    tensor that it replaces. In place of a tensor on the meta device it stays on the CPU, and
    ``model.cuda()`` copies it out of the file. Every packed byte is read and checked. Parameters
    that are tied in the model stay tied if the file has one of them; the file can omit the others,
    and the tied tensors that ``save_model`` omits.

    The mapping is private: a write to a tensor copies the pages that it touches, and never changes
    the file. Do not change the file while a tensor of it is alive. On Linux and macOS you can
    delete it, or rename another file to its name. But bytes written into it can appear in the
    model, and a process that reads past a new end is killed (SIGBUS). So save a loaded model under
    another name, then ``os.replace`` the file. Windows refuses to change or delete a mapped file.

    Args:
        path: A safetensors file; the index of several files (``*.safetensors.index.json``, as
            Hugging Face writes it); or a directory with one index, or with one safetensors file.
        model: Its BitLinear layers and bitlinear.Embedding become deployed, if they are not.
        strict: Whether the names in the file and those of the model must be the same. If False,
            the differences are logged as warnings by the logger ``"bitlinear"``, and tensors on the
            meta device can stay there.

    Returns:
        ``model``.

    Raises:
        ImportError: The package safetensors is not installed.
        OSError: A file cannot be opened, or a directory contains no model or several.
        TypeError: The file has scales under the name for fp16 in another dtype.
        ValueError: A file is damaged or not a safetensors file; or it has floating-point weights
            of a layer of this package, or packed weights of an ``nn.Linear`` or ``nn.Embedding``
            that is not. The model is unchanged.
        RuntimeError: A tensor does not fit, a packed weight is not valid, or, if ``strict``, names
            differ or tensors stay on the meta device. As by ``load_state_dict``, the other tensors
            are loaded.
    """
    tensors, omitted = map_tensors(Path(path))
    restore_scales(tensors)
    _check_layer_kinds(model, tensors)
    return assign(model, tensors, omitted=omitted, source=str(path), strict=strict)


def assign(
    model: _Model,
    tensors: dict[str, Tensor],
    *,
    source: str,
    omitted: Mapping[str, str] | None = None,
    strict: bool = True,
) -> _Model:
    """Make tensors the tensors of a model, as :func:`load_deployed` says.

    Args:
        model: The model.
        tensors: By their names in the deployed model.
        source: What the tensors come from, for messages.
        omitted: Names that are not in ``tensors``, each with the name of the tensor for it.
        strict: As for :func:`load_deployed`.

    Returns:
        ``model``.

    Raises:
        RuntimeError: As for :func:`load_deployed`.
    """
    targets = _targets(model)
    for name, kept in (omitted or {}).items():
        if name in targets and kept in tensors:
            tensors.setdefault(name, tensors[kept])
    _move_and_tie(tensors, targets)
    result = model.load_state_dict(tensors, strict=strict, assign=True)
    update_ties(module for module in model.modules() if isinstance(module, TernaryLayer))

    on_meta = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if on_meta and strict:
        raise RuntimeError(
            f"{source} has no values for {list_names(on_meta)}, on the meta device: state_dict() "
            f"omits non-persistent buffers, so set their values before load_deployed"
        )
    for names, problem in (
        (result.missing_keys, "not in the file"),
        (result.unexpected_keys, "not in the model"),
        (on_meta, "left on the meta device"),
    ):
        if names:
            _logger.warning("%s: %s: %s", source, problem, list_names(names))
    integrations.attach_to_transformers(model)
    return model


def _check_layer_kinds(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError if the file has another kind of layer than the model."""
    layers = {
        f"{name}." if name else "": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    packed_names = [p + "w_packed" for p, m in layers.items() if not isinstance(m, TernaryLayer)]
    packed = [name for name in packed_names if name in tensors]
    if packed:
        raise ValueError(
            f"the file has packed weights, {list_names(packed)}, for layers that are not "
            f"ternary: call bitlinear.convert(model) first, without excluding them, and make an "
            f"nn.Embedding a bitlinear.Embedding"
        )
    float_names = [p + "weight" for p, m in layers.items() if isinstance(m, TernaryLayer)]
    floats = [name for name in float_names if name in tensors]
    if floats:
        raise ValueError(
            f"the file has floating-point weights of BitLinear layers, {list_names(floats)}, so "
            f"the model was not deployed: load it with load_state_dict, call "
            f"bitlinear.deploy(model), and save it again"
        )


class _Target(NamedTuple):
    """A tensor of the model that a tensor of the file replaces.

    Attributes:
        tensor: The tensor of the model.
        part: ``"w_packed"`` or ``"w_scale"``, which together replace a weight in training; ``""``
            for a tensor that one tensor replaces.
    """

    tensor: Tensor
    part: str = ""


def _targets(model: nn.Module) -> dict[str, _Target]:
    """The tensors of ``model``, by the names that they have in the deployed model."""
    state = model.state_dict(keep_vars=True)
    targets = {name: _Target(value) for name, value in state.items() if isinstance(value, Tensor)}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        weight = targets.pop(prefix + "weight", None) if isinstance(module, TernaryLayer) else None
        if weight is not None:
            for part in ("w_packed", "w_scale"):
                targets[prefix + part] = _Target(weight.tensor, part)
    return targets


def _move_and_tie(tensors: dict[str, Tensor], targets: dict[str, _Target]) -> None:
    """Move tensors to the devices of their targets, and share them among tied targets."""
    ties: dict[tuple[int, str], list[str]] = {}
    for name, target in targets.items():
        ties.setdefault((id(target.tensor), target.part), []).append(name)
    for names in ties.values():
        target = targets[names[0]]
        device = torch.device("cpu") if target.tensor.is_meta else target.tensor.device
        found = {name: tensors[name] for name in names if name in tensors}
        if len({id(tensor) for tensor in found.values()}) == 1:
            shared = next(iter(found.values())).to(device)
            if len(names) > 1 and isinstance(target.tensor, nn.Parameter) and not target.part:
                # load_state_dict would make one parameter for each name.
                shared = nn.Parameter(shared, requires_grad=target.tensor.requires_grad)
            found = dict.fromkeys(names, shared)
        tensors.update({name: tensor.to(device) for name, tensor in found.items()})
