"""A base of autograd functions, and the dtypes of their outputs and products."""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

# Whether this CPU has instructions with which torch multiplies matrices of bf16. (torch has these
# functions since 2.6.)
CPU_MULTIPLIES_BF16 = any(
    getattr(torch.cpu, name, bool)()
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
)


class Function(torch.autograd.Function):
    """An autograd function that is cheap to call and works under ``vmap``."""

    generate_vmap_rule = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # apply() reads it in every call; to compute it takes as long as a small forward pass.
        setattr(cls.forward, "__signature__", inspect.signature(cls.forward))  # noqa: B010


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a layer's output for the input ``x``; under autocast, the autocast dtype."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if _autocasts(device_type) else x.dtype


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context in which autocast does not round products to 16 bits."""
    if _autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def backward_dtype(device_type: str, grad_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products in a backward pass.

    A GPU multiplies 16-bit numbers many times faster, and ``nn.Linear`` rounds its operands to them
    as well. Most CPUs gain little, or lose.
    """
    return grad_dtype if device_type == "cuda" else torch.float32


def compiles_transform() -> bool:
    """Whether torch.compile traces a transform of torch.func; older versions do not tell."""
    return torch.__version__ >= "2.13" and torch._C._are_functorch_transforms_active()


def _autocasts(device_type: str) -> bool:
    # is_autocast_enabled raises for "meta".
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
