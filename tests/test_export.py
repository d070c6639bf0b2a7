"""Models as graphs: torch.export, AOTInductor, TorchScript, torch.fx."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitlinear
from bitlinear import BitLinear
from tests.layers import both_forms

LINEAR = torch.ops.bitlinear.linear


# --- torch.export and AOTInductor ---


needs_aoti = pytest.mark.skipif(torch.__version__ < "2.6", reason="packages are of torch 2.6")


def test_an_export_of_a_layer_in_training_quantises_its_weight():
    layer, x = BitLinear(20, 6), torch.randn(4, 20)
    layer(x)  # must leave nothing behind that becomes a constant of the program
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
    assert program.state_dict.keys() == layer.state_dict().keys()
    assert not program.constants
    assert torch.equal(program.module()(x), layer(x))
    with pytest.raises(RuntimeError, match="derivative for bitlinear::linear is not implemented"):
        torch.export.export(layer, (x,)).module()(x).sum().backward()


class Exported(nn.Module):
    """Several layers and several outputs, to compare the bits after each layer."""

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
    """A model, inputs, and a folder with its program and the package of AOTInductor."""
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
        environment["BITLINEAR_CACHE_DIR"] = str(tmp_path)  # an empty cache
    script = f"import bitlinear\n{LOAD[kind]}{RUN}"
    result = in_a_new_process(script, folder, **environment)
    assert result.returncode == 0, result.stderr
    compiled = bitlinear.HAS_BITLINEAR and build == "auto"
    # A compiled kernel is called from C++, and no Python of this package runs.
    assert result.stdout.split() == [str(compiled), str(not compiled)]
    for x, outputs in zip(inputs, torch.load(folder / "outputs.pt")):
        hidden, normal, logits, halves = outputs
        wanted = model(x)
        assert torch.equal(hidden, wanted[0])
        torch.testing.assert_close(normal, wanted[1])  # the compiler rounds in another order
        assert torch.equal(logits, model.head(normal))
        assert halves.dtype == torch.bfloat16
        assert torch.equal(halves, wanted[3])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["program", pytest.param("package", marks=needs_aoti)])
def test_an_exported_model_needs_the_import(exported, kind):
    result = in_a_new_process(LOAD[kind], exported[-1])
    assert result.returncode == 1
    assert {"program": "bitlinear.linear", "package": "bitlinear::linear"}[kind] in result.stderr


# --- TorchScript and torch.fx ---


@both_forms
@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore::torch.jit.TracerWarning")
def test_a_trace_follows_the_weights(make):
    model, x = nn.Sequential(make(20, 6), nn.ReLU()).eval(), torch.randn(4, 20)
    with torch.no_grad():
        model(x)  # must leave nothing behind that becomes a constant of the trace
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


@both_forms
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_script_is_rejected(make):
    with pytest.raises(NotImplementedError, match=r"cannot compile BitLinear: use torch\.export"):
        torch.jit.script(nn.Sequential(make(20, 6)))


@both_forms
def test_a_layer_alone_is_not_traced(make):
    with pytest.raises(TypeError, match=r"trace a module that holds it"):
        torch.fx.symbolic_trace(make(20, 6))


@both_forms
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_layer_is_a_leaf_of_a_symbolic_trace(make, mode):
    model, x = nn.Sequential(nn.Sequential(make(20, 6)), nn.ReLU()), torch.randn(4, 20)
    with mode():
        graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0.0", "1"]
    assert torch.equal(graph(x), model(x))
    bitlinear.deploy(graph)
    assert torch.equal(graph(x), model(x))
