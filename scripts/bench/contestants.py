"""Contestants: a deployed BitLinear on each kernel, and everything else that computes x @ w.T.

A contestant is made in two steps, because the weights of a shape serve every batch size: ``build``
makes a layer of an ``nn.Linear``, and ``bind`` makes a call without arguments of it and an input.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, Callable

import torch
from torch import Tensor, nn

import bitlinear
from bitlinear import runtime
from bitlinear.arguments import QUANT_TYPES
from scripts import tools
from scripts.bench import peers
from scripts.bench.devices import Device, Mode
from scripts.bench.timing import Call, Contestant, do_nothing

# The quantisation type of the layer that is compared.
DEFAULT_TYPE = "ai8pc_wpt"

# A layer, or the tensors of a bare product.
Weights = Any

# Roles in the results. A complete layer has floating-point inputs and outputs, as a BitLinear has;
# a bare product gets operands that are quantised already, and leaves the sums as they are.
KERNEL, LAYER, PRODUCT, OTHER = "kernel", "layer", "product", "other"

# torch raises one of these if its build lacks an operation, or if the operation rejects a shape.
_UNAVAILABLE = (RuntimeError, AttributeError, ImportError)


@dataclass(frozen=True)
class Kind:
    """A contestant that is not a deployed BitLinear.

    Attributes:
        label: Its name for people.
        role: ``LAYER``, ``PRODUCT`` or ``OTHER``.
        devices: The names of the devices that have it.
        build: Makes the weights of an fp32 layer of the shape, on the device.
        bind: Makes the calls of some copies of the weights, which share the input. The input has
            the dtype of BitLinear's.
        note: What a fair comparison must take into account.
        by_default: Whether it takes part if nobody names it.
        package: For a peer (see ``peers.py``), the distribution that it comes from. A peer's
            result is checked before it is timed.
    """

    label: str
    role: str
    devices: tuple[str, ...]
    build: Callable[[nn.Linear], Weights]
    bind: Callable[[Sequence[Weights], Tensor], list[Call]]
    note: str = ""
    by_default: bool = True
    package: str = ""

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What ``build``, ``bind`` and the calls raise if this machine cannot run them."""
        return (Exception,) if self.package else _UNAVAILABLE


def _bind(layers: Sequence[nn.Module], x: Tensor) -> list[Call]:
    return [partial(layer, x) for layer in layers]


