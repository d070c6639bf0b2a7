"""A head with int8 weights, and the embedding that shares its table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...conversion.replacement import CALL_HOOKS, find_parents, set_child
from .int8 import Int8Table
from .layers import pretrained_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Int8Module(nn.Module):
    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has int8 weights in its table, and no weight of floating "
                f"point: what reads or changes the weight (gguf.save, a resize of the embeddings) "
                f"has to come before quantize_head"
            )
        return super().__getattr__(name)


class Int8Embedding(_Int8Module):
    """Embedding whose rows are int8 with a scale each; see :class:`Int8Table`.

    It has no parameter. Indices of int32 or int64 in any shape; the output has the shape
    ``(*indices.shape, embedding_dim)`` and the dtype of the model.
    """

    def __init__(self, table: Int8Table, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = table
        self.padding_idx = padding_idx
        self.num_embeddings, self.embedding_dim = table.values.shape

    def forward(self, input: Tensor) -> Tensor:
        """Look the rows up."""
        return self.table.lookup(input)


class Int8Head(_Int8Module):
    """Linear layer with int8 weights, one scale per output feature; see :class:`Int8Table`.

    ``y = x @ (values * scales).T + bias``, in the dtype of ``x``, for ``x`` of shape ``(..., K)``.
    The weights are constants; ``x`` and the bias can need gradients.

    Args:
        table: The weights. The head of a tied model refers to the table of the embedding, which
            owns it: the state of the head does not have it, and ``head.to()`` does not move it.
        bias: Shape ``(N,)``, or None.
        is_tied: Whether the embedding owns the table.
    """

    def __init__(
        self, table: Int8Table, bias: nn.Parameter | None = None, is_tied: bool = False
    ) -> None:
        super().__init__()
        self.is_tied = is_tied
        if is_tied:
            vars(self)["table"] = table  # Not a submodule.
        else:
            self.table = table
        self.bias = bias
        self.out_features, self.in_features = table.values.shape

    def forward(self, input: Tensor) -> Tensor:
        """Compute the logits."""
        y = self.table.multiply(input)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Return sizes and whether the head is tied, for ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, is_tied={self.is_tied}"
        )


def put_empty_head(model: PreTrainedModel, *, has_embedding: bool, has_head: bool) -> None:
    """Put int8 modules on the meta device into a model whose weights are loaded afterwards.

    Args:
        model: The model, also one without a head.
        has_embedding: Whether the checkpoint has an int8 embedding.
        has_head: Whether it has an int8 head, which is tied if it also has an int8 embedding.
    """
    embedding: Any = model.get_input_embeddings() if has_embedding else None
    layer: Any = model.get_output_embeddings() if has_head else None
    if embedding is None and layer is None:
        return
    weight = layer.weight if embedding is None else embedding.weight
    rows, columns = weight.shape
    table = Int8Table(rows, columns, weight.dtype, "meta")
    put_head(find_parents(model), layer, embedding, table)
    forget_ties(model)


def put_head(parents: Any, layer: Any, embedding: Any, table: Int8Table) -> None:
    """Put int8 modules with this table in place of a head, an embedding, or both."""
    replacements: list[tuple[Any, nn.Module]] = []
    if embedding is not None:
        replacements.append((embedding, Int8Embedding(table, embedding.padding_idx)))
    if layer is not None:
        is_tied = embedding is not None
        replacements.append((layer, Int8Head(table, layer.bias, is_tied)))
    for old, new in replacements:
        for name in (*CALL_HOOKS, "_is_hf_initialized"):
            if name in vars(old):
                vars(new)[name] = vars(old)[name]
        set_child(parents[id(old)], new.train(old.training))


def forget_ties(model: nn.Module) -> None:
    """Remove the int8 modules from the ties of parameters that transformers restores."""
    for inner in pretrained_models(model):
        replaced = {f"{name}.weight" for name in int8_modules(inner)}
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            ties = getattr(inner, attribute, None)
            if isinstance(ties, dict) and not replaced.isdisjoint({*ties, *ties.values()}):
                kept = {a: b for a, b in ties.items() if replaced.isdisjoint((a, b))}
                setattr(inner, attribute, kept)


def int8_modules(model: nn.Module) -> dict[str, Int8Head | Int8Embedding]:
    """The int8 heads and embeddings inside ``model``, by their first qualified name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (Int8Head, Int8Embedding)):
            found[name] = module
    return found
