"""One step of a model that reads one token of each sequence; on a GPU, captured as a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .token_choice import TokenChoice

# What a model gets in a step. Other tensors would be constants in a CUDA graph.
_CHANGING = ("input_ids", "position_ids", "attention_mask")


class DecodeStep:
    """Runs a model for one token after the other, with tensors that stay at their addresses.

    The first call runs as usual; on a GPU the second one is captured, and all later ones replay
    the CUDA graph. A graph is no more than a record of kernels and addresses, so it must not
    outlive the call of ``generate`` in which nothing about the model changes. No Python runs in
    replays: what a hook computes on the GPU is repeated, all else is not.

    Args:
        forward: The model.
        inputs: What ``prepare_inputs_for_generation`` returns for the first step.
        visible: bool, ``(batch, length of the cache)``: the tokens that the first step attends to.
        position: int64, ``(1,)``: where the step writes into the cache; it is increased.
        dtype: The dtype of queries and keys.
        choice: Chooses the next token; as a part of the graph if it fits. The step reads the
            tokens that it chose.

    Raises:
        ValueError: The model needs inputs that are not known here, or another attention mask.
        RuntimeError: (a call) The step cannot be captured.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        visible: Tensor,
        position: Tensor,
        dtype: torch.dtype,
        choice: TokenChoice,
    ) -> None:
        self._forward, self._position, self._choice = forward, position, choice
        unknown = [k for k, v in inputs.items() if _is_tensor(v) and k not in _CHANGING]
        if unknown:
            raise ValueError(
                f"the model reads {', '.join(unknown)} in each step, which cannot be captured: "
                f"call model.generate"
            )
        self._inputs = {**inputs, "input_ids": choice.report[0][:, None], "return_dict": True}
        self._position_ids = inputs.get("position_ids")
        if self._position_ids is not None:
            self._inputs["position_ids"] = self._position_ids = self._position_ids.clone()
        mask = inputs.get("attention_mask")
        if isinstance(mask, dict):  # by the type of the layer
            new = {kind: _changing_mask(value, visible, dtype) for kind, value in mask.items()}
            self._masks = list(new.values())
            self._inputs["attention_mask"] = new
        else:
            self._inputs["attention_mask"] = _changing_mask(mask, visible, dtype)
            self._masks = [self._inputs["attention_mask"]]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False
        self._logits = visible  # set by the first run

    @property
    def is_captured(self) -> bool:
        """Whether the last step was the replay of a graph, which runs on while the host goes on."""
        return self._graph is not None

    def __call__(self) -> None:
        """Read the last tokens, and choose the next ones."""
        if self._graph is not None:
            self._graph.replay()
        elif self._is_warm and self._position.is_cuda:
            self._graph = self._capture()
            self._graph.replay()
        else:
            self._run()
            self._is_warm = True
        if not self._choice.fits_graph:
            self._choice(self._logits)

    def _run(self) -> None:
        for mask in self._masks:
            mask.index_fill_(-1, self._position, mask.dtype == torch.bool)  # True, or add 0
        self._logits = self._forward(**self._inputs).logits[:, -1]
        if self._choice.fits_graph:
            self._choice(self._logits)
        self._position.add_(1)
        if self._position_ids is not None:
            self._position_ids.add_(1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._position.device)
        stream = _side_stream(self._position.device)
        stream.wait_stream(current)
        # Other threads can use the GPU meanwhile.
        capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        try:
            # torch.cuda.graph switches streams by itself, but not back if the capture fails.
            with torch.cuda.stream(stream), capture:
                self._run()
        except RuntimeError as error:
            raise RuntimeError(
                "a step of this model cannot be captured as a CUDA graph, for example because it "
                "waits for the GPU: call model.generate"
            ) from error
        current.wait_stream(stream)
        return graph


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _changing_mask(mask: Any, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of a model, ``(batch, 1, 1, length)``, in memory of its own.

    On a GPU it is one to add to scores, with which cuDNN is faster than with bool.
    """
    wanted = visible[:, None, None]
    seen = mask
    if _is_tensor(mask) and mask.dtype != torch.bool:
        seen = mask == 0
    if not _is_tensor(seen) or seen.shape[1:] != wanted.shape[1:] or not (seen == wanted).all():
        raise ValueError(
            "the attention mask of this model is not one of all tokens so far, which is the only "
            "one that can be captured: call model.generate, or set_attn_implementation('sdpa') "
            "before"
        )
    if mask.dtype == torch.bool and not mask.is_cuda:
        return wanted.clone()
    additive = torch.zeros(wanted.shape, dtype=dtype, device=visible.device)
    return additive.masked_fill_(~wanted, -torch.inf)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of all captures: cuBLAS keeps a workspace for every stream it meets."""
    return torch.cuda.Stream(device)
