"""Generate with llama.cpp through the package llama-cpp-python, and time every token.

This module does not import torch, so that it adds nothing to the memory of its process.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np

PACKAGE = "llama-cpp-python"

# Of the file that is written first, which has no other types.
_FILE_TYPE = "LLAMA_FTYPE_MOSTLY_TQ2_0"


_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_errors: list[str] = []


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _log(level: int, text: bytes, _: object) -> None:
    """Keep errors, for exceptions, and drop the hundreds of lines about each model."""
    if level == _LOG_ERROR:
        _errors.append(text.decode(errors="replace").strip())


def _failure(action: str) -> RuntimeError:
    """Return the error for an action that llama.cpp could not do, with its last reason."""
    reason = f": {_errors[-1]}" if _errors else ""
    return RuntimeError(f"llama.cpp cannot {action}{reason}")


def load_package() -> Any:
    """Return the module ``llama_cpp`` of the package.

    Raises:
        RuntimeError: It is not installed.
    """
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise RuntimeError(
            f"{PACKAGE} is not installed: run pip install {PACKAGE}, which compiles for minutes"
        ) from error
    llama_cpp.llama_log_set(_log, None)
    llama_cpp.llama_backend_init()
    return llama_cpp


def describe() -> dict[str, str] | None:
    """Return the version of the package and what it was compiled for; None without it."""
    try:
        package = load_package()
    except RuntimeError:
        return None
    info = package.llama_print_system_info().decode().strip(" |")
    return {"version": package.__version__, "system_info": info}


def write_with_head(source: Path, target: Path, head: str, threads: int) -> None:
    """Copy a GGUF file of TQ2_0 layers and give its tied head another type.

    Args:
        source: The file.
        target: The new file.
        head: A type of ggml, such as ``"Q6_K"``.
        threads: Threads of llama.cpp's quantiser.

    Raises:
        RuntimeError: llama.cpp cannot do it, or it is not installed.
    """
    package = load_package()
    params = package.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(package, _FILE_TYPE)
    params.output_tensor_type = params.token_embedding_type = _tensor_type(head)
    failed = package.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if failed:
        raise _failure(f"write a head of {head}")


def _tensor_type(name: str) -> int:
    import gguf

    return int(gguf.GGMLQuantizationType[name])


class LlamaEngine:
    """A GGUF file in llama.cpp, with its default settings and a number of threads.

    Attributes:
        token_bytes: The bytes of weights that a token reads: all, as the head is tied.
    """

    def __init__(self, path: Path, threads: int, on_gpu: bool = False) -> None:
        self._lib = load_package()
        if on_gpu and not self._lib.llama_supports_gpu_offload():
            raise RuntimeError(f"this {PACKAGE} was compiled without a GPU")
        self.token_bytes = path.stat().st_size
        self._threads = threads
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = -1 if on_gpu else 0
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise _failure(f"load {path.name}")
        self._vocabulary = self._lib.llama_vocab_n_tokens(
            self._lib.llama_model_get_vocab(self._model)
        )
        self._context: Any = None

    def first_token(self, length: int, batch: int) -> Callable[[], float]:
        """Return a call that reads a prompt; it returns the seconds until its first token."""
        self._open(length, batch)
        prompts = [self._tokens(length)] * batch

        def call() -> float:
            self._lib.llama_memory_clear(self._memory, False)
            start = time.perf_counter()
            self._read(prompts, 0)
            return time.perf_counter() - start

        return call

    def next_tokens(self, depth: int, batch: int, count: int) -> Callable[[], float]:
        """Return a call that generates after ``depth`` tokens, in ``batch`` sequences at once.

        It generates ``1 + count`` tokens and returns the seconds of the last ``count``. The keys
        and values of the ``depth`` tokens are computed for one sequence and copied to the others.
        """
        self._open(depth + 1 + count, batch)
        self._read([self._tokens(depth)], 0)
        for sequence in range(1, batch):
            self._lib.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

        def call() -> float:
            for sequence in range(batch):
                self._lib.llama_memory_seq_rm(self._memory, sequence, depth, -1)
            tokens = self._tokens(batch)
            times = []
            for position in range(depth, depth + 1 + count):
                tokens = self._read([[token] for token in tokens], position)
                times.append(time.perf_counter())
            return times[-1] - times[0]

        return call

    def generate(self, length: int, batch: int, count: int) -> None:
        """Generate ``count`` tokens after random prompts of ``length`` tokens."""
        self._open(length + count, batch)
        tokens = self._read([self._tokens(length)] * batch, 0)
        for position in range(length, length + count - 1):
            tokens = self._read([[token] for token in tokens], position)

    def close(self) -> None:
        """Release the model."""
        self._close_context()
        self._lib.llama_model_free(self._model)

    def _open(self, length: int, batch: int) -> None:
        """Replace the context by one for ``batch`` sequences, each with a cache of its own."""
        self._close_context()
        params = self._lib.llama_context_default_params()
        # A sequence's share of the context is a multiple of 256.
        params.n_ctx = batch * -(-length // 256) * 256
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = self._threads
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise _failure(f"hold {batch} sequences of {length} tokens")

    def _close_context(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None

    @property
    def _memory(self) -> Any:
        return self._lib.llama_get_memory(self._context)

    def _tokens(self, count: int) -> list[int]:
        return np.random.default_rng(0).integers(self._vocabulary, size=count).tolist()

    def _read(self, sequences: Sequence[Sequence[int]], position: int) -> list[int]:
        """Read tokens from ``position`` on, and return the most likely next one of each sequence.

        All sequences have the same length. A batch of llama.cpp holds so many positions of all of
        them as fit.
        """
        width = max(1, self._lib.llama_n_batch(self._context) // len(sequences))
        length = len(sequences[0])
        for start in range(0, length, width):
            part = range(start, min(start + width, length))
            chosen = self._decode(sequences, part, position, last=part[-1] == length - 1)
        return chosen

    def _decode(
        self, sequences: Sequence[Sequence[int]], part: range, position: int, last: bool
    ) -> list[int]:
        with self._batch(len(sequences) * len(part)) as batch:
            outputs = []
            for number, tokens in enumerate(sequences):
                for index in part:
                    n = batch.n_tokens
                    batch.token[n] = tokens[index]
                    batch.pos[n] = position + index
                    batch.n_seq_id[n] = 1
                    batch.seq_id[n][0] = number
                    batch.logits[n] = last and index == part[-1]
                    batch.n_tokens = n + 1
                outputs.append(batch.n_tokens - 1)
            if self._lib.llama_decode(self._context, batch):
                raise _failure(f"compute {batch.n_tokens} tokens")
            return [self._most_likely(index) for index in outputs] if last else []

    def _most_likely(self, index: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())

    @contextlib.contextmanager
    def _batch(self, size: int) -> Any:
        batch = self._lib.llama_batch_init(size, 0, 1)
        try:
            yield batch
        finally:
            self._lib.llama_batch_free(batch)
