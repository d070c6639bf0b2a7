"""``bitlinear.Embedding``: lookups, gradients, both forms, states."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import bitlinear
from bitlinear import BitLinear, Embedding
from tests import oracle
from tests.layers import unchanged
from tests.test_state import BAD_FLOATS, CORRUPT, through_mmap, through_safetensors, through_torch

IDS = torch.tensor([[0, 3, 3, 5], [4, 1, 0, 2]])

types = pytest.mark.parametrize("quant_type", ["wpt", "wpc"])


def packed(num=6, dim=20, **kwargs):
    return Embedding(num, dim, **kwargs).deploy()


both_forms = pytest.mark.parametrize("make", [Embedding, packed])


def expected(ids, weight, scale, dtype):
    t = oracle.ternarize(weight.detach().float().numpy(), scale.numpy())
    return torch.from_numpy(oracle.lookup(ids.numpy(), t, scale.numpy())).to(dtype)


# --- The lookup ---


@types
@pytest.mark.parametrize("dtype", [*oracle.DTYPES, torch.float64])
@pytest.mark.parametrize("dim", [*range(1, 10), 16, 33, 130])
def test_a_lookup_is_that_of_the_oracle_in_both_forms(dim, dtype, quant_type):
    table = Embedding(7, dim, quant_type=quant_type, dtype=dtype)
    ids, weight = torch.tensor([[6, 0, 2], [2, 5, 1]]), table.weight
    in_training = table(ids)
    with torch.no_grad():
        assert torch.equal(table(ids), in_training)
    table.deploy()
    scale = oracle.weight_scale(weight.detach().double().numpy(), per_row=quant_type == "wpc")
    torch.testing.assert_close(
        table.w_scale, torch.from_numpy(scale.reshape(table.w_scale.shape)), rtol=1e-6, atol=0
    )
    wanted = expected(ids, weight, table.w_scale, dtype)
    oracle.assert_same_bits(in_training, wanted)
    oracle.assert_same_bits(table(ids), wanted)
    oracle.assert_same_bits(F.embedding(ids, table.weight), wanted)


@types
def test_a_large_table_has_the_same_bits_in_both_forms(quant_type):
    """The scale of a row must not depend on the rows that are quantised beside it."""
    table = Embedding(3000, 77, quant_type=quant_type)
    ids = torch.randint(0, 3000, (500,))
    y = table(ids)
    assert torch.equal(table.deploy()(ids), y)


def test_one_scale_covers_rows_that_are_not_looked_up():
    outputs = []
    for quant_type in ("wpt", "wpc"):
        table = Embedding(6, 20, quant_type=quant_type)
        before = table(torch.tensor([1]))
        with torch.no_grad():
            table.weight[5] *= 100
        outputs.append(torch.equal(table(torch.tensor([1])), before))
    assert outputs == [False, True]


@both_forms
@types
def test_indices_of_every_kind(make, quant_type):
    table = make(6, 20, quant_type=quant_type)
    rows = table(torch.arange(6))
    for ids in (
        *(IDS, IDS.to(torch.int32), IDS.t(), IDS[:, ::2], IDS[0, 0], IDS[None, :, None]),
        *(IDS[:0], IDS[:, :0].to(torch.int32)),
    ):
        assert torch.equal(table(ids), rows[ids.long()])
    nested = torch.nested.nested_tensor([IDS[0], IDS[1, :2]], layout=torch.jagged)
    first, second = table(nested).unbind()
    assert torch.equal(first, rows[IDS[0]])
    assert torch.equal(second, rows[IDS[1, :2]])


@both_forms
@types
def test_bad_indices(make, quant_type):
    table = make(6, 20, quant_type=quant_type)
    for ids in ([6], [-1], [0, 1 << 40]):
        with pytest.raises(IndexError, match="out of range"):
            table(torch.tensor(ids))
    with pytest.raises(RuntimeError, match="Long, Int"):
        table(torch.tensor([1.0]))
    with pytest.raises(TypeError, match=r"Embedding needs a torch\.Tensor, but got list"):
        table([1])


@types
def test_extreme_weights(quant_type):
    for value in (0.0, 1e-30, 3e38, float("nan"), float("inf")):
        table = Embedding(6, 20, quant_type=quant_type)
        with torch.no_grad():
            table.weight[2] = value
        y = table(torch.arange(6))
        finite = y.isfinite().all(dim=1)
        if value - value != 0:  # NaN or infinity
            assert finite.tolist() == [quant_type == "wpc" and n != 2 for n in range(6)]
            with pytest.raises(ValueError, match="NaN, infinite"):
                table.deploy()
        else:
            assert torch.equal(table.deploy()(torch.arange(6)), y)


class Shapes(TorchDispatchMode):
    """Records the shapes of what expand_weight returns."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.bitlinear.expand_weight.default:
            self.found.append(tuple(result.shape))
        return result


