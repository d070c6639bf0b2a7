"""``torch.onnx.export``, both of its exporters, for models with BitLinear layers.

``import bitlinear`` arranges that :func:`register` is called as soon as ``torch.onnx`` is imported;
users call nothing here. Each operator is written once, in plain torch operations. The exporter of
``torch.export`` (``dynamo=True``) uses these functions as decompositions. The exporter of
TorchScript (``dynamo=False``) runs the same functions on :class:`_GraphValue`, which writes ONNX
nodes.

The packed weights of a deployed layer are initializers of the file, uint8, and are unpacked in the
graph. A runtime that folds constants unpacks them once, when it loads the file; onnxruntime then
holds fp32 weights in memory. The integer product is a ``MatMul`` in fp32, in parts whose sums are
exact, and every other operation is rounded as in the layer, so a runtime that computes in fp32
gives the bits of the layer. ONNX does not define the results of ``ReduceMax``, ``Clip`` and casts
to integers for NaN, so comparisons remove NaN before them.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import packing
from ..groups import count_groups
from ..quantize import EXACT_K, HIGH_WEIGHT, INTEGER_DTYPES, PER_ROW, QMAX

_MIN_OPSET = 13


def _multiply_groups(t: Tensor, w_scale: Tensor, group_size: int, in_features: int) -> Tensor:
    """Weights ``(N, in_features)``, each times the scale of its group in ``(N, groups)``."""
    groups = count_groups(in_features, group_size)
    t = torch.constant_pad_nd(t, (0, groups * group_size - in_features), 0.0)
    t = t.reshape((-1, groups, group_size)) * w_scale.reshape((-1, groups, 1))
    return t.reshape((-1, groups * group_size)).narrow(1, 0, in_features)


def _scale_activations(x: Tensor, eps: float, act_bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """``q`` as fp32, with the absmax and the scale of each token.

    A token with an infinity or a NaN has an infinite absmax and the scale NaN.
    """
    x = x.to(torch.float32)
    magnitude = x.abs()
    magnitude = torch.where(magnitude < math.inf, magnitude, math.inf)
    absmax = magnitude.amax(dim=-1, keepdim=True)
    absmax = torch.where(absmax < eps, eps, absmax)  # Clip would make infinity finite
    qmax = absmax.new_full((), QMAX[act_bits])
    # There is no clamp: |x * (qmax / absmax)| exceeds qmax by two roundings at most.
    q = (x * (qmax / absmax)).round()
    return q, absmax, torch.where(absmax < math.inf, absmax / qmax, math.nan)


def quantize_activations(x: Tensor, eps: float = 1e-6, act_bits: int = 8) -> tuple[Tensor, Tensor]:
    """``torch.ops.bitlinear.quantize_activations``."""
    q, absmax, s_x = _scale_activations(x, eps, act_bits)
    return torch.where(absmax < math.inf, q, 0.0).to(INTEGER_DTYPES[act_bits]), s_x


def expand_activations(q: Tensor, s_x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.ops.bitlinear.expand_activations``."""
    return (q.to(torch.float32) * s_x).to(dtype or torch.float32)


def quantize_weight(
    weight: Tensor, eps: float = 1e-6, group_size: int = 0
) -> tuple[Tensor, Tensor]:
    """``torch.ops.bitlinear.quantize_weight``.

    Raises:
        NotImplementedError: ``group_size`` is positive.
    """
    if group_size > 0:
        raise NotImplementedError(
            f"bitlinear: a layer with scales for groups of {group_size} inputs is exported to ONNX "
            f"only if it is deployed: call deploy() first"
        )
    out_features, in_features = weight.shape
    weight = weight.to(torch.float32)
    sums = weight.abs().to(torch.float64).sum(dim=-1)
    count = in_features
    if group_size == PER_ROW:
        sums = sums.reshape((out_features, 1))
    else:
        sums, count = sums.sum(dim=-1), out_features * in_features
    mean = (sums / sums.new_full((1,), count)).to(torch.float32)
    w_scale = torch.where(mean < eps, eps, mean)
    ratio = weight / w_scale
    # The code is clamp(rint(ratio), -1, 1) + 1, or 1 for NaN.
    codes = (ratio > 0.5).to(torch.float32) - (ratio < -0.5).to(torch.float32) + 1.0
    columns = packing.packed_shape(0, in_features)[1]
    codes = torch.constant_pad_nd(codes, (0, 4 * columns - in_features), 1.0)
    codes = codes.reshape((out_features, columns, 4))
    parts = [codes.select(-1, i) * shift for i, shift in enumerate((64.0, 16.0, 4.0, 1.0))]
    return functools.reduce(operator.add, parts).to(torch.uint8), w_scale


