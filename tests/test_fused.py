"""Gradients through a fused product, whose weights are constants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from bitlinear.fused import fused_linear
from tests import oracle
from tests.calls import Calls
from tests.fused import SOURCES, Fused, expected, operands, tokens

OP = torch.ops.bitlinear.fused_linear
EXPAND = torch.ops.bitlinear.expand_weight.default
every_source = pytest.mark.parametrize(("activation", "with_norm"), SOURCES)


def trainable(*args, **kwargs):
    """``(t, arguments, leaves)``; what can have a gradient requires it."""
    t, arguments = operands(*args, **kwargs)
    tensors = (arguments["x"], arguments["norm_weight"], arguments["residual"], *arguments["bias"])
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    return t, arguments, leaves


def in_float64(t, arguments):
    """The product without rounding, ``(output, leaves)``: autograd knows its gradients."""
    named = {
        name: value.detach().double().requires_grad_() if value is not None else None
        for name, value in arguments.items()
        if name in ("x", "norm_weight", "residual")
    }
    bias = [None if b is None else b.detach().double().requires_grad_() for b in arguments["bias"]]
    values = named["x"]
    if arguments["activation"] is not None:
        a, b = values.chunk(2, dim=-1)
        values = (F.silu(a) if arguments["activation"] == "silu" else F.relu(a).square()) * b
    if named["norm_weight"] is not None:
        shape = (arguments["in_features"],)
        values = F.rms_norm(values, shape, named["norm_weight"], arguments["norm_eps"])
    weights = [torch.from_numpy(rows) * s.double() for rows, s in zip(t, arguments["w_scale"])]
    y = torch.cat([F.linear(values, w, b) for w, b in zip(weights, bias)], dim=-1)
    if named["residual"] is not None:
        y = y + named["residual"]
    return y, [v for v in (*named.values(), *bias) if v is not None]


def close(actual, wanted, share=0.0):
    """``share``: an error that is allowed where sums cancel, as a share of the largest value."""
    for a, w in zip(actual, wanted, strict=True):
        rtol, atol = torch.testing._comparison.default_tolerances(a)
        largest = float(w.abs().max()) if w.numel() else 0.0
        torch.testing.assert_close(a, w.to(a.dtype), rtol=rtol, atol=max(atol, share * largest))


@every_source
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)])
def test_gradients_are_those_of_the_product_without_rounding(shape, activation, with_norm, dtype):
    """Of the input, the weight of the norm, the residual and each bias."""
    for seed, residual_dtype in enumerate((None, *oracle.DTYPES)):
        t, arguments, leaves = trainable(
            *(shape, (7, 1, 4), 37, dtype, activation, with_norm, residual_dtype, seed)
        )
        y = fused_linear(**arguments)
        oracle.assert_same_bits(y, expected(t, arguments))
        wanted_y, wanted_leaves = in_float64(t, arguments)
        cotangent = torch.randn_like(y)
        actual = torch.autograd.grad(y, leaves, cotangent)
        wanted = torch.autograd.grad(wanted_y, wanted_leaves, cotangent.double())
        assert [a.dtype for a in actual] == [leaf.dtype for leaf in leaves]
        close(actual, wanted, share=0.01 if dtype == torch.bfloat16 else 0.0)


@every_source
def test_higher_derivatives_are_those_of_the_product_without_rounding(activation, with_norm):
    """Of the gradients, which are linear in the cotangent: penalties and Hessians need them."""
    t, arguments, leaves = trainable(4, (7, 4), 37, torch.float32, activation, with_norm)
    penalties = []
    cotangent = torch.randn(4, 11, requires_grad=True)
    wanted_cotangent = cotangent.detach().double().requires_grad_()
    for y, operands_of_y, dy in (
        (fused_linear(**arguments), leaves, cotangent),
        (*in_float64(t, arguments), wanted_cotangent),
    ):
        gradients = torch.autograd.grad(y, operands_of_y, dy, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        needed = [dy, *operands_of_y]
        penalties.append(
            torch.autograd.grad(penalty, needed, allow_unused=True, materialize_grads=True)
        )
    close(*penalties, share=1e-6)


def test_only_gradients_that_are_needed_are_computed():
    _, arguments, leaves = trainable(seed=2)
    y = fused_linear(**arguments)
    cotangent = torch.randn_like(y)
    whole = torch.autograd.grad(y, leaves, cotangent)
    for i, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        y = fused_linear(**arguments)
        with Calls(EXPAND) as calls:
            (alone,) = torch.autograd.grad(y, leaf, cotangent)
        assert torch.equal(alone, whole[i])
        is_behind_the_product = leaf is arguments["residual"] or leaf is arguments["bias"][0]
        assert calls.count == (0 if is_behind_the_product else 2)


@every_source
def test_the_input_is_saved_only_for_a_prologue(activation, with_norm):
    _, arguments, _ = trainable(3, (5, 3), 12, torch.float32, activation, with_norm)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        fused_linear(**arguments)
    sizes = [v.shape for v in saved]
    assert (arguments["x"].shape in sizes) == (activation is not None or with_norm)
    assert arguments["residual"].shape not in sizes


def test_without_gradients_the_operator_is_called():
    _, arguments, _ = trainable()
    with torch.no_grad():
        y = fused_linear(**arguments)
    assert not y.requires_grad
    assert torch.equal(y, fused_linear(**arguments))


def test_a_scale_that_requires_a_gradient_is_an_error():
    _, arguments, _ = trainable()
    arguments["w_scale"][1].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"w_scale has no gradient.*undeploy"):
        fused_linear(**arguments).sum().backward()
    for name in ("x", "norm_weight", "residual"):
        arguments[name] = arguments[name].detach()
    arguments["bias"] = [None, None]
    with pytest.raises(RuntimeError, match="bitlinear::fused_linear is not implemented"):
        fused_linear(**arguments).sum().backward()


def test_the_gradient_of_a_bias_is_summed_in_fp32():
    _, arguments, _ = trainable(300, dtype=torch.bfloat16, seed=2)
    cotangent = torch.randn(300, 8).bfloat16()
    (actual,) = torch.autograd.grad(fused_linear(**arguments), arguments["bias"][0], cotangent)
    torch.testing.assert_close(actual, cotangent[:, :5].float().sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_nothing_but_the_output(dtype):
    _, arguments, leaves = trainable(seed=2)
    y = fused_linear(**arguments)
    with torch.autocast("cpu", dtype):
        rounded = fused_linear(**arguments)
    assert torch.equal(rounded, y.to(dtype))
    ones = torch.ones_like(y)
    wanted = torch.autograd.grad(y, leaves, ones)
    close(torch.autograd.grad(rounded, leaves, ones.to(dtype)), wanted, share=0.01)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    _, arguments, leaves = trainable(seed=2)
    module, found = Fused(arguments), []
    for function in (module, lambda *v: checkpoint(module, *v, use_reentrant=use_reentrant)):
        function(*tokens(arguments)).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    assert all(map(torch.equal, *found))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_gradients():
    _, arguments, leaves = trainable(seed=2)
    module = Fused(arguments)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7):
        inputs = tokens(operands(rows, seed=9)[1])
        needed = [*(v.requires_grad_() for v in inputs), *leaves[1:2], *leaves[3:]]
        results = [f(*inputs) for f in (compiled, module)]
        assert torch.equal(*results)
        close(*(torch.autograd.grad(y.square().sum(), needed) for y in results))


# --- torch.func ---


@every_source
def test_gradients_of_each_sample(activation, with_norm):
    _, arguments = operands(4, (5, 3), 12, torch.float32, activation, with_norm, seed=2)
    parameters = {
        name: arguments.pop(name) for name in ("norm_weight",) if arguments[name] is not None
    }
    module = {name: v for name, v in arguments.items() if name not in ("x", "residual")}

    def loss(parameters, x, residual):
        return fused_linear(x, residual=residual, **{**module, **parameters}).square().sum()

    actual = vmap(grad(loss, (0, 1, 2)), in_dims=(None, 0, 0))(parameters, *tokens(arguments))
    actual = [*actual[0].values(), *actual[1:]]
    for i in range(4):
        inputs = [v[i].clone().requires_grad_() for v in tokens(arguments)]
        leaves = {name: v.clone().requires_grad_() for name, v in parameters.items()}
        wanted = torch.autograd.grad(loss(leaves, *inputs), [*leaves.values(), *inputs])
        close([a[i] for a in actual], wanted)


def test_vmap_within_a_gradient():
    _, arguments = operands(4, seed=2)
    module, inputs = Fused(arguments), tokens(arguments)
    wanted = grad(lambda *v: module(*v).square().sum(), (0, 1))(*inputs)
    with Calls(OP.default) as calls:
        actual = grad(lambda *v: vmap(module)(*v).square().sum(), (0, 1))(*inputs)
    assert calls.count == 1 or not hasattr(torch.library, "register_vmap")
    close(actual, wanted)


def test_jacobians_and_hessians():
    _, arguments = operands((), (5, 3), activation=None, with_norm=False, residual_dtype=None)
    module, x = Fused(arguments), arguments["x"]
    weights = zip(arguments["w_packed"], arguments["w_scale"])
    weight = torch.cat([torch.ops.bitlinear.expand_weight(w, 12, s) for w, s in weights])
    torch.testing.assert_close(jacrev(module)(x), weight)
    hessian = jacrev(grad(lambda x: module(x).square().sum()))(x)
    torch.testing.assert_close(hessian, 2 * weight.T @ weight)


def test_ensembles():
    models = [Fused(operands(seed=2 + 4 * i)[1]) for i in range(3)]
    x, residual = tokens(operands(seed=2)[1])
    _, buffers = stack_module_state(models)

    def outputs(x):
        return vmap(lambda b: functional_call(models[0], b, (x, residual)))(buffers)

    assert torch.equal(outputs(x), torch.stack([model(x, residual) for model in models]))
    actual = grad(lambda x: outputs(x).square().sum())(x)
    wanted = grad(lambda x: sum(m(x, residual).square().sum() for m in models))(x)
    torch.testing.assert_close(actual, wanted)


def test_a_missing_derivative_is_an_error():
    _, arguments = operands()
    module, inputs = Fused(arguments), tokens(arguments)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(module, inputs, inputs)


# --- Training through it ---


def test_what_stands_in_front_of_a_fused_product_is_trained():
    front, norm_weight = nn.Linear(16, 64), nn.Parameter(torch.ones(32))
    _, arguments = operands(1, (3,), 32, residual_dtype=None, seed=3)
    del arguments["x"]
    x = torch.randn(256, 16)
    target = (x @ torch.randn(16, 3)).argmax(1)
    parameters = [*front.parameters(), norm_weight]
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)

    def logits():
        return fused_linear(front(x), **{**arguments, "norm_weight": norm_weight})

    for _ in range(30):
        loss = F.cross_entropy(logits(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (logits().argmax(1) == target).float().mean() > 0.9
