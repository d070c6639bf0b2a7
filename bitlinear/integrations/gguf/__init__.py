"""GGUF files with ternary weights: types of llama.cpp, of PrismML and of bitnet.cpp.

:func:`tensors` reads the ternary tensors of any file as packed weights and scales, :func:`load`
fills a model of transformers, and :func:`save` writes a deployed model for llama.cpp.

Needs the package ``gguf``; :func:`load` and :func:`save` also need ``transformers``.
"""

from __future__ import annotations

try:
    import gguf  # noqa: F401
except ImportError as error:
    raise ImportError(
        "bitlinear.integrations.gguf needs the package gguf: pip install 'gguf>=0.19'"
    ) from error

from .loading import load
from .saving import save
from .ternary import TernaryTensor, tensors

__all__ = ["TernaryTensor", "load", "save", "tensors"]
