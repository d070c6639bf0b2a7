"""Files that stay mapped because of a few tensors."""

from __future__ import annotations

import bisect
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

# Files of which a model uses more stay mapped.
_MOST_IN_USE = 0.25

_MAPS = Path("/proc/self/maps")


@torch.inference_mode(False)  # Nothing could be loaded into tensors made in inference mode.
@torch.no_grad()
def release_files(model: nn.Module) -> None:
    """Copy the last tensors that a model has in mapped files, so that the system unmaps the files.

    ``from_pretrained`` maps a file as a whole, and each tensor keeps all of it. After a conversion
    a few norms would keep the weights that were replaced: their pages count as memory of the
    process until the system needs them for something else. Parameters and buffers get new memory
    with the same values, and stay the same objects. A file stays mapped if the model uses more than
    a quarter of it, if tensors of the model share their memory there, or if other processes see
    what is written to the memory. Linux only: elsewhere every file stays.
    """
    ranges, sizes = _mapped_files()
    starts = [start for start, _, _ in ranges]
    tensors: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in (*model.parameters(), *model.buffers()):
        is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if is_plain and tensor.device.type == "cpu":
            index = bisect.bisect(starts, tensor.untyped_storage().data_ptr()) - 1
            if index >= 0 and tensor.data_ptr() < ranges[index][1]:
                tensors[ranges[index][2]].append(tensor)
    for file, found in tensors.items():
        memory = {tensor.untyped_storage().data_ptr() for tensor in found}
        in_use = sum(tensor.nbytes for tensor in found)
        if len(memory) == len(found) and in_use <= _MOST_IN_USE * sizes[file]:
            for tensor in found:
                tensor.data = tensor.detach().clone()


def _mapped_files() -> tuple[list[tuple[int, int, str]], dict[str, int]]:
    """The address ranges of files that are mapped privately, and how many bytes of each file are.

    Returns:
        Ranges as start, end and file, in ascending order; the bytes by file.
    """
    try:
        lines = _MAPS.read_text(errors="replace").split("\n")
    except OSError:  # another system, or a sandbox
        lines = []
    ranges: list[tuple[int, int, str]] = []
    sizes: dict[str, int] = defaultdict(int)
    for line in filter(None, lines):
        addresses, permissions, _, device, inode, *_ = line.split()
        if inode != "0" and permissions.endswith("p"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            ranges.append((start, end, f"{device} {inode}"))
            sizes[f"{device} {inode}"] += end - start
    return sorted(ranges), sizes