def expand_weight(
    w_packed: Tensor,
    in_features: int,
    w_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    group_size: int = 0,
) -> Tensor:
    """``torch.ops.bitlinear.expand_weight``."""
    # The table holds the four weights of each byte. It is computed, because a decomposition cannot
    # contain a constant tensor.
    byte = torch.arange(256, dtype=torch.float32, device=w_packed.device)
    codes = torch.stack([(byte * shift).floor() for shift in (1 / 64, 1 / 16, 1 / 4, 1)], dim=-1)
    table = codes - (codes * 0.25).floor() * 4.0 - 1.0
    columns = packing.packed_shape(0, in_features)[1]
    weight = torch.embedding(table, w_packed.to(torch.int32)).reshape((-1, 4 * columns))
    weight = weight.narrow(1, 0, in_features)
    if w_scale is not None and group_size > 0:
        weight = _multiply_groups(weight, w_scale, group_size, in_features)
    elif w_scale is not None:
        weight = weight * w_scale
    return weight.to(dtype or torch.float32)


def linear(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    eps: float = 1e-6,
    group_size: int = 0,
    act_bits: int = 8,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch.ops.bitlinear.linear``.

    Scales of groups are rounded already, by ``deploy()``.
    """
    q, _, s_x = _scale_activations(x, eps, act_bits)
    t = expand_weight(w_packed, in_features)
    if group_size > 0:
        # Integers times a power of two per row, below 2**53 of them: sums in fp64 are exact.
        weight = _multiply_groups(t, w_scale, group_size, in_features)
        product = q.to(torch.float64) @ weight.to(torch.float64).T
        y = product.to(torch.float32) * s_x
        return _add_bias(y, bias).to(out_dtype or x.dtype)
    if act_bits == 8:
        product = _integer_product(q, t, in_features)
    else:
        high = (q / q.new_full((), HIGH_WEIGHT)).round()
        high = torch.where(high > QMAX[8], QMAX[8], high)
        high = torch.where(high < -QMAX[8], -QMAX[8], high)
        low = q - high * HIGH_WEIGHT
        halves = [_integer_product(half, t, in_features).to(torch.float64) for half in (high, low)]
        product = halves[0] * HIGH_WEIGHT + halves[1]
    product = product.to(torch.float32)
    y = product * (s_x * w_scale.reshape((-1,)))
    return _add_bias(y, bias).to(out_dtype or x.dtype)


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(torch.float32)


def _integer_product(q: Tensor, t: Tensor, in_features: int) -> Tensor:
    """``q @ t.T`` of fp32 integers, exact, in fp32 or int32."""
    if in_features <= EXACT_K:
        return q @ t.T
    starts = range(0, in_features, EXACT_K)
    sizes = [min(EXACT_K, in_features - start) for start in starts]
    parts = [
        (q.narrow(-1, start, size) @ t.narrow(1, start, size).T).to(torch.int32)
        for start, size in zip(starts, sizes)
    ]
    return functools.reduce(operator.add, parts)


_DECOMPOSITIONS: tuple[Callable[..., Any], ...] = (
    linear,
    quantize_weight,
    expand_weight,
    quantize_activations,
    expand_activations,
)


def register() -> None:
    """Register the operators with ``torch.onnx``, already imported."""
    from torch._decomp import decomposition_table, meta_table

    exporter: Any = torch.onnx
    for decomposition in _DECOMPOSITIONS:
        overload = getattr(torch.ops.bitlinear, decomposition.__name__).default
        # The exporter uses the whole decomposition table; compilers look up operators by name. Fake
        # tensors of unknown sizes prefer a decomposition to the operator's own fake implementation,
        # unless the operator is also in the meta table.
        decomposition_table.setdefault(overload, decomposition)
        meta_table.setdefault(overload, overload)
        exporter.register_custom_op_symbolic(
            overload._schema.name, _symbolic(overload, decomposition), _MIN_OPSET
        )


def _symbolic(overload: Any, decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """The function that the exporter of TorchScript calls for a node of ``overload``."""
    from torch.onnx import symbolic_helper

    def to_argument(graph: Any, value: Any, name: str, kind: str) -> Any:
        if symbolic_helper._is_none(value):
            return None
        if "Tensor" in kind:
            return _GraphValue(graph, value, _scalar_type(value).dtype())
        constant = symbolic_helper._get_const(value, "f" if kind == "float" else "i", name)
        return _scalar_type(constant).dtype() if name.endswith("dtype") else constant

    def symbolic(graph: Any, *values: Any) -> Any:
        arguments = [
            to_argument(graph, value, formal.name, str(formal.type))
            for value, formal in zip(values, overload._schema.arguments)
        ]
        results = decomposition(*arguments)
        if isinstance(results, tuple):
            return tuple(result.value for result in results)
        return results.value

    return symbolic


def _scalar_type(source: Any) -> Any:
    """The ``torch.onnx.JitScalarType`` of a value, a dtype, or the number of a dtype."""
    kind = cast(Any, torch.onnx).JitScalarType
    if isinstance(source, torch.dtype):
        return kind.from_dtype(source)
    return kind(source) if isinstance(source, int) else kind.from_value(source)


class _GraphValue:
    """A tensor of the graph that the exporter of TorchScript writes.

    It has the methods of a tensor that the decompositions use. Each method adds a node.
    """

    device = torch.device("cpu")  # the device of constants, even if the model is on another one

    def __init__(self, graph: Any, value: Any, dtype: torch.dtype) -> None:
        self.graph = graph
        self.value = value
        self.dtype = dtype

    def _node(
        self, kind: str, *operands: Any, dtype: torch.dtype | None = None, **attributes: Any
    ) -> _GraphValue:
        """Add a node with this value as its first input, and return the output."""
        others = [self._to_value(operand) for operand in operands]
        value = self.graph.op(kind, self.value, *others, **attributes)
        return _GraphValue(self.graph, value, dtype or self.dtype)

    def _to_value(self, operand: Any) -> Any:
        """The graph's value of an operand; numbers get the dtype of this one, indices int64."""
        if isinstance(operand, _GraphValue):
            return operand.value
        dtype = torch.int64 if isinstance(operand, (list, tuple)) else self.dtype
        constant = operand if isinstance(operand, Tensor) else torch.tensor(operand, dtype=dtype)
        return self.graph.op("Constant", value_t=constant)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Handle the functions of torch that the decompositions use."""
        if function is torch.where:
            condition, chosen, other = args
            first = chosen if isinstance(chosen, cls) else other
            operands = [first._to_value(operand) for operand in (chosen, other)]
            value = condition.graph.op("Where", condition.value, *operands)
            return cls(condition.graph, value, first.dtype)
        if function is torch.embedding:
            table, index = args
            value = index.graph.op("Gather", index._to_value(table), index.value)
            return cls(index.graph, value, table.dtype)
        if function is torch.constant_pad_nd:
            tensor, (before, after), value = args
            return tensor._node("Pad", [0, before, 0, after], value)
        return NotImplemented

    @property
    def shape(self) -> list[int]:
        sizes = self.value.type().sizes()
        if sizes is None:
            raise RuntimeError(
                "torch.onnx.export(dynamo=False) does not know the shape of the rows that an "
                "Embedding with a scale per row quantises in training: call deploy() first, or "
                "export with dynamo=True"
            )
        return list(sizes)

    @property
    def T(self) -> _GraphValue:
        return self._node("Transpose", perm_i=[1, 0])

    def to(self, dtype: torch.dtype) -> _GraphValue:
        if dtype == self.dtype:
            return self
        # The exporter folds the Cast of a constant, and would write the packed weights four times
        # as large, as fp32. It does not fold Abs.
        source = self.abs() if self.dtype == torch.uint8 else self
        return source._node("Cast", dtype=dtype, to_i=_scalar_type(dtype).onnx_type())

    def new_full(self, size: tuple[int, ...], value: float) -> _GraphValue:
        constant = torch.full(size, value, dtype=self.dtype)
        return _GraphValue(self.graph, self._to_value(constant), self.dtype)

    def abs(self) -> _GraphValue:
        return self._node("Abs")

    def round(self) -> _GraphValue:
        return self._node("Round")

    def amax(self, dim: int, keepdim: bool) -> _GraphValue:
        if self.graph.opset < 18:
            return self._node("ReduceMax", axes_i=[dim], keepdims_i=int(keepdim))
        return self._node("ReduceMax", [dim], keepdims_i=int(keepdim))

    def sum(self, dim: int) -> _GraphValue:
        return self._node("ReduceSum", [dim], keepdims_i=0)

    def reshape(self, shape: tuple[int, ...]) -> _GraphValue:
        return self._node("Reshape", list(shape))

    def select(self, dim: int, index: int) -> _GraphValue:
        return self._node("Gather", torch.tensor(index), axis_i=dim)

    def narrow(self, dim: int, start: int, length: int) -> _GraphValue:
        return self._node("Slice", [start], [start + length], [dim])

    def __add__(self, other: Any) -> _GraphValue:
        return self._node("Add", other)

    def __sub__(self, other: Any) -> _GraphValue:
        return self._node("Sub", other)

    def __mul__(self, other: Any) -> _GraphValue:
        return self._node("Mul", other)

    def __truediv__(self, other: Any) -> _GraphValue:
        return self._node("Div", other)

    def __matmul__(self, other: Any) -> _GraphValue:
        return self._node("MatMul", other)

    def __lt__(self, other: Any) -> _GraphValue:
        return self._node("Less", other, dtype=torch.bool)

    def __gt__(self, other: Any) -> _GraphValue:
        return self._node("Greater", other, dtype=torch.bool)
