"""``layer.weight`` after ``deploy()``: a read-only tensor that has no memory of its own.

Much code reads the shape, dtype or device of ``layer.weight``, and some passes it to
``torch.nn.functional.linear`` or ``embedding``. :class:`PackedWeight` serves all: it looks like the
weight from before deployment, ``linear`` runs the kernel on the packed bytes, and ``embedding``
expands the rows that it looks up. Any other computation gets the dequantised values. Writing raises
an error, because the values would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .messages import warn

# Setters and methods that call no operator, so that __torch_dispatch__ does not see them. The
# storage, which callers could write to, does not exist.
_WRITES = (
    Tensor.requires_grad_,
    Tensor.share_memory_,
    Tensor.apply_,
    Tensor.map_,
    Tensor.storage,
    Tensor.untyped_storage,
    *(getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad")),
)
_SETS_REQUIRES_GRAD = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_READS = (Tensor.tolist, Tensor.__dlpack__)
_NUMPY_READS = (Tensor.numpy, Tensor.__array__)


class PackedWeight(Tensor):
    """The weight of a deployed layer, or a view of it.

    Args:
        shape: ``(N, K)`` for the weight itself.
        dtype: The dtype that the weight had before deployment.
        device: The device of the packed bytes.
        dequantize: Computes the values, with this shape, dtype and device.
        linear: Computes ``F.linear`` from ``x`` and ``bias``; None for a view.
        lookup: Computes ``F.embedding`` from the indices; None for a view.
        strides: Strides of a view; None for a contiguous tensor.
    """

    # transformers initialises weights without this attribute.
    _is_hf_initialized = True

    _dequantize: Callable[[], Tensor]
    _linear: Callable[[Tensor, Tensor | None], Tensor] | None
    _lookup: Callable[[Tensor], Tensor] | None

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        shape: Any,
        dtype: torch.dtype,
        device: torch.device,
        dequantize: Callable[[], Tensor],
        linear: Callable[[Tensor, Tensor | None], Tensor] | None = None,
        lookup: Callable[[Tensor], Tensor] | None = None,
        strides: Any = None,
    ) -> PackedWeight:
        weight: PackedWeight = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device
        )
        weight._dequantize = dequantize
        weight._linear = linear
        weight._lookup = lookup
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = tuple(self.shape)
        return f"PackedWeight(shape={shape}, dtype={self.dtype}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._dequantize()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._dequantize().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, PackedWeight) and weight._linear is not None:
                return weight._linear(x, bias)
        if func is F.embedding:
            ids, weight, max_norm = _embedding_arguments(*args, **kwargs)
            if max_norm is not None:  # It would normalise the weight in place.
                _raise_read_only()
            if isinstance(weight, PackedWeight) and weight._lookup is not None:
                return weight._lookup(ids)
        if func in _SETS_REQUIRES_GRAD and not _requires_grad_argument(*args, **kwargs):
            return args[0]  # it has no gradient
        if func in _WRITES:
            _raise_read_only()
        if func in _READS:
            return func(*_dequantize_all(args), **kwargs)
        if func in _NUMPY_READS:
            array = func(*_dequantize_all(args), **kwargs)
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
        aliased = None  # the argument that the result is a view of
        for argument in arguments:
            value = given.get(argument.name)
            if argument.alias_info is None or not _holds_packed_weight(value):
                continue
            if argument.alias_info.is_write:
                _raise_read_only()
            aliased = value
        name = func._schema.name.partition("::")[2]
        if name.endswith("_like") or name.startswith("new_"):
            return func(*_with_empty_weights(args), **_with_empty_weights(kwargs))
        if isinstance(aliased, PackedWeight):
            views = _view(aliased, func, args, kwargs)
            if views is not None:
                return views
        return func(*_dequantize_all(args), **_dequantize_all(kwargs))


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """The arguments of ``F.linear``, passed by position or by name."""
    return input, weight, bias


def _embedding_arguments(
    input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> tuple[Any, Any, Any]:
    """The arguments of ``F.embedding`` that matter for a weight without gradients."""
    return input, weight, max_norm


def _requires_grad_argument(weight: Any, requires_grad: bool = True) -> bool:
    """The new value of ``requires_grad``, by the method or by the setter."""
    return requires_grad


def _holds_packed_weight(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(v, PackedWeight) for v in values)


def _dequantize_all(arguments: Any) -> Any:
    return tree_map_only(PackedWeight, lambda weight: weight._dequantize(), arguments)


def _with_empty_weights(arguments: Any) -> Any:
    """Replace packed weights by empty tensors, for functions that read no values."""
    return tree_map_only(
        PackedWeight,
        lambda w: torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=w.device),
        arguments,
    )


def _view(weight: PackedWeight, func: Any, args: Any, kwargs: Any) -> Any:
    """Make a view, or a list of views, that are packed weights too: writing to them raises.

    Returns None if ``func`` copies the weight, as ``to`` and ``reshape`` sometimes do.
    """

    def apply(tensor: Tensor) -> Any:
        return func(*(tensor if value is weight else value for value in args), **kwargs)

    base = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
    result = apply(base)

    def pack(meta: Tensor, index: int | None = None) -> PackedWeight:
        def dequantize() -> Tensor:
            views: Any = apply(weight._dequantize())
            return cast(Tensor, views if index is None else views[index])

        strides = meta.stride()
        return PackedWeight(meta.shape, meta.dtype, weight.device, dequantize, strides=strides)

    if not isinstance(result, Tensor):
        return [pack(meta, index) for index, meta in enumerate(result)]
    is_view = result.untyped_storage()._cdata == base.untyped_storage()._cdata
    return pack(result) if is_view else None


def _raise_read_only() -> NoReturn:
    raise RuntimeError(
        "this layer is deployed, so its weight is read-only: call undeploy() to change it"
    )


def warn_of_dequantization(kind: str, shape: tuple[int, int]) -> None:
    """Warn that the weight of a layer was dequantised, at the line of the user's code."""
    warn(
        f"the weight of a deployed {kind} was dequantised ({shape[0]} x {shape[1]}), as it was "
        f"used in another computation than torch.nn.functional.linear or embedding: this takes the "
        f"memory and the time that deploy() saves"
    )
