"""Other projects: one module or package for each, loaded only if the project is in use."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_logger = logging.getLogger("bitlinear")


def watch_imports() -> None:
    """Register each integration as soon as its project is imported."""
    register_after_import("torch.onnx", "bitlinear.integrations.onnx")
    register_after_import("torch.utils.flop_counter", "bitlinear.integrations.flop_counter")
    register_after_import("torch._inductor.lowering", "bitlinear.integrations.inductor")
    register_after_import("transformers.quantizers.auto", "bitlinear.integrations.transformers")


def register_after_import(name: str, integration: str) -> None:
    """Call ``register()`` of an integration after the import of the module ``name``.

    This function does not import ``name`` itself, because that could take longer than
    ``import bitlinear``. If ``register()`` raises, as it does for an unsupported version of the
    project, the error is logged and nothing else happens.

    Args:
        name: Qualified name of a module of another project, imported or not.
        integration: Qualified name of the module with ``register``.
    """
    if name in sys.modules:
        _register(integration)
        return
    for finder in list(sys.meta_path):
        # Of an earlier import of this package in the process, and so of another class.
        if type(finder).__name__ == _ImportWatch.__name__ and vars(finder).get("name") == name:
            sys.meta_path.remove(finder)
    sys.meta_path.insert(0, _ImportWatch(name, lambda: _register(integration)))


def attach_to_transformers(model: Any) -> None:
    """Call ``transformers.attach``, so that the transformers models in ``model`` can be saved.

    Does nothing unless transformers is in use. An error is logged: the model is deployed anyway.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    kind = getattr(modeling, "PreTrainedModel", None)
    if kind is None or not any(isinstance(module, kind) for module in model.modules()):
        return
    try:
        importlib.import_module("bitlinear.integrations.transformers").attach(model)
    except Exception as error:
        _logger.info(
            "from_pretrained cannot load this model if save_pretrained writes it: %s: %s",
            type(error).__name__,
            error,
        )


def _register(integration: str) -> None:
    try:
        importlib.import_module(integration).register()
    except Exception as error:
        _logger.info("%s cannot be used: %s: %s", integration, type(error).__name__, error)


class _ImportWatch(MetaPathFinder):
    """A finder that calls a function after the first import of a module.

    The other finders find the module; this one wraps the loader that they return.
    """

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self.name = name
        self.callback = callback

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the watched module; return None for all other modules."""
        if name != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            exec_module = loader.exec_module

            def exec_and_call(module: ModuleType) -> None:
                exec_module(module)
                self.callback()

            loader.exec_module = exec_and_call
        return spec
