"""The quantisation of a model's head."""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from ... import foreign
from ...conversion.replacement import find_parents
from ...linear import BitLinear
from ...preconditions import why_no_plain_weight
from .int8 import MAX_IN_FEATURES, Int8Table
from .int8_head import Int8Head, forget_ties, put_head
from .mapped_files import release_files
from .quantizer import attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)

HEADS = ("int8",)
"""The values of ``head`` of :func:`quantize_head`."""


def quantize_head(model: _Model, head: str = "int8") -> _Model:
    """Replace the head of a model, and an embedding tied to it, by int8 ones, in place.

    The weight gets one scale per row (absmax). Tied, one table serves both: the memory of the
    weight falls to half of bf16. The head is not trained any more; gradients pass through it.

    Args:
        model: A ``PreTrainedModel`` with output embeddings, converted already or not.
        head: ``"int8"``.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a ``PreTrainedModel``.
        ValueError: ``head`` is not valid, the model has no head, or the head or a module that
            shares its weight cannot be replaced. The model is unchanged.
    """
    layer, embedding = find_head(model, head)
    put_head(find_parents(model), layer, embedding, Int8Table.from_weight(layer.weight))
    forget_ties(model)
    release_files(model)
    attach(model)
    _logger.info("the head%s has int8 weights", "" if embedding is None else " and the embedding")
    return model


def find_head(model: nn.Module, head: str) -> tuple[nn.Linear, nn.Embedding | None]:
    """The head that :func:`quantize_head` replaces, and the embedding tied to it or None.

    Raises:
        TypeError, ValueError: As :func:`quantize_head`.
    """
    from transformers import PreTrainedModel

    if head not in HEADS:
        raise ValueError(f"head must be None or one of {', '.join(HEADS)}, but it is {head!r}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"head={head!r} needs a PreTrainedModel of transformers, but got {type(model).__name__}"
        )
    layer: Any = model.get_output_embeddings()
    if isinstance(layer, Int8Head):
        raise ValueError(
            f"the head of this {type(model).__name__} is int8 already: leave head=None, or do not "
            f"call quantize_head again"
        )
    if layer is None:
        raise ValueError(f"this {type(model).__name__} has no head: use the model with a head")
    if isinstance(layer, BitLinear):
        reason = "it is a BitLinear, whose weights are ternary: exclude it from the conversion"
    else:
        reason = foreign.why_not_linear(layer) or why_no_plain_weight(layer)
    if not reason and _reads_weight(model, layer):
        reason = f"the code of {type(model).__name__} calls it and also reads its weight"
    if not reason and foreign.is_conv1d(layer):
        reason = "it is a Conv1D"
    if not reason and layer.weight.is_meta:
        reason = "its weight is on the meta device: load it first, without offloading"
    if not reason and layer.weight.shape[1] > MAX_IN_FEATURES:
        reason = f"it has {layer.weight.shape[1]} inputs, but the sums hold {MAX_IN_FEATURES}"
    if not reason and not all(bound.isfinite() for bound in layer.weight.detach().aminmax()):
        reason = "its weight has values that are NaN or infinite"
    if reason:
        raise ValueError(f"the head cannot be quantised: {reason}")
    return layer, _tied_embedding(model, layer)


def _reads_weight(model: PreTrainedModel, layer: nn.Linear) -> bool:
    """Whether the code of a model has an expression for the weight of its head."""
    from transformers import PreTrainedModel

    names = {name.rpartition(".")[2] for name, child in model.named_modules() if child is layer}
    expressions = {f"self.{name}.weight" for name in names}
    for cls in type(model).__mro__:
        if cls is PreTrainedModel:
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError):  # no file: a class that is defined in an interpreter, say
            continue
        attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        if any(node.attr == "weight" and ast.unparse(node) in expressions for node in attributes):
            return True
    return False


def _tied_embedding(model: PreTrainedModel, layer: nn.Linear) -> nn.Embedding | None:
    """The embedding that shares the weight of the head, or None.

    Raises:
        ValueError: Another module shares it, or an embedding that cannot be replaced.
    """
    sharing = {
        name: module
        for name, module in model.named_modules()
        if module is not layer and module._parameters.get("weight") is layer.weight
    }
    if not sharing:
        return None
    name, embedding = next(iter(sharing.items()))
    if len(sharing) > 1:
        reason = f"{', '.join(sharing)} share its weight, but only one embedding can"
    elif embedding is not model.get_input_embeddings():
        reason = f"{name} shares its weight, but is not the input embedding"
    elif problem := foreign.why_not_embedding(embedding):
        reason = f"{name} shares its weight: {problem}"
    elif embedding.max_norm is not None:
        reason = f"{name} shares its weight, and has max_norm"
    else:
        return cast(nn.Embedding, embedding)
    raise ValueError(f"the head cannot be quantised: {reason}")
