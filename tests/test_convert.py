from __future__ import annotations

import copy
import logging

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


class Subclass(nn.Linear):
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
        (Subclass, "it is a Subclass"),
        (lambda *_: nn.LazyLinear(8), "it is lazy"),
        (lambda *_: parametrized(), "it is parametrized"),
        (lambda *_: nn.utils.weight_norm(nn.Linear(8, 8)), "computed, not a parameter"),
        (lambda *_: with_forward_replaced(), "its forward has been replaced"),
        (lambda *_: with_adapter(), "nn.Linear has not: lora_A"),
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


def test_every_layer_and_a_summary_are_logged(log):
    convert(Model(), filter_fn=lambda name, _: name != "blocks.1.up")
    lines = log()
    assert lines[-1] == "converted 3 of 5 linear layers to BitLinear"
    assert len(lines) == 6
    assert "blocks.1.up: not converted: filter_fn returned False" in lines
    assert "lm_head: not converted: excluded by 'lm_head'" in lines
    assert sum(": converted to BitLinear(in_features=" in line for line in lines) == 3


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


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_call_their_linears_in_evaluation(norm_first, log):
    layer, x = encoder_layer(norm_first=norm_first).eval(), torch.randn(3, 5, 8)
    convert(layer)
    assert isinstance(layer.linear1, BitLinear)
    assert isinstance(layer.linear2, BitLinear)
    wanted = in_python(layer, x)
    assert any("fast path is off" in line for line in log())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)
    deploy(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)


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
        ValueError, match=r"attention\.out_proj: its owner .* has to be an nn\.Linear"
    ):
        deploy(model)
    assert not model["head"].is_deployed
    attention.out_proj.deploy()
    with pytest.raises(AttributeError, match=r"put an nn\.Linear where another module reads"):
        attention(x, x, x)


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
