"""torch.onnx.export, both exporters: onnxruntime gives the bits of the layers."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from bitlinear import BitLinear, Embedding, packing
from bitlinear.integrations import onnx as bitlinear_onnx
from bitlinear.quantize import EXACT_K
from tests import oracle

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
if torch.__version__ >= "2.7":
    pytest.importorskip("onnxscript")

ONNXRUNTIME = tuple(map(int, onnxruntime.__version__.split(".")[:2]))

# Before torch 2.7 the exporter of torch.export was a preview with other decompositions.
needs_dynamo = pytest.mark.skipif(torch.__version__ < "2.7", reason="dynamo=True is of torch 2.7")
both = pytest.mark.parametrize(
    "exporter", [pytest.param("dynamo", marks=needs_dynamo), "torchscript"]
)

INF, NAN = float("inf"), float("nan")


def export(model, x, path, exporter, any_batch=True):
    """Export a model with one input by torch alone, and load the file with onnx."""
    options = {"dynamo": exporter == "dynamo"} if torch.__version__ >= "2.5" else {}
    if any_batch and exporter == "dynamo":
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    elif any_batch:
        options["dynamic_axes"] = {"x": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(path), input_names=["x"], **options)
    return onnx.load(str(path))


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.detach().numpy()})
    return torch.from_numpy(y)


def assert_runs_alike(model, path, *batches):
    with torch.no_grad():
        for x in batches:
            oracle.assert_same_bits(run(path, x), model(x))


OTHER_TYPES = ("ai8pc_wpc", "ai16pc_wpt")


def rows(k):
    """Tokens that are hard to quantise, and some that are not finite."""
    x = torch.from_numpy(oracle.adversarial_rows(k))
    bad = torch.randn(4, k)
    bad[0, 0], bad[1, -1], bad[2, k // 2] = NAN, INF, -INF
    return torch.cat([x, bad])


def deployed(n, k, bias=True, per_feature=False, dtype=torch.float32):
    layer = BitLinear(k, n, bias=bias, dtype=dtype).deploy()
    if per_feature:
        layer.w_scale = torch.rand(n, 1) + 0.5
    return layer.eval()


@both
@pytest.mark.parametrize(
    ("n", "k", "bias", "per_feature"),
    [
        (33, 70, True, True),
        pytest.param(5, 1, True, False, marks=pytest.mark.slow),
        pytest.param(8, 64, False, False, marks=pytest.mark.slow),
        pytest.param(130, 1031, False, True, marks=pytest.mark.slow),
    ],
)
def test_deployed_layers(exporter, n, k, bias, per_feature, tmp_path):
    layer, x = deployed(n, k, bias, per_feature), rows(k)
    export(layer, x, tmp_path / "m.onnx", exporter)
    assert_runs_alike(layer, tmp_path / "m.onnx", x, x[:1], torch.randn(40, k))
    if ONNXRUNTIME >= (1, 32):  # 1.19 cannot multiply tensors of shapes (0, 1) and (N,)
        assert_runs_alike(layer, tmp_path / "m.onnx", x[:0])


@both
@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_models_in_training(exporter, grad, tmp_path):
    model = nn.Sequential(BitLinear(70, 33), nn.ReLU(), BitLinear(33, 130, bias=False)).eval()
    with torch.set_grad_enabled(grad):
        export(model, rows(70), tmp_path / "m.onnx", exporter)
    assert_runs_alike(model, tmp_path / "m.onnx", rows(70), torch.randn(3, 70))


@both
@pytest.mark.parametrize("is_deployed", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "quant_type", ["ai16pc_wpc", *(pytest.param(q, marks=pytest.mark.slow) for q in OTHER_TYPES)]
)
def test_quantisation_types(exporter, quant_type, is_deployed, tmp_path):
    layer = BitLinear(70, 33, quant_type=quant_type).eval()
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-1, 1, 33)[:, None])
    if is_deployed:
        layer.deploy()
    x = torch.cat([rows(70), torch.from_numpy(oracle.adversarial_rows(70, act_bits=16))])
    export(layer, x, tmp_path / "m.onnx", exporter)
    assert_runs_alike(layer, tmp_path / "m.onnx", x, torch.randn(40, 70))


@both
@pytest.mark.parametrize(
    "quant_type", ["ai8pc_wpg32", pytest.param("ai16pc_wpg64", marks=pytest.mark.slow)]
)
def test_scales_of_groups(exporter, quant_type, tmp_path):
    layer = BitLinear(70, 33, quant_type=quant_type).eval()
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-1, 1, 70))
    with pytest.raises(Exception, match="call deploy\\(\\) first"):
        export(layer, rows(70), tmp_path / "m.onnx", exporter)
    layer.deploy()
    export(layer, rows(70), tmp_path / "m.onnx", exporter)
    assert_runs_alike(layer, tmp_path / "m.onnx", rows(70), torch.randn(40, 70))


@both
@pytest.mark.parametrize("is_deployed", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("quant_type", ["wpt", "wpc"])
def test_embeddings(exporter, quant_type, is_deployed, tmp_path):
    table, ids = Embedding(9, 7, quant_type=quant_type), torch.tensor([[0, 3, 8], [4, 4, 1]])
    if is_deployed:
        table.deploy()
    if exporter == "torchscript" and not is_deployed and quant_type == "wpc":
        with pytest.raises(RuntimeError, match=r"call deploy\(\) first, or export with dynamo"):
            export(table.eval(), ids, tmp_path / "m.onnx", exporter)
        return
    export(table.eval(), ids, tmp_path / "m.onnx", exporter)
    assert_runs_alike(table, tmp_path / "m.onnx", ids, ids[:1])


@pytest.mark.slow
@both
def test_weights_of_zero_and_nan(exporter, tmp_path):
    model = nn.Sequential(BitLinear(16, 8), BitLinear(8, 4))
    model[0].weight.data.zero_()
    export(model, torch.randn(3, 16), tmp_path / "zero.onnx", exporter)
    assert_runs_alike(model, tmp_path / "zero.onnx", torch.randn(3, 16))
    model[1].weight.data[1, 2] = NAN
    export(model, torch.randn(3, 16), tmp_path / "nan.onnx", exporter)
    assert run(tmp_path / "nan.onnx", torch.randn(3, 16)).isnan().all()


@pytest.mark.slow
@both
@pytest.mark.parametrize("is_deployed", [True, False])
@pytest.mark.parametrize("quant_type", ["ai8pc_wpt", "ai16pc_wpt"])
def test_a_product_with_inexact_fp32_sums_is_exact(exporter, is_deployed, quant_type, tmp_path):
    k = 2 * EXACT_K + 7
    layer = BitLinear(k, 3, quant_type=quant_type)
    with torch.no_grad():
        layer.weight[0].fill_(1.0)
        layer.weight[1:] = layer.weight[1:].sign()
    if is_deployed:
        layer.deploy()
    x = torch.randint(-127, 128, (2, k)).float()
    x[0] = 127
    export(layer.eval(), x, tmp_path / "m.onnx", exporter)
    assert_runs_alike(layer, tmp_path / "m.onnx", x)


@pytest.mark.slow
@both
@pytest.mark.parametrize("shape", [(24,), (2, 24), (2, 3, 24), (2, 3, 4, 24)])
def test_inputs_with_any_number_of_dimensions(exporter, shape, tmp_path):
    layer, x = deployed(6, 24), torch.randn(shape)
    export(layer, x, tmp_path / "m.onnx", exporter, any_batch=len(shape) > 1)
    batches = [x] if len(shape) == 1 else [x, torch.randn(5, *shape[1:])]
    assert_runs_alike(layer, tmp_path / "m.onnx", *batches)


class InDtype(nn.Module):
    """A layer with inputs in 16 bits, in a model with fp32 inputs, because NumPy has no bf16."""

    def __init__(self, layer, dtype):
        super().__init__()
        self.layer = layer
        self.dtype = dtype

    def forward(self, x):
        return self.layer(x.to(self.dtype)).float()


@pytest.mark.slow
@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_deployed", [True, False])
def test_inputs_and_parameters_in_16_bits(exporter, dtype, is_deployed, tmp_path):
    layer = BitLinear(70, 33, dtype=dtype)
    model = InDtype(layer.deploy() if is_deployed else layer, dtype).eval()
    export(model, rows(70), tmp_path / "m.onnx", exporter)
    assert_runs_alike(model, tmp_path / "m.onnx", rows(70), torch.randn(3, 70))


@pytest.mark.slow
@both
def test_models_in_fp16(exporter, tmp_path):
    layer, x = deployed(33, 70, dtype=torch.float16), torch.randn(4, 70).half()
    export(layer, x, tmp_path / "m.onnx", exporter)
    assert_runs_alike(layer, tmp_path / "m.onnx", x)


@pytest.mark.slow
@both
def test_under_autocast(exporter, tmp_path):
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = deployed(33, 70)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.layer(x)
            return y.float()

    model, x = Autocast(), rows(70)
    export(model, x, tmp_path / "m.onnx", exporter)
    assert_runs_alike(model, tmp_path / "m.onnx", x)


@pytest.mark.slow
@both
def test_a_layer_behind_parameters_that_require_gradients(exporter, tmp_path):
    model = nn.Sequential(nn.Linear(12, 8), deployed(4, 8))
    export(model, torch.randn(3, 12), tmp_path / "m.onnx", exporter)
    x = torch.randn(5, 12)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "m.onnx", x), model(x))


@pytest.mark.slow
@both
def test_a_quantisation_strength_below_one_is_exported(exporter, tmp_path):
    layer = BitLinear(40, 12).eval()
    layer.quantization_strength = 0.5
    x = torch.randn(6, 40)
    export(layer, x, tmp_path / "m.onnx", exporter)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "m.onnx", x), layer(x))


@both
def test_the_file_has_the_packed_weights(exporter, tmp_path):
    layer = deployed(1024, 1022, bias=False)
    model = export(layer, torch.randn(2, 1022), tmp_path / "m.onnx", exporter)
    packed = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.UINT8]
    assert [list(i.dims) for i in packed] == [list(packing.packed_shape(1024, 1022))]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 1.1 * layer.w_packed.numel()
    assert {node.domain for node in model.graph.node} == {""}  # only operators of ONNX itself


def test_decompositions_run_on_the_device_of_the_model():
    layer = BitLinear(24, 8, device="meta")
    x, weight = torch.empty(3, 24, device="meta"), layer.weight
    w_packed, w_scale = bitlinear_onnx.quantize_weight(weight)
    assert (w_packed.shape, w_packed.dtype) == ((8, 6), torch.uint8)
    y = bitlinear_onnx.linear(x, w_packed, w_scale, layer.bias, 24)
    assert (y.shape, y.device) == ((3, 8), x.device)
    q, s_x = bitlinear_onnx.quantize_activations(x)
    assert bitlinear_onnx.expand_activations(q, s_x, torch.bfloat16).device == x.device


# --- Who else sees the decompositions ---


def test_nothing_else_decomposes_the_operators():
    import torch.onnx
    from torch._inductor.decomposition import select_decomp_table

    ours = {"linear", "quantize_weight", "expand_weight", "quantize_activations"}
    overloads = {getattr(torch.ops.bitlinear, name).default for name in ours}
    assert overloads <= torch._decomp.decomposition_table.keys()
    assert overloads.isdisjoint(select_decomp_table())
    assert overloads.isdisjoint(torch._decomp.core_aten_decompositions())


@pytest.mark.parametrize("is_deployed", [True, False])
@pytest.mark.skipif(torch.__version__ < "2.5", reason="exported otherwise by torch 2.4")
def test_exported_programs_keep_the_operators(is_deployed):
    import torch.onnx

    layer = BitLinear(24, 8)
    model = nn.Sequential(layer.deploy() if is_deployed else layer).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(4, 24),), dynamic_shapes=shapes)
    for each in (program, program.run_decompositions()):
        called = [str(node.target) for node in each.graph.nodes if node.op == "call_function"]
        wanted = ["bitlinear.quantize_weight.default"] * (not is_deployed)
        kept = [name for name in called if name.startswith("bitlinear")]
        assert kept == [*wanted, "bitlinear.linear.default"]


def test_fake_tensors_of_unknown_sizes_take_the_fake_implementation():
    import torch.onnx
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    layer = deployed(8, 24)
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(5, 24))
        assert layer(x).shape == (x.shape[0], 8)
        with pytest.raises(ValueError, match="in_features = 24"):
            layer(mode.from_tensor(torch.randn(5, 23)))


COMPILE = """
import bitlinear
from torch import nn
model = nn.Sequential(bitlinear.BitLinear(24, 24), bitlinear.BitLinear(24, 8).deploy())
x = torch.randn(4, 24, requires_grad=True)
y = torch.compile(model)(x)
assert torch.equal(y, model(x))
y.sum().backward()
assert "bitlinear.integrations.onnx" in sys.modules
lowerings = torch._inductor.lowering.lowerings
operators = {getattr(torch.ops.bitlinear, name).default for name in torch.ops.bitlinear}
# The compiler traces into an operator that only calls others, and never lowers it.
is_composite = torch._C._dispatch_has_kernel_for_dispatch_key
operators = {op for op in operators if not is_composite(op.name(), "CompositeImplicitAutograd")}
assert len(operators) > 5
assert operators <= lowerings.keys(), operators - lowerings.keys()
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["torch.onnx", "torch._inductor.lowering", "bitlinear"])
def test_inductor_compiles_in_ci_after_any_order_of_imports(first):
    code = f"import sys, torch, {first}, torch.onnx\n{COMPILE}"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CI": "true"})
