"""Attention of one query token, for models of transformers."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from ...attend import HEAD_UNIT, MAX_HEAD
from ...deployed import is_transformed
from ...ops import has_cpu_kernels
from .layers import pretrained_models
from .rotation import NewToken, is_rotation_of_llama

ATTENTION = "bitlinear_sdpa"
"""The name of :func:`attention` for ``model.set_attn_implementation``."""

# On a GPU, the sizes of heads that our kernel computes, and how many can share one of a key.
_CUDA_HEADS, _CUDA_GROUP = (64, 128), 8

# The longest head of cuDNN's kernel.
_CUDNN_HEAD = 128

# Code that builds masks, or takes other ways, for the name "sdpa" alone.
_NAME_IS_COMPARED = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``sdpa`` of transformers; faster for one query token.

    Where nothing records a gradient, ``torch.ops.bitlinear.attend`` computes it: on a CPU in bf16,
    on a GPU from Hopper on in 16 bits with a mask, for heads of 64 and 128. Everything else is
    torch's scaled_dot_product_attention: on a CPU the query heads that share a key head are then
    the rows of one product, so that each key and value is read once. In fp32 without a mask its
    rounding error is 1.2 times as large as with ``sdpa`` (root mean square; the largest error is up
    to 2.7 times); with a mask, in bf16 and in fp16 it is not larger. On a GPU from Hopper on, in 16
    bits with a mask, cuDNN computes other heads.

    Args:
        module: The attention module.
        query: ``(batch, heads, tokens, head_dim)``.
        key, value: ``(batch, key heads, length, head_dim)``.
        attention_mask: As for ``sdpa``; True where a token takes part, or numbers to add.
        dropout, scaling: As for ``sdpa``.
        kwargs: As for ``sdpa``.

    Returns:
        The result, shape ``(batch, tokens, heads, head_dim)``, and None.
    """
    is_one = _is_one_token(query, key, attention_mask, dropout, kwargs)
    if is_one and _kernel_serves(query, key, value, attention_mask):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.bitlinear.attend(query, key, value, attention_mask, scale), None
    if is_one and _cudnn_is_faster(query, value, attention_mask):
        y = scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, enable_gqa=True
        )
        return y.transpose(1, 2), None
    if not is_one or query.device.type != "cpu":
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return result
    batch, heads, _, head_dim = query.shape
    rows = query.reshape(batch, key.shape[1], -1, head_dim)
    y = scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)
    return y.reshape(batch, 1, heads, value.shape[-1]), None


def rotate_and_attend(
    attend: Callable[..., Any],
    token: NewToken,
    cache: tuple[Tensor, Tensor, Tensor | None],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Rotate a token, write its key and value into a cache, and attend to the cache.

    The same bits as of ``token.rotate`` and :func:`attention`, in one kernel.

    Args:
        attend: The attention of the model: only :func:`attention` has such a kernel.
        token: The query, the key and the value.
        cache: All keys, all values, and the position where the new ones go: int64, ``(1,)``, or
            None for the last one.
        attention_mask, dropout, scaling, kwargs: As for :func:`attention`.

    Returns:
        The result of :func:`attention`; None if the kernel cannot compute it, and nothing is
        written.
    """
    query, (all_keys, all_values, position) = token.query, cache
    tensors, angles = token[1:], token[-2:]
    if not (
        attend is attention
        and _is_one_token(query, all_keys, attention_mask, dropout, kwargs)
        and _kernel_serves(query, all_keys, all_values, attention_mask)
        and (position is not None or query.device.type == "cpu")
        and is_rotation_of_llama(token.rotate)
        and all(t.dtype == query.dtype for t in tensors)
        and all(t.is_contiguous() for t in angles)
        and all(t.shape[1:] == (1, query.shape[-1]) for t in angles)
    ):
        return None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    result: Tensor = torch.ops.bitlinear.attend(
        *(query, all_keys, all_values, attention_mask, scale), position, *tensors[1:]
    )
    return result


def select_attention(model: PreTrainedModel) -> None:
    """Make a model that uses ``sdpa`` use :func:`attention`.

    It stays as it is if its code, or that of a model inside, compares the name of the
    implementation. ``model.set_attn_implementation("sdpa")`` undoes this.
    """
    models = list(pretrained_models(model))
    if all(inner.config._attn_implementation == "sdpa" and _can_rename(inner) for inner in models):
        model.set_attn_implementation(ATTENTION)


def _is_one_token(
    query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> bool:
    return (
        query.shape[2] == 1
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1))
        and not dropout
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and not kwargs.get("output_attentions", False)
    )


def _kernel_serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether ``torch.ops.bitlinear.attend`` has a kernel for this."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_transformed():
        return False
    supports = {"cpu": _cpu_kernel_supports, "cuda": _cuda_kernel_supports}.get(query.device.type)
    return (
        supports is not None
        and (type(query), type(key), type(value)) == (Tensor,) * 3
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and key.stride()[2:] == value.stride()[2:] == (key.shape[-1], 1)
        and (mask is None or (type(mask) is Tensor and mask.shape[-1] == key.shape[2]))
        and supports(query, key, mask)
        and not torch.is_autocast_enabled(query.device.type)
    )


def _cpu_kernel_supports(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    return (
        query.dtype == torch.bfloat16
        and query.shape[-1] % HEAD_UNIT == 0
        and query.shape[-1] <= MAX_HEAD
        and (mask is None or mask.dtype == torch.bool)
        and has_cpu_kernels()
    )


def _cuda_kernel_supports(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] in _CUDA_HEADS
        and query.shape[1] <= _CUDA_GROUP * key.shape[1]
        and mask is not None
        and mask.dtype in (torch.bool, query.dtype)
        and mask.stride(-1) == 1
        and _has_cuda_kernel(query.device)
    )


@functools.cache
def _has_cuda_kernel(device: torch.device) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("bitlinear::attend", "CUDA")
    return has_kernel and torch.cuda.get_device_capability(device) >= (9, 0)


def _cudnn_is_faster(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether torch chooses cuDNN for grouped queries, and nothing else of torch is faster.

    H100, bf16, 20 heads of 128, 5 key heads, us by the tokens in the cache (192, 2112) with a mask
    of numbers: 6.3, 10.3; as rows of one product 10.5, 48.7; flash attention of all keys, without
    a mask, 8.1, 12.7; flex attention 7.8, 10.5. A mask of bool takes 4 us more.
    """
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= _CUDNN_HEAD
        and query.shape[-1] % 8 == 0
        and mask is not None
        and not torch.is_grad_enabled()
        and _torch_prefers_cudnn(query.device)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _torch_prefers_cudnn(device: torch.device) -> bool:
    return (
        torch.cuda.get_device_capability(device) >= (9, 0)
        and torch.backends.cuda.cudnn_sdp_enabled()
    )


def _can_rename(model: PreTrainedModel) -> bool:
    """Whether the code of a model's attention only looks its implementation up by name."""
    source = inspect.getsource(sys.modules[type(model).__module__])
    return "ALL_ATTENTION_FUNCTIONS.get_interface(" in source and not _NAME_IS_COMPARED.search(
        source
    )


# The mask of sdpa serves: None where it is causal only, or True where a token takes part.
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
