"""``load_deployed``: models that run from the file in which they are stored."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import integrations
from .linear import BitLinear
from .packable import update_ties

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)

# How Hugging Face names the list of the files that hold one model.
_INDEX = ".safetensors.index.json"


@torch.inference_mode(False)  # tensors made in inference mode could never be loaded into
def load_deployed(path: str | os.PathLike[str], model: _Model, *, strict: bool = True) -> _Model:
    """Loads a deployed model from safetensors files, without a copy of them in memory.

    The packed format is the one on disk: the files are mapped, and on the CPU the tensors of the
    model are the mapped bytes. They take no memory of the process, processes that load the same
    file share it, and the system may drop and read again what is not in use. Built on the meta
    device, a model has nothing else either::

        safetensors.torch.save_model(bitlinear.deploy(model), "model.safetensors")

        with torch.device("meta"):
            model = Model()
        model = bitlinear.load_deployed("model.safetensors", bitlinear.convert(model)).eval()

    The file names neither ``eps`` nor ``quant_type``: make the layers with those that were saved.

    Everything in the file is loaded, as ``load_state_dict(..., assign=True)`` does it: what is not
    a BitLinear's as well, with the dtypes of the file. A tensor goes to the device of the one that
    it replaces; in place of one on the meta device, to the CPU, from where ``model.cuda()`` copies
    it out of the file. Every packed byte is read and checked. Parameters that are tied in the model
    stay tied if the file has one of them; it need not have the others, nor what ``save_model`` left
    out for being tied.

    The mapping is private: what writes to a tensor gets a copy of the pages that it touches, and
    never changes the file. The file should not change either, while a tensor of it is alive. On
    Linux and macOS it may be deleted, or replaced by renaming another one to its name; but bytes
    written into it can appear in the model, and a process that reads past a new end is killed
    (SIGBUS). So save a loaded model under another name, then ``os.replace`` it. Windows refuses to
    change or to delete a file that is mapped.

    Args:
        path: A safetensors file; the index of several (``*.safetensors.index.json``, as Hugging
            Face writes it); or a directory that contains one index, or else one safetensors file.
        model: Its BitLinear layers become deployed, whatever they were.
        strict: Whether the names in the file and those of the model must be the same. If not, the
            differences go to the logger ``"bitlinear"``, and tensors on the meta device may be
            left there.

    Returns:
        ``model``.

    Raises:
        ImportError: The package safetensors is not installed.
        OSError: A file cannot be opened, or a directory contains none or several.
        ValueError: A file is damaged or none of safetensors; or it has floating-point weights of a
            BitLinear, or packed ones of another ``nn.Linear``. The model is unchanged.
        RuntimeError: A tensor does not fit, a packed weight is not valid, or, if ``strict``, names
            differ or tensors are left on the meta device. As with ``load_state_dict``, the other
            tensors have been loaded.
    """
    tensors, tied = _map(Path(path))
    _check_kinds(model, tensors)
    slots = _slots(model)
    for name, kept in tied.items():
        if name in slots and kept in tensors:
            tensors.setdefault(name, tensors[kept])
    _fit(tensors, slots)
    result = model.load_state_dict(tensors, strict=strict, assign=True)
    update_ties(module for module in model.modules() if isinstance(module, BitLinear))

    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left and strict:
        raise RuntimeError(
            f"{path} has nothing for {_some(left)}, on the meta device: state_dict() leaves "
            f"non-persistent buffers out, so give them their values before load_deployed"
        )
    for names, what in (
        (result.missing_keys, "not in the file"),
        (result.unexpected_keys, "not in the model"),
        (left, "left on the meta device"),
    ):
        if names:
            _logger.warning("%s: %s: %s", path, what, _some(names))
    integrations.attach_to_transformers(model)
    return model


def _map(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The mapped tensors, and the names that save_model left out, each with the one it kept."""
    if path.is_dir():
        path = _only_one(path)
    if path.suffix != ".json":
        return _map_file(path)
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {file: _map_file(path.parent / file) for file in sorted(set(weight_map.values()))}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no index of safetensors files ({error!r}): it needs a 'weight_map' from "
            f"the names of tensors to those of files beside it"
        ) from error
    lost = [name for name, file in weight_map.items() if name not in files[file][0]]
    if lost:
        raise ValueError(
            f"{path} names tensors that are not in their files, {_some(lost)}: index and files are "
            f"not of one model; fetch or save them again"
        )
    tensors = {name: files[file][0][name] for name, file in weight_map.items()}
    return tensors, {name: kept for _, tied in files.values() for name, kept in tied.items()}


