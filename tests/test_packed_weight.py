"""``layer.weight`` of a deployed layer: a read-only tensor without memory."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitlinear import BitLinear
from tests import oracle
from tests.calls import Calls

LINEAR = torch.ops.bitlinear.linear.default


X = torch.ones(2, 20)


def deployed(in_features=20, out_features=6, **kwargs):
    return BitLinear(in_features, out_features, **kwargs).deploy()


# --- What it is ---


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_looks_like_the_weight_from_before(dtype, bias):
    layer = BitLinear(20, 6, bias=bias, dtype=dtype)
    before = layer.weight
    weight = layer.deploy().weight
    assert isinstance(weight, torch.Tensor)
    assert not isinstance(weight, nn.Parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (
            lambda w: w.shape,
            lambda w: w.dtype,
            lambda w: w.device,
            lambda w: w.size(0),
            lambda w: w.numel(),
            lambda w: w.dim(),
            lambda w: w.stride(),
            lambda w: w.layout,
            lambda w: w.element_size(),
            lambda w: w.is_floating_point(),
            lambda w: w.is_cuda,
            len,
        ):
            assert read(weight) == read(before)
        assert not weight.requires_grad
        assert repr(weight).startswith(f"PackedWeight(shape=(6, 20), dtype={dtype}")


def test_it_is_neither_parameter_nor_buffer():
    layer = deployed()
    assert not list(layer.parameters())
    assert {name for name, _ in layer.named_buffers()} == {"w_packed", "w_scale", "bias"}
    assert hasattr(layer, "weight")


@pytest.mark.parametrize("bias", [True, False])
def test_its_dtype_and_device_follow_the_layer(bias):
    layer = deployed(bias=bias)
    assert layer.half().weight.dtype == torch.float16
    assert layer.bfloat16().weight.dtype == torch.bfloat16
    assert layer.float().weight.dtype == torch.float32
    assert layer.double().weight.dtype == torch.float64
    assert layer.undeploy().weight.dtype == torch.float64
    assert layer.deploy().to("meta").weight.is_meta


# --- F.linear runs the kernel ---


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_linear_runs_the_kernel(dtype):
    layer, x = deployed(dtype=dtype), torch.randn(2, 3, 20, dtype=dtype)
    bias = torch.randn(6, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for output, bias_used in (
            (lambda: F.linear(x, layer.weight, layer.bias), layer.bias),
            (lambda: F.linear(x, layer.weight), None),
            (lambda: F.linear(input=x, weight=layer.weight, bias=bias), bias),
            (lambda: torch.nn.functional.linear(x, bias=bias, weight=layer.weight), bias),
        ):
            with Calls(LINEAR) as calls:
                actual = output()
            assert calls.count == 1
            arguments = (layer.w_packed, layer.w_scale, bias_used, 20, layer.eps)
            oracle.assert_same_bits(actual, LINEAR(x, *arguments))


def test_linear_has_the_gradients_of_the_input_and_of_the_bias():
    layer, bias = deployed(), torch.randn(6, requires_grad=True)
    x, grad = torch.randn(3, 20, requires_grad=True), torch.randn(3, 6)
    F.linear(x, layer.weight, bias).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.dequantize())
    torch.testing.assert_close(bias.grad, grad.sum(0))


class Owner(nn.Module):
    """Reads the weight and never calls the layer, as the attention of several models does."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(20, 60)

    def forward(self, x):
        bias = torch.cat([self.qkv.bias[:20], torch.zeros(20), self.qkv.bias[40:]])
        x = x.to(self.qkv.weight.dtype)
        assert self.qkv.weight.shape[1] == x.shape[-1]
        return F.linear(x, weight=self.qkv.weight, bias=bias).chunk(3, dim=-1)


def test_an_owner_that_reads_the_weight():
    owner, x = Owner(), torch.randn(4, 20)
    owner.qkv = layer = BitLinear.from_linear(owner.qkv).deploy()
    q, k, v = owner(x)
    wanted = layer(x)
    assert torch.equal(torch.cat([q, v], -1), wanted[:, [*range(20), *range(40, 60)]])
    torch.testing.assert_close(k, wanted[:, 20:40] - layer.bias[20:40])


# --- Any other computation gets the values ---


COMPUTATIONS = {
    "x @ w.T": lambda w, x: x @ w.T,
    "w + 1": lambda w, x: w + 1,
    "a row": lambda w, x: w[2] * 1,
    "a slice": lambda w, x: w[1:4, ::3] * 1,
    "a mask": lambda w, x: w[w > 0],
    "a chunk": lambda w, x: w.chunk(2, dim=1)[1] * 1,
    "einsum": lambda w, x: torch.einsum("mk,nk->mn", x, w),
    "mean of magnitudes": lambda w, x: w.abs().mean(),
    "clone": lambda w, x: w.clone(),
    "another dtype": lambda w, x: w.to(torch.bfloat16),
    "cat": lambda w, x: torch.cat([w, w]),
    "a view of a view": lambda w, x: w.t().reshape(4, 5, 6)[1] + 0,
    "numpy": lambda w, x: torch.from_numpy(w.numpy().copy()),
    "np.asarray": lambda w, x: torch.from_numpy(np.asarray(w).copy()),
    "tolist": lambda w, x: torch.tensor(w.tolist()),
    "item": lambda w, x: torch.tensor(w[0, 1].item()),
    "dlpack": lambda w, x: torch.from_dlpack(w),
    "norm of a vector": lambda w, x: nn.utils.parameters_to_vector([w]).norm(),
    "linear with a slice": lambda w, x: F.linear(x, w[:3]),
    "deepcopy": lambda w, x: copy.deepcopy(w),
    "pickle": lambda w, x: pickle.loads(pickle.dumps(w)),
    "convolution": lambda w, x: F.conv1d(x[:, :, None], w[:, :, None]),
    "an operand in place": lambda w, x: torch.zeros(6, 20).copy_(w),
    "an operand of addmm_": lambda w, x: torch.zeros(4, 6).addmm_(x, w.t()),
    "an operand of lerp_": lambda w, x: torch.ones(6, 20).lerp_(w, 0.5),
    "assigned": lambda w, x: torch.ones(6, 20).index_copy_(0, torch.arange(6), w),
    "with out=": lambda w, x: torch.sum(w, 1, out=torch.empty(6)),
    "two of them": lambda w, x: torch.stack([w, w[:, :]]),
    "the transposed, reshaped": lambda w, x: w.T.reshape(-1) * 1,
    "columns, flattened": lambda w, x: w.chunk(2, dim=1)[0].flatten(),
    "expanded": lambda w, x: w.expand(2, 6, 20).reshape(12, 20) + 0,
}


