"""Small models and layers that the tests of several files convert."""

from __future__ import annotations

import torch
from torch import nn

from bitlinear import BitLinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


IDS = torch.arange(10).reshape(2, 5)


ALL = {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "lm_head"}


def converted(model):
    return {name for name, module in model.named_modules() if isinstance(module, BitLinear)}


class Harmless(nn.Linear):
    """A subclass that changes how a layer is made, filled and printed."""

    __constants__ = ("in_features",)
    note: str

    def __init__(self, width, *_):
        super().__init__(width, width, bias=False)
        self.note = "mine"

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def extra_repr(self):
        return f"width={self.in_features}"


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnHelper(nn.Linear):
    def norm(self):
        return self.weight.norm()


class Mixin:
    scale = 2


class Mixed(Harmless, Mixin):
    pass


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


def with_forward_replaced():
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: x
    return linear
