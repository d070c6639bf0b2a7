"""Layers, and comparisons of layers, that several tests use."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from bitlinear import BitLinear, quantize


def deployed(in_features=20, out_features=6, **kwargs):
    return BitLinear(in_features, out_features, **kwargs).deploy()


both_forms = pytest.mark.parametrize("make", [BitLinear, deployed])
"""Runs a test with layers in training and with deployed ones."""


@contextlib.contextmanager
def unchanged(layer):
    """Checks that the block leaves the layer as it was."""
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    is_table = isinstance(layer, torch.nn.Embedding)
    x = torch.arange(layer.num_embeddings) if is_table else torch.randn(3, layer.in_features)
    y, kinds = layer(x), [type(layer._parameters.get(name)) for name in ("weight", "bias")]
    yield
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert [type(layer._parameters.get(name)) for name in ("weight", "bias")] == kinds
    assert torch.equal(layer(x), y)


def detached_linear(x, weight, bias=None):
    """The product as most implementations write it: autograd takes the rounding for a constant."""
    q, s_x = quantize.quantize_activations(x.detach())
    t, s_w = quantize.quantize_weights(weight.detach())
    return F.linear(x + (q * s_x - x.detach()), weight + (t * s_w - weight.detach()), bias)
