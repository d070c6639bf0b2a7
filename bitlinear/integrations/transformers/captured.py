"""``generate`` with captured steps, for models of transformers."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .decode_step import DecodeStep
from .report_reader import Reader
from .small_kernels import compiling
from .step_cache import USE_GENERATE, make_cache, stepping, why_no_steps
from .token_choice import TokenChoice

# A cache that is made here has room for a multiple of so many tokens, so that sizes repeat and
# kernels of attention read aligned rows of masks.
_ROUND_UP = 64


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    streamer: Any = None,
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """``model.generate`` for greedy search and sampling, without Python between the tokens.

    On an NVIDIA GPU, one step (a token of each sequence, and the choice of the next) is captured
    as a CUDA graph and replayed. Each call captures its own graph, so that no change of the model
    between calls is missed; that takes as long as a step without a graph. The host reads a token
    while the next step runs already. On a CPU the same loop runs without capture.

    The cache is a ``StaticCache``: one that the caller passes (``cache``), or a new one with room
    for the tokens of this call, with ``cache_implementation="static"`` or without. Before a chat of
    several calls, make one with room for all of them: ``StaticCache(config=model.config,
    max_cache_len=4096)``.
    The call returns the same tokens as ``model.generate`` with a static cache of the same length
    that is not compiled; for sampling too, from the same seed. With another cache attention can
    round in other places, on which a token can depend: between ``generate`` and ``model.generate``
    as between two calls of ``model.generate``.

    On a GPU the rotation of queries and keys in fused decoder layers, the product of an int8 head
    and the choice are compiled when they first run, with the same roundings; it takes 8 s.
    ``disable_compile=True`` leaves it out. ``compile_config=CompileConfig(fullgraph=True)``
    compiles the whole model instead, in 20 s or more, and rounds in other places; modes of it that
    make CUDA graphs are replaced by those that do not.

    Args:
        model: A decoder-only model whose tensors are all on one device.
        inputs: The prompts, int64, ``(batch, length)``, on the device of the model.
        generation_config: As in ``model.generate``.
        streamer: Gets the prompts, then the tokens of each step, on the CPU.
        tokenizer: For ``stop_strings``.
        stop_strings: As in ``model.generate``.
        stopping_criteria: As in ``model.generate``. One that needs a value on the host makes each
            step wait for it.
        kwargs: Everything else that ``model.generate`` takes, such as ``attention_mask``,
            ``max_new_tokens``, ``do_sample``, ``logits_processor``, ``output_scores`` (with
            ``return_dict_in_generate``).

    Returns:
        As ``model.generate``: the prompts and the new tokens, ``(batch, length + new)``, or a
        ``GenerateDecoderOnlyOutput``.

    Raises:
        TypeError: ``model`` is not a ``PreTrainedModel`` that can generate.
        ValueError: The call, the model or the cache cannot be captured; nothing was computed. Or
            the model's masks or inputs cannot, which the prefill shows.
        RuntimeError: A step of the model cannot be captured, which the third token shows.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(
            f"generate takes a PreTrainedModel that can generate, but this is a "
            f"{type(model).__name__}: call its own generate, or pass the model inside if that "
            f"computes the same, as peft_model.get_base_model() does with LoRA"
        )
    for name in ("assistant_model", "custom_generate", "synced_gpus", "token_healing"):
        if kwargs.pop(name, None):
            raise ValueError(f"{name} cannot be captured: {USE_GENERATE}")
    if kwargs.get("cache_implementation") not in (None, "static"):
        raise ValueError(
            f"cache_implementation={kwargs['cache_implementation']!r} cannot be captured: "
            f"{USE_GENERATE}"
        )
    if model.generation_config.stop_strings is not None:
        raise ValueError(
            f"model.generation_config.stop_strings is {model.generation_config.stop_strings!r}: "
            f"set it to None, and pass stop_strings to this call"
        )
    if generation_config is not None and generation_config.stop_strings is not None:
        stop_strings = stop_strings or generation_config.stop_strings
        generation_config = copy.deepcopy(generation_config)
        generation_config.stop_strings = None
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings are found by means of a tokenizer: pass tokenizer=...")
        found = StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings)
        stopping_criteria = StoppingCriteriaList([*(stopping_criteria or ()), found])
    result: Tensor | GenerateDecoderOnlyOutput = model.generate(
        inputs,
        generation_config,
        stopping_criteria=stopping_criteria,
        # transformers withholds streamer and tokenizer from a function that it gets here. It would
        # give the prompts to the streamer before the call is checked.
        custom_generate=functools.partial(_decode, streamer=streamer),
        **kwargs,
    )
    return result


