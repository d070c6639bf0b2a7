"""Training: operators, what the backward pass saves, what is kept between calls, schedules."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bitlinear
from bitlinear import BitLinear, ops, quantize
from bitlinear.training import straight_through_linear
from scripts.bench.train_step import saved_bytes
from tests import oracle
from tests.calls import Calls

OPS = torch.ops.bitlinear
WEIGHT_DTYPES = [*oracle.DTYPES, torch.float64]


# --- The operators ---


@given(
    n=st.integers(1, 40),
    k=st.one_of(st.integers(1, 40), st.integers(1000, 2100)),
    dtype=st.sampled_from(WEIGHT_DTYPES),
    spread=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_weights_are_quantised_as_by_the_oracle(n, k, dtype, spread, seed):
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)
    w_packed, w_scale = OPS.quantize_weight(w, 1e-6)
    assert (w_packed.dtype, w_scale.dtype, w_scale.shape) == (torch.uint8, torch.float32, (1,))
    scale = oracle.weight_scale(w.float(), 1e-6)
    np.testing.assert_allclose(w_scale.item(), scale, rtol=1.2e-7)
    t = oracle.ternarize(w.float(), w_scale)
    np.testing.assert_array_equal(w_packed.numpy(), oracle.pack(t))
    np.testing.assert_array_equal(OPS.expand_weight(w_packed, k).numpy(), t)
    reference = ops.reference_quantize_weight(w, 1e-6)
    if reference[1] == w_scale:  # they may differ in the last bit
        assert torch.equal(reference[0], w_packed)


@pytest.mark.parametrize("dtype", [None, *oracle.DTYPES])
def test_weights_expand_to_any_dtype(dtype):
    w_packed, w_scale = OPS.quantize_weight(torch.randn(5, 21))
    t = OPS.expand_weight(w_packed, 21, dtype=dtype)
    assert t.dtype == (dtype or torch.float32)
    assert torch.equal(t.float(), OPS.expand_weight(w_packed, 21))
    for its_scale in (None, w_scale):
        weight = OPS.expand_weight(w_packed, 21, its_scale, dtype)
        assert torch.equal(weight, ops.reference_expand_weight(w_packed, 21, its_scale, dtype))
    assert torch.equal(weight, (t.float() * w_scale).to(t.dtype))


def test_half_of_the_scale_rounds_to_zero():
    # Their mean is 1; 0.5 is halfway, and rounds to even.
    w = torch.tensor([[0.5, -0.5, 0.5000001, -0.5000001, 1.5, 0.0, 2.0, 2.5]])
    w[0, -1] += 8 - w.abs().sum()
    w_packed, w_scale = OPS.quantize_weight(w)
    assert w_scale.item() == 1.0
    assert OPS.expand_weight(w_packed, 8).tolist() == [[0, 0, 1, -1, 1, 0, 1, 1]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_zeros_with_a_scale_that_says_so(value):
    w = torch.randn(3, 50)
    w[1, 20] = value
    w_packed, w_scale = OPS.quantize_weight(w)
    assert not w_scale.isfinite()
    assert not OPS.expand_weight(w_packed, 50).any()


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 70), (2, 0, 9), (0, 4), (2, 3, 2051)])
def test_activations_are_quantised_as_by_the_oracle(shape, dtype):
    x = torch.randn(shape).to(dtype)
    q, s_x = OPS.quantize_activations(x, 1e-6)
    assert (q.dtype, q.shape, s_x.shape) == (torch.int8, x.shape, (*shape[:-1], 1))
    if x.numel():
        wanted, scale = oracle.quantize_activations(x.float())
        np.testing.assert_array_equal(q.numpy(), wanted)
        np.testing.assert_array_equal(s_x.numpy(), scale)


@pytest.mark.parametrize("dtype", [None, *oracle.DTYPES])
def test_activations_expand_to_any_dtype(dtype):
    q, s_x = OPS.quantize_activations(torch.randn(2, 5, 21))
    x = OPS.expand_activations(q, s_x, dtype)
    assert (x.dtype, x.shape) == (dtype or torch.float32, q.shape)
    assert torch.equal(x, torch.from_numpy(q.numpy() * s_x.numpy()).to(x.dtype))


def test_views_and_threads():
    w, x = torch.randn(70, 300), torch.randn(300, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for weight, tokens in ((w, x.T), (w.T.contiguous().T, x.T.contiguous())):
                w_packed, w_scale = OPS.quantize_weight(weight)
                results.append((w_packed, w_scale, *OPS.quantize_activations(tokens)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"weight must be floating point.*int64"):
        OPS.quantize_weight(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(N, K\)"):
        OPS.quantize_weight(torch.ones(2))
    with pytest.raises(ValueError, match="eps must be between"):
        OPS.quantize_weight(torch.ones(2, 2), 0.0)
    with pytest.raises(ValueError, match=r"\(N, 2\) for in_features = 5"):
        OPS.expand_weight(torch.zeros(3, 3, dtype=torch.uint8), 5)
    with pytest.raises(TypeError, match=r"dtype must be float32.*float64"):
        OPS.expand_weight(torch.zeros(3, 2, dtype=torch.uint8), 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"w_scale must be float32, of shape \(1,\)"):
        OPS.expand_weight(torch.zeros(3, 2, dtype=torch.uint8), 5, torch.ones(3, 1))
    with pytest.raises(TypeError, match=r"x must be float32.*float64"):
        OPS.quantize_activations(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="no dimension"):
        OPS.quantize_activations(torch.tensor(1.0))


def check_operators(device):
    """What torch asks of an operator, of each; test_cuda_training.py does the same on a GPU."""
    x, weight = torch.randn(2, 6, 11, device=device), torch.randn(6, 11, device=device)
    w_packed, w_scale = OPS.quantize_weight(weight)
    for operator, arguments in (
        (OPS.quantize_weight, (weight,)),
        (OPS.expand_weight, (w_packed, 11, w_scale)),
        (OPS.quantize_activations, (x,)),
        (OPS.expand_activations, OPS.quantize_activations(x)),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_the_operators_are_what_torch_expects():
    check_operators("cpu")


# --- What is saved for the backward pass ---


@pytest.mark.parametrize("features", [1024, 4096])
def test_little_is_saved_for_the_backward_pass(features):
    x = torch.randn(512, features, requires_grad=True)
    ours, linears = (saved_bytes(kind(features, features), x) for kind in (BitLinear, nn.Linear))
    assert ours <= 0.15 * linears


# --- Nothing is kept between calls ---


def mask_of_rows(layer):
    mask = torch.ones_like(layer.weight)
    mask[torch.randperm(len(mask))[:10]] = 0
    layer.weight.data.mul_(mask)


class DataSGD(torch.optim.Optimizer):
    """Writes through ``.data``, as some optimizers do, past the version counter."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"])


