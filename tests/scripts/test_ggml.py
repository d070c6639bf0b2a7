"""llama.cpp's product in the benchmark of one layer: the calls of ggml, and ggml itself."""

from __future__ import annotations

import ctypes
import gc
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitlinear import runtime
from scripts.bench import contestants, ggml, peers, records
from scripts.bench.__main__ import main


class FakeGgml:
    """The functions of ggml that a product calls. Its handles are numbers, its weights are fp32."""

    def __init__(self):
        self.objects = {}
        self.threads = {}
        self.status = 0

    def _add(self, **fields):
        handle = len(self.objects) + 1
        self.objects[handle] = SimpleNamespace(handle=handle, freed=False, **fields)
        return handle

    def _free(self, handle):
        assert not self.objects[handle].freed
        self.objects[handle].freed = True

    ggml_free = ggml_backend_free = ggml_backend_buffer_free = _free

    def ggml_tensor_overhead(self):
        return 100

    def ggml_graph_overhead(self):
        return 5000

    def ggml_init(self, params):
        assert params.mem_size >= 5300
        assert params.no_alloc
        return self._add(tensors=[])

    def ggml_backend_cpu_init(self):
        return self._add()

    def ggml_backend_cpu_set_n_threads(self, backend, threads):
        self.threads[backend] = threads

    def _new_tensor(self, context, columns, rows, operands=()):
        handle = self._add(columns=columns, rows=rows, operands=operands, data=None)
        self.objects[context].tensors.append(handle)
        return handle

    def ggml_new_tensor_2d(self, context, kind, columns, rows):
        assert kind in (0, 35)
        return self._new_tensor(context, columns, rows)

    def ggml_mul_mat(self, context, weight, x):
        assert self.objects[weight].columns == self.objects[x].columns
        return self._new_tensor(
            context, self.objects[weight].rows, self.objects[x].rows, (weight, x)
        )

    def ggml_new_graph(self, context):
        return self._add(context=context, target=None)

    def ggml_build_forward_expand(self, graph, tensor):
        self.objects[graph].target = tensor

    def ggml_backend_alloc_ctx_tensors(self, context, backend):
        for handle in self.objects[context].tensors:
            tensor = self.objects[handle]
            tensor.data = np.full((tensor.rows, tensor.columns), np.nan, np.float32)
        return self._add()

    def ggml_get_data(self, tensor):
        return self.objects[tensor].data.ctypes.data

    def ggml_quantize_chunk(self, kind, source, target, start, rows, columns, importance):
        assert (kind, start, importance) == (35, 0, None)
        ctypes.memmove(target, source, 4 * rows * columns)

    def ggml_backend_graph_compute(self, backend, graph):
        assert backend in self.threads
        target = self.objects[self.objects[graph].target]
        weight, x = (self.objects[operand].data for operand in target.operands)
        target.data[:] = x @ weight.T
        return self.status


def ternary(N, K):
    """Return ternary weights times a scale, the first rows zero."""
    weight = torch.randint(-1, 2, (N, K)) * 0.037
    weight[:2] = 0
    return weight


@pytest.fixture
def fake(monkeypatch):
    """ggml without the package."""
    library = FakeGgml()
    monkeypatch.setattr(ggml, "_load", lambda: library)
    return library


def test_a_product_of_any_number_of_tokens_and_threads(fake):
    weight = ternary(5, 256)
    weights = ggml.Weights(weight)
    for M, threads in ((1, 1), (3, 2)):
        x = torch.randn(M, 256)
        product = ggml.Product(weights, x, threads)
        assert list(fake.threads.values())[-1] == threads
        torch.testing.assert_close(product(), x @ weight.T)
        assert product() is product()


def test_everything_is_freed_and_a_result_outlives_its_product(fake):
    weights = ggml.Weights(ternary(5, 256))
    y = ggml.Product(weights, torch.randn(1, 256), 1)()
    del weights
    gc.collect()
    assert torch.isfinite(y).all()
    # A context, its backend and its buffer; the result belongs to the second context.
    assert sum(thing.freed for thing in fake.objects.values()) == 3
    del y
    gc.collect()
    assert sum(thing.freed for thing in fake.objects.values()) == 6


def test_failures_name_the_reason(fake, monkeypatch):
    with pytest.raises(RuntimeError, match="a multiple of 256 inputs, but K is 300"):
        ggml.Weights(ternary(5, 300))
    product = ggml.Product(ggml.Weights(ternary(5, 256)), torch.randn(1, 256), 1)
    fake.status = -1
    with pytest.raises(RuntimeError, match="ggml_backend_graph_compute returned -1"):
        product()
    monkeypatch.setattr(fake, "ggml_backend_alloc_ctx_tensors", lambda *_: None)
    with pytest.raises(RuntimeError, match="ggml cannot allocate"):
        ggml.Weights(ternary(5, 256))


CPU = ("--shapes", "64x256", "64x30", "--tokens", "1", "5", "--budget", "0.02")


@pytest.mark.skipif(runtime.current().kernel is None, reason="the benchmark needs a kernel")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_with_llama_cpp(threads, fake, no_peaks, tmp_path):
    path = tmp_path / "results.json"
    options = ("--contestants", "fp32", "llama_cpp", "--threads", str(threads))
    assert main([*CPU, *options, "--json", str(path)]) == 0
    assert set(fake.threads.values()) == {threads}
    results = records.read(path)
    assert records.names_of(results, contestants.LAYER) == ["fp32", "llama_cpp"]
    for cell in results["cells"]:
        assert ("llama_cpp" in cell["contestants"]) == (cell["K"] == 256)
    (skipped,) = results["skipped"]
    assert skipped["reason"] == "TQ2_0 needs a multiple of 256 inputs, but K is 30"


def test_a_missing_package_is_named(monkeypatch):
    ggml._load.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(RuntimeError, match="run pip install llama-cpp-python"):
        ggml.Weights(ternary(5, 256))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("M", [1, 2, 65, 130])
def test_ggml_itself(M, threads):
    pytest.importorskip("llama_cpp")
    weight, x = ternary(70, 768), peers.checked_input(M, 768, "cpu", torch.float32)
    y = ggml.Product(ggml.Weights(weight), x, threads)()
    peers.check(y, x, weight)
    assert not y[:, :2].any()
