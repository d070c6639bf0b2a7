"""LinearGroup: one product, or the layers one after the other, and the reasons."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import bitlinear
from bitlinear import BitLinear, LinearGroup, linear_group
from bitlinear.prologue import apply_prologue
from tests import oracle
from tests.calls import Calls

fused = torch.ops.bitlinear.fused_linear.default
K, WIDTHS = 20, {"q": 12, "k": 8, "v": 8, "z": 1}


class LlamaNorm(nn.Module):
    """The RMSNorm of Llama, as many models have it in their own code."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(K) + 0.5)
        self.variance_epsilon = 1e-5

    def forward(self, hidden_states):
        """A docstring."""
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class GemmaNorm(LlamaNorm):
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (1 + self.weight) * hidden_states.to(input_dtype)


class QuarticNorm(LlamaNorm):
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(4).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


def torch_norm():
    norm = nn.RMSNorm(K, eps=1e-5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


def make_group(count=3, norm=torch_norm, activation=None, bias=True, **kwargs):
    layers = {name: BitLinear(K, n, bias, **kwargs) for name, n in [*WIDTHS.items()][:count]}
    return bitlinear.deploy(LinearGroup(layers, norm and norm(), activation))


def layers_of(group):
    return [group.get_submodule(name) for name in WIDTHS if name in group._modules]


def called_one_by_one(group, x, residual=None):
    """The outputs side by side, by calls of the modules and functions of torch."""
    if group.activation is not None:
        a, b = x.chunk(2, dim=-1)
        x = b * (nn.functional.silu(a) if group.activation == "silu" else a.clamp_min(0) ** 2)
    if group.norm is not None:
        x = group.norm(x)
    output = torch.cat([layer(x) for layer in layers_of(group)], dim=-1)
    return output if residual is None else output + residual


def side_by_side(outputs):
    return torch.cat(outputs, dim=-1) if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("activation", [None, "silu", "relu2"])
@pytest.mark.parametrize("norm", [None, torch_norm, LlamaNorm])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_group_is_one_product(count, norm, activation, with_residual, bias):
    group = make_group(count, norm, activation, bias)
    x = torch.randn(3, 5, K if activation is None else 2 * K)
    residual = torch.randn(3, 5, sum([*WIDTHS.values()][:count])) if with_residual else None
    with Calls(fused) as calls:
        outputs = group(x, residual)
    assert calls.count == 1
    assert group.why_not_fused() == ""
    assert isinstance(outputs, torch.Tensor if count == 1 else tuple)
    if count > 1:
        assert [y.shape[-1] for y in outputs] == [*WIDTHS.values()][:count]
    weight = None if norm is None else group.norm.weight
    values = apply_prologue(x, activation, weight, 1e-5)
    wanted = torch.cat([layer(values) for layer in layers_of(group)], dim=-1)
    wanted = wanted if residual is None else wanted + residual
    oracle.assert_same_bits(side_by_side(outputs), wanted)
    # torch adds in another order, so an activation can move to the next of 255 steps.
    other = called_one_by_one(group, x, residual)
    assert (side_by_side(outputs) - other).norm() <= 1e-2 * other.norm()
    assert (side_by_side(outputs) - other).abs().median() <= 1e-6


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3), (1, 1)])
@pytest.mark.parametrize("deployed", [True, False])
def test_halves_of_one_tensor_are_not_copied(shape, deployed, monkeypatch):
    group = make_group(2, activation="silu")
    if not deployed:
        for layer in layers_of(group):
            layer.undeploy()
    both = torch.randn(*shape, 2 * K)
    halves = both.split(K, dim=-1)
    wanted = group(both)
    oracle.assert_same_bits(side_by_side(group(halves)), side_by_side(wanted))
    apart = tuple(half.clone() for half in halves)
    oracle.assert_same_bits(side_by_side(group(apart)), side_by_side(wanted))
    oracle.assert_same_bits(
        side_by_side(group(halves[::-1])), side_by_side(group(torch.cat(halves[::-1], -1)))
    )
    monkeypatch.setattr(linear_group.torch, "cat", None)  # Nothing is copied:
    joined = linear_group._side_by_side(*halves)
    assert joined.data_ptr() == both.data_ptr()