@both_forms
@types
def test_only_the_rows_that_are_looked_up_are_expanded(make, quant_type):
    table = make(1000, 20, quant_type=quant_type)
    with Shapes() as shapes:
        table(IDS)
    assert shapes.found == [(8, 20)]


# --- Training ---


@types
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 0},
        {"padding_idx": -3},
        {"scale_grad_by_freq": True},
        {"sparse": True},
        {"dtype": torch.bfloat16},
    ],
)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_gradient_is_that_of_nn_embedding(options, quant_type, strength):
    plain = nn.Embedding(6, 20, **options)
    table = Embedding(6, 20, quant_type=quant_type, **options)
    table.quantization_strength = strength
    assert table.padding_idx == plain.padding_idx
    grad_output = torch.randn(*IDS.shape, 20).to(plain.weight.dtype)
    for module in (plain, table):
        module(IDS).backward(grad_output)
    assert table.weight.grad.layout == plain.weight.grad.layout
    assert torch.equal(table.weight.grad.to_dense(), plain.weight.grad.to_dense())
    if table.padding_idx is not None:
        assert not table.weight[table.padding_idx].any()
        assert not table.weight.grad[table.padding_idx].any()


def test_a_frozen_table():
    table = Embedding(6, 20).requires_grad_(False)
    assert not table(IDS).requires_grad
    assert not packed()(IDS).requires_grad


def test_derivatives_of_the_gradient():
    table = Embedding(6, 20)
    y = table(IDS)
    (first,) = torch.autograd.grad(y.pow(3).sum(), table.weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), table.weight)
    rows = y.detach().reshape(-1, 20)
    # Of an index that occurs twice, the first derivative is the sum, and so is the second.
    wanted = torch.zeros(6, 20).index_add_(0, IDS.reshape(-1), 6 * rows)
    torch.testing.assert_close(second, wanted)


@both_forms
def test_the_output_can_be_changed_in_place(make):
    table = make(6, 20)
    before = table(IDS).detach().clone()
    y = table(IDS)
    y += 1
    y.mul_(2)
    assert torch.equal(table(IDS), before)
    if y.requires_grad:
        y.sum().backward()
        assert torch.equal(table.weight.grad[4], torch.full((20,), 2.0))


@types
def test_the_formula_of_a_blend(quant_type):
    table = Embedding(6, 20, quant_type=quant_type)
    quantised, plain = table(IDS), F.embedding(IDS, table.weight)
    model = nn.Sequential(table)
    for strength in (0.0, 0.3, 1.0):
        assert bitlinear.set_quantization_strength(model, strength) is model
        assert table.quantization_strength == strength
        torch.testing.assert_close(table(IDS), plain.lerp(quantised, strength))
    assert torch.equal(table(IDS), quantised)
    table.quantization_strength = 0.5
    assert "quantization_strength=0.5" in repr(table)
    with unchanged(table), pytest.raises(ValueError, match=r"quantization_strength is 0\.5"):
        table.deploy()
    table.quantization_strength = 1
    with pytest.raises(ValueError, match="this Embedding is deployed, so its quantization_st"):
        table.deploy().quantization_strength = 0.5