def _float(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(linear).to(dtype)


def _bind_float(layers: Sequence[nn.Linear], x: Tensor) -> list[Call]:
    return _bind(layers, x.to(layers[0].weight.dtype))


def _int8_dynamic(linear: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        # Deprecated in favour of another package, but torch itself has no other.
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated")
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, .* are deprecated")
        quantize = torch.ao.quantization.quantize_dynamic
        return quantize(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]


def _random_int8(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)


def _int_mm(linear: nn.Linear) -> Tensor:
    return _random_int8(*linear.weight.shape, linear.weight.device).t()


def _bind_int_mm(weights: Sequence[Tensor], x: Tensor) -> list[Call]:
    q = _random_int8(*x.shape, x.device)
    return [partial(torch._int_mm, q, weight) for weight in weights]


def _fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(q, scale)``, with one scale for the whole of ``x``."""
    dtype = torch.float8_e4m3fn
    scale = x.abs().amax().float() / torch.finfo(dtype).max
    return (x / scale).to(dtype), scale


def _scaled_mm(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    q, scale = _fp8(linear.weight.detach())
    return q.t(), scale


def _bind_scaled_mm(weights: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> list[Call]:
    # Some versions take multiples of 16 rows only. Tiles of the product are not smaller.
    q, scale = _fp8(nn.functional.pad(x, (0, 0, 0, -len(x) % 16)))
    options = {"scale_a": scale, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return [
        partial(torch._scaled_mm, q, weight, scale_b=weight_scale, **options)
        for weight, weight_scale in weights
    ]


def _bitlinear(linear: nn.Linear) -> nn.Module:
    return bitlinear.BitLinear.from_linear(linear)


def _deployed(linear: nn.Linear, quant_type: str = DEFAULT_TYPE) -> nn.Module:
    return bitlinear.BitLinear.from_linear(linear, quant_type).deploy()


def _deployed_types() -> dict[str, Kind]:
    """The deployed layer of other quantisation types, on the kernel that was chosen."""
    grouped = ("ai8pc_wpg128", "ai8pc_wpg64", "ai16pc_wpg128")
    return {
        name: Kind(
            f"BitLinear {name}",
            OTHER,
            ("cpu",) if name in grouped else ("cpu", "cuda"),
            partial(_deployed, quant_type=name),
            _bind,
            note=f"the deployed layer with quant_type={name!r}, in place of {DEFAULT_TYPE!r}",
            by_default=False,
        )
        for name in (*QUANT_TYPES, *grouped)
        if name != DEFAULT_TYPE
    }


def _gpu_peers(name: str, package: str, build: Callable[..., nn.Module]) -> dict[str, Kind]:
    """Return another library's layers of two-bit weights, with activations of bf16 and of int8."""
    activations = {"bf16": "bf16 activations", "int8": "int8 activations, one scale per token"}
    return {
        f"{name}_{dtype}": Kind(
            f"{name}, {dtype} x 2 bits",
            LAYER,
            ("cuda",),
            partial(build, activations=dtype),
            _bind,
            note=f"BitLinear's ternary weights; {note}; adds no bias",
            by_default=False,
            package=package,
        )
        for dtype, note in activations.items()
    }


# The layer on every CPU kernel, or on the GPU.
_DEPLOYED = Kind("BitLinear", KERNEL, ("cpu", "cuda"), _deployed, _bind)

OTHERS: dict[str, Kind] = {
    "fp32": Kind(
        "nn.Linear fp32", LAYER, ("cpu",), partial(_float, dtype=torch.float32), _bind_float
    ),
    "fp16": Kind(
        "nn.Linear fp16", LAYER, ("cuda",), partial(_float, dtype=torch.float16), _bind_float
    ),
    "bf16": Kind(
        "nn.Linear bf16",
        LAYER,
        ("cpu", "cuda"),
        partial(_float, dtype=torch.bfloat16),
        _bind_float,
    ),
    "int8_dynamic": Kind("dynamic int8 Linear", LAYER, ("cpu",), _int8_dynamic, _bind),
    "fp8": Kind(
        "torch._scaled_mm fp8",
        PRODUCT,
        ("cuda",),
        _scaled_mm,
        _bind_scaled_mm,
        note="the bare fp8 product, with a scale for each tensor: it quantises nothing, adds no "
        "bias, and gets M rounded up to a multiple of 16",
    ),
    "int_mm": Kind(
        "torch._int_mm",
        PRODUCT,
        ("cpu", "cuda"),
        _int_mm,
        _bind_int_mm,
        note="the bare int8 product: it quantises nothing and leaves int32 sums",
    ),
    "undeployed": Kind(
        "BitLinear, undeployed",
        OTHER,
        ("cpu",),
        _bitlinear,
        _bind,
        note="in eval mode without deploy(): every call quantises the weights",
    ),
    **_gpu_peers("humming", "humming-kernels", peers.humming),
    **_gpu_peers("gemlite", "gemlite", peers.gemlite),
    "llama_cpp": Kind(
        "llama.cpp TQ2_0",
        LAYER,
        ("cpu",),
        peers.llama_cpp,
        peers.bind_llama_cpp,
        note="ggml_mul_mat with BitLinear's ternary weights; int8 activations, one scale per 256; "
        "adds no bias; a graph of its own for each product, as a model does not have",
        by_default=False,
        package="llama-cpp-python",
    ),
    **_deployed_types(),
}


def available_kernels(device: str) -> list[str]:
    """Return the kernels that a deployed layer can run on, best first."""
    names = [verdict.variant for verdict in bitlinear.available_kernels() if verdict.ok]
    if device == "cuda":
        return ["cuda" if "cuda" in names else "reference"]
    return [name for name in names if name != "cuda"]


def chosen_kernel(device: str) -> str | None:
    """Return the kernel that ``import bitlinear`` chose; None if no CPU kernel is compiled."""
    return available_kernels(device)[0] if device == "cuda" else runtime.current().kernel


def build_kernels(names: Iterable[str]) -> dict[str, str]:
    """Compile the CPU kernels that are not in the cache; return why the others fail, by kernel."""
    failed = {}
    for name in names:
        try:
            runtime.activate(name)
        except RuntimeError as error:
            failed[name] = one_line(error)
    return failed


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the peers' packages that are installed, by package."""
    found = {}
    for package in dict.fromkeys(OTHERS[name].package for name in names if OTHERS[name].package):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


class Layers:
    """The layers of one shape: N outputs, K inputs.

    Every contestant has ``copies`` layers, each with weights of its own.
    """

    def __init__(
        self,
        N: int,
        K: int,
        others: Iterable[str],
        kernels: Iterable[str],
        device: Device,
        copies: int = 1,
    ) -> None:
        self._K = K
        self._device = device
        self._kernels = list(kernels)
        self._copies = copies
        self._others: dict[str, list[Weights]] = {}
        self._failed: dict[str, str] = {}
        # As models are loaded: outside of inference mode, in which they then run.
        with torch.inference_mode(False), torch.no_grad():
            linear = nn.Linear(K, N, device=device.torch_device).eval()
            self._deployed = self._copied(_DEPLOYED.build(linear))
            for name in others:
                try:
                    self._others[name] = self._copied(OTHERS[name].build(linear))
                except OTHERS[name].failures as error:
                    self._failed[name] = one_line(error)

    def contestants(self, M: int, mode: Mode) -> tuple[list[Contestant], dict[str, str]]:
        """Return the contestants for batches of M tokens, and why the missing ones are missing.

        Each of them has run once.
        """
        x = torch.randn(M, self._K, device=self._device.torch_device).to(self._device.dtype)
        field = []
        failed = dict(self._failed)
        runners = [
            *((name, self._switch(name), _DEPLOYED, self._deployed) for name in self._kernels),
            *(
                (name, self._switch(None), OTHERS[name], copies)
                for name, copies in self._others.items()
            ),
        ]
        for name, enter, kind, copies in runners:
            try:
                enter()
                if kind.package:
                    for layer in {id(copies[i]): copies[i] for i in (0, -1)}.values():
                        self._check(kind, layer, M)
                calls = kind.bind(copies, x)
                calls[0]()
                call, repeats = mode.arrange(calls)
            except kind.failures as error:
                failed[name] = one_line(error)
            else:
                field.append(Contestant(name, call, enter, repeats))
        return field, failed

    def _check(self, kind: Kind, layer: Weights, M: int) -> None:
        """Raise an error if a peer's result is wrong.

        The check has an input of its own: the memory that a result gets can still hold the right
        result of an earlier contestant, and a peer that computes nothing would leave it there.
        """
        x = peers.checked_input(M, self._K, self._device.torch_device, self._device.dtype)
        (call,) = kind.bind([layer], x)
        peers.check(call(), x, self._deployed[0].dequantize())

    def _copied(self, weights: Weights) -> list[Weights]:
        return [weights, *(copy.deepcopy(weights) for _ in range(self._copies - 1))]

    def _switch(self, kernel: str | None) -> Call:
        """Return a call that activates a CPU kernel; None: the one that the import chose."""
        # A GPU has one implementation, and the operator finds it by the device of its input.
        if self._device.name == "cuda" or not bitlinear.HAS_BITLINEAR:
            return do_nothing
        return partial(runtime.activate, kernel)


def one_line(error: Exception) -> str:
    """Return the first line of a message, without the paths of this machine."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return tools.without_paths(first)
