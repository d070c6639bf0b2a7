"""Embedding, the module: a table of ternary rows, in training or packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import foreign, ties
from .arguments import (
    check_eps,
    check_features,
    parse_weight_type,
    weight_type_name,
)
from .lookup import blended_lookup, deployed_lookup, straight_through_lookup
from .preconditions import why_no_plain_weight
from .ternary_layer import DEFAULT_EPS, TernaryLayer


class Embedding(TernaryLayer, nn.Embedding):
    """``nn.Embedding`` with ternary rows {-1, 0, +1} times a scale.

    It trains like ``nn.Embedding``: ``weight`` stays a floating-point parameter, which the forward
    pass quantises, with straight-through gradients. :meth:`deploy` packs the table, 2 bits a value,
    and drops the floating-point one; a lookup then expands the rows that it returns.

    ``y = t[ids] * s_w``, in fp32, rounded once to the dtype of the weight, with ``t, s_w`` the
    weight quantised as by :class:`~bitlinear.BitLinear` (absmean, arXiv 2402.17764). Both forms
    give the same bits.

    A tied ternary head is a ``BitLinear(embedding_dim, num_embeddings, bias=False)`` with
    ``head.weight = embedding.weight`` and the same ``eps`` and kind of scale. It trains with the
    embedding, and :func:`bitlinear.deploy` packs one table for both. ``F.linear(x,
    embedding.weight)`` is such a head of a deployed embedding (activations of 8 bits); in training,
    it multiplies by the floating-point weight.

    Args:
        num_embeddings: ``N``, at least 1.
        embedding_dim: Values of a row, from 1 to 500,000.
        padding_idx: A row whose gradient is 0, as in ``nn.Embedding``. It is 0 at the start, and
            quantised like the other rows.
        max_norm: Must be None: rows that are scaled in place would change the scale of the table.
        norm_type: Of no effect without ``max_norm``.
        scale_grad_by_freq, sparse: As in ``nn.Embedding``.
        eps: Lower bound of the absmean of the weights; at least 2e-36.
        quant_type: ``"wpt"``: one scale for the table. ``"wpc"``: one for each row. ``"wpg128"``,
            or another multiple of 32: one for each group of so many values of a row.
        device: Device of the parameter.
        dtype: Floating-point dtype of the parameter, and of the output.

    Shape:
        Indices of int32 or int64 in any shape, output ``(*indices.shape, embedding_dim)``.

    Attributes:
        weight: Parameter ``(N, embedding_dim)``. In a deployed embedding, a read-only tensor
            without memory (see :mod:`bitlinear.packed_weight`), neither parameter nor buffer.
        w_packed: uint8 buffer ``(N, ceil(embedding_dim/4))`` of a deployed embedding; see
            :mod:`bitlinear.packing`.
        w_scale: fp32 buffer ``(1,)`` of a deployed embedding, ``(N, 1)``, or
            ``(N, ceil(embedding_dim/128))`` with groups of 128. It stays fp32 through ``half()`` or
            ``to(dtype)``. Loading ``(1,)`` or ``(N, 1)`` changes ``quant_type``, unless the state
            has metadata, which then must fit.

    Raises:
        TypeError: ``num_embeddings`` or ``embedding_dim`` is not an integer, ``eps`` is not a
            number, or ``dtype`` is not floating point.
        ValueError: ``num_embeddings``, ``embedding_dim``, ``max_norm``, ``eps`` or ``quant_type``
            is not as above.

    The forward pass raises IndexError for an index below 0 or from ``N`` on. It does not check
    packed bytes; a load does, and :meth:`dequantize`.
    """

    _dimensions = ("num_embeddings", "embedding_dim")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        eps: float = DEFAULT_EPS,
        quant_type: str = "wpt",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_features(embedding_dim, num_embeddings, "embedding_dim", "num_embeddings")
        if max_norm is not None:
            raise ValueError(
                f"bitlinear: max_norm must be None, but it is {max_norm}: scaling rows in place "
                f"would change the scale of the whole table; normalise the output instead"
            )
        check_eps(eps)
        parse_weight_type(quant_type)
        if not (dtype or torch.get_default_dtype()).is_floating_point:
            raise TypeError(f"bitlinear: dtype must be floating point, but it is {dtype}")
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            device=device,
            dtype=dtype,
        )
        self.eps = float(eps)
        self.quant_type = quant_type
        self._weight_dtype = self.weight.dtype
        ties.register(self)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, quant_type: str = "wpt", eps: float = DEFAULT_EPS
    ) -> Embedding:
        """Make an Embedding that shares the parameter of an ``nn.Embedding``.

        The parameter is the same object, so tied weights stay tied and an optimizer that holds it
        keeps working. ``padding_idx``, device, dtype, ``training`` and ``requires_grad`` stay the
        same. Hooks stay with the old module.

        Args:
            embedding: The embedding to convert; not modified. An ``nn.Embedding``, or a subclass
                that defines nothing but ``__init__``, ``reset_parameters`` and how it is printed.
                Its weight must be an ordinary parameter.
            quant_type: As for :class:`Embedding`.
            eps: As for :class:`Embedding`.

        Raises:
            TypeError: ``embedding`` is not an embedding, computes something else, or its weight is
                not an ordinary parameter (parametrised, sharded, quantised, deployed).
            ValueError: ``eps`` or ``quant_type`` is not valid, or ``embedding`` has a ``max_norm``.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(
                f"from_embedding needs a torch.nn.Embedding, but got {type(embedding).__name__}"
            )
        reason = why_no_plain_weight(embedding) or foreign.why_not_embedding(embedding, cls)
        if reason:
            raise TypeError(
                f"from_embedding cannot convert this {type(embedding).__name__}: {reason}"
            )
        weight = embedding.weight
        layer = cls(
            weight.shape[0],
            weight.shape[1],
            embedding.padding_idx,
            embedding.max_norm,
            embedding.norm_type,
            embedding.scale_grad_by_freq,
            embedding.sparse,
            eps,
            quant_type,
            device="meta",  # Draws nothing from the random number generator.
        )
        layer.weight = weight
        layer._weight_dtype = weight.dtype
        return layer.train(embedding.training)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        *args: Any,
        quant_type: str = "wpt",
        eps: float = DEFAULT_EPS,
        **kwargs: Any,
    ) -> Embedding:
        """Make an Embedding of ``nn.Embedding.from_pretrained(embeddings, ...)``, frozen as there.

        Args:
            embeddings, args, kwargs: As for ``nn.Embedding.from_pretrained``.
            quant_type, eps: As for :class:`Embedding`.

        Raises:
            TypeError, ValueError: As for :meth:`from_embedding`.
        """
        embedding = nn.Embedding.from_pretrained(embeddings, *args, **kwargs)
        return cls.from_embedding(embedding, quant_type, eps)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(N, K)``: ``(num_embeddings, embedding_dim)``."""
        return self.num_embeddings, self.embedding_dim

    @property
    def quant_type(self) -> str:
        """The quantisation type, such as ``"wpt"``; see :class:`Embedding`.

        Raises:
            ValueError: The new value is not a type, or the embedding is deployed with scales of
                another shape.
        """
        return weight_type_name(self._group_size)

    @quant_type.setter
    def quant_type(self, name: str) -> None:
        self._set_group_size(parse_weight_type(name), name)

    def forward(self, input: Tensor) -> Tensor:
        """Look the rows of the indices ``input`` up; see :class:`Embedding`."""
        if type(input) is not Tensor:
            special: Tensor | None = self._forward_special(input)
            if special is not None:
                return special
        buffers = self._buffers
        if "w_packed" in buffers:
            w_packed: Any = buffers["w_packed"]
            w_scale: Any = buffers["w_scale"]
            return deployed_lookup(
                *(input, w_packed, w_scale, self.embedding_dim, self._weight_dtype),
                self._group_size,
            )
        if not torch.compiler.is_compiling():
            self.__dict__["_called"] = True  # nn.Module.__setattr__ takes longer.
        weight = self.weight
        self._check_whole(weight)
        options = {
            "padding_idx": self.padding_idx,
            "scale_grad_by_freq": self.scale_grad_by_freq,
            "sparse": self.sparse,
        }
        if self._blend is not None:
            return blended_lookup(input, weight, self._blend, self.eps, self._group_size, **options)
        return straight_through_lookup(input, weight, self.eps, self._group_size, **options)
