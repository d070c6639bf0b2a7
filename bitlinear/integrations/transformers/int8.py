"""A table of int8 rows with one scale each, and its product with activations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...arguments import ACTIVATION_DTYPES
from ...autograd import Function
from ...ops import has_cpu_kernels
from ...packing import enumerate_chunks
from ...quantize import epilogue, join_products, quantize_activations, split_activations
from .small_kernels import call

_QMAX = 127

# Sums of in_features products of 127 * 127 must fit in int32.
MAX_IN_FEATURES = (2**31 - 1) // _QMAX**2

# The most tokens for which our product on a CPU is faster than torch._int_mm (128256 x 2560, 2
# threads of Zen 4: 1 token 7 to 10 ms and 32, 8 tokens 32 and 48, 32 tokens 111 and 110).
_FEW_TOKENS = 8

# Rows that are expanded at a time where no int8 product can be used.
_BLOCK_ROWS = 4096

# Tokens of one product by torch._int_mm: its sums take 8 bytes for each token and row.
_BLOCK_TOKENS = 64

# Below every activation that counts; a row of zeros needs a scale, too.
_EPS = 1e-30


class Int8Table(nn.Module):
    """Rows of int8 values, each with a scale: ``row = values * scale``.

    ``scale`` is the absmax of the row divided by 127, rounded up to 8 significant bits, so that
    kernels that take it in bf16 compute with the same number. ``values`` are rounded to nearest.

    Args:
        rows: ``N``.
        columns: ``K``.
        dtype: Floating-point dtype of the rows that a lookup returns.
        device: Device of the buffers.

    Attributes:
        values: int8 buffer ``(N, K)``, in [-127, 127].
        scales: fp32 buffer ``(N, 1)``. It stays fp32 through ``half()`` or ``to(dtype)``.
        dtype: As above; it follows ``to(dtype)``.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: Any = None) -> None:
        super().__init__()
        self.dtype = dtype
        values = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        self.register_buffer("values", values)
        self.register_buffer("scales", torch.ones(rows, 1, dtype=torch.float32, device=device))

    @classmethod
    @torch.inference_mode(False)  # Nothing could be loaded into buffers made in inference mode.
    @torch.no_grad()
    def from_weight(cls, weight: Tensor) -> Int8Table:
        """Quantise a floating-point weight ``(N, K)`` of finite values.

        Beyond the weight this takes the table and, on a CPU, a few MB.
        """
        rows, columns = weight.shape
        table = cls(rows, columns, weight.dtype, weight.device)
        for first, chunk in enumerate_chunks(weight):
            last = first + len(chunk)
            values = chunk.to(torch.float32)
            absmax = values.abs().amax(dim=1, keepdim=True)
            scales = _round_up_to_bf16((absmax / _QMAX).clamp_min(torch.finfo(torch.float32).tiny))
            table.scales[first:last] = scales
            quotients = (values / scales).round_()
            table.values[first:last] = quotients.clamp_(-_QMAX, _QMAX).to(torch.int8)
        return table

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of the table, in :attr:`dtype`, shape ``(*ids.shape, K)``."""
        values = nn.functional.embedding(ids, self.values)
        return (values * nn.functional.embedding(ids, self.scales)).to(self.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """``x @ rows.T`` for ``x`` of shape ``(..., K)``, in the dtype of ``x``.

        Tokens are quantised to 16 bits with their absmax, and multiplied as integers, exactly (see
        :func:`bitlinear.head_products.reference_int8_product`): few tokens on a CPU by a kernel of
        ours, others as two digits of 8 bits by ``torch._int_mm``. On devices without an integer
        product, blocks of rows are expanded to the dtype of ``x``. ``x`` can need a gradient.

        Raises:
            ValueError: The last dimension is not ``K``.
        """
        if x.shape[-1:] != self.values.shape[1:]:
            raise ValueError(
                f"the input must have {self.values.shape[1]} features in its last dimension, but "
                f"its shape is {tuple(x.shape)}"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tokens = x.reshape(-1, x.shape[-1])
        y: Tensor = _Product.apply(tokens, self.values, self.scales)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], len(self.values))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Table:
        """Move the buffers; ``scales`` keep their dtype, :attr:`dtype` changes."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Return the size, for ``print``."""
        return f"{self.values.shape[0]}, {self.values.shape[1]}"


class _Product(Function):
    """``x @ (values * scales).T`` with the gradient of ``x``; the table is a constant."""

    @staticmethod
    def forward(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        if x.dtype in ACTIVATION_DTYPES and _uses_own_product(len(x), values):
            q, s_x = torch.ops.bitlinear.quantize_activations(x, _EPS, 16)
            y: Tensor = torch.ops.bitlinear.int8_product(q, s_x, values, scales, x.dtype)
            return y
        product = _integer_product if _has_integer_product(values) else _expanded_product
        parts = [call(product, part, values, scales) for part in x.split(_BLOCK_TOKENS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        values, scales = ctx.saved_tensors
        dx = grad.new_zeros(len(grad), values.shape[1], dtype=torch.float32)
        for block in _blocks(len(values)):
            dy = grad[:, block].to(torch.float32) * scales[block].T
            dx += dy @ values[block].to(torch.float32)
        return dx.to(grad.dtype), None, None


def _integer_product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    q, s_x = quantize_activations(x, eps=_EPS, act_bits=16)
    digits = torch.cat(split_activations(q)).to(torch.int8)
    if x.device.type == "cuda":
        # cuBLAS wants more than 16 rows, in multiples of 8.
        padding = max(32 - len(digits), -len(digits) % 8)
        digits = nn.functional.pad(digits, (0, 0, 0, padding))
        sums = torch._int_mm(digits, values.T)
    else:
        # The table is the first operand: oneDNN rearranges the second one in every call.
        sums = torch._int_mm(values, digits.T).T
    high, low = sums[: 2 * len(x)].chunk(2)
    return epilogue(join_products(high, low).to(torch.float32), s_x, scales, None).to(x.dtype)


def _expanded_product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    blocks = _blocks(len(values))
    sums = [x @ values[block].to(x.dtype).T for block in blocks]
    return (torch.cat(sums, dim=1) * scales.T).to(x.dtype)


def _uses_own_product(tokens: int, values: Tensor) -> bool:
    if values.device.type != "cpu" or not has_cpu_kernels():
        return False
    return tokens <= _FEW_TOKENS or not _has_integer_product(values)


def _has_integer_product(values: Tensor) -> bool:
    # cuBLAS needs multiples of 8. oneDNN returns wrong sums for rows of one value.
    if values.device.type == "cuda":
        return all(size % 8 == 0 for size in values.shape)
    return values.device.type == "cpu" and values.shape[1] % 8 == 0 and cpu_product_is_exact()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cpu_product_is_exact() -> bool:
    """Whether ``torch._int_mm`` is exact on this CPU.

    oneDNN adds pairs of products in 16 bits on x86 CPUs without VNNI, and saturates.
    """
    return _try_cpu_product()  # torch.compile would trace a cached function itself


@functools.cache
def _try_cpu_product() -> bool:
    ones = torch.full((64, 64), _QMAX, dtype=torch.int8)
    return all(
        bool((torch._int_mm(ones, sign * ones[:columns].T) == sign * 64 * _QMAX**2).all())
        for columns in (1, 2, 16, 64)
        for sign in (1, -1)
    )


def _round_up_to_bf16(positive: Tensor) -> Tensor:
    """The least numbers of 8 significant bits that are not below these fp32 numbers."""
    return ((positive.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(first, first + _BLOCK_ROWS) for first in range(0, rows, _BLOCK_ROWS))
