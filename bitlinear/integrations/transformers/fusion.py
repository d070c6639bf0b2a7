"""Fused products in the decoder layers of a model: :func:`fuse` and :func:`unfuse`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from .decoder_layers import KNOWN, FusedDecoderLayer, fused_class
from .layers import bitlinear_layers

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)


def fuse(model: _Model) -> _Model:
    """Compute the deployed layers of decoder layers as fused products, in place. Idempotent.

    The decoder layers of BitNet, Llama (Falcon-E, Falcon3), Mistral, Qwen2 and Qwen3 get a subclass
    of their class whose forward pass computes norms, gates and residuals together with the products
    beside them. Modules, names and state stay as they are; ``isinstance`` holds. What counts is how
    the modules are in each call: layers with adapters, hooks or other norms, and layers that are
    not deployed any more, run as in transformers.

    The logger ``"bitlinear"`` reports the fused layers, and warns of blocks with deployed layers
    that stay unfused, and why.

    In fp32, results differ by the order in which a norm adds squares. In 16 bits they also differ
    because a fused product rounds nothing between the hidden state that it reads and its output.

    Args:
        model: A model of transformers, or a module around some.

    Returns:
        ``model``.

    Raises:
        ValueError: The model has no deployed BitLinear layer.
    """
    if not _has_deployed(model):
        remedy = "bitlinear.deploy(model)" if bitlinear_layers(model) else "convert the model"
        raise ValueError(
            f"this {type(model).__name__} has no deployed BitLinear layer to fuse: first {remedy}"
        )
    unfused: dict[tuple[str, str], list[str]] = {}
    blocks = list(_blocks(model))
    for name, block in blocks:
        for reason in _fuse_block(block):
            unfused.setdefault((type(block).__name__, reason), []).append(name)
    fused = sum(isinstance(block, FusedDecoderLayer) for _, block in blocks)
    _logger.info("fused %d decoder layers", fused)
    for (kind, reason), names in unfused.items():
        _logger.warning(
            "%d x %s (the first is %s) not fused: %s",
            *(len(names), kind, names[0] or "the model itself", reason),
        )
    return model


def unfuse(model: _Model) -> _Model:
    """Give the decoder layers that :func:`fuse` changed their classes back, in place. Idempotent.

    Args:
        model: A model of transformers, or a module around some.

    Returns:
        ``model``.

    Raises:
        ValueError: A fused layer got another class since, as FSDP gives it one. The model is
            unchanged.
    """
    layers = fused_layers(model)
    for name, layer in layers.items():
        if type(layer) is not fused_class(layer.unfused_class):
            raise ValueError(
                f"{name} was fused and then became a {type(layer).__name__}, so it cannot be "
                f"unfused: unfuse the model before that"
            )
    for layer in layers.values():
        layer.__class__ = layer.unfused_class  # type: ignore[assignment]
    return model


def fused_layers(model: nn.Module) -> dict[str, FusedDecoderLayer]:
    """The fused decoder layers inside ``model``, by their first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FusedDecoderLayer)}


def _has_deployed(module: nn.Module) -> bool:
    return any(layer.is_deployed for layer in bitlinear_layers(module).values())


def _blocks(
    module: nn.Module, name: str = "", in_list: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """The blocks with deployed layers: known decoder layers, and other elements of lists.

    Args:
        module: Where to search, the module itself included.
        name: The qualified name of the module.
        in_list: Whether the module is an element of an ``nn.ModuleList``.
    """
    if not _has_deployed(module):
        return
    if _is_known(module) or (in_list and not any(map(_is_known, module.modules()))):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _blocks(
            child, f"{name}.{child_name}".lstrip("."), isinstance(module, nn.ModuleList)
        )


def _is_known(module: nn.Module) -> bool:
    return isinstance(module, FusedDecoderLayer) or fused_class(type(module)) is not None


def _fuse_block(block: nn.Module) -> list[str]:
    """Fuse a block if its class is known; return the reasons why some of it stays unfused."""
    if not isinstance(block, FusedDecoderLayer):
        fused_kind: type[nn.Module] | None = fused_class(type(block))
        if fused_kind is None:
            return [f"only {', '.join(KNOWN)} can be"]
        if "forward" in vars(block):
            return ["its forward was replaced on the instance, for example by accelerate"]
        block.__class__ = fused_kind
    fused: FusedDecoderLayer = block  # type: ignore[assignment]
    return fused.why_not_fused()
