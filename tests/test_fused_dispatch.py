"""What torch asks of ``torch.ops.bitlinear.fused_linear``: fakes, autocast, vmap, graphs."""

from __future__ import annotations

import io

import pytest
import torch
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from tests import oracle
from tests.calls import Calls
from tests.fused import SOURCES, Fused, expected, operands, tokens

OP = torch.ops.bitlinear.fused_linear
every_source = pytest.mark.parametrize(("activation", "with_norm"), SOURCES)


def without_tokens(arguments):
    return {name: v for name, v in arguments.items() if name not in ("x", "residual")}


@every_source
def test_opcheck(activation, with_norm):
    residual_dtype = torch.bfloat16 if with_norm else None
    _, arguments = operands(3, (5, 3), 12, torch.float32, activation, with_norm, residual_dtype)
    torch.library.opcheck(OP.default, (), arguments)


def test_opcheck_with_gradients():
    _, arguments = operands(out_dtype=torch.float16)
    for tensor in (*tokens(arguments), arguments["norm_weight"]):
        tensor.requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OP.default, (), arguments, test_utils=tests)


def test_backward_raises():
    _, arguments = operands()
    arguments["x"].requires_grad_()
    match = "derivative for bitlinear::fused_linear is not implemented"
    with pytest.raises(RuntimeError, match=match):
        OP(**arguments).sum().backward()


def test_meta_tensors():
    _, arguments = operands((2, 3), out_dtype=torch.float16)
    meta = tree_map_only(torch.Tensor, lambda v: v.to("meta"), arguments)
    y = OP(**meta)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 8), torch.float16)


def test_fake_tensors_keep_symbolic_shapes():
    _, arguments = operands()
    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        arguments["x"] = mode.from_tensor(arguments["x"], symbolic_context=context)
        arguments["residual"] = None
        y = OP(**arguments)
    assert isinstance(y.shape[0], torch.SymInt)
    assert y.shape[1] == 8


def test_wrong_arguments_are_found_while_tracing():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        _, arguments = operands()
        arguments["residual"] = torch.ones(3, 5)
        with pytest.raises(ValueError, match=r"the shape of the output, \[3, 8\], but .* \[3, 5\]"):
            OP(**arguments)


@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "nested"])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype", "ignore:.*Sparse CSR")
def test_other_layouts_are_rejected_by_name(kind):
    _, arguments = operands(activation=None)
    x = arguments["x"]
    arguments["x"] = {
        "sparse_coo": x.to_sparse,
        "sparse_csr": x.to_sparse_csr,
        "nested": lambda: torch.nested.nested_tensor([x, x[:2]]),
    }[kind]()
    with pytest.raises(TypeError, match=f"x must be strided.*{kind}"):
        OP(**arguments)


def test_inference_mode():
    t, arguments = operands()
    with torch.inference_mode():
        oracle.assert_same_bits(OP(**arguments), expected(t, arguments))
        arguments["w_packed"] = [w.clone() for w in arguments["w_packed"]]
        OP(**arguments)
        arguments["w_packed"][1][0, 0] = 255  # such tensors have no version counter
        with pytest.raises(ValueError, match="code 3"):
            OP(**arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", oracle.DTYPES)
def test_autocast_rounds_only_the_output(x_dtype, dtype):
    t, arguments = operands(dtype=x_dtype)
    with torch.autocast("cpu", dtype):
        y, explicit = OP(**arguments), OP(**arguments, out_dtype=torch.float32)
    oracle.assert_same_bits(y, expected(t, {**arguments, "out_dtype": dtype}))
    oracle.assert_same_bits(explicit, expected(t, {**arguments, "out_dtype": torch.float32}))


# --- vmap ---


@pytest.mark.parametrize("residual_dtype", [None, torch.float16])
def test_vmap_of_tokens_is_one_call(residual_dtype):
    _, arguments = operands((4, 3), residual_dtype=residual_dtype)
    y, rest = OP(**arguments), without_tokens(arguments)
    with_residual = residual_dtype is not None

    def function(x, residual=None):
        return OP(x=x, residual=residual, **rest)

    inputs = tokens(arguments)[: 1 + with_residual]
    for mapped, wanted in (
        (vmap(function), y),
        (vmap(vmap(function)), y),
        (vmap(function, in_dims=1), y.transpose(0, 1)),
        (vmap(function, out_dims=1), y.transpose(0, 1)),
    ):
        with Calls(OP.default) as calls:
            assert torch.equal(mapped(*inputs), wanted)
        assert calls.count == 1 or not hasattr(torch.library, "register_vmap")


@pytest.mark.filterwarnings("ignore:.*performance drop")  # before torch 2.5
@pytest.mark.parametrize("batched", ["x", "residual", "norm_weight"])
def test_vmap_of_one_operand(batched):
    _, arguments = operands()
    values = [arguments[batched], arguments[batched].flip(-1), 2 * arguments[batched]]
    y = vmap(lambda v: OP(**{**arguments, batched: v}))(torch.stack(values))
    assert torch.equal(y, torch.stack([OP(**{**arguments, batched: v}) for v in values]))


@pytest.mark.filterwarnings("ignore:.*performance drop")
@pytest.mark.parametrize("with_tokens", [False, True])
@pytest.mark.parametrize("name", ["w_packed", "w_scale", "bias"])
def test_vmap_of_one_weight_of_several(name, with_tokens):
    _, arguments = operands(seed=2)
    first, second = arguments[name]
    firsts = torch.stack([first, first.flip(0), first])
    xs = torch.stack([arguments["x"] * (i if with_tokens else 1) for i in (1, 2, 3)])

    def function(first, x):
        return OP(**{**arguments, name: [first, second], "x": x})

    y = vmap(function)(firsts, xs) if with_tokens else vmap(function, (0, None))(firsts, xs[0])
    assert torch.equal(y, torch.stack([function(*pair) for pair in zip(firsts, xs)]))


# --- Graphs ---


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode):
    _, arguments = operands(seed=2)
    module = Fused(arguments)
    graph = make_fx(module, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(
        *tokens(arguments)
    )
    assert [node.target for node in graph.graph.nodes].count(OP.default) == 1
    rows = 7 if tracing_mode == "symbolic" else 3
    inputs = tokens(operands(rows, seed=9)[1])
    assert torch.equal(graph(*inputs), module(*inputs))


def test_export():
    """With any number of tokens; saved and loaded."""
    _, arguments = operands(dtype=torch.bfloat16)
    module, batch = Fused(arguments), torch.export.Dim("batch", max=1000)
    program = torch.export.export(
        module, tokens(arguments), dynamic_shapes={"x": {0: batch}, "residual": {0: batch}}
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    run = torch.export.load(file).module()
    for rows in (1, 3, 500):
        inputs = tokens(operands(rows, dtype=torch.bfloat16)[1])
        assert torch.equal(run(*inputs), module(*inputs))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend):
    _, arguments = operands()
    module = Fused(arguments)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 7):
        inputs = tokens(operands(rows, dtype=torch.float16)[1])
        assert torch.equal(compiled(*inputs), module(*inputs))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(*inputs), module(*inputs))


@pytest.mark.skipif(
    torch.__version__ < "2.5", reason="torch 2.4 does not find the formulas it is given"
)
def test_floating_point_operations_are_those_of_nn_linear():
    _, arguments = operands((2, 3), (5, 3), 12)
    with FlopCounterMode(display=False) as counter:
        OP(**arguments)
    assert counter.get_total_flops() == 2 * 6 * 12 * 8
