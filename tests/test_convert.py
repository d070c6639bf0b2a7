from __future__ import annotations

import copy
import logging
import sys
import types
import warnings

import pytest
import torch
from torch import nn

import bitlinear
from bitlinear import BitLinear, convert, deploy


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


def converted(model):
    return {name for name, module in model.named_modules() if isinstance(module, BitLinear)}


ALL = {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "lm_head"}


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="bitlinear")

    def lines():
        return [r.getMessage() for r in caplog.records if r.name == "bitlinear"]

    return lines


# --- Which layers ---


def test_everything_but_the_head():
    model = Model()
    parameters = dict(model.named_parameters())
    assert convert(model) is model
    assert converted(model) == ALL - {"lm_head"}
    # The very same parameters: an optimizer made before goes on working.
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert len(parameters) == len(list(model.parameters()))
    model(IDS).sum().backward()


@pytest.mark.parametrize(
    ("exclude", "left_alone"),
    [
        ((), set()),
        (("lm_head",), {"lm_head"}),
        ("lm_head", {"lm_head"}),
        (("up",), {"blocks.0.up", "blocks.1.up"}),
        (("0.up", "1.down"), {"blocks.0.up", "blocks.1.down"}),
        (("blocks.1.up",), {"blocks.1.up"}),
        (("blocks.0.*",), {"blocks.0.up", "blocks.0.down"}),
        (("*.up", "lm_*"), {"blocks.0.up", "blocks.1.up", "lm_head"}),
        (("head", "p", "blocks", "up.0"), set()),
    ],
)
@pytest.mark.filterwarnings("ignore:exclude=")
def test_exclude_by_qualified_name(exclude, left_alone):
    assert converted(convert(Model(), exclude=exclude)) == ALL - left_alone
    # The same pattern where the model is inside another one.
    outer = nn.ModuleDict({"model": Model()})
    wanted = {f"model.{name}" for name in ALL - left_alone}
    assert converted(convert(outer, exclude=exclude)) == wanted


def test_filter_fn_sees_names_and_modules():
    seen = {}

    def wide_only(name, module):
        seen[name] = type(module)
        return module.out_features == 16

    model = convert(Model(), filter_fn=wide_only)
    assert converted(model) == {"blocks.0.up", "blocks.1.up"}
    assert seen == dict.fromkeys(ALL - {"lm_head"}, nn.Linear)


def test_a_model_that_is_one_linear():
    linear = nn.Linear(8, 4)
    layer = convert(linear)
    assert isinstance(layer, BitLinear)
    assert layer.weight is linear.weight
    assert deploy(layer) is layer
    assert layer.is_deployed
    assert convert(layer) is layer


def test_a_linear_excluded_by_filter_is_returned_as_it_is():
    linear = nn.Linear(8, 4)
    assert convert(linear, filter_fn=lambda name, module: name != "") is linear


def test_converting_twice_changes_nothing():
    model = convert(Model())
    layers = list(model.modules())
    convert(model)
    assert all(a is b for a, b in zip(layers, model.modules()))


def test_wrong_quant_type_changes_nothing():
    model = Model()
    with pytest.raises(ValueError, match="ai8pc_wpt"):
        convert(model, quant_type="int4")
    assert not converted(model)


class Harmless(nn.Linear):
    """Another way to be made, filled and printed."""

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


def with_adapter():
    linear = nn.Linear(8, 8)
    linear.lora_A = nn.Linear(8, 2)
    return linear


