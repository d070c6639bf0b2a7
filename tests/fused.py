"""Operands of a fused product, for the operator and for the oracle."""

from __future__ import annotations

import numpy as np
import torch

from bitlinear.fused import fused_linear
from tests import oracle

SOURCES = [(a, with_norm) for a in (None, "silu", "relu2") for with_norm in (False, True)]
"""Every ``(activation, with_norm)``."""


def operands(
    m=3,
    widths=(5, 3),
    k=12,
    dtype=torch.float32,
    activation="silu",
    with_norm=True,
    residual_dtype=torch.float32,
    seed=0,
    **options,
):
    """``(t, arguments)``: ternary weights, and the named arguments of the operator.

    Scales per tensor and per row take turns, as do weights with a bias and without; they start with
    the one or the other by the bits of ``seed``. ``m``: the tokens, or leading dimensions.
    """
    rng = np.random.default_rng(seed)
    leading = m if isinstance(m, tuple) else (m,)

    def normal(*shape):
        return torch.tensor(rng.standard_normal(shape), dtype=torch.float32)

    t = [oracle.ternary(n, k, seed + i) for i, n in enumerate(widths)]
    arguments = {
        "x": normal(*leading, k if activation is None else 2 * k).to(dtype),
        "w_packed": [torch.tensor(oracle.pack(rows)) for rows in t],
        "w_scale": [
            normal(*((n, 1) if (i + seed) % 2 else (1,))).abs() + 0.01 for i, n in enumerate(widths)
        ],
        "bias": [normal(n) if (i + seed // 2) % 2 else None for i, n in enumerate(widths)],
        "in_features": k,
        "activation": activation,
        "norm_weight": normal(k) if with_norm else None,
        "norm_eps": 1e-5 if with_norm else 0.0,
        "residual": None
        if residual_dtype is None
        else normal(*leading, sum(widths)).to(residual_dtype),
        **options,
    }
    return t, arguments


def expected(t, arguments):
    """The output of the operator, from the oracle."""
    named = dict(arguments)
    weights = zip(t, named.pop("w_scale"), named.pop("bias"))
    x, dtype = named.pop("x"), named.pop("out_dtype", None)
    del named["w_packed"], named["in_features"]
    return oracle.expected_fused(x, list(weights), dtype=dtype, **named)


def tokens(arguments):
    """The inputs that have a row for each token: ``(x, residual)``."""
    return arguments["x"], arguments["residual"]


class Fused(torch.nn.Module):
    """A fused product with its weights as buffers, with gradients; called with :func:`tokens`."""

    def __init__(self, arguments):
        super().__init__()
        self.options = {}
        for name, value in arguments.items():
            if name in ("w_packed", "w_scale", "bias"):
                for i, element in enumerate(value):
                    self.register_buffer(f"{name}_{i}", element)
            elif name == "norm_weight":
                self.register_buffer(name, value)
            elif name not in ("x", "residual"):
                self.options[name] = value
        self._count = len(arguments["w_packed"])

    def forward(self, x, residual=None):
        weights = {
            name: [getattr(self, f"{name}_{i}") for i in range(self._count)]
            for name in ("w_packed", "w_scale", "bias")
        }
        return fused_linear(
            x, **weights, norm_weight=self.norm_weight, residual=residual, **self.options
        )
