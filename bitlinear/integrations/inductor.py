"""``torch.compile``: the operators are called as they are, whatever else is known of them.

``import bitlinear`` has :func:`register` called as soon as inductor is imported; nothing here is
for users to call.
"""

from __future__ import annotations

import torch

from .. import ops


def register() -> None:
    """Makes the operators known to inductor, which has been imported, as calls of a kernel.

    Left to find that out, inductor raises in environments that set ``CI`` once ``torch.onnx`` has
    been imported: the operators then have decompositions, which are only for export.
    """
    from torch._inductor import lowering

    for schema in ops.SCHEMAS:
        operator = getattr(torch.ops.bitlinear, schema.partition("(")[0]).default
        lowering.make_fallback(operator, warn=False)