def _only_one(directory: Path) -> Path:
    """The index in a directory, or else its safetensors file."""
    for pattern in ("*" + _INDEX, "*.safetensors"):
        found = sorted(directory.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise FileNotFoundError(
                f"{directory} contains several models, {_some(file.name for file in found)}: give "
                f"the path of one of them"
            )
    raise FileNotFoundError(f"{directory} contains neither *.safetensors nor *{_INDEX}")


def _map_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "load_deployed needs the package safetensors: pip install 'bitlinear[safetensors]'"
        ) from error
    try:
        # Old versions of safetensors obey a default device; a mapped file is on the CPU.
        with torch.device("cpu"), safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tied = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file, or a damaged one ({error}): fetch or save it again; "
            f"what torch.save wrote is for torch.load and load_state_dict"
        ) from error
    for name, tensor in tensors.items():
        # The format does not align anything. safetensors itself does; other writers may not.
        if tensor.data_ptr() % tensor.element_size():
            tensors[name] = tensor.clone()
    return tensors, tied


def _check_kinds(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError where the file has another kind of layer than the model."""
    linears = {
        f"{name}." if name else "": isinstance(module, BitLinear)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    }
    plain = [p + "w_packed" for p, ternary in linears.items() if not ternary]
    plain = [name for name in plain if name in tensors]
    if plain:
        raise ValueError(
            f"the file has packed weights, {_some(plain)}, for layers that are no BitLinear: call "
            f"bitlinear.convert(model) first, without excluding them"
        )
    floats = [p + "weight" for p, ternary in linears.items() if ternary]
    floats = [name for name in floats if name in tensors]
    if floats:
        raise ValueError(
            f"the file has floating-point weights of BitLinear layers, {_some(floats)}, so the "
            f"model was not deployed: load it with load_state_dict, call bitlinear.deploy(model), "
            f"and save it again"
        )


class _Slot(NamedTuple):
    """A place for a tensor: what is there now, and which of two tensors that replace it goes in."""

    tensor: Tensor
    part: str = ""


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Where the tensors of ``model`` go, by the names that they have once it is deployed."""
    state = model.state_dict(keep_vars=True)
    slots = {name: _Slot(value) for name, value in state.items() if isinstance(value, Tensor)}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        weight = slots.pop(prefix + "weight", None) if isinstance(module, BitLinear) else None
        if weight is not None:
            for part in ("w_packed", "w_scale"):
                slots[prefix + part] = _Slot(weight.tensor, part)
    return slots


def _fit(tensors: dict[str, Tensor], slots: dict[str, _Slot]) -> None:
    """Moves tensors to the devices of their slots, and fills slots tied to one that is filled."""
    ties: dict[tuple[int, str], list[str]] = {}
    for name, slot in slots.items():
        ties.setdefault((id(slot.tensor), slot.part), []).append(name)
    for names in ties.values():
        slot = slots[names[0]]
        device = torch.device("cpu") if slot.tensor.is_meta else slot.tensor.device
        found = {name: tensors[name] for name in names if name in tensors}
        if len({id(tensor) for tensor in found.values()}) == 1:
            shared = next(iter(found.values())).to(device)
            if len(names) > 1 and isinstance(slot.tensor, nn.Parameter) and not slot.part:
                # One object under all names: load_state_dict would make a parameter of each.
                shared = nn.Parameter(shared, requires_grad=slot.tensor.requires_grad)
            found = dict.fromkeys(names, shared)
        tensors.update({name: tensor.to(device) for name, tensor in found.items()})


def _some(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
