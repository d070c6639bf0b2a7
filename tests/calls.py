"""A counter of the calls of an operator."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Counts the calls in ``with Calls(operator) as calls: ...``; see ``calls.count``."""

    def __init__(self, operator):
        super().__init__()
        self._operator, self.count = operator, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is self._operator
        return func(*args, **(kwargs or {}))
