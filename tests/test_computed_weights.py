"""Weights that are computed from parameters: parametrizations, pruning."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from bitlinear import BitLinear
from tests.layers import deployed, detached_linear


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, 20))
        self.b = nn.Parameter(torch.randn(6, 2))

    def forward(self, weight):
        return weight + self.b @ self.a


def old_spectral_norm(layer):
    """Estimate the norm first: it is a divisor, and random vectors can have one near 0."""
    nn.utils.spectral_norm(layer.train(), n_power_iterations=15)
    layer(torch.randn(1, layer.in_features))
    layer.eval()


def remove_parametrizations(layer):
    parametrize.remove_parametrizations(layer, "weight")


PARAMETRISED = {
    "weight_norm": (parametrizations.weight_norm, remove_parametrizations),
    "orthogonal": (parametrizations.orthogonal, remove_parametrizations),
    "spectral_norm": (parametrizations.spectral_norm, remove_parametrizations),
    "low_rank": (
        lambda layer: parametrize.register_parametrization(layer, "weight", LowRank()),
        remove_parametrizations,
    ),
    "old_weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old_spectral_norm": (old_spectral_norm, nn.utils.remove_spectral_norm),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        lambda layer: prune.remove(layer, "weight"),
    ),
}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRISED)
def test_a_computed_weight_is_quantised(name):
    apply, remove = PARAMETRISED[name]
    # In evaluation, spectral_norm is the same function in every call.
    layer, x = BitLinear(20, 6).eval(), torch.randn(4, 20, requires_grad=True)
    layer(x)  # must leave nothing behind of the weight from before
    apply(layer)
    parameters = list(layer.parameters())
    for _ in range(2):
        y = layer(x)
        wanted = detached_linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(y, wanted)
        gradients = [
            torch.autograd.grad(
                output.square().sum(), [x, *parameters], retain_graph=True, allow_unused=True
            )
            for output in (y, wanted)
        ]
        for gradient, wanted in zip(*gradients):
            # Relative to the largest element, because others can be the rest of sums that cancel.
            # The quantised operands are the same to the bit, so nothing else differs on any CPU.
            tolerance = 1e-4 * float(wanted.abs().max())
            torch.testing.assert_close(gradient, wanted, rtol=0, atol=tolerance)
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1 + torch.rand_like(parameter))

    y = layer(x).detach()
    with pytest.raises(ValueError, match=r"remove_parametrizations first|remove that first"):
        layer.deploy()
    remove(layer)
    assert torch.equal(layer(x), y)
    with torch.no_grad():
        assert torch.equal(layer.deploy()(x), y)


def test_a_pruned_bias_is_not_deployed():
    layer = BitLinear(20, 6)
    prune.l1_unstructured(layer, "bias", 0.3)
    with pytest.raises(ValueError, match="its bias is computed"):
        layer.deploy()
    prune.remove(layer, "bias")
    assert layer.deploy().state_dict().keys() == {"w_packed", "w_scale", "bias"}


def test_a_deployed_layer_has_no_weight_to_compute():
    layer, x = deployed(), torch.randn(4, 20)
    y = layer(x)
    with pytest.raises(ValueError, match=r"deployed=True.* does not have a parameter"):
        parametrize.register_parametrization(layer, "weight", LowRank())
    with pytest.raises(AttributeError, match=r"deployed .* call undeploy\(\)"):
        prune.l1_unstructured(layer, "weight", 0.3)
    assert torch.equal(layer(x), y)