@pytest.mark.parametrize("deployed", [True, False])
def test_halves_under_vmap(deployed):
    group = make_group(2, activation="silu")
    if not deployed:
        for layer in layers_of(group):
            layer.undeploy()
    a, b = torch.randn(2, 4, 3, K)
    with torch.no_grad():
        outputs = torch.vmap(lambda a, b: group((a, b)))(a, b)
        for output, wanted in zip(outputs, group((a, b))):
            torch.testing.assert_close(output, wanted)


def test_halves_with_another_sign_bit_are_copied():
    both = torch.randn(3, 2 * K)
    a, b = both.split(K, dim=-1)
    joined = linear_group._side_by_side(torch._neg_view(a), b)
    assert torch.equal(joined, torch.cat([-a, b], dim=-1))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_halves_get_gradients(shape):
    group = make_group(2, activation="relu2")
    both = torch.randn(*shape, 2 * K, requires_grad=True)
    grads = [
        torch.autograd.grad(side_by_side(group(x)).square().sum(), both)[0]
        for x in (both, both.split(K, dim=-1))
    ]
    oracle.assert_same_bits(*grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_lose_less_than_one_by_one(dtype):
    group = make_group(1, activation="silu").to(dtype)
    x, residual = torch.randn(64, 2 * K).to(dtype), torch.randn(64, 12).to(dtype)
    exact = copy.deepcopy(group).float()(x.float(), residual.float())
    error = (group(x, residual).float() - exact).norm()
    assert group(x, residual).dtype == dtype
    assert error < (called_one_by_one(group, x, residual).float() - exact).norm()
    assert error < 2e-3 * exact.norm() if dtype == torch.float16 else 8e-3 * exact.norm()


def hook_that_doubles(module, args, output):
    return 2 * output


class Adapted(nn.Module):
    """What PEFT puts in place of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.in_features = layer, layer.in_features
        self.lora = nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.lora(x)


class Doubled(BitLinear):
    def forward(self, x):
        return 2 * super().forward(x)


class Distributed(torch.Tensor):
    full_tensor = None
    __torch_function__ = torch._C._disabled_torch_function_impl


def replace(name, make):
    return lambda group: setattr(group, name, make(getattr(group, name)))


def set_attribute(name, attribute, value):
    return lambda group: setattr(getattr(group, name), attribute, value)


def replace_forward(group):
    forward = group.k.forward
    group.k.forward = lambda x: 2 * forward(x)


def wrap_packed(group):
    group.k._buffers["w_packed"] = group.k.w_packed.as_subclass(Distributed)


REASONS = {
    "hook": (lambda g: g.k.register_forward_hook(hook_that_doubles), "k has hooks"),
    "pre-hook": (
        lambda g: g.k.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
        "k has hooks",
    ),
    "backward hook": (
        lambda g: g.k.register_full_backward_hook(lambda *_: None),
        "k has hooks",
    ),
    "hook of the norm": (
        lambda g: g.norm.register_forward_hook(hook_that_doubles),
        "the norm has hooks",
    ),
    "adapter": (replace("k", Adapted), "k is a Adapted, not a BitLinear"),
    "subclass": (replace("k", lambda _: Doubled(K, 8).deploy()), "k is a Doubled"),
    "float layer": (replace("k", lambda _: nn.Linear(K, 8)), "k is a Linear"),
    "forward": (replace_forward, "k has a forward that was replaced on the instance"),
    "undeploy": (lambda g: g.k.undeploy(), "k is not deployed"),
    "eps": (set_attribute("k", "eps", 3.0), "q and k quantise activations in different ways"),
    "bits": (set_attribute("k", "quant_type", "ai16pc_wpt"), "q and k quantise"),
    "parametrised layer": (
        lambda g: nn.utils.parametrize.register_parametrization(g.k.undeploy(), "weight", Halved()),
        "k is a ParametrizedBitLinear",
    ),
    "parametrised norm": (
        lambda g: nn.utils.parametrize.register_parametrization(g.norm, "weight", Halved()),
        "the norm is a ParametrizedRMSNorm, which is not known",
    ),
    "divided layer": (wrap_packed, "k is divided among processes"),
    "layer norm": (replace("norm", lambda _: nn.LayerNorm(K)), "the norm is a LayerNorm"),
    "gemma": (replace("norm", lambda _: GemmaNorm()), "the norm is a GemmaNorm"),
    "other constant": (replace("norm", lambda _: QuarticNorm()), "the norm is a QuarticNorm"),
    "no eps": (set_attribute("norm", "eps", None), "the norm has no eps"),
    "no weight": (
        replace("norm", lambda _: nn.RMSNorm(K, 1e-5, elementwise_affine=False)),
        "the norm has no weight",
    ),
    "norm over two dimensions": (
        replace("norm", lambda _: nn.RMSNorm((4, K), eps=1e-5)),
        "the norm is over 2 dimensions",
    ),
}


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_fused_is_called_from_the_next_call_on(kind):
    change, reason = REASONS[kind]
    group, x = make_group(), torch.randn(3, 4, K)
    residual = torch.randn(3, 4, 28)
    before = side_by_side(group(x, residual))
    change(group)
    assert group.why_not_fused().startswith(reason)
    with Calls(fused) as calls:
        outputs = group(x, residual)
    assert calls.count == 0
    assert [y.shape[-1] for y in outputs] == [12, 8, 8]
    wanted = called_one_by_one(group, x, residual)
    assert torch.equal(side_by_side(outputs), wanted)
    assert torch.equal(side_by_side(group(x)), called_one_by_one(group, x))
    if kind not in ("backward hook", "undeploy", "bits", "divided layer", "no eps"):
        assert (wanted - before).abs().max() > 0.01


def test_a_hook_of_all_modules_sees_the_layers():
    group, seen = make_group(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        assert group.why_not_fused() == "q is seen by a hook of all modules"
        group(torch.randn(2, K))
    finally:
        handle.remove()
    assert set(seen) == {*group.children(), group}
    assert group.why_not_fused() == ""


def test_layers_on_different_devices():
    group = make_group(norm=None)
    group.k.to("meta")
    assert group.why_not_fused() == "q and k are on different devices"


def test_an_adapter_is_removed_again():
    group, x = make_group(), torch.randn(3, K)
    before, layer = side_by_side(group(x)), group.k
    group.k = Adapted(layer)
    assert not torch.equal(side_by_side(group(x)), before)
    group.k = layer
    assert torch.equal(side_by_side(group(x)), before)


@pytest.mark.parametrize(
    ("x", "norm", "residual", "output"),
    [
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_mixed_dtypes_give_the_dtype_of_one_by_one(x, norm, residual, output):
    group = make_group(norm=LlamaNorm)
    group.norm.to(norm)
    x = torch.randn(3, K).to(x)
    residual = None if residual is None else torch.randn(3, 28).to(residual)
    outputs = side_by_side(group(x, residual))
    assert outputs.dtype == output
    assert torch.equal(outputs, called_one_by_one(group, x, residual))


@pytest.mark.parametrize("with_residual", [True, False])
def test_autocast_rounds_neither_input_nor_residual(with_residual):
    group, x = make_group(), torch.randn(3, K)
    residual = torch.randn(3, 28) if with_residual else None
    with torch.autocast("cpu", torch.bfloat16):
        outputs = side_by_side(group(x, residual))
        wanted = called_one_by_one(group, x, residual)
    assert outputs.dtype == wanted.dtype == (torch.float32 if with_residual else torch.bfloat16)
    torch.testing.assert_close(outputs, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("activation", [None, "silu", "relu2"])
def test_gradients(activation):
    group = make_group(activation=activation)
    group.q.bias.requires_grad_()
    x = torch.randn(3, K if activation is None else 2 * K, requires_grad=True)
    residual = torch.randn(3, 28, requires_grad=True)
    weights = torch.randn(3, 28)
    inputs = (x, residual, group.norm.weight, group.q.bias)
    outputs = side_by_side(group(x, residual))
    actual = torch.autograd.grad((outputs * weights).sum(), inputs)
    wanted = torch.autograd.grad((called_one_by_one(group, x, residual) * weights).sum(), inputs)
    for a, b in zip(actual, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_group_in_training_trains():
    group = LinearGroup({"q": BitLinear(K, 12), "k": BitLinear(K, 8)}, torch_norm())
    assert group.why_not_fused() == "q is not deployed"
    x = torch.randn(3, K)
    side_by_side(group(x)).sum().backward()
    assert all(parameter.grad is not None for parameter in group.parameters())
    with torch.no_grad():
        trained = side_by_side(group(x))
        torch.testing.assert_close(side_by_side(bitlinear.deploy(group)(x)), trained)
    assert group.why_not_fused() == ""


def test_nothing_is_stale(tmp_path):
    group, other, x = make_group(), make_group(), torch.randn(3, K)
    wanted = side_by_side(other(x))
    assert not torch.equal(side_by_side(group(x)), wanted)
    assert [*group.state_dict()] == [
        *("q.w_packed", "q.w_scale", "q.bias", "k.w_packed", "k.w_scale", "k.bias"),
        *("v.w_packed", "v.w_scale", "v.bias", "norm.weight"),
    ]
    group.load_state_dict(other.state_dict())
    oracle.assert_same_bits(side_by_side(group(x)), wanted)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        oracle.assert_same_bits(side_by_side(copied(x)), wanted)
    save_model(other, tmp_path / "group.safetensors")
    mapped = bitlinear.load_deployed(tmp_path / "group.safetensors", make_group())
    oracle.assert_same_bits(side_by_side(mapped(x)), wanted)
    group.v.w_scale = 2 * group.v.w_scale
    group.norm.weight.data *= 3
    assert not torch.equal(side_by_side(group(x)), wanted)
    torch.testing.assert_close(side_by_side(group(x)), called_one_by_one(group, x))
    assert side_by_side(group.to(torch.bfloat16)(x.bfloat16())).dtype == torch.bfloat16


def test_the_children_are_given_back():
    layers = {"q": BitLinear(K, 12).deploy(), "k": BitLinear(K, 8).deploy()}
    norm = torch_norm()
    group = LinearGroup(layers, norm, "relu2")
    assert group.unfuse() == {**layers, "norm": norm}
    assert LinearGroup(layers).unfuse() == layers
    assert repr(group).startswith("LinearGroup(\n  activation='relu2'\n  (q): BitLinear(")


def test_nested_tensors_and_symbolic_traces_take_the_layers():
    group = make_group(norm=None)
    x = torch.nested.nested_tensor([torch.randn(2, K), torch.randn(3, K)], layout=torch.jagged)
    for actual, layer in zip(group(x), layers_of(group)):
        assert torch.equal(actual.values(), layer(x.values()))
    traced = torch.fx.symbolic_trace(nn.Sequential(group))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["0.q", "0.k", "0.v"]


@pytest.mark.parametrize(
    "norm", [LlamaNorm, *(pytest.param(n, marks=pytest.mark.slow) for n in (torch_norm, GemmaNorm))]
)
def test_a_compiled_group_is_one_graph(norm, fresh_compiler):
    group, x, residual = make_group(norm=norm), torch.randn(3, K), torch.randn(3, 28)
    compiled = torch.compile(group, fullgraph=True, backend="aot_eager")
    oracle.assert_same_bits(side_by_side(compiled(x, residual)), side_by_side(group(x, residual)))
    group.k = Adapted(group.k)
    oracle.assert_same_bits(side_by_side(compiled(x, residual)), side_by_side(group(x, residual)))


WRONG = [
    (dict, ValueError, "1 to 4 layers, but got 0"),
    (lambda: {str(n): BitLinear(4, 4) for n in range(5)}, ValueError, "but got 5"),
    (lambda: {"q": nn.Conv1d(4, 4, 1)}, TypeError, "but q is a Conv1d"),
    (lambda: {"q": BitLinear(4, 4), "k": BitLinear(5, 4)}, ValueError, r"\{'q': 4, 'k': 5\}"),
    (lambda: {"forward": BitLinear(4, 4)}, ValueError, "cannot have the name 'forward'"),
    (lambda: {"norm": BitLinear(4, 4)}, ValueError, "cannot have the name 'norm'"),
    (lambda: {"a.b": BitLinear(4, 4)}, ValueError, r"cannot have the name 'a\.b'"),
    (lambda: [BitLinear(4, 4)], TypeError, "mapping from names to layers.* it is a list"),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG)
def test_wrong_layers(make, error, message):
    with pytest.raises(error, match=message):
        LinearGroup(make())


def test_wrong_arguments():
    with pytest.raises(ValueError, match="one of silu, relu2, but it is 'gelu'"):
        LinearGroup({"q": BitLinear(4, 4)}, activation="gelu")
    with pytest.raises(TypeError, match="norm must be a module or None, but it is a float"):
        LinearGroup({"q": BitLinear(4, 4)}, norm=1e-6)
    pair = (torch.randn(3, K), torch.randn(3, K))
    with pytest.raises(TypeError, match="but it is a tuple of 2, and the activation is None"):
        make_group()(pair)
    with pytest.raises(TypeError, match="but it is a tuple of 3, and the activation is 'silu'"):
        make_group(activation="silu")((*pair, pair[0]))
    group = make_group()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shape of the output, \[3, 28\], but it has"):
            group(torch.randn(3, K), torch.randn(28))
        group.q.undeploy()
