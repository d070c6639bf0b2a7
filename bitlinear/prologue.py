"""What a fused product does to its input before it quantises it: a gate, then an RMSNorm.

The specification, in plain torch. Every float operation here is one separately rounded fp32
operation, in the order in which the kernels do it, so that the results are the same to the bit. The
values between the operations are not rounded to the dtype of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import reinterpret

ACTIVATIONS = ("silu", "relu2")
"""The activations of a gate: ``silu(a) = a / (1 + exp(-a))`` and ``relu2(a) = relu(a)**2``."""


def input_width(in_features: int, activation: str | None) -> int:
    """The values of ``x`` for each token: K, or 2 K with a gate."""
    return in_features if activation is None else 2 * in_features


def apply_prologue(
    x: Tensor,
    activation: str | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
) -> Tensor:
    """Return what the product quantises: ``rms_norm(gate(x))``, either or both left out.

    Args:
        x: fp32, fp16 or bf16, shape ``(..., K)``; with an activation ``(..., 2 K)``.
        activation: One of :data:`ACTIVATIONS`; None for no gate.
        norm_weight: Floating point, shape ``(K,)``; None for no norm.
        norm_eps: What the norm adds to the mean square.

    Returns:
        fp32, shape ``(..., K)``.
    """
    values = x.to(torch.float32)
    if activation is not None:
        values = gate(values, activation)
    if norm_weight is not None:
        values = rms_norm(values, norm_weight.to(torch.float32), norm_eps)
    return values


def gate(x: Tensor, activation: str) -> Tensor:
    """``activation(a) * b``, where ``a`` is the first half of the last dimension, ``b`` the second.

    As :func:`exp` ends at 88, ``silu(a)`` is ``a * 6.1e-39`` for ``a < -88``, where it should be 0.

    Args:
        x: fp32, shape ``(..., 2 K)``.
        activation: One of :data:`ACTIVATIONS`.

    Returns:
        fp32, shape ``(..., K)``.
    """
    a, b = x.chunk(2, dim=-1)
    if activation == "silu":
        return a / (exp(-a) + 1.0) * b
    positive = a.clamp_min(0.0)
    return positive * positive * b


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * (1 / sqrt(sum(x**2) / K + eps)) * weight`` (arXiv 1910.07467).

    Args:
        x: fp32, shape ``(..., K)``.
        weight: fp32, shape ``(K,)``.
        eps: At least 0.

    Returns:
        fp32, shape ``(..., K)``.
    """
    total = sum_in_pairs(x * x)
    mean = total / torch.full_like(total, x.shape[-1])
    root = _sqrt(mean + torch.full_like(mean, eps))
    return x * (torch.ones_like(root) / root) * weight


def _sqrt(x: Tensor) -> Tensor:
    """The square root, correctly rounded: on a CPU torch's own of fp32 is off by an ulp at times.

    No square root of an fp32 number is close enough to the middle of two for fp64 to miss its side.
    """
    return x.sqrt() if x.device.type == "mps" else x.to(torch.float64).sqrt().to(torch.float32)


def sum_in_pairs(x: Tensor) -> Tensor:
    """The sum of the last dimension, in an order that every kernel can keep to.

    Neighbours are added, then the neighbours of these sums, and so on; a value without a neighbour
    stays. So the sum of any ``2**n`` values, from a multiple of ``2**n`` on, is a part of the
    result: each thread can compute some of them.

    Args:
        x: fp32, shape ``(..., K)``.

    Returns:
        fp32, shape ``(..., 1)``.
    """
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        x = x[..., 0::2] + x[..., 1::2]
    return x


# exp(z) = 2**n * exp(r) with z = n * ln(2) + r; |r| <= ln(2) / 2. The high part of ln(2) has 9
# bits, so n times it is exact. Cephes' polynomial of exp(r), with an error of about one ulp.
_LOG2_E = 1.44269504
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_POLYNOMIAL = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
    *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
)
# Beyond these, 2**n is no normal number. Between them lies all that 1 + exp(z) can tell apart.
_SMALLEST, _LARGEST = -86.0, 88.0
_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to the nearest integer, ties to even


def exp(z: Tensor) -> Tensor:
    """``exp`` of fp32 values; those beyond -86 and 88 give what these give."""
    z = z.clamp(_SMALLEST, _LARGEST)
    n = (z * _LOG2_E + _ROUND) - _ROUND
    r = z - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = torch.full_like(r, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = p * r + coefficient
    p = p * (r * r) + r + 1.0
    powers = n.nan_to_num(0.0).to(torch.int32) << 23
    return reinterpret(reinterpret(p, torch.int32) + powers, torch.float32)
