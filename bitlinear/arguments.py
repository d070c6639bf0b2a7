"""Checks of arguments: dtypes, shapes, devices and ranges.

``kernels/arguments.h`` makes the same checks of the operators' arguments, with the same messages.
"""

from __future__ import annotations

import operator
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import packing
from .groups import GROUP_UNIT, count_groups
from .prologue import ACTIVATIONS, input_width
from .quantize import PER_ROW, QMAX

MAX_IN_FEATURES = 500_000
"""The largest ``K`` for which the product, 127 * K, and the kernels' partial sums fit int32."""

WEIGHT_TYPES = {"wpt": 0, "wpc": PER_ROW}
"""The ``group_size`` of ternary weights (``w``) with one scale per tensor (``pt``) or per row of
the weight (``pc``). ``wpg<G>`` has one for each group of ``G`` weights of a row; the ``group_size``
is ``G``."""


class QuantType(NamedTuple):
    """What the name of a quantisation type says.

    Attributes:
        act_bits: The bits of a quantised activation, 8 or 16.
        group_size: 0 for one scale of the weights per tensor, -1 for one per output feature, or the
            number of weights of an output feature that share one.
    """

    act_bits: int
    group_size: int

    @property
    def name(self) -> str:
        """The name, such as ``"ai8pc_wpt"``."""
        return f"ai{self.act_bits}pc_{weight_type_name(self.group_size)}"


def weight_type_name(group_size: int) -> str:
    """The name of the type of weights with this ``group_size``, such as ``"wpt"``."""
    if group_size > 0:
        return f"wpg{group_size}"
    return next(name for name, value in WEIGHT_TYPES.items() if value == group_size)


def parse_weight_type(name: str) -> int:
    """The ``group_size`` of a type such as ``"wpg128"``; raises ValueError for another name."""
    group_size = _find_group_size(name)
    if group_size is None:
        raise ValueError(_bad_type(WEIGHT_TYPES, "wpg<G>", name))
    return group_size


def parse_quant_type(name: str) -> QuantType:
    """What the name of a quantisation type says; raises ValueError for another name."""
    match = re.fullmatch(r"ai(8|16)pc_(\w+)", name) if isinstance(name, str) else None
    group_size = match and _find_group_size(match[2])
    if match is None or group_size is None:
        raise ValueError(_bad_type(QUANT_TYPES, "ai8pc_wpg<G>, ai16pc_wpg<G>", name))
    return QuantType(int(match[1]), group_size)


def _find_group_size(name: str) -> int | None:
    if not isinstance(name, str):
        return None
    match = re.fullmatch(r"wpg([1-9][0-9]{0,9})", name)
    if match is None:
        return WEIGHT_TYPES.get(name)
    return int(match[1]) if _is_group(int(match[1])) else None


def _is_group(size: int) -> bool:
    return 0 < size <= MAX_IN_FEATURES and size % GROUP_UNIT == 0


def _bad_type(names: Iterable[str], groups: str, name: str) -> str:
    return (
        f"quant_type must be one of {[*names]}, or {groups} with a multiple G of {GROUP_UNIT} "
        f"from {GROUP_UNIT} to {MAX_IN_FEATURES}, but it is {reprlib.repr(name)}"
    )


QUANT_TYPES = {
    f"ai{act_bits}pc_{weights}": QuantType(act_bits, group_size)
    for act_bits in (8, 16)
    for weights, group_size in WEIGHT_TYPES.items()
}
"""``ai8pc_wpt``: activations (``a``) as int8 (``i8``), one scale per token (``pc``), and the type
of the weights."""

MAX_WEIGHTS = 4
"""The largest number of weights that a fused product reads one input for."""

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MIN_EPS = {8: 2e-36, 16: 4e-34}
_MAX_EPS = 1e18
"""Between these, eps / max is a normal fp32 number, and max / eps and eps * eps are finite; max is
the largest quantised activation."""