@pytest.mark.parametrize("compute", COMPUTATIONS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_other_computations_get_the_values(compute, mode):
    layer, x = deployed(), torch.randn(4, 20)
    with mode(), pytest.warns(UserWarning, match="was dequantised.*deploy"):
        actual = COMPUTATIONS[compute](layer.weight, x)
    assert type(actual) is torch.Tensor
    wanted = COMPUTATIONS[compute](layer.dequantize(), x)
    assert torch.equal(actual, wanted)


def test_one_warning_for_a_layer():
    layer = deployed()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            layer.weight.sum()
    assert len(caught) == 1


def test_new_tensors_of_its_kind_need_no_values():
    weight = deployed(dtype=torch.bfloat16).weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for new in (torch.zeros_like(weight), weight.new_ones(3), torch.empty_like(weight.T)):
            assert type(new) is torch.Tensor
            assert new.dtype == torch.bfloat16
    assert torch.zeros_like(weight).shape == (6, 20)
    assert weight.T.stride() == (1, 20)


def test_the_warning_points_to_the_code_that_computes():
    with pytest.warns(UserWarning, match="6 x 20") as caught:
        deployed().weight.sum()
    assert caught[0].filename == __file__


def test_damaged_bytes_are_not_computed_with():
    layer = deployed()
    layer.w_packed[2, 1] = 255
    for read in (layer.dequantize, layer.undeploy, lambda: layer.weight + 0, lambda: layer(X)):
        with pytest.raises(ValueError, match="code 3, first in byte 1 of row 2"):
            read()
    assert layer.is_deployed


def test_gradients_pass_the_values():
    layer, x = deployed(), torch.randn(4, 20, requires_grad=True)
    with pytest.warns(UserWarning, match="dequantised"):
        (x @ layer.weight.T).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 6) @ layer.dequantize())


# --- Writing raises ---

WRITES = {
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(torch.zeros(6, 20)),
    "+=": lambda w: w.__iadd__(1),
    "a row": lambda w: w[2].zero_(),
    "an item": lambda w: w.__setitem__((2, 3), 1.0),
    "a slice": lambda w: w.__setitem__(slice(1, 3), 0.0),
    "a mask": lambda w: w.__setitem__(torch.ones(6, 20).bool(), 0.0),
    "the transposed": lambda w: w.T.fill_(1),
    "a chunk": lambda w: w.chunk(2)[1].mul_(2),
    "rows": lambda w: w.unbind()[3].add_(1),
    ".data": lambda w: w.data.zero_(),
    "a row of .data": lambda w: w.data[2].zero_(),
    "another .data": lambda w: setattr(w, "data", torch.zeros(6, 20)),
    "detach()": lambda w: w.detach().zero_(),
    "out=": lambda w: torch.add(torch.ones(6, 20), 1, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "init": nn.init.xavier_uniform_,
    "requires_grad_": lambda w: w.requires_grad_(),
    "requires_grad": lambda w: setattr(w, "requires_grad", True),
    "grad": lambda w: setattr(w, "grad", torch.zeros(6, 20)),
    "a parameter": nn.Parameter,
    "set_": lambda w: w.set_(torch.zeros(6, 20)),
    "share_memory_": lambda w: w.share_memory_(),
    "apply_": lambda w: w.apply_(lambda value: 0),
    "its storage": lambda w: w.untyped_storage().fill_(0),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.zeros(120), [w]),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_raises(write):
    layer, x = deployed(), torch.randn(4, 20)
    y = layer(x)
    with pytest.raises(RuntimeError, match=r"deployed, so its weight is read-only: call undeploy"):
        WRITES[write](layer.weight)
    assert torch.equal(layer(x), y)


def test_what_changes_nothing_is_no_write():
    """PEFT freezes base weights, in this way for AdaLoRA."""
    weight = deployed().weight
    weight.requires_grad = False
    assert weight.requires_grad_(False) is weight
    assert not weight.requires_grad


def test_the_memory_of_its_values_is_read_only():
    with pytest.warns(UserWarning, match="dequantised"):
        array = deployed().weight.numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_a_weight_cannot_be_assigned_to_a_deployed_layer():
    layer = deployed()
    for weight in (nn.Parameter(torch.zeros(6, 20)), torch.zeros(6, 20), None):
        with pytest.raises(AttributeError, match="would be ignored; call undeploy"):
            layer.weight = weight
    assert not list(layer.parameters())


def test_initialising_a_deployed_layer_raises():
    layer = deployed()
    with pytest.raises(RuntimeError, match="read-only"):
        layer.reset_parameters()
