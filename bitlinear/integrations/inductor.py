"""``torch.compile``: inductor calls the operators as they are and never decomposes them.

``import bitlinear`` arranges that :func:`register` is called as soon as inductor is imported; users
call nothing here.
"""

from __future__ import annotations

import torch

from .. import ops


def register() -> None:
    """Register each operator with inductor, already imported, as the call of a kernel.

    Without this, inductor raises in environments that set ``CI`` once ``torch.onnx`` has been
    imported: the operators then have decompositions, which are only for export.
    """
    from torch._inductor import lowering

    for schema in ops.SCHEMAS:
        operator = getattr(torch.ops.bitlinear, schema.partition("(")[0]).default
        lowering.make_fallback(operator, warn=False)