@types
def test_training_then_deployment_changes_no_bit(quant_type):
    model = nn.Sequential(Embedding(6, 20, padding_idx=0, quant_type=quant_type), nn.Linear(20, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    target, losses = torch.randn(*IDS.shape, 3), []
    for _ in range(20):
        loss = F.mse_loss(model(IDS), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    y = model(IDS)
    assert bitlinear.deploy(model) is model
    assert torch.equal(model(IDS), y)


# --- Making one ---


def test_the_arguments():
    assert repr(Embedding(6, 20)) == "Embedding(6, 20, quant_type=wpt)"
    table = Embedding(6, 20, 2, None, 2.0, True, True, eps=1e-3, quant_type="wpc")
    assert (table.padding_idx, table.scale_grad_by_freq, table.sparse) == (2, True, True)
    assert "quant_type=wpc, eps=0.001, deployed=True" in repr(table.deploy())
    assert isinstance(table, nn.Embedding)
    for arguments, options, error, message in (
        ((0, 20), {}, ValueError, "embedding_dim and num_embeddings must be at least 1"),
        ((6, 0), {}, ValueError, "must be at least 1, but they are 0 and 6"),
        ((6, 500_001), {}, ValueError, "embedding_dim must be at most 500000"),
        ((6.0, 20), {}, TypeError, "num_embeddings must be an integer, but it is 6.0"),
        ((6, 20), {"max_norm": 1.0}, ValueError, "max_norm must be None, but it is 1.0"),
        ((6, 20), {"eps": 0.0}, ValueError, "eps must be between"),
        ((6, 20), {"quant_type": "ai8pc_wpt"}, ValueError, r"one of \['wpt', 'wpc'\]"),
        ((6, 20), {"dtype": torch.complex64}, TypeError, "dtype must be floating point"),
    ):
        with pytest.raises(error, match=message):
            Embedding(*arguments, **options)


@types
def test_the_type_of_a_deployed_table_is_that_of_its_scales(quant_type):
    table, other = packed(quant_type=quant_type), {"wpt": "wpc", "wpc": "wpt"}[quant_type]
    with pytest.raises(ValueError, match=f"its quant_type cannot be '{other}': call undeploy"):
        table.quant_type = other
    table.undeploy().quant_type = other
    assert table.deploy().quant_type == other


def test_from_embedding_shares_the_parameter():
    plain = nn.Embedding(6, 20, padding_idx=2, sparse=True, dtype=torch.bfloat16).eval()
    plain.weight.requires_grad_(False)
    state = torch.get_rng_state()
    table = Embedding.from_embedding(plain, quant_type="wpc", eps=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert table.weight is plain.weight
    assert (table.padding_idx, table.sparse, table.training) == (2, True, False)
    assert (table.quant_type, table.eps) == ("wpc", 1e-3)
    assert table.deploy()(IDS).dtype == torch.bfloat16
    assert Embedding.from_embedding(Embedding(6, 20)).weight.shape == (6, 20)
    assert not Embedding.from_pretrained(torch.randn(6, 20)).weight.requires_grad
    assert Embedding.from_pretrained(torch.randn(6, 20), freeze=False).weight.requires_grad


class Scaled(nn.Embedding):
    def forward(self, input):
        return 3 * super().forward(input)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(6, 20), TypeError, "needs a torch.nn.Embedding, but got Linear"),
        (lambda: Scaled(6, 20), TypeError, "Scaled defines forward"),
        (packed, TypeError, "it is a deployed Embedding; call undeploy"),
        (lambda: nn.Embedding(6, 20, max_norm=1.0), ValueError, "max_norm must be None"),
        (
            lambda: nn.utils.parametrizations.orthogonal(nn.Embedding(6, 6)),
            TypeError,
            "it is parametrized",
        ),
    ],
)
def test_embeddings_that_cannot_be_converted(make, error, message):
    with pytest.raises(error, match=message):
        Embedding.from_embedding(make())


def test_convert_leaves_embeddings_alone(log):
    model = nn.Sequential(nn.Embedding(6, 20), Embedding(6, 20), nn.Linear(20, 3))
    before = list(model)
    bitlinear.convert(model)
    assert [*model][:2] == before[:2]
    assert isinstance(model[2], BitLinear)
    bitlinear.deploy(model)
    assert model[1].is_deployed
    assert log()[-1] == "deployed 1 BitLinear layers and 1 embeddings"


# --- The deployed form ---


@types
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undeploy_keeps_the_function(quant_type, dtype):
    table = Embedding(6, 20, padding_idx=1, quant_type=quant_type, dtype=dtype)
    y = table.deploy()(IDS)
    assert not list(table.parameters())
    assert {name for name, _ in table.named_buffers()} == {"w_packed", "w_scale"}
    assert table.w_packed.shape == (6, 5)
    assert table.w_scale.shape == ((1,) if quant_type == "wpt" else (6, 1))
    assert table.deploy() is table
    table.undeploy()
    assert table.weight.dtype == dtype
    assert not table.weight[1].any()
    if dtype == torch.float32:
        assert torch.equal(table(IDS), y)
    table(IDS).sum().backward()
    assert table.weight.grad is not None


@types
def test_a_table_has_the_format_of_a_layer(quant_type):
    table, layer = Embedding(6, 21, quant_type=quant_type), BitLinear(21, 6, bias=False)
    layer.quant_type = f"ai8pc_{quant_type}"
    layer.weight = table.weight
    x = torch.randn(3, 21)
    table.deploy()
    layer.deploy()
    assert torch.equal(table.w_packed, layer.w_packed)
    assert torch.equal(table.w_scale, layer.w_scale)
    assert torch.equal(table.dequantize(), layer.dequantize())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(F.linear(x, table.weight), layer(x))
        assert torch.equal(F.embedding(IDS, layer.weight), table(IDS))
        assert torch.equal(F.embedding(input=IDS, weight=table.weight, padding_idx=0), table(IDS))


def test_the_weight_of_a_deployed_table():
    table = packed()
    assert table.weight.shape == (6, 20)
    with pytest.warns(UserWarning, match="deployed Embedding was dequantised .6 x 20."):
        assert torch.equal(table.weight + 0, table.dequantize())
    for write in (
        lambda: F.embedding(IDS, table.weight, max_norm=1.0),
        table.reset_parameters,
        lambda: table.weight.fill_(0),
    ):
        with unchanged(table), pytest.raises(RuntimeError, match="read-only: call undeploy"):
            write()
    with pytest.raises(AttributeError, match="would be ignored"):
        table.weight = nn.Parameter(torch.zeros(6, 20))
    with pytest.warns(UserWarning, match="dequantised"):
        rows = F.embedding(torch.tensor([1]), packed().weight[2:])  # of a view
    assert rows.shape == (1, 20)


def test_damaged_bytes_are_found_by_whatever_reads_all_of_them():
    table = packed()
    table.w_packed[2, 1] = 255
    for read in (table.dequantize, table.undeploy):
        with pytest.raises(ValueError, match="code 3, first in byte 1 of row 2"):
            read()


@both_forms
@types
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(make, quant_type, clone):
    table = make(6, 20, eps=1e-3, padding_idx=1, quant_type=quant_type)
    copied = clone(table)
    assert torch.equal(copied(IDS), table(IDS))
    assert repr(copied) == repr(table)
    for name, tensor in table.state_dict().items():
        assert copied.state_dict()[name].data_ptr() != tensor.data_ptr()
    copied.undeploy()
    assert table.is_deployed == (make is packed)


def test_conversions_of_a_deployed_table():
    table = packed()
    scale, codes = table.w_scale.clone(), table.w_packed.clone()
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        table.to(dtype)
        assert table(IDS).dtype == table.weight.dtype == dtype
        assert torch.equal(table.w_scale, scale)
        assert torch.equal(table.w_packed, codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert table(IDS).dtype == Embedding(6, 20)(IDS).dtype == torch.float32
    ids = torch.zeros(2, 3, dtype=torch.long, device="meta")
    for module in (Embedding(6, 20, device="meta"), table.half().to("meta")):
        assert module(ids).shape == (2, 3, 20)
    assert table.to_empty(device="cpu").w_scale.dtype == torch.float32


# --- States ---


@types
@pytest.mark.parametrize("round_trip", [through_torch, through_mmap, through_safetensors])
@pytest.mark.parametrize("from_deployed", [True, False])
@pytest.mark.parametrize("into_deployed", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_either_state_loads_into_either_table(
    round_trip, from_deployed, into_deployed, assign, quant_type, tmp_path
):
    def model(is_deployed):
        table = Embedding(6, 20, quant_type=quant_type)
        return nn.Sequential(nn.Identity(), table.deploy() if is_deployed else table)

    source, target = model(from_deployed), model(into_deployed)
    state = round_trip(source.state_dict(), tmp_path)
    assert str(target.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert target[1].is_deployed == from_deployed
    assert target.state_dict().keys() == source.state_dict().keys()
    assert torch.equal(target(IDS), source(IDS))


def test_a_state_from_nn_embedding_and_back():
    plain, table = nn.Embedding(6, 20), Embedding(6, 20)
    table.load_state_dict(plain.state_dict())
    assert torch.equal(table.weight, plain.weight)
    nn.Embedding(6, 20).load_state_dict(table.state_dict())


@pytest.mark.parametrize(("message", "change"), [case for case in CORRUPT if "bias" not in case[0]])
@pytest.mark.parametrize("into_deployed", [True, False])
def test_a_corrupt_state_is_rejected_and_changes_nothing(message, change, into_deployed):
    table, state = (packed() if into_deployed else Embedding(6, 20)), change(packed().state_dict())
    with unchanged(table), pytest.raises(RuntimeError, match=message):
        table.load_state_dict(state)
    assert table.is_deployed == into_deployed


@pytest.mark.parametrize(
    ("message", "change"), [case for case in BAD_FLOATS if "bias" not in case[0]]
)
@pytest.mark.parametrize("into_deployed", [True, False])
def test_a_bad_float_state_is_rejected_and_changes_nothing(message, change, into_deployed):
    state = change(Embedding(6, 20).state_dict())
    table = packed() if into_deployed else Embedding(6, 20)
    with unchanged(table), pytest.raises(RuntimeError, match=message):
        table.load_state_dict(state)


@pytest.mark.parametrize("make", [Embedding, packed])
def test_a_bias_is_unexpected(make):
    table = make(6, 20)
    state = {**table.state_dict(), "bias": torch.ones(6)}
    with unchanged(table), pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        table.load_state_dict(state)


@both_forms
def test_the_metadata_names_the_table(make):
    source = make(6, 20, eps=0.5, quant_type="wpc")
    state = source.state_dict()
    wanted = {"version": 1, "embedding_dim": 20, "eps": 0.5, "quant_type": "wpc"}
    assert state._metadata[""] == wanted
    for options, message in (
        ({"quant_type": "wpc"}, r"eps=0\.5, but this one has eps=1e-06"),
        ({"eps": 0.5}, "quant_type='wpc', but this one has quant_type='wpt'"),
    ):
        target = Embedding(6, 20, **options)
        with unchanged(target), pytest.raises(RuntimeError, match=message):
            target.load_state_dict(state)


@both_forms
def test_a_scale_of_another_shape_changes_the_type(make):
    table, source = make(6, 20), packed(quant_type="wpc")
    table.load_state_dict(dict(source.state_dict()))  # without metadata
    assert table.quant_type == "wpc"
    assert torch.equal(table(IDS), source(IDS))


def test_a_deployed_state_ends_a_blend():
    table, source = Embedding(6, 20), packed()
    table.quantization_strength = 0.5
    table.load_state_dict(source.state_dict())
    assert torch.equal(table.undeploy()(IDS), source(IDS))


# --- The rest of PyTorch ---


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@both_forms
@types
def test_compile(make, quant_type):
    table = make(6, 20, quant_type=quant_type)
    compiled = torch.compile(table, fullgraph=True, dynamic=True)
    for count in (3, 5):
        ids = torch.randint(0, 6, (2, count))
        assert torch.equal(compiled(ids), table(ids))
    if make is Embedding:
        grads = [
            torch.autograd.grad(f(ids).square().sum(), table.weight)[0] for f in (table, compiled)
        ]
        torch.testing.assert_close(*grads)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="older versions do not tell of a transform")
def test_compile_a_gradient_of_torch_func():
    table = Embedding(6, 20)

    def loss(weight, ids):
        return functional_call(table, {"weight": weight}, (ids,)).square().sum()

    actual = torch.compile(grad(loss), fullgraph=True)(table.weight.detach(), IDS)
    wanted = torch.autograd.grad(table(IDS).square().sum(), table.weight)[0]
    torch.testing.assert_close(actual, wanted)


@pytest.mark.cuda
@types
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_on_a_gpu(quant_type, dtype):
    table = Embedding(6, 21, padding_idx=0, quant_type=quant_type, dtype=dtype).cuda()
    ids = IDS.cuda()
    y = table(ids)
    y.sum().backward()
    assert not table.weight.grad[0].any()
    table.deploy()
    assert torch.equal(table(ids), y)
    assert torch.equal(table.cpu()(IDS), y.cpu())


@types
def test_export_and_traces(quant_type):
    table = packed(quant_type=quant_type)
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(table, (IDS,), dynamic_shapes={"input": {0: batch}})
    with torch.no_grad():
        traced = torch.jit.trace(table, IDS)
    graph = torch.fx.symbolic_trace(nn.Sequential(table, nn.ReLU()))
    assert [node.op for node in graph.graph.nodes].count("call_module") == 2
    for run in (program.module(), traced, graph):
        assert torch.equal(run(IDS[:1]).relu(), table(IDS[:1]).relu())
    with pytest.raises(NotImplementedError, match=r"use torch\.export"):
        torch.jit.script(table)


@types
def test_gradients_of_each_sample(quant_type):
    table = Embedding(6, 20, quant_type=quant_type)

    def loss(parameters, ids):
        return functional_call(table, parameters, (ids,)).square().sum()

    parameters = {"weight": table.weight.detach()}
    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, IDS)["weight"]
    wanted = [torch.autograd.grad(table(ids).square().sum(), table.weight)[0] for ids in IDS]
    torch.testing.assert_close(actual, torch.stack(wanted))


@both_forms
@types
def test_ensembles(make, quant_type):
    tables = [make(6, 20, quant_type=quant_type) for _ in range(3)]
    tensors = {**stack_module_state(tables)[0], **stack_module_state(tables)[1]}
    run = vmap(lambda t, ids: functional_call(tables[0], t, (ids,)), in_dims=(0, None))
    for output, table in zip(run(tensors, IDS), tables):
        assert torch.equal(output, table(IDS))
    assert torch.equal(vmap(tables[0])(IDS), tables[0](IDS))


def test_a_weight_that_a_parametrization_computes():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    table = Embedding(6, 20)
    y = table(IDS)
    nn.utils.parametrize.register_parametrization(table, "weight", Double())
    assert torch.equal(table(IDS), 2 * y)
    with pytest.raises(ValueError, match="Embedding cannot be deployed: it is parametrized"):
        table.deploy()


# --- Copies and conversions ---


def test_a_shallow_copy_knows_its_dtype():
    layer = Embedding(9, 5, dtype=torch.bfloat16)
    other = copy.copy(layer)
    layer.deploy()
    ids = torch.tensor([1, 8])
    assert torch.equal(other(ids), layer(ids))
    assert other(ids).dtype == other.weight.dtype == torch.bfloat16


class Doubled(Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_subclass_that_computes_something_else_is_not_converted():
    with pytest.raises(TypeError, match="it is a Doubled, whose use of the weight is unknown"):
        Embedding.from_embedding(Doubled(3, 4))
    replaced = Embedding(3, 4)
    replaced.forward = lambda ids: ids
    with pytest.raises(TypeError, match="its forward has been replaced"):
        Embedding.from_embedding(replaced)


def test_a_pretrained_table_with_a_scale_per_row():
    table = torch.randn(4, 7)
    layer = Embedding.from_pretrained(table, quant_type="wpc", eps=1e-3)
    assert (layer.quant_type, layer.eps, layer.weight.requires_grad) == ("wpc", 1e-3, False)


def test_the_dimensions_have_their_names():
    state = Embedding(4, 63).deploy().state_dict()
    with pytest.raises(RuntimeError, match=r"embedding_dim=63, .* embedding_dim=64"):
        Embedding(4, 64).load_state_dict(state)


def test_the_scale_of_a_table_needs_no_gradient():
    layer = Embedding(4, 8).deploy()
    layer.w_scale.requires_grad_()
    assert not layer(torch.tensor([1])).requires_grad


@pytest.mark.parametrize("deploys", [True, False])
def test_states_of_layers_and_embeddings_are_exchanged(deploys):
    """A head and an embedding have one format."""
    source, target = BitLinear(8, 20, bias=False), Embedding(20, 8)
    if deploys:
        source.deploy()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.dequantize(), source.dequantize())