def with_state_hook():
    linear = nn.Linear(8, 8)
    linear._register_load_state_dict_pre_hook(lambda *args: None)
    return linear


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OwnForward, "it is a OwnForward, whose use of the weight is unknown: OwnForward defines"),
        (OwnHelper, "OwnHelper defines norm"),
        (Mixed, "Mixin defines scale"),
        (lambda *_: nn.LazyLinear(8), "it is lazy"),
        (lambda *_: parametrized(), "it is parametrized"),
        (lambda *_: nn.utils.weight_norm(nn.Linear(8, 8)), "computed, not a parameter"),
        (lambda *_: with_forward_replaced(), "its forward has been replaced"),
        (lambda *_: with_adapter(), "nn.Linear does not have: lora_A"),
        (lambda *_: with_state_hook(), "hooks that cannot be moved: _load_state_dict_pre_hooks"),
        (BitLinear, "it is a BitLinear already"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_converted_and_why(make, reason, log):
    odd = make(8, 8)
    model = nn.ModuleDict({"odd": odd, "plain": nn.Linear(8, 8)})
    convert(model, exclude=("lora_A",))
    assert model["odd"] is odd
    assert type(model["plain"]) is BitLinear
    (line,) = (line for line in log() if line.startswith("odd: "))
    assert line.startswith("odd: not converted: ")
    assert reason in line


@pytest.mark.parametrize("make", [Harmless, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_harmless_subclasses_are_converted(make):
    model, x = nn.Sequential(make(8, 8)), torch.randn(3, 8)
    old = model[0]
    convert(model)
    assert type(model[0]) is BitLinear
    assert model[0].weight is old.weight
    assert vars(model[0]).get("note") == vars(old).get("note")
    assert torch.equal(model(x), BitLinear.from_linear(old)(x))


@pytest.mark.parametrize("make", [OwnForward, OwnHelper, Mixed])
def test_from_linear_refuses_what_may_compute_something_else(make):
    with pytest.raises(TypeError, match=r"from_linear cannot convert this .* defines"):
        BitLinear.from_linear(make(8, 8))


def test_from_linear_refuses_a_forward_of_the_instance():
    with pytest.raises(TypeError, match="its forward has been replaced on the instance"):
        BitLinear.from_linear(with_forward_replaced())


@pytest.mark.parametrize("value", [3, "model.pt", None, nn.Linear, [nn.Linear(2, 2)]])
@pytest.mark.parametrize("function", [convert, deploy])
def test_what_is_no_model(function, value):
    shown = "the class Linear" if value is nn.Linear else repr(value)[:20]
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, but got ") as error:
        function(value)
    assert shown in str(error.value)
    assert f"bitlinear.{function.__name__}(pipeline.model)" in str(error.value)


def test_from_linear_of_what_is_no_layer():
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Linear, but got int: use bitlinear"):
        BitLinear.from_linear(3)


@pytest.mark.parametrize("exclude", [None, (3,), ("lm_head", nn.ReLU)])
def test_patterns_that_are_no_strings(exclude):
    with pytest.raises(TypeError, match=r"exclude must hold names .* but it holds .*filter_fn"):
        convert(Model(), exclude=exclude)


def test_every_layer_and_a_summary_are_logged(log):
    convert(Model(), filter_fn=lambda name, _: name != "blocks.1.up")
    lines = log()
    assert lines[-1] == "converted 3 of 5 linear layers to BitLinear"
    assert len(lines) == 6
    assert "blocks.1.up: not converted: filter_fn returned False" in lines
    assert "lm_head: not converted: excluded by 'lm_head'" in lines
    assert sum(": converted to BitLinear(in_features=" in line for line in lines) == 3


# --- Patterns that exclude nothing ---


@pytest.mark.parametrize(
    ("exclude", "advice"),
    [
        ("blocks", r"'blocks\.\*' to exclude the layers inside, such as blocks\.0\.up"),
        ("blocks.1", r"'blocks\.1\.\*' to exclude the layers inside, such as blocks\.1\.up"),
        ("head", r"its layers are lm_head, blocks\.0\.up"),
        (("up", "down.0"), r"'down\.0' matches no linear layer"),
    ],
)
def test_a_pattern_that_matches_nothing(exclude, advice):
    with pytest.warns(UserWarning, match=advice) as caught:
        convert(Model(), exclude=exclude)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("exclude", [("lm_head",), "lm_head", (), ("embed",), ("lm_head", "up")])
def test_patterns_that_are_quiet(exclude):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(Model().blocks if exclude == ("lm_head",) else Model(), exclude=exclude)


# --- Models that stay in floating point ---


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.up_proj = nn.Parameter(torch.randn(4, 8, 16))


class Vision(nn.Module):
    """A patch embedding, a table of positions and a class token in front of linear layers."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.positions = nn.Parameter(torch.zeros(1, 64, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.Sequential(*(Block() for _ in range(2)))
        self.gate = nn.Parameter(torch.zeros(2, 8))


HARDLY = {
    "LSTM": (nn.LSTM(8, 8), r"weight_ih_l0 \[32, 8\] \(LSTM: a recurrent layer"),
    "attention": (nn.MultiheadAttention(8, 2), r"in_proj_weight \[24, 8\] \(MultiheadAttention: "),
    "encoder layer": (nn.TransformerEncoderLayer(8, 2, 16), r"which hold 50\.0% of the weights"),
    "1 x 1": (
        nn.Sequential(nn.Conv2d(8, 8, 1)),
        r"0\.weight .*kernel of size 1 it is an nn\.Linear",
    ),
    "1 x 1 of an image": (nn.Sequential(nn.Conv2d(3, 8, 1)), r"\(Conv2d: a convolution; with"),
    "CNN": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4096, 8)),
        r"1 of 3 weight matrices ternary, which hold 99\.2% of the weights",
    ),
    "experts": (Experts(), r"up_proj \[4, 8, 16\] \(Experts: several matrices in one parameter"),
    "own forward": (nn.Sequential(OwnForward(8, 8)), r"0\.weight .*OwnForward defines forward"),
    "parametrized": (nn.Sequential(parametrized()), r"original1 .*: it is parametrized; call"),
    "lazy": (nn.Sequential(nn.LazyLinear(8)), r"0\.weight \(LazyLinear: it is lazy; run it once"),
    "a parameter": (
        nn.ParameterList([torch.randn(8, 8)]),
        r"\(ParameterList: it is not an nn\.Linear",
    ),
}


@pytest.mark.parametrize("kind", HARDLY)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_model_that_stays_in_floating_point_warns(kind):
    model, message = copy.deepcopy(HARDLY[kind][0]), HARDLY[kind][1]
    with pytest.warns(UserWarning, match=r"(?s)^convert\(\) made .*" + message) as caught:
        convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "name their modules in exclude" in str(caught[0].message)


def test_the_largest_of_many_are_named():
    model = nn.Sequential(*(nn.Conv2d(8, width, 3) for width in range(2, 9)))
    with pytest.warns(
        UserWarning, match=r"(?s)6\.weight.*5\.weight.*4\.weight.*3\.weight.*and 3 m"
    ):
        convert(model)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (Model, {}),
        (lambda: Model().embed, {}),
        (lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), {}),
        (Vision, {}),
        (lambda: convert(Model()), {}),
        (lambda: deploy(convert(Model())), {}),
        (Model, {"filter_fn": lambda name, _: False}),
        (Model, {"exclude": "*"}),
        (lambda: nn.LSTM(8, 8), {"exclude": "*"}),
        (lambda: nn.ModuleDict({"lstm": nn.LSTM(8, 8)}), {"exclude": "lstm"}),
        (lambda: nn.ModuleDict({"a": Experts(), "b": Block()}), {"exclude": ("b.*", "a")}),
    ],
)
def test_models_that_are_quiet(make, arguments):
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, **arguments)


def test_a_weight_tied_to_an_embedding_does_not_count():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(99, 8), "decoder": OwnForward(8, 99), "x": Block()}
    )
    model["decoder"].weight = model["embed"].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model)


# --- Layers of other libraries ---


@pytest.fixture
def conv1d(monkeypatch):
    """A class like that of transformers, which need not be installed."""

    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf))
            self.bias = nn.Parameter(torch.randn(nf))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    library = types.ModuleType("transformers.pytorch_utils")
    library.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, library.__name__, library)
    return Conv1D


def test_a_conv1d_is_converted_and_keeps_its_parameter(conv1d):
    model, x = nn.Sequential(conv1d(6, 8)), torch.randn(3, 8)
    old, weight = model[0], model[0].weight
    values, before = weight.detach().clone(), old(x).detach()
    old(x).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert(model)
    layer = model[0]
    assert (type(layer), layer.in_features, layer.out_features) == (BitLinear, 8, 6)
    assert (layer.nf, layer.nx) == (6, 8)
    assert layer.weight is weight
    assert torch.equal(layer.weight, values.t())
    assert layer.weight.is_contiguous()
    assert torch.equal(old(x), before)  # The user may still hold it.

    wanted = nn.Linear(8, 6)
    with torch.no_grad():
        wanted.weight.copy_(values.t())
        wanted.bias.copy_(old.bias)
    assert torch.equal(layer(x), BitLinear.from_linear(wanted)(x))
    optimizer.step()
    assert not torch.equal(layer.weight, values.t())
    optimizer.zero_grad()
    layer(x).sum().backward()
    optimizer.step()
    deploy(model)(x)


def test_from_linear_takes_a_conv1d(conv1d):
    old = conv1d(6, 8).eval()
    old.weight.requires_grad_(False)
    values = old.weight.clone()
    layer = BitLinear.from_linear(old)
    assert torch.equal(layer.weight, values.t())
    assert torch.equal(old.weight, values)
    assert layer.bias is old.bias
    assert (layer.training, layer.weight.requires_grad) == (False, False)


def test_a_conv1d_that_shares_its_weight_is_left_alone(conv1d, log):
    model = nn.Sequential(conv1d(8, 8), conv1d(8, 8), Block(), Block())
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match="another module shares its weight"):
        convert(model)
    assert type(model[0]) is type(model[1]) is conv1d
    assert any("another module shares its weight" in line for line in log())


def test_subclasses_of_a_conv1d(conv1d):
    class Harmless1D(conv1d):
        pass

    class Own1D(conv1d):
        def forward(self, x):
            return x

    assert type(convert(Harmless1D(6, 8))) is BitLinear
    with pytest.raises(TypeError, match="Own1D defines forward"):
        BitLinear.from_linear(Own1D(6, 8))


def test_layers_of_transformers():
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    x = torch.randn(3, 8)
    for layer in (falcon.FalconLinear(8, 6), falcon.FalconLinear(8, 6, bias=False), conv1d(6, 8)):
        weight = layer.weight.t() if type(layer) is conv1d else layer.weight
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
        plain = nn.Linear(8, 6, bias=layer.bias is not None)
        plain.weight = nn.Parameter(weight.detach().clone())
        plain.bias = layer.bias
        new = convert(nn.Sequential(layer))[0]
        assert type(new) is BitLinear
        assert torch.equal(new(x), BitLinear.from_linear(plain)(x))


class Wrapped(torch.Tensor):
    """A tensor subclass as torchao and optimum-quanto have them."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.data_ = data

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data_)
        raise NotImplementedError(function)


def test_weights_that_are_wrapper_subclasses(log):
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(Wrapped(torch.randn(8, 8)), requires_grad=False)
    with pytest.raises(TypeError, match=r"its weight is a Wrapped, a tensor subclass.*dequantise"):
        BitLinear.from_linear(layer)
    with pytest.warns(UserWarning, match=r"Linear: its weight is a Wrapped"):
        convert(nn.Sequential(layer))
    assert any("0: not converted: its weight is a Wrapped" in line for line in log())
    hand_made = BitLinear(8, 8)
    hand_made.weight = layer.weight
    with pytest.raises(ValueError, match="its weight is a Wrapped"):
        deploy(hand_made)


def test_fake_weights_are_plain():
    with torch._subclasses.FakeTensorMode():
        assert type(convert(nn.Sequential(nn.Linear(8, 8)))[0]) is BitLinear


class Tuner(nn.Module):
    """As a LoRA layer of PEFT."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        self.router = nn.Linear(8, 8)


def test_adapters_are_left_alone(log):
    model = nn.Sequential(Tuner(nn.Linear(8, 8)), nn.Linear(8, 8), Tuner(Tuner(nn.Linear(8, 8))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model)
    assert converted(model) == {"0.base_layer", "1", "2.base_layer.base_layer"}
    assert sum("part of an adapter of PEFT" in line for line in log()) == 9


def test_a_conv1d_under_an_adapter_is_left_alone(conv1d):
    """Its adapter adds a transposed matrix to the weight when it is merged."""
    model = nn.Sequential(Tuner(conv1d(8, 8)), Block(), Block())
    with pytest.warns(UserWarning, match=r"0\.base_layer\.weight .*convert before adding it"):
        convert(model)
    assert type(model[0].base_layer) is conv1d


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(base, config)
    convert(model)
    names = {"base_model.model.0.base_layer", "base_model.model.2"}
    assert converted(model) == names
    model(torch.randn(3, 8)).sum().backward()


# --- Sharing ---


def test_a_module_in_two_places_stays_one_module(log):
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(nn.ReLU(), shared)})
    convert(model)
    assert isinstance(model["a"][0], BitLinear)
    assert model["a"][0] is model["b"][1]
    assert any(line.startswith("a.0 = b.1: converted") for line in log())
    deploy(model)
    assert model["a"][0] is model["b"][1]
    assert model["a"][0].is_deployed


def test_a_module_in_two_places_is_excluded_in_both():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"proj": shared, "lm_head": shared})
    convert(model)
    assert model["proj"] is model["lm_head"] is shared


def test_a_shared_block_is_converted_once():
    block = Block()
    model = nn.Sequential(block, block)
    convert(model)
    assert isinstance(model[0].up, BitLinear)
    assert model[0] is model[1] is block


def test_two_layers_that_share_a_weight_share_the_packed_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    convert(model)
    assert model[0].weight is model[1].weight is not model[2].weight
    x = torch.randn(3, 8)
    before = model(x).detach()
    deploy(model)
    assert model[0].w_packed is model[1].w_packed
    assert model[0].w_scale is model[1].w_scale
    assert model[2].w_packed is not model[0].w_packed
    assert torch.equal(model(x), before)
    copied = copy.deepcopy(model)
    assert copied[0].w_packed is copied[1].w_packed


def test_a_weight_shared_with_an_embedding_stays_there_in_floating_point(log):
    model = Model()
    model.lm_head.weight = model.embed.weight
    convert(model, exclude=())
    assert model.lm_head.weight is model.embed.weight
    before = model(IDS).detach()
    deploy(model)
    assert model.lm_head.is_deployed
    assert model.embed.weight.dtype == torch.float32
    assert torch.equal(model(IDS), before)
    wanted = "lm_head: deployed; embed.weight keeps the shared weight in floating point"
    assert wanted in log()


# --- Hooks and attributes ---


def test_hooks_and_attributes_move_along():
    model, calls = nn.Sequential(nn.Linear(8, 8)), []
    linear = model[0]
    handles = [
        linear.register_forward_hook(lambda m, *_: calls.append(("forward", type(m)))),
        linear.register_forward_pre_hook(
            lambda m, *_: calls.append(("pre", type(m))), with_kwargs=True
        ),
        linear.register_full_backward_pre_hook(lambda m, _: calls.append(("grad", type(m)))),
        linear.register_full_backward_hook(lambda m, *_: calls.append(("backward", type(m)))),
    ]
    linear.tag = "mine"
    convert(model)
    assert model[0].tag == "mine"
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == [(call, BitLinear) for call in ("pre", "forward", "grad", "backward")]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 8)).sum().backward()
    assert len(calls) == 4


# --- Deploying models ---


def test_deploy_a_model(log):
    model = convert(Model()).eval()
    before = model(IDS).detach()
    assert deploy(model) is model
    assert torch.equal(model(IDS), before)
    assert all(m.is_deployed for m in model.modules() if isinstance(m, BitLinear))
    assert log()[-1] == "deployed 4 BitLinear layers"
    deploy(model)
    assert log()[-1] == "deployed 0 BitLinear layers"


def test_deploy_refuses_by_name_and_changes_nothing():
    model = convert(Model())
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] = float("nan")
        model.blocks[1].down.weight[0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=r"(?s)blocks\.1\.up: .*NaN.*blocks\.1\.down: .*NaN"
    ) as error:
        deploy(model)
    assert "blocks.0" not in str(error.value)
    assert not any(m.is_deployed for m in model.modules() if isinstance(m, BitLinear))


def test_layers_that_were_never_called_are_named():
    model = convert(Model(), exclude=())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach())
    for name in ALL - {"blocks.1.up"}:
        vars(model.get_submodule(name))["_called"] = True
    with pytest.warns(
        UserWarning, match=r"1 of 5 BitLinear .* called, .*: blocks\.1\.up\."
    ) as caught:
        deploy(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert model.blocks[1].up.is_deployed


@pytest.mark.parametrize("called", [True, False])
def test_deploy_is_quiet_if_all_layers_were_called_or_none(called):
    model = convert(Model())
    for name in converted(model):
        vars(model.get_submodule(name))["_called"] = called
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deploy(model)


def offload(layer, *wrappers, **attributes):
    """As accelerate does: the weight goes to the meta device, the hook brings it for each call."""
    hook = types.SimpleNamespace(**attributes)
    for _ in wrappers:
        hook = types.SimpleNamespace(hooks=(types.SimpleNamespace(), hook))
    layer._hf_hook = hook
    return layer.to("meta")


@pytest.mark.parametrize(
    "make",
    [
        lambda model: offload(model[0].up, offload=True),
        lambda model: offload(model[0].up, "SequentialHook", offload=True),
        lambda model: offload(model[0], offload=True, place_submodules=True),
        lambda model: offload(model, offload=True, place_submodules=True),
    ],
)
def test_deploy_refuses_offloaded_weights(make):
    model = convert(nn.Sequential(Block(), Block()))
    make(model)
    with pytest.raises(ValueError, match=r"0\.up: its weight is offloaded by accelerate"):
        deploy(model)
    assert not any(m.is_deployed for m in model.modules() if isinstance(m, BitLinear))


@pytest.mark.parametrize("attributes", [{}, {"offload": False}, {"offload": True}])
def test_deploy_of_a_model_on_meta_whose_hooks_bring_nothing(attributes):
    model = convert(nn.Sequential(Block()))
    offload(model, **attributes)
    deploy(model)


def test_deploy_of_a_model_that_accelerate_offloads():
    accelerate = pytest.importorskip("accelerate")
    model = convert(nn.Sequential(Block()))
    x = torch.randn(3, 8)
    wanted = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"0\.up: .*remove_hook_from_submodules"):
        deploy(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    with torch.no_grad():
        assert torch.equal(deploy(model)(x), wanted)


def test_a_deployed_model_loads_into_a_fresh_one(tmp_path):
    source = deploy(convert(Model()))
    torch.save(source.state_dict(), tmp_path / "model.pt")
    target = convert(Model())
    target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(target(IDS), source(IDS))

    with torch.device("meta"):
        skeleton = deploy(convert(Model()))
    state = torch.load(tmp_path / "model.pt", weights_only=True, mmap=True)
    skeleton.load_state_dict(state, assign=True)
    assert torch.equal(skeleton(IDS), source(IDS))


def test_training_stays_possible_around_deployed_layers():
    # As a frozen feature extractor: what comes after a deployed layer still trains.
    model = nn.Sequential(BitLinear(8, 8).deploy(), nn.Linear(8, 2))
    model(torch.randn(3, 8)).sum().backward()
    assert model[1].weight.grad is not None


# --- Modules of torch that read the weights of their linear layers ---


def encoder_layer(**kwargs):
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **kwargs)


def in_python(model, *args, **kwargs):
    """The result without torch's fast path, which would bypass the layers."""
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


def test_a_hand_made_encoder_is_put_right_by_deploy():
    layer, x = encoder_layer().eval(), torch.randn(3, 5, 8)
    layer.linear1 = BitLinear.from_linear(layer.linear1)
    wanted = in_python(layer, x)
    deploy(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)


@hardly_ternary
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
    """As F.multi_head_attention_forward takes the weight of any layer for that of an nn.Linear."""
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
    """One with a forward of its own, which calls the layer."""

    def forward(self, x):
        return self.out_proj(x)


def test_attention_that_calls_its_output_projection_is_deployed():
    attention, x = Attention(8, 2), torch.randn(3, 8)
    attention.out_proj = BitLinear(8, 8)
    before = attention(x)
    assert torch.equal(deploy(attention)(x), before)


def test_the_package_exports_them():
    assert (bitlinear.convert, bitlinear.deploy) == (convert, deploy)


# --- Loads into what was a Conv1D; nothing to do ---


@pytest.mark.filterwarnings("ignore:.*convert.*floating point")
def test_checkpoints_of_a_conv1d_are_not_taken_for_those_of_a_bitlinear():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    for n, k in ((32, 16), (16, 16)):
        model = nn.Sequential(pytorch_utils.Conv1D(n, k))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        converted = convert(model)
        state = {name: value.clone() for name, value in converted.state_dict().items()}
        if n == k:
            with pytest.warns(UserWarning, match=r"square weight .* was a Conv1D.*before"):
                converted.load_state_dict(before)
        else:
            with pytest.raises(RuntimeError, match=r"that of a Conv1D.*before bitlinear"):
                converted.load_state_dict(before)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            converted.load_state_dict(convert(nn.Sequential(nn.Linear(k, n))).state_dict())
        assert state.keys() == before.keys()


@pytest.mark.parametrize(
    "function", [deploy, lambda m: bitlinear.set_quantization_strength(m, 0.5)]
)
def test_a_model_without_layers_is_reported(function):
    with pytest.warns(UserWarning, match=r"did nothing: this Sequential has no BitLinear inside"):
        function(nn.Sequential(nn.Linear(4, 4)))
