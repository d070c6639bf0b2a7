"""Safetensors files as tensors: their mapped bytes, without a copy."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .messages import list_names

# Hugging Face gives this name to the index of the files that hold one model.
_INDEX_SUFFIX = ".safetensors.index.json"


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tensors of a model.

    Args:
        path: As for :func:`bitlinear.load_deployed`.

    Returns:
        The tensors, on the CPU, and the names that ``save_model`` omitted as tied, each with the
        name it kept.

    Raises:
        ImportError, OSError, ValueError: As for :func:`bitlinear.load_deployed`.
    """
    if path.is_dir():
        path = _find_in(path)
    if path.suffix != ".json":
        return _map_file(path)
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {file: _map_file(path.parent / file) for file in sorted(set(weight_map.values()))}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeError) as error:
        raise ValueError(
            f"{path} is not an index of safetensors files ({error!r}): it needs a 'weight_map' "
            f"from the names of tensors to the names of the files beside it"
        ) from error
    missing = [name for name, file in weight_map.items() if name not in files[file][0]]
    if missing:
        raise ValueError(
            f"{path} names tensors that are not in their files, {list_names(missing)}: the index "
            f"and the files belong to different models; download or save them again"
        )
    tensors = {name: files[file][0][name] for name, file in weight_map.items()}
    return tensors, {name: kept for _, omitted in files.values() for name, kept in omitted.items()}


def _find_in(directory: Path) -> Path:
    """The index in a directory, or else its safetensors file."""
    for pattern in ("*" + _INDEX_SUFFIX, "*.safetensors"):
        found = sorted(directory.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = list_names(file.name for file in found)
            raise FileNotFoundError(
                f"{directory} contains several models, {names}: give the path of one of them"
            )
    raise FileNotFoundError(
        f"{directory} contains neither *.safetensors nor *{_INDEX_SUFFIX}: give the path of a "
        f"model that was saved with safetensors"
    )


def _map_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "load_deployed needs the package safetensors, which is not installed: "
            "pip install safetensors"
        ) from error
    try:
        # Old versions of safetensors obey a default device; a mapped file is on the CPU.
        with torch.device("cpu"), safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            omitted = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or is damaged ({error}): download or save it "
            f"again; if torch.save wrote it, use torch.load and load_state_dict"
        ) from error
    for name, tensor in tensors.items():
        # The format does not require alignment. safetensors aligns; other writers may not.
        if tensor.data_ptr() % tensor.element_size():
            tensors[name] = tensor.clone()
    return tensors, omitted
