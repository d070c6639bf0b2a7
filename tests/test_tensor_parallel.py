"""Deployed layers divided among processes, and their checkpoints.

The tests compare bits. These are the same on every CPU: layers add integers, and the functions
between them give bits that do not depend on the number of columns in a process (see processes.py).
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import bitlinear
from bitlinear import BitLinear, Embedding, packing
from tests import oracle
from tests.processes import EXACT_ACTIVATION, WORLD_SIZES, Transformer, assert_same_bits, mesh

try:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import parallelize_module

    from bitlinear.tensor_parallel import ColwiseParallel, RowwiseParallel
except ImportError as error:
    pytest.skip(f"needs a newer torch: {error}", allow_module_level=True)

SHAPES = [(), (1,), (5,), (2, 3), (0,), (3, 0, 2)]

# What MLPs and attention are divided into.
PLAN = {
    **{name: ColwiseParallel() for name in ("q", "k", "v", "up")},
    **{name: RowwiseParallel() for name in ("o", "down")},
}


# --- The checks, which run in every process ---


def deployed(in_features, out_features, bias=True, scales="one", act_bits=8):
    """A layer, the same in all processes. ``scales`` are ``"one"``, or ``"many"``, one a row."""
    quant_type = f"ai{act_bits}pc_{'wpc' if scales == 'many' else 'wpt'}"
    layer = BitLinear(in_features, out_features, bias=bias, quant_type=quant_type).deploy()
    if scales == "many":
        layer.w_scale = torch.rand(out_features, 1) + 0.5
    return layer


def divided(module, plan):
    return parallelize_module(copy.deepcopy(module), mesh(), plan)


def with_bad_tokens(x):
    """Write NaN, infinities and zeros to tokens, each in the columns of another process."""
    if x.dim() > 1 and x.shape[0] > 3:
        x[0, 3], x[1, -2], x[2], x[3, -1] = math.nan, -math.inf, 0, math.nan
    return x


# Output features, bias, scales and bits of activations.
LAYERS = [
    *((64, True, "one", 8), (37, True, "many", 8), (3, False, "one", 8)),
    *((37, True, "one", 16), (5, False, "many", 16)),
]


def check_columns():
    whole = Replicate()
    for layer_of_n in LAYERS:
        layer = deployed(50, *layer_of_n)
        n = layer.out_features
        style = divided(layer, ColwiseParallel(output_layouts=whole))
        parts = divided(layer, ColwiseParallel(use_local_output=False))
        assert parts.w_packed.to_local().shape[0] <= math.ceil(n / dist.get_world_size())
        for dtype in oracle.DTYPES:
            for shape in SHAPES:
                x = with_bad_tokens(torch.randn(*shape, 50)).to(dtype)
                assert_same_bits(style(x), layer(x))
                y = parts(x)
                assert y.placements == (Shard(y.dim() - 1),)
                assert y.shape == layer(x).shape
                assert_same_bits(y.full_tensor(), layer(x))


def check_rows():
    k = 4 * dist.get_world_size() * 3
    for layer_of_n in LAYERS:
        layer = deployed(k, *layer_of_n)
        parts = divided(layer, RowwiseParallel(input_layouts=Replicate()))
        assert parts.w_packed.to_local().shape[1] == 3
        for dtype in oracle.DTYPES:
            for shape in SHAPES:
                x = with_bad_tokens(torch.randn(*shape, k)).to(dtype)
                assert_same_bits(parts(x), layer(x))
                part = x.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]
                assert_same_bits(divided(layer, RowwiseParallel())(part), layer(x))


def check_layouts_of_rows(scales):
    k = 4 * dist.get_world_size() * 3
    layer = deployed(k, 37, scales=scales)
    for layout in (Replicate(), Shard(0), Shard(1), Shard(-1)):
        arguments = {"input_layouts": Replicate(), "output_layouts": layout}
        parts = divided(layer, RowwiseParallel(**arguments))
        distributed = divided(layer, RowwiseParallel(**arguments, use_local_output=False))
        for shape in [(4, 8), (1, 1), (5, 3), (0, 2)]:
            x = torch.randn(*shape, k)
            y = distributed(x)
            assert_same_bits(y.full_tensor(), layer(x))
            assert_same_bits(parts(x), y.to_local())
            if layout.is_shard():
                assert y.placements[0].is_shard()


def check_sharded_inputs():
    """Sequence parallelism: layers gather the whole sequence, and give its parts back."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    mlp = nn.Sequential(deployed(32, 64), EXACT_ACTIVATION, deployed(64, 32))
    plan = {
        "0": ColwiseParallel(input_layouts=Shard(1)),
        "2": RowwiseParallel(output_layouts=Shard(1)),
    }
    x = torch.randn(2, 2 * world_size, 32)
    part = divided(mlp, plan)(x.chunk(world_size, dim=1)[rank])
    assert_same_bits(part, mlp(x).chunk(world_size, dim=1)[rank])