def step(layer, optimizer=torch.optim.SGD):
    layer(torch.randn(2, 40)).square().sum().backward()
    optimizer(layer.parameters(), lr=0.5).step()


def vector(layer):
    flat = nn.utils.parameters_to_vector(layer.parameters()).clone()
    flat[:40] = 0
    nn.utils.vector_to_parameters(flat, layer.parameters())


def in_another_process(layer):
    """Writes to shared memory, where nothing in this process can count it."""
    process = torch.multiprocessing.get_context("spawn").Process(
        target=torch.Tensor.zero_, args=(layer.weight.detach()[5],)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


EDITS = {
    "a step": step,
    "a step through .data": lambda layer: step(layer, DataSGD),
    "one row of .data": lambda layer: layer.weight.data[5].zero_(),
    "one column of .data": lambda layer: layer.weight.data[:, 7].zero_(),
    "one value of .data": lambda layer: layer.weight.data[5, 7].fill_(9),
    "some rows of .data": mask_of_rows,
    "all of .data": lambda layer: layer.weight.data.mul_(-1),
    "another storage": lambda layer: setattr(layer.weight, "data", -layer.weight.data),
    "a row of a NumPy view": lambda layer: layer.weight.detach().numpy()[5].fill(0),
    "a row through DLPack": lambda layer: torch.from_dlpack(layer.weight.detach())[5].zero_(),
    "vector_to_parameters": vector,
    "load_state_dict": lambda layer: layer.load_state_dict(BitLinear(40, 30).state_dict()),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(30, 40))),
    "eps": lambda layer: setattr(layer, "eps", 0.5),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_change_is_seen_by_the_next_call(edit, mode):
    layer, x = BitLinear(40, 30), torch.randn(4, 40)
    with mode():
        before = layer(x)
    EDITS[edit](layer)
    with mode():
        after = layer(x)
    assert not torch.equal(before, after)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    assert torch.equal(after, straight_through_linear(x, weight, bias, layer.eps))
    assert torch.equal(layer.deploy()(x), after)


@pytest.mark.slow
def test_a_change_by_another_process_is_seen():
    layer, x = BitLinear(40, 30).share_memory(), torch.randn(4, 40)
    before = layer(x)
    in_another_process(layer)
    after = layer(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, copy.deepcopy(layer)(x))


def attributes(layer):
    return {
        name: (dict(value) if isinstance(value, dict) else value)
        for name, value in vars(layer).items()
    }


def fake_mode(layer, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x))


def dispatch_mode(layer, x):
    with Calls(OPS.linear.default):
        layer(x)


TRACERS = {
    "a fake tensor mode": fake_mode,
    "make_fx": lambda layer, x: torch.fx.experimental.proxy_tensor.make_fx(layer)(x),
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
    "functional_call": lambda layer, x: torch.func.functional_call(
        layer, {name: torch.zeros_like(p) for name, p in layer.named_parameters()}, x
    ),
    "a dispatch mode": dispatch_mode,
    "symbolic_trace": lambda layer, x: torch.fx.symbolic_trace(nn.Sequential(layer)),
}


