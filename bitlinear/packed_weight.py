"""What ``layer.weight`` is after ``deploy()``: a read-only tensor that has no memory of its own.

Much code reads the shape, dtype or device of ``layer.weight``, and some passes it to
``torch.nn.functional.linear`` itself. A :class:`PackedWeight` serves both: it looks like the weight
from before deployment, and ``linear`` runs the kernel on the packed bytes. Any other computation
gets the dequantised values. Writing raises, as the values would be lost.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

# Setters and methods that reach no operator, so that __torch_dispatch__ does not see them. There is
# no storage, and one could be written to.
_WRITES = (
    Tensor.requires_grad_,
    Tensor.share_memory_,
    Tensor.apply_,
    Tensor.map_,
    Tensor.storage,
    Tensor.untyped_storage,
    *(getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad")),
)
_READS = (Tensor.tolist, Tensor.__dlpack__)
_NUMPY_READS = (Tensor.numpy, Tensor.__array__)


class PackedWeight(Tensor):
    """The weight of a deployed :class:`BitLinear`, or a view of it.

    Args:
        shape: ``(N, K)`` for the weight itself.
        dtype: The dtype that the weight had before deployment.
        device: The device of the packed bytes.
        values: Computes the dequantised values, of this shape, dtype and device.
        linear: Called with ``x`` and ``bias`` in the place of ``F.linear``; None for a view.
        strides: Of a view; else those of a contiguous tensor.
    """

    # transformers initialises the weights that do not have this attribute.
    _is_hf_initialized = True

    _compute_values: Callable[[], Tensor]
    _compute_linear: Callable[[Tensor, Tensor | None], Tensor] | None

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        shape: Any,
        dtype: torch.dtype,
        device: torch.device,
        values: Callable[[], Tensor],
        linear: Callable[[Tensor, Tensor | None], Tensor] | None = None,
        strides: Any = None,
    ) -> PackedWeight:
        weight: PackedWeight = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device
        )
        weight._compute_values = values
        weight._compute_linear = linear
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = tuple(self.shape)
        return f"PackedWeight(shape={shape}, dtype={self.dtype}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._compute_values()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._compute_values().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, PackedWeight) and weight._compute_linear is not None:
                return weight._compute_linear(x, bias)
        if func in _WRITES:
            _raise_read_only()
        if func in _READS:
            return func(*_dequantized(args), **kwargs)
        if func in _NUMPY_READS:
            array = func(*_dequantized(args), **kwargs)
            array.flags.writeable = False
            return array
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        given = {**{argument.name: value for argument, value in zip(arguments, args)}, **kwargs}
        aliased = None  # a weight that the result is a view of
        for argument in arguments:
            value = given.get(argument.name)
            if argument.alias_info is None or not _holds_packed_weight(value):
                continue
            if argument.alias_info.is_write:
                _raise_read_only()
            aliased = value
        name = func._schema.name.partition("::")[2]
        if name.endswith("_like") or name.startswith("new_"):
            return func(*_without_values(args), **_without_values(kwargs))
        if isinstance(aliased, PackedWeight):
            views = _views(aliased, func, args, kwargs)
            if views is not None:
                return views
        return func(*_dequantized(args), **_dequantized(kwargs))


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """The arguments of ``F.linear``, however they were passed."""
    return input, weight, bias


def _holds_packed_weight(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(v, PackedWeight) for v in values)


def _dequantized(arguments: Any) -> Any:
    return tree_map_only(PackedWeight, lambda weight: weight._compute_values(), arguments)


def _without_values(arguments: Any) -> Any:
    """For functions that make a new tensor and read no values."""
    return tree_map_only(
        PackedWeight,
        lambda w: torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=w.device),
        arguments,
    )


def _views(weight: PackedWeight, func: Any, args: Any, kwargs: Any) -> Any:
    """Views of a packed weight are packed weights, so that writing to a view raises too.

    None if the function makes a copy of this weight, as ``to`` and ``reshape`` sometimes do.
    """

    def view_of(values: Tensor) -> Any:
        return func(*(values if value is weight else value for value in args), **kwargs)

    base = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
    metas = view_of(base)

    def view(meta: Tensor, index: int | None = None) -> PackedWeight:
        def values() -> Tensor:
            result: Any = view_of(weight._compute_values())
            return cast(Tensor, result if index is None else result[index])

        return PackedWeight(meta.shape, meta.dtype, weight.device, values, strides=meta.stride())

    if not isinstance(metas, Tensor):
        return [view(meta, index) for index, meta in enumerate(metas)]
    is_view = metas.untyped_storage()._cdata == base.untyped_storage()._cdata
    return view(metas) if is_view else None


def _raise_read_only() -> NoReturn:
    raise RuntimeError(
        "this BitLinear is deployed, so its weight is read-only: call undeploy() to change it"
    )


def warn_of_values(what: str) -> None:
    """Warns, where the caller's code stands, that the weight of ``what`` was dequantised."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("bitlinear.", "torch.")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"the weight of a deployed BitLinear was dequantised ({what}), as it was used in another "
        f"computation than torch.nn.functional.linear: this takes the memory and the time that "
        f"deploy() saves",
        stacklevel=level,
    )
