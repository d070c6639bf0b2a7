"""Modules of torch that read the weights of their linear layers instead of calling them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitlinear import BitLinear, convert, deploy


def encoder_layer(**kwargs):
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **kwargs)


def in_python(model, *args, **kwargs):
    """The result without torch's fast path, which bypasses the layers."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


hardly_ternary = pytest.mark.filterwarnings(r"ignore:convert\(\) made")


@hardly_ternary
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_call_their_linears_in_evaluation(norm_first, log):
    layer, x = encoder_layer(norm_first=norm_first).eval(), torch.randn(3, 5, 8)
    convert(layer)
    assert isinstance(layer.linear1, BitLinear)
    assert isinstance(layer.linear2, BitLinear)
    wanted = in_python(layer, x)
    assert any("disabled its fast path" in line for line in log())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)
    deploy(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)


@hardly_ternary
@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
def test_encoders_with_padding_call_their_linears_in_evaluation():
    model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    convert(model)
    wanted = in_python(model, x, src_key_padding_mask=padding)
    for _ in range(2):
        with torch.no_grad():
            y = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(y[~padding], wanted[~padding])
        deploy(model)


def test_deploy_disables_the_fast_path_of_a_hand_made_encoder():
    layer, x = encoder_layer().eval(), torch.randn(3, 5, 8)
    layer.linear1 = BitLinear.from_linear(layer.linear1)
    wanted = in_python(layer, x)
    deploy(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)


@hardly_ternary
@pytest.mark.filterwarnings(r"ignore:deploy\(\) did nothing")
@pytest.mark.parametrize("replaced", [False, True])
def test_attention_keeps_its_output_projection(replaced, log):
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    if replaced:
        attention.out_proj = nn.Linear(8, 8)
    model, x = nn.ModuleDict({"attention": attention}), torch.randn(3, 5, 8)
    before = attention(x, x, x)[0]
    convert(model)
    deploy(model)
    assert torch.equal(attention(x, x, x)[0], before)
    (line,) = (line for line in log() if line.startswith("attention.out_proj"))
    assert "nn.MultiheadAttention) reads its weight and never calls it" in line
    attention.train()(x, x, x)[0].sum().backward()
    assert attention.out_proj.weight.grad is not None


def test_a_hand_made_output_projection_is_not_deployed():
    """F.multi_head_attention_forward reads the weight of any layer as of an nn.Linear."""
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    before = attention(x, x, x)[0]
    attention.out_proj = BitLinear.from_linear(attention.out_proj)
    assert torch.equal(attention(x, x, x)[0], before)
    model = nn.ModuleDict({"attention": attention, "head": BitLinear(8, 8)})
    with pytest.raises(
        ValueError, match=r"attention\.out_proj: its owner .* must be an nn\.Linear"
    ):
        deploy(model)
    assert not model["head"].is_deployed
    attention.out_proj.deploy()
    with pytest.warns(UserWarning, match="dequantised"):
        after = attention(x, x, x)[0]
    attention.out_proj.weight = nn.Parameter(attention.out_proj.undeploy().dequantize())
    torch.testing.assert_close(after, attention(x, x, x)[0])


class Attention(nn.MultiheadAttention):
    """Attention whose own forward calls the layer."""

    def forward(self, x):
        return self.out_proj(x)


def test_attention_that_calls_its_output_projection_is_deployed():
    attention, x = Attention(8, 2), torch.randn(3, 8)
    attention.out_proj = BitLinear(8, 8)
    before = attention(x)
    assert torch.equal(deploy(attention)(x), before)