def check_autocast():
    layer = deployed(48, 33)
    device_type = mesh().device_type
    x = torch.randn(5, 48)
    for style in (
        ColwiseParallel(output_layouts=Replicate()),
        RowwiseParallel(input_layouts=Replicate()),
    ):
        parts = divided(layer, style)
        with torch.autocast(device_type, torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
            assert_same_bits(parts(x), layer(x))


def check_large_sums():
    """fp32 holds neither the sum of all parts nor that of one."""
    k = 280_000
    layer = deployed(k, 1)
    layer.w_packed = packing.pack_ternary(torch.ones(1, k, dtype=torch.int8))
    x = torch.randint(125, 128, (64, k)).float()
    x[:, 0] = 127  # so that these integers quantise to themselves
    y = layer(x)
    assert (y / layer.w_scale > 2 * 2**24).all()
    assert_same_bits(divided(layer, RowwiseParallel(input_layouts=Replicate()))(x), y)


def check_a_pair():
    mlp = nn.Sequential(deployed(50, 64), EXACT_ACTIVATION, deployed(64, 37, bias=False))
    parts = divided(mlp, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            for tokens in (0, 1, 2, 7, 32):
                x = with_bad_tokens(torch.randn(tokens, 50))
                assert_same_bits(parts(x), mlp(x))


def check_a_norm_between():
    mlp = nn.Sequential(deployed(50, 64), nn.LayerNorm(64), deployed(64, 37))
    plan = {
        "0": ColwiseParallel(output_layouts=Replicate()),
        "2": RowwiseParallel(input_layouts=Replicate()),
    }
    x = torch.randn(5, 50)
    assert_same_bits(divided(mlp, plan)(x), mlp(x))


def new_transformer(seed=0):
    torch.manual_seed(seed)
    return bitlinear.deploy(bitlinear.convert(Transformer(), exclude=("head",)))


def divided_transformer(model):
    plan = {f"blocks.*.{name}": style for name, style in PLAN.items()}
    return divided(model, plan)


def check_a_transformer():
    model, x = new_transformer(), torch.randn(3, 5, 32)
    parts = divided_transformer(model)
    with torch.inference_mode():
        assert_same_bits(parts(x), model(x))
        assert_same_bits(copy.deepcopy(parts)(x), model(x))


def check_groups():
    """Each process has whole groups, and their sums add up exactly."""
    for quant_type in ("ai8pc_wpg32", "ai16pc_wpg64"):
        k = int(quant_type.partition("wpg")[2]) * dist.get_world_size() * 3
        layer = BitLinear(k, 37, quant_type=quant_type)
        with torch.no_grad():
            layer.weight.mul_(torch.logspace(-1, 1, k))
        layer.deploy()
        x = with_bad_tokens(torch.randn(5, k)).requires_grad_()
        for style in (
            ColwiseParallel(output_layouts=Replicate(), use_local_output=False),
            *(
                RowwiseParallel(
                    input_layouts=Replicate(), output_layouts=layout, use_local_output=False
                )
                for layout in (Replicate(), Shard(0), Shard(-1))
            ),
        ):
            parts = divided(layer, style)
            assert_same_bits(parts(x).full_tensor(), layer(x))
            (grad,) = torch.autograd.grad(parts(x).full_tensor().sum(), x)
            (wanted,) = torch.autograd.grad(layer(x).sum(), x)
            torch.testing.assert_close(grad, wanted)


def check_other_modules():
    class Normed(BitLinear):
        def forward(self, x):
            return super().forward(x / x.norm())

    for style in (ColwiseParallel, RowwiseParallel):
        for module, message in [
            (nn.Linear(16, 16), rf"{style.__name__} is for deployed BitLinear.*got Linear"),
            (nn.Embedding(16, 16), r"got Embedding: use torch\.distributed"),
            (Embedding(16, 16).deploy(), "got Embedding: leave it out of the plan"),
            (BitLinear(16, 16), r"this one is not: call deploy\(\) first"),
            (Normed(16, 16).deploy(), "forward pass of this Normed"),
        ]:
            with pytest.raises(TypeError, match=message):
                parallelize_module(module, mesh(), style())
    with pytest.raises(ValueError, match=r"multiple of 8, .* 2 processes, but they are 20"):
        parallelize_module(deployed(20, 16), mesh(), RowwiseParallel())
    layer = BitLinear(96, 16, quant_type="ai8pc_wpg32").deploy()
    with pytest.raises(ValueError, match=r"multiple of 64, 32 weights to a group and 2 processes"):
        parallelize_module(layer, mesh(), RowwiseParallel())


def check_inputs():
    for style in (ColwiseParallel(), RowwiseParallel(input_layouts=Replicate())):
        parts = divided(deployed(16, 8), style)
        with pytest.raises(ValueError, match=r"in_features = 16, but x has shape \[2, 8\]"):
            parts(torch.randn(2, 8))
        with pytest.raises(TypeError, match="int64"):
            parts(torch.ones(2, 16, dtype=torch.int64))


def check_gradients():
    for scales in ("one", "many"):
        layer = deployed(16, 8, scales=scales)
        x, weight = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, 8)
        (wanted,) = torch.autograd.grad((layer(x) * weight).sum(), x)
        for style in (
            ColwiseParallel(output_layouts=Replicate()),
            RowwiseParallel(input_layouts=Replicate()),
        ):
            y = divided(layer, style)(x)
            assert_same_bits(y, layer(x))
            (grad,) = torch.autograd.grad((y * weight).sum(), x)
            torch.testing.assert_close(grad, wanted)


def check_no_training():
    for style in (ColwiseParallel(), RowwiseParallel(input_layouts=Replicate())):
        parts = divided(deployed(16, 8), style)
        with pytest.raises(ValueError, match=r"divided among processes.*full_state_dict"):
            parts.undeploy()
        assert parts.is_deployed


def check_sources():
    """Without a source, each process takes its part of its own layer."""
    layer, x = deployed(16, 8), torch.randn(2, 16)
    for style in (
        ColwiseParallel(output_layouts=Replicate()),
        RowwiseParallel(input_layouts=Replicate()),
    ):
        parts = parallelize_module(copy.deepcopy(layer), mesh(), style, src_data_rank=None)
        assert parts.w_packed.to_local().is_contiguous()
        assert_same_bits(parts(x), layer(x))


def check_dtypes():
    layer = deployed(16, 8, scales="many")
    parts = divided(layer, ColwiseParallel(output_layouts=Replicate())).half()
    assert parts.w_scale.dtype == torch.float32
    x = torch.randn(2, 16, dtype=torch.float16)
    assert_same_bits(parts(x), copy.deepcopy(layer).half()(x))


def check_states():
    """Whole and divided models take each other's states, and no damaged ones."""
    model, other, x = new_transformer(1), new_transformer(2), torch.randn(3, 5, 32)
    parts = divided_transformer(other)
    state = parts.state_dict()
    packed = [value for name, value in state.items() if name.endswith("w_packed")]
    assert all(isinstance(value, DTensor) for value in packed)
    assert len(packed) == 12
    full = StateDictOptions(full_state_dict=True)

    set_model_state_dict(parts, model.state_dict(), options=full)
    assert_same_bits(parts(x), model(x))
    other.load_state_dict(get_model_state_dict(parts, options=full))
    assert_same_bits(other(x), model(x))
    parts.load_state_dict(copy.deepcopy(parts.state_dict()))
    assert_same_bits(parts(x), model(x))

    with pytest.raises(RuntimeError, match="divided among processes, but the state is not"):
        parts.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"its tensors are sharded.*full_state_dict"):
        other.load_state_dict(parts.state_dict())
    for name, value in (("q.w_packed", 255), ("o.w_packed", 255), ("o.w_scale", -1)):
        damaged = copy.deepcopy(parts.state_dict())
        damaged[f"blocks.0.{name}"].to_local().flatten()[-1] = value
        with pytest.raises(RuntimeError, match=r"invalid code 3|positive"):
            parts.load_state_dict(damaged)
    assert_same_bits(parts(x), model(x))


