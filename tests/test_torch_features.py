"""Where people put an ``nn.Linear``: what else torch does with a module, done with a BitLinear."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bitlinear
from bitlinear import BitLinear, quantize
from bitlinear.training import straight_through_linear
from tests import oracle
from tests.calls import Calls
from tests.test_linear import deployed

LINEAR = torch.ops.bitlinear.linear

both = pytest.mark.parametrize("make", [BitLinear, deployed])


# --- Autocast ---


@both
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


# --- torch.func ---


@both
def test_functional_call(make):
    layer, x = make(20, 6), torch.randn(4, 20)
    other = make(20, 6)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(functional_call(layer, tensors, (x,)), other(x))


@both
def test_vmap_is_one_call_with_more_tokens(make):
    layer, x = make(20, 6), torch.randn(5, 4, 20)
    y = layer(x)
    for function, operand, wanted in (
        (vmap(layer), x, y),
        (vmap(vmap(layer)), x, y),
        (vmap(layer, in_dims=1), x, y.transpose(0, 1)),
        (vmap(layer, out_dims=1), x, y.transpose(0, 1)),
        (vmap(layer), x[0], y[0]),
    ):
        with Calls(LINEAR.default) as calls:
            assert torch.equal(function(operand), wanted)
        assert calls.count == 1 or not hasattr(torch.library, "register_vmap")


def test_gradients_of_each_sample():
    layer, x, y = BitLinear(20, 6), torch.randn(4, 20), torch.randn(4, 6)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x, y):
        return F.mse_loss(functional_call(layer, parameters, (x,)), y)

    actual = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(4):
        wanted = torch.autograd.grad(F.mse_loss(layer(x[i]), y[i]), list(parameters.values()))
        for name, its in zip(parameters, wanted):
            torch.testing.assert_close(actual[name][i], its)


def test_jacobians():
    layer, x = BitLinear(20, 6), torch.randn(20)
    t, s_w = quantize.quantize_weights(layer.weight.detach())
    torch.testing.assert_close(jacrev(layer)(x), t * s_w)


@both
def test_ensembles(make):
    models, x = [make(20, 6) for _ in range(3)], torch.randn(4, 20)
    skeleton = copy.deepcopy(models[0]).to("meta")
    parameters, buffers = stack_module_state(models)

    def outputs(parameters):
        def one(parameters, buffers):
            return functional_call(skeleton, (parameters, buffers), (x,))

        return vmap(one)(parameters, buffers)

    assert torch.equal(outputs(parameters), torch.stack([model(x) for model in models]))
    if parameters:
        actual = grad(lambda p: outputs(p).square().sum())(parameters)["weight"]
        for model, its in zip(models, actual):
            (wanted,) = torch.autograd.grad(model(x).square().sum(), model.weight)
            torch.testing.assert_close(its, wanted)


def test_what_has_no_derivative_says_so():
    layer, x = BitLinear(20, 6), torch.randn(4, 20, requires_grad=True)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(layer, (x,), (x,))
    with pytest.raises(RuntimeError, match=r"not implemented|no derivative"):
        LINEAR(x, *layer.deploy().buffers(), 20).sum().backward()


def test_vmap_and_gradients_of_a_deployed_layer():
    layer, x = deployed(), torch.randn(4, 20, requires_grad=True)
    wanted = torch.ones(4, 6) @ layer.dequantize()
    (actual,) = torch.autograd.grad(vmap(layer)(x).sum(), x)
    torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(grad(lambda x: vmap(layer)(x).sum())(x.detach()), wanted)
    by_hand = vmap(lambda row: F.linear(row, layer.weight))
    torch.testing.assert_close(grad(lambda x: by_hand(x).sum())(x.detach()), wanted)


def test_hessians():
    layer, x = BitLinear(20, 6), torch.randn(20)
    t, s_w = quantize.quantize_weights(layer.weight.detach())
    weight = t * s_w

    def loss(x):
        return layer(x).square().sum()

    torch.testing.assert_close(jacrev(grad(loss))(x), 2 * weight.T @ weight)
    layer.deploy()
    torch.testing.assert_close(grad(loss)(x), 2 * layer(x) @ weight)
    torch.testing.assert_close(jacrev(grad(loss))(x), 2 * weight.T @ weight)


# --- Weights that are computed from parameters ---


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, 20))
        self.b = nn.Parameter(torch.randn(6, 2))

    def forward(self, weight):
        return weight + self.b @ self.a


def old_spectral_norm(layer):
    """With the norm estimated: that of its random vectors may be near 0, and is divided by."""
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


def by_hand(x, weight, bias):
    """As most implementations train: rounded in floating point, with detach() for the rounding."""
    q, s_x = quantize.quantize_activations(x)
    t, s_w = quantize.quantize_weights(weight)
    return F.linear(x + (q * s_x - x).detach(), weight + (t * s_w - weight).detach(), bias)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRISED)
def test_a_computed_weight_is_what_is_quantised(name):
    apply, remove = PARAMETRISED[name]
    # In evaluation, where spectral_norm is the same function every time.
    layer, x = BitLinear(20, 6).eval(), torch.randn(4, 20, requires_grad=True)
    layer(x)  # what is kept of the weight that it has now must not come back
    apply(layer)
    parameters = list(layer.parameters())
    for _ in range(2):
        y = layer(x)
        wanted = by_hand(x, layer.weight, layer.bias)
        torch.testing.assert_close(y, wanted)
        gradients = [
            torch.autograd.grad(
                output.square().sum(), [x, *parameters], retain_graph=True, allow_unused=True
            )
            for output in (y, wanted)
        ]
        for gradient, its in zip(*gradients):
            # Relative to the largest element: others may be what is left of sums that cancel. The
            # quantised operands are the same to the bit, so that nothing else differs on any CPU.
            torch.testing.assert_close(gradient, its, rtol=0, atol=1e-4 * float(its.abs().max()))
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


# --- Moves of a model, and places for its parameters ---


def test_channels_last():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), BitLinear(32, 4)
    )
    images = torch.randn(2, 3, 9, 9)
    for _ in range(2):
        before = copy.deepcopy(model[-1])
        model.to(memory_format=torch.channels_last)
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        # The convolution adds in another order now, so that its last bits depend on the CPU. What
        # the layer makes of them does not.
        features = model[:-1](images.to(memory_format=torch.channels_last))
        assert torch.equal(model[-1](features), before(features.contiguous()))
        bitlinear.deploy(model).to(memory_format=torch.contiguous_format)

    layer, x = deployed(3, 5), images.to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_a_meta_layer_gives_shapes():
    x = torch.empty(3, 20, dtype=torch.bfloat16, device="meta")
    for layer in (BitLinear(20, 6, device="meta"), BitLinear(20, 6, device="meta").deploy()):
        y = layer(x)
        assert (y.shape, y.dtype, y.is_meta) == ((3, 6), torch.bfloat16, True)


def test_layers_made_without_values():
    with torch.device("meta"):
        model = nn.Sequential(BitLinear(20, 6), deployed(6, 3))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    source = nn.Sequential(BitLinear(20, 6), deployed(6, 3))
    model.load_state_dict(source.state_dict())
    x = torch.randn(4, 20)
    assert torch.equal(model(x), source(x))

    layer = nn.utils.skip_init(BitLinear, 20, 6)
    layer.reset_parameters()
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()


OPTIMIZERS = {
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_any_optimizer_is_seen(name):
    layer, x = BitLinear(20, 6), torch.randn(4, 20)

    def loss():
        layer.zero_grad()
        value = layer(x).square().mean()
        value.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
        return value

    for _ in range(3):
        before = layer.weight.detach().clone()
        # A new one for each step. Its first step follows the gradient, so that it is short and not
        # 0 on every CPU; with the curvature that it estimates from the steps before, L-BFGS ends in
        # infinity for one seed in three, as straight-through gradients are of no function.
        OPTIMIZERS[name](layer.parameters()).step(loss)
        assert not torch.equal(layer.weight, before)
        assert torch.equal(layer(x), straight_through_linear(x, layer.weight, layer.bias))


def test_averaged_and_flattened_parameters():
    layer, x = BitLinear(20, 6), torch.randn(4, 20)
    averaged = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        averaged.update_parameters(layer)
        its = averaged.module
        assert torch.equal(averaged(x), straight_through_linear(x, its.weight, its.bias))
        vector = nn.utils.parameters_to_vector(layer.parameters()).detach()
        nn.utils.vector_to_parameters(vector + torch.randn_like(vector), layer.parameters())
        assert torch.equal(layer(x), straight_through_linear(x, layer.weight, layer.bias))
    assert torch.equal(its.deploy()(x), averaged(x))


# --- Other tools that take a model ---


@both
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="it copies models to GPUs, where there are any"
)
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
    """As quanto does: it makes a layer of its own and gives it the weight."""
    linear, layer = nn.Linear(20, 6), deployed()
    with pytest.raises(TypeError, match="as parameter 'weight'"):
        linear.weight = layer.weight
    with pytest.raises(RuntimeError, match="read-only"):
        nn.Parameter(layer.weight)


@both
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


# --- TorchScript and torch.fx ---


@both
@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore::torch.jit.TracerWarning")
def test_a_trace_follows_the_weights(make):
    model, x = nn.Sequential(make(20, 6), nn.ReLU()).eval(), torch.randn(4, 20)
    with torch.no_grad():
        model(x)  # what is kept from this call must not become a constant of the trace
        traced = torch.jit.trace(model, x)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        for trace in (traced, torch.jit.load(file)):
            model = nn.Sequential(make(20, 6), nn.ReLU())
            trace.load_state_dict(model.state_dict())
            for rows in (4, 9):
                x = torch.randn(rows, 20)
                assert torch.equal(trace(x), model(x))


@both
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_script_is_refused(make):
    with pytest.raises(NotImplementedError, match=r"cannot compile a BitLinear: use torch\.export"):
        torch.jit.script(nn.Sequential(make(20, 6)))


@both
def test_a_layer_alone_is_not_traced(make):
    with pytest.raises(TypeError, match=r"trace a module that holds it"):
        torch.fx.symbolic_trace(make(20, 6))


@both
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_layer_is_a_leaf_of_a_symbolic_trace(make, mode):
    model, x = nn.Sequential(nn.Sequential(make(20, 6)), nn.ReLU()), torch.randn(4, 20)
    with mode():
        graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0.0", "1"]
    assert torch.equal(graph(x), model(x))
    bitlinear.deploy(graph)
    assert torch.equal(graph(x), model(x))


# --- Other kinds of input ---


@both
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


@both
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
def test_other_layouts_are_refused_by_name(make, kind, convert):
    x = convert(torch.randn(4, 20))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(TypeError, match=f"x must be (a )?strided.*{kind}"):
            make(20, 6)(x)


# --- torch.compile and torch.export ---


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_training():
    layer = BitLinear(20, 6)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (4, 7):
        x = torch.randn(batch, 20, requires_grad=True)
        grad = torch.randn(batch, 6)
        wanted = torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)
        actual = torch.autograd.grad(compiled(x), (x, *layer.parameters()), grad)
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(actual, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_deployed():
    model = nn.Sequential(deployed(), nn.ReLU(), deployed(6, 3))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (4, 7):
        x = torch.randn(batch, 20)
        assert torch.equal(compiled(x), model(x))
    x.requires_grad_()
    y = compiled(x)
    assert torch.equal(y, model(x))
    torch.testing.assert_close(
        *(torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, model))
    )
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert compiled(x).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_training_step_is_one_graph(strength):
    from torch._dynamo.testing import CompileCounterWithBackend

    # Side by side: of two layers in a row the second would quantise what the first has computed,
    # whose last bit, for a strength of 0.5, depends on how a CPU adds. Here outputs and gradients
    # are sums of at most 20 products, a few units of fp32 apart on every CPU.
    model = nn.ModuleList([BitLinear(20, 6), BitLinear(13, 6)])
    bitlinear.set_quantization_strength(model, strength)
    inputs = [torch.randn(4, layer.in_features, requires_grad=True) for layer in model]
    target = torch.randn(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    operands = [*model.parameters(), *inputs]

    def loss():
        return F.mse_loss(sum(layer(x.relu()) for layer, x in zip(model, inputs)), target)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for _ in range(3):
        with torch.no_grad():
            value = loss()  # keeps quantised weights, of which the graph knows nothing
        for operand in operands:
            operand.grad = None
        torch.testing.assert_close(compiled(), value)
        compiled().backward()
        gradients = [operand.grad for operand in operands]
        torch.testing.assert_close(gradients, list(torch.autograd.grad(loss(), operands)))
        optimizer.step()
    assert counter.frame_count == 1


@both
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compile_autocast(make, dtype):
    layer, x = make(20, 6), torch.randn(4, 20)

    def function(x):
        with torch.autocast("cpu", dtype):
            rounded = layer(x)
            with torch.autocast("cpu", enabled=False):
                return rounded, layer(x)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert [y.dtype for y in compiled(x)] == [dtype, torch.float32]
    assert all(map(torch.equal, compiled(x), function(x)))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_checkpointed():
    layer, x = BitLinear(20, 6), torch.randn(4, 20, requires_grad=True)
    compiled = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    operands = (x, *layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).square().sum(), operands),
        torch.autograd.grad(layer(x).square().sum(), operands),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="older ones do not say what they compile")
def test_compile_gradients_of_torch_func():
    layer, x = BitLinear(20, 6), torch.randn(4, 20)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    for function in (grad(loss, (0, 1)), vmap(grad(loss, (0, 1)), in_dims=(None, 0))):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(parameters, x), function(parameters, x))

    closure = grad(lambda x: layer(x).square().sum())
    compiled = torch.compile(closure, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), closure(x))


# --- torch.export and AOTInductor ---

needs_aoti = pytest.mark.skipif(torch.__version__ < "2.6", reason="packages are of torch 2.6")


def test_an_export_of_a_layer_in_training_quantises_its_weight():
    layer, x = BitLinear(20, 6), torch.randn(4, 20)
    layer(x)  # what is kept from this call must not become a constant of the program
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
    assert program.state_dict.keys() == layer.state_dict().keys()
    assert not program.constants
    assert torch.equal(program.module()(x), layer(x))
    with pytest.raises(RuntimeError, match=r"not implemented|inference only"):
        torch.export.export(layer, (x,)).module()(x).sum().backward()


class Exported(nn.Module):
    """Several layers and several outputs: each is the bits of what comes before it."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(20, 64)
        self.down = nn.Linear(64, 33, bias=False)
        self.norm = nn.LayerNorm(33)
        self.head = nn.Linear(33, 7)
        bitlinear.deploy(bitlinear.convert(self)).eval()

    def forward(self, x):
        hidden = self.down(torch.relu(self.up(x)))
        normal = F.gelu(self.norm(hidden))
        return hidden, normal, self.head(normal), self.up(x.bfloat16())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, inputs, and a folder with its program and what AOTInductor compiles it to."""
    torch.manual_seed(0)
    model, folder = Exported(), tmp_path_factory.mktemp("exported")
    inputs = [torch.randn(rows, 20) for rows in (3, 1, 500)]
    batch = torch.export.Dim("batch", max=1000)
    with torch.no_grad():
        program = torch.export.export(model, (inputs[0],), dynamic_shapes={"x": {0: batch}})
    calls = [node for node in program.graph.nodes if node.target is LINEAR.default]
    assert len(calls) == 4
    torch.export.save(program, folder / "program.pt2")
    if torch.__version__ >= "2.6":
        package = str(folder / "package.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package)
    torch.save(inputs, folder / "inputs.pt")
    return model, inputs, folder


LOAD = {
    "program": "run = torch.export.load('program.pt2').module()",
    "package": "run = torch._inductor.aoti_load_package('package.pt2')",
}
RUN = """
inputs, ran = torch.load('inputs.pt'), set()
sys.setprofile(lambda frame, *_: ran.add(frame.f_code.co_filename))
outputs = [run(x) for x in inputs]
sys.setprofile(None)
torch.save(outputs, 'outputs.pt')
package = os.path.dirname(bitlinear.__file__)
print(bitlinear.HAS_BITLINEAR, any(file.startswith(package) for file in ran))
"""


def in_a_new_process(script, folder, **environment):
    script = f"import os, sys, torch\n{script}"
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["program", pytest.param("package", marks=needs_aoti)])
@pytest.mark.parametrize("build", ["auto", "off"])
def test_an_exported_model_runs_in_a_new_process(exported, kind, build, tmp_path):
    model, inputs, folder = exported
    environment = {"BITLINEAR_BUILD": build}
    if build == "off":
        environment["BITLINEAR_CACHE_DIR"] = str(tmp_path)  # where nothing is compiled
    script = f"import bitlinear\n{LOAD[kind]}{RUN}"
    result = in_a_new_process(script, folder, **environment)
    assert result.returncode == 0, result.stderr
    compiled = bitlinear.HAS_BITLINEAR and build == "auto"
    # A compiled kernel is called from C++: nothing of this package's Python runs.
    assert result.stdout.split() == [str(compiled), str(not compiled)]
    for x, outputs in zip(inputs, torch.load(folder / "outputs.pt")):
        hidden, normal, logits, halves = outputs
        wanted = model(x)
        assert torch.equal(hidden, wanted[0])
        torch.testing.assert_close(normal, wanted[1])  # the compiler's own arithmetic
        assert torch.equal(logits, model.head(normal))
        assert halves.dtype == torch.bfloat16
        assert torch.equal(halves, wanted[3])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["program", pytest.param("package", marks=needs_aoti)])
def test_an_exported_model_needs_the_import(exported, kind):
    result = in_a_new_process(LOAD[kind], exported[-1])
    assert result.returncode == 1
    assert {"program": "bitlinear.linear", "package": "bitlinear::linear"}[kind] in result.stderr