@pytest.mark.parametrize("run", TRACERS)
@pytest.mark.parametrize("deployed", [True, False])
def test_a_trace_leaves_nothing_behind(run, deployed):
    layer, x = BitLinear(40, 30), torch.randn(4, 40)
    if deployed:
        layer.deploy()
    y = layer(x)
    before = attributes(layer)
    TRACERS[run](layer, x)
    assert attributes(layer) == before
    assert torch.equal(layer(x), y)


def test_a_weight_is_not_kept_alive():
    layer = BitLinear(40, 30)
    layer(torch.randn(4, 40))
    weight = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.randn(30, 40))
    gc.collect()
    assert weight() is None


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_layer_sees_its_weight_change():
    layer, x = BitLinear(40, 30), torch.randn(4, 40)
    compiled = torch.compile(layer, fullgraph=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(3):
        y = compiled(x)
        torch.testing.assert_close(y, straight_through_linear(x, layer.weight, layer.bias))
        y.square().sum().backward()
        optimizer.step()


# --- Schedules ---


def test_strength_goes_from_a_plain_layer_to_a_quantised_one():
    layer, x = BitLinear(40, 30), torch.randn(8, 40)
    quantised, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    assert layer.quantization_strength == 1
    distances = []
    for strength in (0.0, 0.25, 0.75, 1.0):
        assert bitlinear.set_quantization_strength(layer, strength) is layer
        assert layer.quantization_strength == strength
        distances.append((layer(x) - plain).norm().item())
    assert distances[0] < 1e-5
    assert distances == sorted(distances)
    assert torch.equal(layer(x), quantised)


def test_the_formula_of_a_blend():
    layer, x = BitLinear(40, 30), torch.randn(8, 40, requires_grad=True)
    bitlinear.set_quantization_strength(layer, 0.3)
    q, s_x = quantize.quantize_activations(x.detach())
    t, s_w = quantize.quantize_weights(layer.weight.detach())
    operand_x = x.detach().lerp(q * s_x, 0.3)
    operand_w = layer.weight.detach().lerp(t * s_w, 0.3)
    y = layer(x)
    torch.testing.assert_close(y, operand_x @ operand_w.T + layer.bias)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, torch.ones(8, 30) @ operand_w)
    torch.testing.assert_close(layer.weight.grad, torch.ones(30, 8) @ operand_x)
    torch.testing.assert_close(layer.bias.grad, torch.full((30,), 8.0))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_dtypes_of_a_blend(dtype):
    layer = BitLinear(40, 30, dtype=dtype)
    layer.quantization_strength = 0.5
    assert layer(torch.randn(2, 40, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 40)).dtype == torch.bfloat16


def test_a_strength_reads_as_it_was_set():
    layer = BitLinear(40, 30)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        layer.quantization_strength = 0.3
        assert layer.quantization_strength == 0.3
        layer.quantization_strength = 0.7
        assert layer.quantization_strength == 0.7
    finally:
        torch.set_default_dtype(default)


def test_a_strength_that_was_set_in_a_fake_tensor_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = BitLinear(40, 30)
    with FakeTensorMode():
        layer.quantization_strength = 0.5
    assert "quantization_strength=0.5" in repr(layer)
    layer(torch.randn(2, 40))
    with pytest.raises(TypeError, match="must be a number, but it is 'x'"):
        bitlinear.set_quantization_strength(layer, "x")


def test_a_strength_that_was_set_in_inference_mode():
    layer = BitLinear(40, 30)
    with torch.inference_mode():
        layer.quantization_strength = 0.5
    layer.quantization_strength = 0.25
    layer(torch.randn(2, 40)).sum().backward()
    assert layer.quantization_strength == 0.25


def test_strength_and_deployment():
    model = nn.Sequential(BitLinear(8, 8), nn.Sequential(BitLinear(8, 8)))
    bitlinear.set_quantization_strength(model, 0.5)
    assert "quantization_strength" not in str(model.state_dict().keys())
    with pytest.raises(ValueError, match=r"quantization_strength is 0\.5"):
        bitlinear.deploy(model)
    bitlinear.set_quantization_strength(model, 1.0)
    bitlinear.deploy(model[1])
    with pytest.raises(ValueError, match=r"'1\.0' first"):
        bitlinear.set_quantization_strength(model, 0.5)
    assert model[0].quantization_strength == 1
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        bitlinear.set_quantization_strength(model, 2)
    with pytest.raises(ValueError, match="between 0 and 1, not nan"):
        model[0].quantization_strength = float("nan")
    with pytest.raises(ValueError, match="deployed"):
        model[1][0].quantization_strength = 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_schedule_is_compiled_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    layer, x = BitLinear(40, 30), torch.randn(4, 40)
    layer.quantization_strength = 0.0
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for strength in (0.0, 0.1, 0.5, 0.9):
        layer.quantization_strength = strength
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1