def check_scales_of_another_shape():
    one, many, x = deployed(16, 8), deployed(16, 8, scales="many"), torch.randn(2, 16)
    for style in (
        ColwiseParallel(output_layouts=Replicate()),
        RowwiseParallel(input_layouts=Replicate()),
    ):
        for ours, theirs in ((one, many), (many, one)):
            parts = divided(ours, style)
            options = StateDictOptions(full_state_dict=True)
            state = dict(theirs.state_dict())  # without metadata, which names the type
            set_model_state_dict(parts, state, options=options)
            assert_same_bits(parts(x), theirs(x))


def check_saving(directory):
    dcp.save(divided_transformer(new_transformer(1)).state_dict(), checkpoint_id=directory)


def check_loading(directory):
    model, x = new_transformer(1), torch.randn(3, 5, 32)
    parts = divided_transformer(new_transformer(2))
    assert not torch.equal(parts(x), model(x))
    state = parts.state_dict()
    dcp.load(state, checkpoint_id=directory)
    parts.load_state_dict(state)
    assert_same_bits(parts(x), model(x))


def check_compilation():
    mlp, x = nn.Sequential(deployed(48, 64), EXACT_ACTIVATION, deployed(64, 37)), torch.randn(5, 48)
    parts = divided(mlp, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with torch.inference_mode():
        compiled = torch.compile(parts, backend="aot_eager", fullgraph=True)
        assert_same_bits(compiled(x), mlp(x))
        assert_same_bits(compiled(x[:2]), mlp(x[:2]))


# --- The tests ---


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    "check",
    [
        check_columns,
        check_rows,
        check_groups,
        check_a_pair,
        pytest.param(check_sharded_inputs, marks=pytest.mark.slow),
        pytest.param(check_a_transformer, marks=pytest.mark.slow),
    ],
    ids=lambda check: check.__name__[6:],
)
def test_the_bits_are_those_of_one_process(processes, world_size, check):
    processes.run(world_size, check)


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["one", "many"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rows_with_any_layout_of_the_output(processes, world_size, scales):
    processes.run(world_size, check_layouts_of_rows, scales)


def test_sums_that_fp32_cannot_hold(processes):
    processes.run(2, check_large_sums)


@pytest.mark.parametrize(
    "check",
    [
        check_autocast,
        check_a_norm_between,
        check_dtypes,
        pytest.param(check_states, marks=pytest.mark.slow),
        pytest.param(check_scales_of_another_shape, marks=pytest.mark.slow),
        check_other_modules,
        check_inputs,
        check_gradients,
        check_no_training,
        check_sources,
    ],
    ids=lambda check: check.__name__[6:],
)
def test_in_two_processes(processes, check):
    processes.run(2, check)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_checkpoints_fit_any_number_of_processes(processes, world_size, tmp_path):
    model = new_transformer(1)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "1")
    processes.run(2, check_saving, tmp_path / "2")
    for saved_by in (1, 2):
        processes.run(world_size, check_loading, tmp_path / str(saved_by))
    other = new_transformer(2)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "2")
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), model.buffers()))


@pytest.mark.slow
def test_compiled(processes):
    processes.run(2, check_compilation)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "check",
    [check_columns, check_rows, check_sharded_inputs, check_autocast, check_a_pair, check_states],
    ids=lambda check: check.__name__[6:],
)
def test_on_gpus(gpu_processes, check):
    """With NCCL; on one GPU there is little for it to do."""
    gpu_processes.run(min(2, torch.cuda.device_count()), check)
