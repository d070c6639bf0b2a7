"""The choice of the next tokens from logits, as ``generate`` of transformers makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .small_kernels import call, largest

# They do not read the tokens so far, and do not wait for the GPU.
_CAPTURABLE = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    LogitNormalization,
)


class TokenChoice:
    """Chooses one token for each sequence, and notes which sequences are finished.

    Args:
        ids: The prompts, int64, ``(batch, length)``.
        processors: They change the scores of all tokens.
        criteria: They finish sequences.
        config: The settings of the call.

    Attributes:
        report: int64, ``(2, batch)``: the last tokens; and 1 for each sequence that is not
            finished, else 0.
        do_sample: Whether it draws random numbers.
        limit: The most tokens that are generated.
        fits_graph: Whether a CUDA graph can hold the choice: it needs no token but the last ones
            and keeps nothing for the caller.
        scores, logits: One tensor for each choice, or None if nobody asked for them.
    """

    def __init__(
        self,
        ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        self._ids, self._processors = ids, processors
        self.do_sample = bool(config.do_sample)
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        # As in transformers, a criterion that is fulfilled already counts after one token.
        self.limit = max(1, min([config.max_length, *lengths]) - ids.shape[1])
        eos = [c.eos_token_id for c in criteria if type(c) is EosTokenCriteria]
        self._eos = torch.cat([t.to(ids.device).reshape(-1) for t in eos]) if eos else None
        known = (MaxLengthCriteria, EosTokenCriteria)
        self._criteria = StoppingCriteriaList(c for c in criteria if type(c) not in known)
        # As in transformers: without such a criterion the tokens of a finished sequence count.
        self._pad = None
        if any(hasattr(c, "eos_token_id") for c in criteria):
            self._pad = config._pad_token_tensor.to(ids.device)
        keeps = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if keeps and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keeps and config.output_logits else None
        self.report = ids.new_ones(2, ids.shape[0])
        self.fits_graph = (
            not self._criteria
            and all(type(processor) in _CAPTURABLE for processor in processors)
            and self.scores is None
            and self.logits is None
        )

    def __call__(self, logits: Tensor) -> None:
        """Choose from logits, ``(batch, vocabulary)``; the result is in :attr:`report`."""
        tokens, unfinished = self.report
        chosen = self._choose(logits)
        if self._pad is not None:
            chosen = torch.where(unfinished == 1, chosen, self._pad)
        tokens.copy_(chosen)
        if self._eos is not None:
            unfinished.mul_((tokens[:, None] != self._eos).all(1))
        if not self.fits_graph:
            self._ids = torch.cat([self._ids, tokens[:, None]], dim=-1)
            if self._criteria:
                unfinished.mul_(~self._criteria(self._ids, self.scores))

    def _choose(self, logits: Tensor) -> Tensor:
        if self.fits_graph and not self._processors and not self.do_sample:
            return call(largest, logits)
        raw = logits.to(dtype=torch.float32, copy=True)
        scores: Any = self._processors(self._ids, raw)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        if self.do_sample:
            return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        return call(largest, scores)

    def forget(self, count: int) -> None:
        """Undo what the last ``count`` choices added to ``scores`` and ``logits``."""
        if count and self.scores is not None:
            self.scores = self.scores[:-count]
        if count and self.logits is not None:
            self.logits = self.logits[:-count]
