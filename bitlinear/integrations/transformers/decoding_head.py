"""The head of a model on a CPU, for one token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.functional import linear

from ...ops import has_cpu_kernels


class DecodingHead(nn.Linear):
    """``nn.Linear``; in bf16 on a CPU it multiplies one token with a kernel of ours.

    Where nothing records a gradient, :func:`bitlinear.head_products.reference_bf16_product`
    specifies that product: it adds in fp32, as ``F.linear`` does, in another order. It reads memory
    at its bandwidth (128256 x 2560, 2 threads of Zen 4: 19 ms, where ``F.linear`` takes 32 and
    ``torch.mv`` 36; with two tokens 28 and 31).

    Rows are multiplied as a matrix. (``F.linear`` of torch 2.13 on a CPU copies a weight that needs
    no gradient, if the input is one token cut out of a longer sequence.)

    Tools that look for the class ``nn.Linear`` itself do not find it: ``quantize_dynamic`` leaves
    it in floating point, and ``torch.fx`` and ``torch.jit.script`` cannot read it. For them, give
    the class back: ``model.lm_head.__class__ = nn.Linear``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``: from ``(..., in_features)`` to ``(..., out_features)``."""
        weight = self.weight
        if torch.compiler.is_compiling() or weight.device.type != "cpu" or input.dim() < 2:
            return linear(input, weight, self.bias)
        rows = input.reshape(-1, input.shape[-1])
        if (
            rows.shape[0] == 1
            and self.bias is None
            and weight.dtype == rows.dtype == torch.bfloat16
            and (type(rows), type(weight)) == (Tensor, nn.Parameter)
            and has_cpu_kernels()
            and not torch.is_grad_enabled()
            and unpack_dual(rows).tangent is None
            and not torch.is_autocast_enabled("cpu")  # our operator ignores it
            and not torch.jit.is_tracing()
        ):
            output = torch.ops.bitlinear.bf16_product(rows, weight)
        else:
            output = linear(rows, weight, self.bias)
        return output.view(*input.shape[:-1], weight.shape[0])

    def _get_name(self) -> str:
        return "Linear"


def select_head(model: nn.Module) -> None:
    """Make the head of a ``PreTrainedModel`` a :class:`DecodingHead`, if it is an ``nn.Linear``."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is nn.Linear:
        head.__class__ = DecodingHead
