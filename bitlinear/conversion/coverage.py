"""The share of a model that ``bitlinear.convert`` has made ternary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..linear import BitLinear

# A sound model keeps a few percent in floating point: position tables, gates, the convolutions of
# ConvNeXt-T 7 %. A model with layers of another kind keeps most of its weights: ResNet-50 with 1000
# classes 92 %, Mixtral 97 %, nn.TransformerEncoderLayer 33 %.
_TOLERATED_SHARE = 0.1
# A convolutional network can have one linear layer that holds nearly all weights. It has few
# layers, so the layers count too: one convolution for every linear layer is too many.
_TOLERATED_COUNT = 0.5

_MAX_LISTED = 4


@dataclass
class _Matrix:
    """A weight of two or more dimensions that ``bitlinear.convert`` might have replaced."""

    name: str
    owner: nn.Module
    weight: Tensor | None  # None in a deployed layer
    size: int

    @property
    def is_ternary(self) -> bool:
        return isinstance(self.owner, BitLinear)


def why_incomplete(
    model: nn.Module, is_excluded: Callable[[str, nn.Module], bool], reasons: Mapping[str, str]
) -> str:
    """The message of a warning about a model that is hardly ternary, or ``""``.

    The candidates are the parameters with two or more dimensions. These do not count: weights of
    an embedding of tokens or image patches, and weights tied to one; parameters whose first
    dimension is 1 (a class token, a table of positions: added, not multiplied); excluded weights.

    There is a message if the candidates in floating point hold more than a tenth of all values, or
    are at least half of all candidates.

    Args:
        model: A converted model.
        is_excluded: Called with the qualified name and the module of each candidate.
        reasons: Why a linear layer has not been converted, by its qualified name.
    """
    matrices = [m for m in _matrices(model) if not is_excluded(m.name.rpartition(".")[0], m.owner)]
    remaining = [matrix for matrix in matrices if not matrix.is_ternary]
    total_size = sum(m.size for m in matrices)
    remaining_size = sum(m.size for m in remaining)
    if not remaining or (
        remaining_size <= _TOLERATED_SHARE * total_size
        and len(remaining) < _TOLERATED_COUNT * len(matrices)
    ):
        return ""
    share = (total_size - remaining_size) / total_size if total_size else 0.0
    largest = sorted(remaining, key=lambda matrix: -matrix.size)
    lines = [f"  {_describe(matrix, reasons)}" for matrix in largest[:_MAX_LISTED]]
    if len(remaining) > _MAX_LISTED:
        lines.append(f"  and {len(remaining) - _MAX_LISTED} more")
    return (
        f"convert() made {len(matrices) - len(remaining)} of {len(matrices)} weight matrices "
        f"ternary, which hold {share:.1%} of the weights. These stay in floating point:\n"
        + "\n".join(lines)
        + "\nTo make them ternary, put nn.Linear layers in their place and convert again. To keep "
        "them without this warning, name their modules in exclude."
    )


def has_matrix(module: nn.Module) -> bool:
    """Whether a module itself holds a parameter with two or more dimensions."""
    return any(
        parameter is not None and not nn.parameter.is_lazy(parameter) and parameter.dim() >= 2
        for parameter in module._parameters.values()
    )


def _matrices(model: nn.Module) -> Iterator[_Matrix]:
    seen = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or _embeds_patches(module)
        for parameter in module._parameters.values()
    }
    for prefix, module in model.named_modules():
        if isinstance(module, BitLinear) and module.is_deployed:
            size = module.in_features * module.out_features
            yield _Matrix(f"{prefix}.weight", module, None, size)
        for key, weight in module._parameters.items():
            if weight is None or id(weight) in seen:
                continue
            seen.add(id(weight))
            if nn.parameter.is_lazy(weight):
                if key == "weight":
                    yield _Matrix(f"{prefix}.{key}", module, None, 0)
            elif weight.dim() >= 2 and weight.shape[0] > 1:
                yield _Matrix(f"{prefix}.{key}", module, weight, weight.numel())


def _embeds_patches(module: nn.Module) -> bool:
    """Whether it is a convolution that cuts images of up to four channels into patches."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and module.in_channels <= 4
        and module.kernel_size == module.stride
        and max(module.kernel_size) > 1
    )


def _describe(matrix: _Matrix, reasons: Mapping[str, str]) -> str:
    """``name [shape] (class: reason)``."""
    prefix = matrix.name.rpartition(".")[0]
    ancestors = [prefix.rsplit(".", depth)[0] for depth in range(prefix.count(".") + 1)]
    recorded = next((reasons[name] for name in ancestors if reasons.get(name)), "")
    reason = recorded or _why_not_linear(matrix)
    shape = "" if matrix.weight is None else f" {list(matrix.weight.shape)}"
    return f"{matrix.name.lstrip('.')}{shape} ({type(matrix.owner).__name__}: {reason})"


def _why_not_linear(matrix: _Matrix) -> str:
    owner = matrix.owner
    if isinstance(owner, nn.MultiheadAttention):
        return "it multiplies by its weights itself and calls no nn.Linear"
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        return "a recurrent layer multiplies by all of its weights itself"
    if isinstance(owner, nn.modules.conv._ConvNd):
        if set(owner.kernel_size) == {1} and owner.groups == 1:
            return "a convolution; with a kernel of size 1 it is an nn.Linear over the channels"
        return "a convolution"
    if matrix.weight is not None and matrix.weight.dim() >= 3:
        return "several matrices in one parameter, such as fused experts"
    return "it is not an nn.Linear"
