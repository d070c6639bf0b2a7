"""llama.cpp in the benchmark of whole models: the batches it gets, and the package itself."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from scripts.bench.generation import llama

VOCABULARY = 11


class FakeLlama:
    """The functions of llama_cpp that the engine calls; the next token is the last one plus 1."""

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.passes = []  # [(token, position, sequence, whether it has an output)]
        self.calls = []
        self.context = None

    def llama_log_set(self, *_): ...
    def llama_backend_init(self): ...
    def llama_free(self, _): ...

    def llama_model_default_params(self):
        return SimpleNamespace()

    llama_context_default_params = llama_model_default_params

    def llama_model_load_from_file(self, path, params):
        self.path, self.gpu_layers = path, params.n_gpu_layers
        return "a model"

    def llama_model_get_vocab(self, _):
        return "a vocabulary"

    def llama_vocab_n_tokens(self, _):
        return VOCABULARY

    def llama_supports_gpu_offload(self):
        return False

    def llama_init_from_model(self, _, params):
        self.context = params
        return params

    def llama_get_memory(self, _):
        return "a memory"

    def llama_memory_clear(self, *_):
        self.calls.append("clear")

    def llama_memory_seq_cp(self, _, source, target, start, end):
        self.calls.append(("copy", source, target, start, end))

    def llama_memory_seq_rm(self, _, sequence, start, end):
        self.calls.append(("remove", sequence, start, end))

    def llama_n_batch(self, _):
        return self.batch_size

    def llama_batch_init(self, size, *_):
        columns = {name: [0] * size for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(size)], **columns)

    def llama_batch_free(self, _): ...

    def llama_decode(self, _, batch):
        assert batch.n_tokens <= self.batch_size
        assert set(batch.n_seq_id[: batch.n_tokens]) == {1}
        sequences = [ids[0] for ids in batch.seq_id]
        rows = list(zip(batch.token, batch.pos, sequences, map(bool, batch.logits)))
        self.passes.append(rows[: batch.n_tokens])
        return 0

    def llama_get_logits_ith(self, _, index):
        token, _, _, has_output = self.passes[-1][index]
        assert has_output
        logits = (ctypes.c_float * VOCABULARY)()
        logits[(token + 1) % VOCABULARY] = 1
        return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def fake(monkeypatch):
    fake = FakeLlama(batch_size=6)
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    return fake


@pytest.fixture
def engine(fake, tmp_path, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(llama, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(321))
    return llama.LlamaEngine(path, threads=3)


def test_a_prompt_is_read_in_batches_that_fit(fake, engine):
    assert engine.token_bytes == 321
    call = engine.first_token(length=8, batch=2)
    assert (fake.context.n_ctx, fake.context.n_seq_max) == (512, 2)
    assert (fake.context.n_threads, fake.context.n_threads_batch) == (3, 3)
    assert call() == 1  # one tick of the clock
    assert fake.calls == ["clear"]
    assert [len(rows) for rows in fake.passes] == [6, 6, 4]
    read = {0: [], 1: []}
    for rows in fake.passes:
        for token, position, sequence, has_output in rows:
            assert position == len(read[sequence])
            assert has_output == (position == 7)
            read[sequence].append(token)
    assert read[0] == read[1]
    assert len(set(read[0])) > 1
    assert max(read[0]) < VOCABULARY


def test_tokens_are_decoded_after_the_cache(fake, engine):
    call = engine.next_tokens(depth=5, batch=2, count=3)
    assert fake.context.n_ctx == 512
    assert [row[1:3] for rows in fake.passes for row in rows] == [(n, 0) for n in range(5)]
    assert fake.calls == [("copy", 0, 1, -1, -1)]
    for _ in range(2):
        fake.passes.clear()
        fake.calls.clear()
        assert call() == 3  # the first token is not timed
        assert fake.calls == [("remove", 0, 5, -1), ("remove", 1, 5, -1)]
        assert [[row[1:] for row in rows] for rows in fake.passes] == [
            [(position, 0, True), (position, 1, True)] for position in range(5, 9)
        ]
        tokens = [rows[1][0] for rows in fake.passes]
        assert tokens == [(tokens[0] + n) % VOCABULARY for n in range(4)]


def test_a_context_has_room_for_each_sequence(fake, engine):
    engine.next_tokens(depth=255, batch=1, count=3)  # 259 tokens
    assert fake.context.n_ctx == 512
    engine.generate(length=255, batch=4, count=1)
    assert (fake.context.n_ctx, fake.context.n_seq_max) == (1024, 4)


def test_failures_name_the_reason(fake, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "_errors", ["earlier", "the reason"])
    monkeypatch.setattr(fake, "llama_decode", lambda *_: 1)
    with pytest.raises(RuntimeError, match=r"llama\.cpp cannot compute 4 tokens: the reason"):
        engine.generate(4, 1, 1)
    monkeypatch.setattr(fake, "llama_model_load_from_file", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"llama\.cpp cannot load model\.gguf: the reason"):
        llama.LlamaEngine(tmp_path / "model.gguf", 1)
    with pytest.raises(RuntimeError, match="was compiled without a GPU"):
        llama.LlamaEngine(tmp_path / "model.gguf", 1, on_gpu=True)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert llama.describe() is None
    with pytest.raises(RuntimeError, match="run pip install llama-cpp-python"):
        llama.load_package()


@pytest.mark.parametrize("head", ["Q6_K", "F16"])
def test_llama_cpp_itself(head, tmp_path, monkeypatch):
    """Sequences with the same tokens go on alike."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("transformers")
    from bitlinear.integrations.gguf.reader import GgufFile
    from scripts.bench.generation import contestants, models
    from tests.scripts.tiny_model import TINY

    monkeypatch.setitem(models.SHAPES, "tiny", {**TINY, "vocab_size": 256})
    materials = contestants.Materials("tiny", None, "cpu", 1, tmp_path)
    path = materials.gguf(head)
    assert GgufFile(path).tensors["token_embd.weight"].type.name == head
    engine = llama.LlamaEngine(path, 1)
    assert engine.first_token(20, 3)() > 0
    assert engine.next_tokens(20, 2, 4)() > 0
    engine._open(20, 2)
    both = engine._read([list(range(10)), list(range(10))], 0)
    assert both[0] == both[1]
    engine.close()