def group_size_of(w_scale: Tensor) -> int:
    """The ``group_size`` of weights with this scale, ``(1,)`` or ``(N, 1)``: without groups."""
    return PER_ROW if w_scale.dim() == 2 else 0


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``, as the C++ messages spell it."""
    return str(dtype).replace("torch.", "")


def check_act_bits(act_bits: int) -> None:
    """Raise ValueError unless quantised activations can have this many bits."""
    if act_bits not in _MIN_EPS:
        raise ValueError(f"bitlinear: act_bits must be 8 or 16, but it is {act_bits}")


def check_group_size(group_size: int) -> None:
    """Raise ValueError unless weights can have such groups."""
    if group_size not in (0, PER_ROW) and not _is_group(group_size):
        raise ValueError(
            f"bitlinear: group_size must be 0 (one scale per tensor), -1 (one per output feature) "
            f"or a positive multiple of {GROUP_UNIT} up to {MAX_IN_FEATURES}, but it is "
            f"{group_size}"
        )


def check_eps(eps: float, act_bits: int = 8) -> None:
    """Raise TypeError or ValueError unless fp32 can divide by ``eps``, and ``eps`` be divided."""
    if not isinstance(eps, (int, float)):
        raise TypeError(
            f"bitlinear: eps must be a number, but it is {eps!r}: pass device and dtype by name, "
            f"as eps and quant_type come before them"
        )
    least, largest = _MIN_EPS[act_bits], QMAX[act_bits]
    if not least <= eps <= _MAX_EPS:
        raise ValueError(
            f"bitlinear: eps must be between {least:g} and 1e+18 (eps / {largest}, {largest} / eps "
            f"and eps * eps have to fit float32), but it is {eps:g}"
        )


def check_features(
    in_features: int,
    out_features: int,
    in_name: str = "in_features",
    out_name: str = "out_features",
) -> None:
    """Raise TypeError or ValueError unless a layer can have this many features."""
    for name, value in ((in_name, in_features), (out_name, out_features)):
        try:
            operator.index(value)
        except TypeError:
            raise TypeError(f"bitlinear: {name} must be an integer, but it is {value!r}") from None
    if in_features < 1 or out_features < 1:
        raise ValueError(
            f"bitlinear: {in_name} and {out_name} must be at least 1, but they are "
            f"{in_features} and {out_features}"
        )
    if in_features > MAX_IN_FEATURES:
        raise ValueError(
            f"bitlinear: {in_name} must be at most {MAX_IN_FEATURES} (where int32 sums are "
            f"exact), but it is {in_features}: split the layer along {in_name}"
        )


def check_strength(strength: float) -> None:
    """Raise TypeError or ValueError unless the strength is a number between 0 and 1."""
    if not isinstance(strength, (int, float)):
        raise TypeError(f"quantization_strength must be a number, but it is {strength!r}")
    if not 0 <= strength <= 1:
        raise ValueError(f"quantization_strength must be between 0 and 1, not {strength}")


def raise_unsupported_layout(x: Tensor, *_: Any) -> NoReturn:
    """Raise the TypeError for a sparse, nested or otherwise unstrided tensor."""
    layout = "torch.nested" if x.is_nested else str(x.layout)
    raise TypeError(
        f"bitlinear: x must be strided, but it is {layout}: convert it with x.to_dense(), or a "
        f"nested tensor to layout=torch.jagged"
    )


def check_activations(x: Tensor, width: int, name: str = "in_features") -> None:
    """Raise TypeError for an unsupported layout or dtype of ``x``, ValueError for its shape.

    ``name`` says what ``width``, the last dimension, is.
    """
    if x.layout != torch.strided or x.is_nested:
        raise_unsupported_layout(x)
    if x.dtype not in ACTIVATION_DTYPES:
        model = ", and a model that makes it with model.float()" if x.dtype == torch.double else ""
        raise TypeError(
            f"bitlinear: x must be float32, float16 or bfloat16, but it is {dtype_name(x.dtype)}: "
            f"convert it, for example with x.float(){model}"
        )
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(
            f"bitlinear: the last dimension of x must be {name} = {width}, but x has shape "
            f"{list(x.shape)}"
        )


def check_device(x: Tensor, name: str, other: Tensor | None) -> None:
    """Raise ValueError unless ``other`` (if it is given) is on the device of ``x``."""
    if other is not None and other.device != x.device:
        raise ValueError(
            f"bitlinear: all tensors must be on one device, but x is on {x.device} and {name} is "
            f"on {other.device}: move one of them with .to(device)"
        )


def check_linear(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    eps: float,
    group_size: int,
    act_bits: int,
    out_dtype: torch.dtype | None,
) -> None:
    """Check the arguments of ``torch.ops.bitlinear.linear``.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: ``in_features``, ``eps``, ``group_size``, ``act_bits``, a shape or a device is
            wrong.
    """
    _check_product(x, in_features, in_features, eps, group_size, act_bits, out_dtype)
    check_operand(x, w_packed, w_scale, bias, in_features, group_size)


def check_fused_linear(
    x: Tensor,
    w_packed: Sequence[Tensor],
    w_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    in_features: int,
    eps: float,
    group_size: int,
    act_bits: int,
    activation: str | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Check the arguments of ``torch.ops.bitlinear.fused_linear``.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A number, a name, a shape, the length of a list or a device is wrong.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"bitlinear: activation must be None or one of {', '.join(ACTIVATIONS)}, but it is "
            f"{activation}"
        )
    width = input_width(in_features, activation)
    _check_product(x, in_features, width, eps, group_size, act_bits, out_dtype)
    count = len(w_packed)
    if not 1 <= count <= MAX_WEIGHTS or len(w_scale) != count or len(bias) != count:
        raise ValueError(
            f"bitlinear: w_packed, w_scale and bias must be lists of one length, from 1 to "
            f"{MAX_WEIGHTS}, but they have {count}, {len(w_scale)} and {len(bias)} elements"
        )
    for operands in zip(w_packed, w_scale, bias):
        check_operand(x, *operands, in_features, group_size)
    if norm_weight is not None:
        _check_vector(x, "norm_weight", norm_weight, in_features, "in_features")
        if not 0 <= norm_eps <= _MAX_EPS:
            raise ValueError(
                f"bitlinear: norm_eps must be between 0 and 1e+18, but it is {norm_eps:g}"
            )
    if residual is not None:
        if residual.dtype not in ACTIVATION_DTYPES:
            raise TypeError(
                f"bitlinear: residual must be float32, float16 or bfloat16, but it is "
                f"{dtype_name(residual.dtype)}: convert it, for example with residual.float()"
            )
        shape = [*x.shape[:-1], sum(w.shape[0] for w in w_packed)]
        if list(residual.shape) != shape:
            raise ValueError(
                f"bitlinear: residual must have the shape of the output, {shape}, but it has shape "
                f"{list(residual.shape)}"
            )
        check_device(x, "residual", residual)


def check_in_features(in_features: int) -> None:
    """Raise ValueError unless int32 holds every sum of this many products."""
    if not 1 <= in_features <= MAX_IN_FEATURES:
        raise ValueError(
            f"bitlinear: in_features must be between 1 and {MAX_IN_FEATURES} (where int32 sums are "
            f"exact), but it is {in_features}: split the layer along in_features"
        )


def _check_product(
    x: Tensor,
    in_features: int,
    width: int,
    eps: float,
    group_size: int,
    act_bits: int,
    out_dtype: torch.dtype | None,
) -> None:
    """Check everything but the weights; ``width`` is the last dimension of ``x``."""
    check_group_size(group_size)
    check_act_bits(act_bits)
    check_in_features(in_features)
    check_eps(eps, act_bits)
    if width == in_features:
        check_activations(x, in_features)
    else:
        check_activations(x, width, "2 * in_features")
    if out_dtype is not None and out_dtype not in ACTIVATION_DTYPES:
        raise TypeError(
            f"bitlinear: out_dtype must be float32, float16 or bfloat16, but it is "
            f"{dtype_name(out_dtype)}: leave it out to get the dtype of x"
        )


def check_operand(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    group_size: int = 0,
) -> None:
    """Check one weight, with its scale and its bias."""
    packing.check_packed_dtype(w_packed)
    if w_scale.dtype != torch.float32:
        raise TypeError(
            f"bitlinear: w_scale must be float32, but it is {dtype_name(w_scale.dtype)}: convert "
            f"it with w_scale.float()"
        )
    packing.check_packed_shape(w_packed, in_features)
    out_features = w_packed.shape[0]
    check_scale_shape(w_scale, out_features, in_features, group_size)
    check_device(x, "w_packed", w_packed)
    check_device(x, "w_scale", w_scale)
    if bias is not None:
        _check_vector(x, "bias", bias, out_features, "rows of w_packed")


def check_scale_shape(
    w_scale: Tensor, out_features: int, in_features: int, group_size: int
) -> None:
    """Raise ValueError unless these are the scales of a weight ``(out_features, in_features)``."""
    has_groups = group_size > 0
    groups = count_groups(in_features, group_size) if has_groups else 1
    shape = list(w_scale.shape)
    if shape != [out_features, groups] and (has_groups or shape != [1]):
        one = "" if has_groups else "(1,) or "
        raise ValueError(
            f"bitlinear: w_scale must have shape {one}({out_features}, {groups}) for group_size = "
            f"{group_size}, but it has shape {shape}: pass the group_size of the layer that it "
            f"comes from"
        )


def _check_vector(x: Tensor, name: str, vector: Tensor, size: int, of: str) -> None:
    """Check a floating-point vector of ``size`` values."""
    if not vector.dtype.is_floating_point:
        raise TypeError(
            f"bitlinear: {name} must be floating point, but it is {dtype_name(vector.dtype)}: "
            f"convert it with {name}.float()"
        )
    if list(vector.shape) != [size]:
        raise ValueError(
            f"bitlinear: {name} must have shape ({size},), one value for each of the {of}, but it "
            f"has shape {list(vector.shape)}"
        )
    check_device(x, name, vector)
