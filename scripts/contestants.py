"""What is timed: a deployed BitLinear with each kernel, and whatever else computes x @ w.T.

A contestant is made in two steps, as the weights of a shape serve every batch size: from an
``nn.Linear`` to the layer (``build``), and from an input to a call without arguments.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Callable

import torch
from torch import Tensor, nn

import bitlinear
from bitlinear import jit
from timing import Call, Contestant

# The dtype of what BitLinear gets and returns.
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

Prepare = Callable[[Tensor], Call]

# How torch says that this build or version has no such operation, or not for this shape.
_UNAVAILABLE = (RuntimeError, AttributeError, ImportError)


@dataclass(frozen=True)
class Kind:
    """A kind of layer that is no deployed BitLinear.

    Attributes:
        label: Its name for people.
        devices: Where it exists.
        build: The first step; gets an fp32 layer of the shape, on the device.
        note: What one must know in order to compare it fairly.
        is_peer: Whether one would use it for want of a BitLinear.
    """

    label: str
    devices: tuple[str, ...]
    build: Callable[[nn.Linear], Prepare]
    note: str = ""
    is_peer: bool = True


def _float(linear: nn.Linear, dtype: torch.dtype) -> Prepare:
    layer = copy.deepcopy(linear).to(dtype)
    return lambda x: partial(layer, x.to(dtype))


def _int8_dynamic(linear: nn.Linear) -> Prepare:
    with warnings.catch_warnings():
        # Deprecated in favour of another package; but it is what torch itself has.
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated")
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, .* are deprecated")
        quantize = torch.ao.quantization.quantize_dynamic
        layer = quantize(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]
    return lambda x: partial(layer, x)


def _int_mm(linear: nn.Linear) -> Prepare:
    def random(rows: int) -> Tensor:
        shape = (rows, linear.in_features)
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=linear.weight.device)

    weight = random(linear.out_features).t()
    return lambda x: partial(torch._int_mm, random(len(x)), weight)


def _bitlinear(linear: nn.Linear, deployed: bool) -> Prepare:
    layer = bitlinear.BitLinear.from_linear(linear)
    if deployed:
        layer.deploy()
    return lambda x: partial(layer, x.to(DTYPES[x.device.type]))


_EVERYWHERE = ("cpu", "cuda")

OTHERS: dict[str, Kind] = {
    "fp32": Kind("nn.Linear fp32", _EVERYWHERE, partial(_float, dtype=torch.float32)),
    "fp16": Kind("nn.Linear fp16", ("cuda",), partial(_float, dtype=torch.float16)),
    "bf16": Kind("nn.Linear bf16", _EVERYWHERE, partial(_float, dtype=torch.bfloat16)),
    "int8_dynamic": Kind("dynamic int8 Linear", ("cpu",), _int8_dynamic),
    "int_mm": Kind(
        "torch._int_mm",
        _EVERYWHERE,
        _int_mm,
        note="the int8 product alone: it quantises nothing and leaves int32 sums",
    ),
    "undeployed": Kind(
        "BitLinear, undeployed",
        _EVERYWHERE,
        partial(_bitlinear, deployed=False),
        note="in eval mode, in which it quantises its weights anew in every call",
        is_peer=False,
    ),
}


def available_kernels(device: str) -> list[str]:
    """What a deployed layer can run on, best first."""
    names = [verdict.variant for verdict in bitlinear.available_kernels() if verdict.ok]
    if device == "cuda":
        return ["cuda" if "cuda" in names else "reference"]
    return [name for name in names if name != "cuda"]


def build_kernels(names: Iterable[str]) -> dict[str, str]:
    """Has CPU kernels compiled that have not been yet; which ones cannot be, and why."""
    failed = {}
    for name in names:
        try:
            jit.activate(name)
        except RuntimeError as error:
            failed[name] = one_line(error)
    return failed


class Layers:
    """The layers of one shape: N outputs, K inputs."""

    def __init__(
        self, N: int, K: int, others: Iterable[str], kernels: Iterable[str], device: str
    ) -> None:
        self._shape = (N, K)
        self._device = device
        self._kernels = list(kernels)
        linear = nn.Linear(K, N, device=device).eval()
        self._deployed = _bitlinear(linear, deployed=True)
        self._others: dict[str, Prepare] = {}
        self._failed: dict[str, str] = {}
        for name in others:
            try:
                self._others[name] = OTHERS[name].build(linear)
            except _UNAVAILABLE as error:
                self._failed[name] = one_line(error)

    def contestants(self, M: int) -> tuple[list[Contestant], dict[str, str]]:
        """Those for batches of M tokens, each of which has run once; who is missing, and why."""
        x = torch.randn(M, self._shape[1], device=self._device)
        call = self._deployed(x)
        field = [Contestant(name, call, self._switch(name)) for name in self._kernels]
        for contestant in field:
            contestant.enter()
            contestant.call()
        failed = dict(self._failed)
        for name, prepare in self._others.items():
            try:
                call = prepare(x)
                call()
            except _UNAVAILABLE as error:
                failed[name] = one_line(error)
            else:
                field.append(Contestant(name, call))
        return field, failed

    def _switch(self, kernel: str) -> Call:
        # A GPU has one implementation, and the operator finds it by the device of its input.
        return (lambda: None) if self._device == "cuda" else partial(jit.activate, kernel)


def one_line(error: Exception) -> str:
    """The first line of a message, without the paths of this machine."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"(?<!\w)(/[\w.+@-]+){2,}", "<path>", first)