def _decode(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The loop of ``generate``, in place of ``GenerationMixin._sample``."""
    config = generation_config
    reason = _why_not(model, input_ids, config, model_kwargs)
    if reason:
        raise ValueError(f"{reason}: {USE_GENERATE}")
    choice = TokenChoice(input_ids, logits_processor, stopping_criteria, config)
    length = _prompt_length(input_ids, config, model_kwargs)
    cache = _static_cache(model, model_kwargs, len(input_ids), length + choice.limit - 1)
    model_kwargs["cache"] = cache
    if streamer is not None:
        streamer.put(input_ids.cpu())

    outputs = model._prefill(input_ids, config, model_kwargs)
    choice(outputs.logits[:, -1])
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    del outputs  # It can hold the logits of the whole prompt.
    reader = Reader(choice, streamer)
    compiles = compiling(input_ids.is_cuda and not config.disable_compile)
    with model._optimize_model_for_decode(), compiles, stepping(cache) as position:
        if reader.read(choice.limit - 1):
            ids = torch.cat([input_ids, choice.report[0][:, None]], dim=-1)
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1, **model_kwargs
            )
            visible = _visible(cache, position, model_kwargs.get("attention_mask"), len(ids))
            forward = _forward(model, config, model_kwargs)
            dtype = cache.layers[0].keys.dtype
            step = DecodeStep(forward, inputs, visible, position, dtype, choice)
            for left in range(choice.limit - 2, -1, -1):
                reader.begin_step()
                step()
                if not reader.read(left, is_running=step.is_captured):
                    break
        position.sub_(reader.undo())
    if streamer is not None:
        streamer.end()
    new = torch.stack(reader.tokens, dim=1).to(input_ids.device)
    sequences = torch.cat([input_ids, new], dim=-1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences, scores=choice.scores, logits=choice.logits, cache=cache
    )


def _why_not(
    model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> str:
    """Why a call cannot be captured; empty if it can."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{mode.value} cannot be captured, only greedy search and sampling"
    if model.config.is_encoder_decoder:
        return "only decoder-only models can be captured"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            return f"{name} cannot be captured"
    if config.cache_implementation not in (None, "static"):
        return f"cache_implementation={config.cache_implementation!r} cannot be captured"
    if is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model):
        return "a model that FSDP or DeepSpeed divides cannot be captured"
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if devices != {str(input_ids.device)}:
        return (
            f"inputs on {input_ids.device} and a model on {', '.join(sorted(devices))} cannot be "
            f"captured; all must be on one device"
        )
    if model_kwargs.get("cache") is None:
        return "a model without a cache (use_cache is False) cannot be captured"
    return ""


def _prompt_length(
    input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> int:
    """The number of tokens that the cache holds after the prefill."""
    embeddings = model_kwargs.get("inputs_embeds")
    if embeddings is not None:
        return int(embeddings.shape[1])
    length = input_ids.shape[1]
    mask = model_kwargs.get("attention_mask")
    mask_length = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
    # transformers takes the prompts for a continuation of the cache unless the mask fits them.
    return length if mask_length == length else length + int(model_kwargs["cache"].get_seq_length())


def _static_cache(model: Any, model_kwargs: dict[str, Any], batch: int, length: int) -> StaticCache:
    """The cache of the call, or a static one in place of the empty one that ``generate`` made."""
    cache = model_kwargs["cache"]
    is_callers = getattr(cache, "_is_user_defined", False)
    if type(cache) in (DynamicCache, StaticCache) and not is_callers and not cache.offloading:
        room = -(-length // _ROUND_UP) * _ROUND_UP
        cache = make_cache(model.config.get_text_config(decoder=True), room, length)
    reason = why_no_steps(cache, batch, length)
    if reason:
        raise ValueError(reason)
    return cache


def _visible(cache: StaticCache, position: Tensor, mask: Tensor | None, batch: int) -> Tensor:
    """The tokens that the first step attends to, ``(batch, length of the cache)``."""
    positions = torch.arange(cache.layers[0].max_cache_len, device=position.device)
    visible = (positions <= position).repeat(batch, 1)
    if mask is not None:
        visible[:, : mask.shape[1]] &= mask.to(torch.bool)
    return visible


def _forward(model: Any, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
    """The model, compiled if the call has a ``compile_config``."""
    if config.compile_config is None or not model._valid_auto_compile_criteria(
        model_kwargs, config
    ):
        return model
    settings = copy.deepcopy(config.compile_config)
    # Modes of torch.compile that make CUDA graphs, without them.
    modes = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
    settings.mode = modes.get(settings.mode, settings.mode)
    return model.get_compiled_call(settings)
