"""The benchmark on a GPU: on an imaginary one, which runs on the CPU, and on a real one."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

import bitlinear
from bitlinear import runtime
from scripts.bench import contestants, cuda_timing, records
from scripts.bench.__main__ import main
from scripts.bench.devices import DEVICES
from tests.scripts.times import made_up

pytestmark = pytest.mark.skipif(
    runtime.current().kernel is None, reason="the benchmark needs a compiled kernel"
)

GPU = ("--device", "cuda", "--shapes", "64x32", "--tokens", "1", "20", "--budget", "0.02")


def test_a_run_of_everything_that_a_gpu_does(no_gpu, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert main([*GPU, "--json", str(path)]) == 0
    results = records.read(path)
    assert results["modes"] == ["cold", "warm", "eager"]
    assert results["checked"] == ["cold", "warm"]
    assert results["machine"]["gpu"]["name"] == "Imaginary GPU"
    where = [(cell["M"], cell["mode"], cell["dtype"]) for cell in results["cells"]]
    assert where == [(M, mode, "bfloat16") for M in (1, 20) for mode in results["modes"]]
    roles = {name: kind["role"] for name, kind in results["contestants"].items()}
    assert roles == {
        results["chosen_kernel"]: "kernel",
        "fp16": "layer",
        "bf16": "layer",
        "fp8": "product",
        "int_mm": "product",
    }
    for cell in results["cells"]:
        assert {results["chosen_kernel"], "fp16", "bf16"} <= set(cell["contestants"])
        assert cell["contestants"]["bf16"]["speedup_over_bf16"] == 1
        ours = cell["contestants"][results["chosen_kernel"]]
        assert (ours["share_of_bound"] is not None) == (cell["mode"] == "cold")
    output = capsys.readouterr().out
    assert "Imaginary GPU" in output
    assert "peaks: reading 1024 MB 3000 GB/s; multiply-adds bf16 700 Top/s" in output
    assert re.search(
        r"\| N x K \(outputs x inputs\) +\| +M \| mode +\| contestant .* Top/s .* over bf16", output
    )
    assert "the int8 peak of Imaginary GPU is not in peaks.py" in output


def test_copies_have_weights_of_their_own_and_take_turns(no_gpu):
    device = DEVICES["cuda"]
    arranged = []

    def arrange(calls):
        arranged.append(calls)
        return calls[0], 1

    with torch.inference_mode():
        layers = contestants.Layers(64, 32, ["bf16", "int_mm"], ["reference"], device, copies=3)
    mode = replace(device.modes["cold"], arrange=arrange)
    field, failed = layers.contestants(20, mode)
    assert [contestant.name for contestant in field] == ["reference", "bf16", "int_mm"]
    assert failed == {}
    ours, bf16, int_mm = arranged
    assert len({call.func.w_packed.data_ptr() for call in ours}) == 3
    assert len({call.func.weight.data_ptr() for call in bf16}) == 3
    assert len({call.args[1].data_ptr() for call in int_mm}) == 3
    # They share the input, and their packed weights are copies.
    assert len({call.args[0].data_ptr() for call in int_mm}) == 1
    assert all(torch.equal(call.func.w_packed, ours[0].func.w_packed) for call in ours)
    # Tensors made in inference mode have no version, so a kernel cannot tell whether they changed.
    assert not any(call.func.w_packed.is_inference() for call in ours)


def test_cold_weights_fill_the_cache_twice(no_gpu):
    cuda = DEVICES["cuda"]
    assert [cuda.copies(size) for size in (1, 100, 1999, 4000, 10**9)] == [512, 40, 3, 1, 1]
    assert DEVICES["cpu"].copies(100) == 1


def test_only_eager_cells_may_be_lost(no_gpu, scripted, capsys):
    won, lost = made_up(reference=10, bf16=20, fp8=5), made_up(reference=30, bf16=20)
    budgets = scripted(won, won, lost, won, lost, won, lost)
    options = ("--contestants", "bitlinear", "bf16", "fp8", "--kernels", "reference", "--check")
    assert main([*GPU, *options]) == 0
    assert "no complete layer is faster than reference in any of 4 cells" in capsys.readouterr().out
    # The warm cell of 20 tokens is lost at first and measured again.
    assert budgets == [0.02] * 5 + [0.04, 0.02]


def test_a_kernel_that_no_graph_can_hold_fails_the_check(no_gpu, scripted, monkeypatch, capsys):
    def capture(calls):
        if isinstance(calls[0].func, bitlinear.BitLinear):
            raise RuntimeError("operation not permitted when stream is capturing")
        return calls[0]

    monkeypatch.setattr(cuda_timing, "capture", capture)
    scripted(*[made_up(bf16=20)] * 2)
    options = ("--contestants", "bitlinear", "bf16", "--modes", "cold", "--check")
    assert main([*GPU, *options]) == 1
    output = capsys.readouterr().out
    assert "skipped: reference everywhere: operation not permitted" in output
    assert "64 x 32, M = 20, cold: not timed" in output


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_on_a_gpu(tmp_path):
    path = tmp_path / "results.json"
    assert main([*GPU, "--json", str(path)]) == 0
    results = records.read(path)
    assert results["machine"]["gpu"]["l2_bytes"] > 0
    assert results["peaks"][0]["multiply_add_gops"]["bf16"] > 0
    for cell in results["cells"]:
        assert {results["chosen_kernel"], "fp16", "bf16"} <= set(cell["contestants"])
        assert all(math.isfinite(figures["gops"]) for figures in cell["contestants"].values())
