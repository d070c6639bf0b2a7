"""Other projects: one module for each, loaded only where the project is in use."""

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
    """Has each integration registered that its project needs to know of."""
    register_after_import("torch.onnx", "bitlinear.integrations.onnx")
    register_after_import("torch._inductor.lowering", "bitlinear.integrations.inductor")
    register_after_import("transformers.quantizers.auto", "bitlinear.integrations.transformers")


def register_after_import(name: str, integration: str) -> None:
    """Calls ``register()`` of an integration as soon as the module ``name`` is imported.

    To import that module here could take longer than ``import bitlinear``.

    Args:
        name: Qualified name of a module of another project, imported or not.
        integration: Qualified name of the module with ``register``. If that raises, as it does for
            a version of the project that it does not fit, this is logged and nothing else happens.
    """
    if name in sys.modules:
        _register(integration)
    else:
        sys.meta_path.insert(0, _ImportWatch(name, lambda: _register(integration)))


def attach_to_transformers(model: Any) -> None:
    """Makes the models of transformers inside ``model`` savable: see ``transformers.attach``.

    Does nothing unless transformers is in use. What is wrong with it is logged: the model is
    deployed all the same.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    kind = getattr(modeling, "PreTrainedModel", None)
    if kind is None or not any(isinstance(module, kind) for module in model.modules()):
        return
    try:
        importlib.import_module("bitlinear.integrations.transformers").attach(model)
    except Exception as error:
        _logger.info(
            "save_pretrained will not write this model so that from_pretrained can load it: %s: %s",
            type(error).__name__,
            error,
        )


def _register(integration: str) -> None:
    try:
        importlib.import_module(integration).register()
    except Exception as error:
        _logger.info("%s cannot be used: %s: %s", integration, type(error).__name__, error)


class _ImportWatch(MetaPathFinder):
    """Calls a function after the first import of a module, which the other finders find."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name = name
        self.then = then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As for every finder; None for other modules."""
        if name != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            exec_module = loader.exec_module

            def exec_and_call(module: ModuleType) -> None:
                exec_module(module)
                self.then()

            loader.exec_module = exec_and_call
        return spec
