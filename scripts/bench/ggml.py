"""llama.cpp's product of ternary weights alone: ggml, called through the package llama-cpp-python.

A product is a graph of one operation on ggml's CPU backend, as in a model: ``ggml_mul_mat`` of a
TQ2_0 weight and fp32 activations, which it quantises itself.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from scripts.bench.generation import llama

# Members of ggml's enum ggml_type.
_F32, _TQ2_0 = 0, 35
# A block of TQ2_0 has one scale.
_BLOCK = 256
# A graph has fewer tensors.
_TENSORS = 8


class _InitParams(ctypes.Structure):
    """The arguments of ``ggml_init``."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


_POINTER, _INT, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
# The type of the result, then the types of the arguments.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_backend_alloc_ctx_tensors": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_buffer_free": (None, _POINTER),
    "ggml_backend_cpu_init": (_POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, _POINTER, _INT),
    "ggml_backend_free": (None, _POINTER),
    "ggml_backend_graph_compute": (_INT, _POINTER, _POINTER),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_free": (None, _POINTER),
    "ggml_get_data": (_POINTER, _POINTER),
    "ggml_graph_overhead": (_SIZE,),
    "ggml_init": (_POINTER, _InitParams),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_new_graph": (_POINTER, _POINTER),
    "ggml_new_tensor_2d": (_POINTER, _POINTER, _INT, _INT64, _INT64),
    "ggml_quantize_chunk": (_SIZE, _INT, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER),
    "ggml_tensor_overhead": (_SIZE,),
}


@functools.cache
def _load() -> ctypes.CDLL:
    """Return the library ggml.

    Raises:
        RuntimeError: The package is not installed.
    """
    llama.load_package()
    from llama_cpp import _ggml

    library = ctypes.CDLL(_ggml.libggml._name)  # another object: its types are ours
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class _Context:
    """Tensors of a CPU backend, and a graph of them; all are freed together.

    Tensors have data once :meth:`allocate` has been called.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        size = _TENSORS * library.ggml_tensor_overhead() + library.ggml_graph_overhead()
        self.backend = library.ggml_backend_cpu_init()
        self.handle = library.ggml_init(_InitParams(size, None, True))
        if not (self.backend and self.handle):
            raise RuntimeError("ggml cannot start its CPU backend")
        weakref.finalize(self, library.ggml_backend_free, self.backend)
        weakref.finalize(self, library.ggml_free, self.handle)

    def allocate(self) -> None:
        """Give memory to the tensors that exist by now."""
        buffer = self._library.ggml_backend_alloc_ctx_tensors(self.handle, self.backend)
        if not buffer:
            raise RuntimeError("ggml cannot allocate its tensors")
        weakref.finalize(self, self._library.ggml_backend_buffer_free, buffer)

    def values(self, tensor: int, shape: tuple[int, int]) -> Tensor:
        """Return the data of an fp32 tensor, which keeps this context alive."""
        address = self._library.ggml_get_data(tensor)
        memory = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
        memory.context = self
        return torch.frombuffer(memory, dtype=torch.float32).view(shape)


class Weights:
    """A TQ2_0 weight.

    Args:
        weight: ``(N, K)``, fp32 on the CPU, ternary values times one scale.

    Raises:
        RuntimeError: Blocks of TQ2_0 do not divide K, or llama-cpp-python is not installed.
    """

    def __init__(self, weight: Tensor) -> None:
        self.N, self.K = weight.shape
        if self.K % _BLOCK:
            raise RuntimeError(f"TQ2_0 needs a multiple of {_BLOCK} inputs, but K is {self.K}")
        self.library = _load()
        self._context = _Context(self.library)
        self.tensor = self.library.ggml_new_tensor_2d(self._context.handle, _TQ2_0, self.K, self.N)
        self._context.allocate()
        weight = weight.contiguous()
        # A block's scale is its largest magnitude, so ternary values stay as they are.
        self.library.ggml_quantize_chunk(
            _TQ2_0,
            weight.data_ptr(),
            self.library.ggml_get_data(self.tensor),
            0,
            self.N,
            self.K,
            None,
        )


class Product:
    """A call that computes ``x @ weights.T``.

    Args:
        weights: The weight.
        x: ``(M, K)``, fp32. It is copied: later changes of ``x`` have no effect.
        threads: The number of threads.
    """

    def __init__(self, weights: Weights, x: Tensor, threads: int) -> None:
        self._weights, self._library = weights, weights.library
        self._context = _Context(self._library)
        self._library.ggml_backend_cpu_set_n_threads(self._context.backend, threads)
        context = self._context.handle
        # ggml counts dimensions from the innermost one.
        source = self._library.ggml_new_tensor_2d(context, _F32, weights.K, len(x))
        target = self._library.ggml_mul_mat(context, weights.tensor, source)
        self._graph = self._library.ggml_new_graph(context)
        self._library.ggml_build_forward_expand(self._graph, target)
        self._context.allocate()
        self._context.values(source, (len(x), weights.K)).copy_(x)
        self._y = self._context.values(target, (len(x), weights.N))

    def __call__(self) -> Tensor:
        """Compute the product into the tensor that every call returns, and return it."""
        status = self._library.ggml_backend_graph_compute(self._context.backend, self._graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self._y
