"""A BitLinear in place of an nn.Linear: autocast, checkpointing, hooks, tools, other inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bitlinear import BitLinear
from tests import oracle
from tests.layers import both_forms, deployed

# --- Autocast ---


@both_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_nn_linear(make, dtype):
    layer, linear = make(20, 6), nn.Linear(20, 6)
    for x_dtype in oracle.DTYPES:
        x = torch.randn(4, 20).to(x_dtype)
        with torch.autocast("cpu", dtype):
            assert layer(x).dtype == linear(x).dtype == dtype
            with torch.autocast("cpu", enabled=False):
                assert layer(x).dtype == x_dtype
        assert layer(x).dtype == x_dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_nothing_but_the_output(dtype):
    layer, x = BitLinear(20, 6), torch.randn(4, 20, requires_grad=True)
    y = layer(x)
    with torch.autocast("cpu", dtype):
        rounded = layer(x)
    assert torch.equal(rounded, y.to(dtype))
    operands, ones = (x, *layer.parameters()), torch.ones_like(y)
    wanted = torch.autograd.grad(y, operands, ones)
    actual = torch.autograd.grad(rounded, operands, ones.to(dtype))
    assert all(map(torch.equal, actual, wanted))
    layer.deploy()
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert torch.equal(layer(x), rounded)


# --- Gradient checkpointing ---


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    layer, x = BitLinear(20, 6), torch.randn(4, 20, requires_grad=True)
    operands = (x, layer.weight, layer.bias)

    def gradients(y):
        y.square().sum().backward()
        found = [operand.grad for operand in operands]
        for operand in operands:
            operand.grad = None
        return found

    wanted = gradients(layer(x))
    assert all(
        map(torch.equal, gradients(checkpoint(layer, x, use_reentrant=use_reentrant)), wanted)
    )


# --- Hooks ---


def test_hooks_of_calls_stay_through_deployment():
    layer, x = BitLinear(20, 6), torch.randn(4, 20, requires_grad=True)
    y, calls = layer(x).detach(), []
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 0,))
    layer.register_forward_hook(lambda module, args, output: calls.append("forward") or -output)
    layer.register_full_backward_pre_hook(lambda module, grad: calls.append("pre"))
    layer.register_full_backward_hook(lambda module, *grads: calls.append("backward"))
    layer.weight.register_hook(lambda grad: calls.append("weight"))

    def forward():
        calls.clear()
        with torch.no_grad():
            assert torch.equal(layer(x), -y)
        assert calls == ["forward"]

    for _ in range(2):
        forward()
        layer.deploy()
        forward()
        layer.undeploy()
    calls.clear()
    layer(x).sum().backward()
    assert calls == ["forward", "pre", "backward"]  # the hook of the old weight went with it


def test_hooks_of_states_stay_through_deployment():
    source = deployed()
    source._register_state_dict_hook(
        lambda module, state, prefix, _: state.update({prefix + "qweight": state.pop("w_packed")})
    )
    target, loads = BitLinear(20, 6), []

    def rename(state, prefix, *_):
        if prefix + "qweight" in state:
            state[prefix + "w_packed"] = state.pop(prefix + "qweight")

    target._register_load_state_dict_pre_hook(rename)
    target.register_load_state_dict_post_hook(lambda module, keys: loads.append(keys))
    x = torch.randn(4, 20)
    for _ in range(2):
        assert "qweight" in source.state_dict()
        target.load_state_dict(source.state_dict())
        assert target.is_deployed
        assert torch.equal(target(x), source(x))
        target.undeploy()
    assert loads == [([], [])] * 2


# --- Other tools that take a model ---


@both_forms
@pytest.mark.skipif(torch.cuda.is_available(), reason="it copies models to the GPUs")
def test_data_parallel_without_gpus_is_the_module(make):
    layer, x = make(20, 6), torch.randn(4, 20)
    assert torch.equal(nn.DataParallel(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_dynamic_quantisation_takes_the_plain_layers_only():
    model = nn.Sequential(BitLinear(20, 6), nn.Linear(6, 6), deployed(6, 3))
    result = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert type(result[0]) is type(result[2]) is BitLinear
    assert type(result[1]) is torch.ao.nn.quantized.dynamic.Linear
    x = torch.randn(4, 20)
    assert torch.equal(result[0](x), model[0](x))


def test_a_deployed_layer_cannot_be_replaced_by_its_weight():
    """quanto makes another layer and assigns the weight to it."""
    linear, layer = nn.Linear(20, 6), deployed()
    with pytest.raises(TypeError, match="as parameter 'weight'"):
        linear.weight = layer.weight
    with pytest.raises(RuntimeError, match="read-only"):
        nn.Parameter(layer.weight)


@both_forms
@pytest.mark.skipif(
    torch.__version__ < "2.5", reason="torch 2.4 does not find the formulas it is given"
)
def test_floating_point_operations_are_those_of_nn_linear(make):
    def flops(layer, x):
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
            if y.requires_grad and make is BitLinear:
                y.sum().backward()
        return counter.get_total_flops()

    trains = make is BitLinear
    linear = nn.Linear(20, 6).requires_grad_(trains)
    x = torch.randn(2, 3, 20, requires_grad=trains)
    assert flops(make(20, 6), x) == flops(linear, x) == (3 if trains else 1) * 2 * 6 * 20 * 6


def test_the_profiler_names_the_operator():
    layer, x = deployed(), torch.randn(4, 20)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    (event,) = (event for event in profile.key_averages() if event.key == "bitlinear::linear")
    assert event.count == 1


# --- Other kinds of input ---


@both_forms
def test_jagged_inputs_go_through_their_values(make):
    layer, parts = make(20, 6), [torch.randn(n, 20) for n in (3, 1, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = layer(x)
    assert y.is_nested
    for actual, part in zip(y.unbind(), parts):
        assert torch.equal(actual, layer(part))
    y.values().square().sum().backward()
    wanted = [p.clone().requires_grad_() for p in parts]
    sum(layer(p).square().sum() for p in wanted).backward()
    torch.testing.assert_close(x.grad.values(), torch.cat([p.grad for p in wanted]))
    assert ((x.detach() @ torch.eye(20)).shape[:2]) == y.shape[:2]  # the same jagged dimension
    with pytest.raises(ValueError, match="the jagged one of a nested tensor: transpose it"):
        layer(x.transpose(1, 2))


@both_forms
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize(
    ("kind", "convert"),
    [
        ("sparse_coo", lambda x: x.to_sparse()),
        ("sparse_csr", lambda x: x.to_sparse_csr()),
        pytest.param(
            "_mkldnn",
            lambda x: x.to_mkldnn(),
            marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no mkldnn"),
        ),
        ("nested", lambda x: torch.nested.nested_tensor([x, x[:2]])),
    ],
)
def test_other_layouts_are_rejected_by_name(make, kind, convert):
    x = convert(torch.randn(4, 20))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(TypeError, match=f"x must be (a )?strided.*{kind}"):
            make(20, 6)(x)
