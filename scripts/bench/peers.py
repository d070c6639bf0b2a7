"""Layers of other libraries, made of the ternary weights of a deployed BitLinear.

They are the strongest competitors: humming-kernels and gemlite on a GPU, llama.cpp on a CPU. None
of them adds a bias.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

import bitlinear
from bitlinear.packing import unpack_ternary
from scripts.bench import ggml
from scripts.bench.timing import Call

# Limits of a peer's errors, relative to the rms of a token's outputs. A scale and an output of bf16
# are rounded by 0.002 each; gemlite 0.6 also adds parts of a single token's product in bf16: 0.019
# rms and 0.13 at most for 8192 x 8192. There 32 columns that are left out give 0.06 rms.
_RMS_ERROR, _LARGEST_ERROR = 0.03, 0.25


def checked_input(M: int, K: int, device: str, dtype: torch.dtype) -> Tensor:
    """Return an input ``(M, K)`` that int8 activations hold exactly: each 256 values reach 127."""
    x = torch.randint(-127, 128, (M, K), device=device)
    x[:, ::256] = 127
    return x.to(dtype)


def check(result: Tensor, x: Tensor, weight: Tensor) -> None:
    """Compare a peer's result with the dense product ``x @ weight.T``, for a ``checked_input``.

    Raises:
        RuntimeError: It differs by more than roundings of sums to bf16 explain.
    """
    expected = x.float() @ weight.T
    if result.shape != expected.shape:
        raise RuntimeError(f"wrong result: its shape is {list(result.shape)}")
    errors = (result.float() - expected) / expected.square().mean(-1, keepdim=True).sqrt()
    rms, largest = float(errors.square().mean().sqrt()), float(errors.abs().max())
    if not (rms <= _RMS_ERROR and largest <= _LARGEST_ERROR):  # either can be NaN
        raise RuntimeError(f"wrong result: relative errors of {rms:.2g} rms, {largest:.2g} at most")


def _ternary(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return ``(t, scale)``: ternary weights, int8, and the scale of the weight, shape ``(1,)``."""
    layer = bitlinear.BitLinear.from_linear(linear).deploy()
    return unpack_ternary(layer.w_packed, layer.in_features), layer.w_scale


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise RuntimeError(f"{package} is not installed: run pip install {package}") from error


def humming(linear: nn.Linear, activations: str) -> nn.Module:
    """Return a layer of humming-kernels, bf16 in and out.

    Args:
        linear: The layer.
        activations: What the weights are multiplied with: ``"bf16"`` or ``"int8"``.
    """
    library = _import("humming.layer", "humming-kernels")
    N, K = linear.weight.shape
    layer = library.HummingLayer(
        shape_n=N,
        shape_k=K,
        weight_config={"dtype": "uint2"},
        input_config={"dtype": {"bf16": "bfloat16", "int8": "int8"}[activations]},
        torch_dtype=torch.bfloat16,
    ).to(linear.weight.device)
    t, scale = _ternary(linear)
    # A code is the weight plus 2. The first of four codes is in the lowest bits of a byte.
    c0, c1, c2, c3 = (t + 2).to(torch.uint8).view(N, K // 4, 4).unbind(-1)
    weight = (c0 | (c1 << 2) | (c2 << 4) | (c3 << 6)).view(torch.int32)
    scales = scale.to(torch.bfloat16).expand(N, 1)
    layer.load_from_tensors({"weight": weight, "weight_scale": scales})
    layer.transform()
    return layer


def gemlite(linear: nn.Linear, activations: str) -> nn.Module:
    """Return a layer of gemlite, bf16 in and out.

    Args:
        linear: The layer.
        activations: What the weights are multiplied with: ``"bf16"`` or ``"int8"``.
    """
    library = _import("gemlite.helper", "gemlite")
    helper = {"bf16": library.A16W158_INT, "int8": library.A8W158_INT_dynamic}[activations]
    t, scale = _ternary(linear)
    device = linear.weight.device
    layer = helper(device=device, dtype=torch.bfloat16).from_weights(t.to(torch.bfloat16), scale)
    return layer.to(device)  # 0.6.0 leaves the scales of A16W158_INT on the CPU


def llama_cpp(linear: nn.Linear) -> ggml.Weights:
    """Return the TQ2_0 weight of llama.cpp."""
    t, scale = _ternary(linear)
    return ggml.Weights(t * scale)


def bind_llama_cpp(weights: Sequence[ggml.Weights], x: Tensor) -> list[Call]:
    """Return calls on as many threads as torch has now."""
    return [ggml.Product(weight, x, torch.get_num_threads()) for weight in weights]
