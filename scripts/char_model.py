"""A small transformer that predicts the next character, of ordinary ``nn.Linear`` layers.

``bitlinear.convert(CharModel(...))`` makes all of them ternary except the last, ``lm_head``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Cache:
    """The keys and values of the last ``context`` characters, by block, for generation.

    It is a ring buffer: keys are rotated before they are stored, so their order does not matter.
    """

    def __init__(self, model: CharModel, batch: int = 1) -> None:
        heads, width = model.heads, model.embedding.embedding_dim
        shape = (len(model.blocks), 2, batch, heads, model.context, width // heads)
        self._entries = torch.empty(shape)
        self.length = 0

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new characters; return all that the cache holds."""
        entries = self._entries[block]
        context, new = entries.shape[-2], k.shape[-2]
        first = self.length % context
        entries[0, :, :, first : first + new] = k
        entries[1, :, :, first : first + new] = v
        keys, values = entries[..., : min(self.length + new, context), :]
        return keys, values


class Block(nn.Module):
    """Attention and a feed-forward network, with a normalisation before each linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width, bias=False)
        self.up_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down_norm = nn.LayerNorm(4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache | None, index: int
    ) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.extend(index, k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        y = y.transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(self.out_norm(y))
        return x + self.down(self.down_norm(F.gelu(self.up(self.up_norm(x)))))


class CharModel(nn.Module):
    """A decoder with rotary positions.

    Args:
        characters: Size of the vocabulary.
        width: Size of a character's vector; a multiple of twice ``heads``.
        depth: Number of blocks.
        heads: Attention heads of a block.
        context: The number of characters that generation looks back; training should use as many.
    """

    def __init__(self, characters: int, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads, self.context = heads, context
        self.embedding = nn.Embedding(characters, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, characters, bias=False)
        size = width // heads
        frequencies = 10_000 ** -(torch.arange(0, size, 2) / size)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits of the next character after each token.

        Args:
            tokens: Shape ``(batch, length)``. With a cache that holds characters, the length is 1.
            cache: The keys and values of the characters before ``tokens``.

        Returns:
            Shape ``(batch, length, characters)``.
        """
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + tokens.shape[1])
        angles = positions[:, None] * self.frequencies
        rotation = angles.cos(), angles.sin()
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, rotation, cache, index)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.lm_head(self.norm(x))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs of ``x`` by angles that grow with the position (RoPE, arXiv 2104.09864)."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@torch.inference_mode()
def generate(
    model: CharModel, prompt: Tensor, count: int, temperature: float = 0.0, seed: int = 0
) -> Tensor:
    """Generate ``count`` characters, one after the other.

    Args:
        model: A model in evaluation mode.
        prompt: Shape ``(length,)``, at least one; only the last ``context`` count.
        count: The number of characters to generate.
        temperature: 0 takes the most likely character; above 0, each one is sampled from
            softmax(logits / temperature).
        seed: The seed of the samples.

    Returns:
        Shape ``(count,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = Cache(model)
    tokens, generated = prompt[None, -model.context :], []
    for _ in range(count):
        logits = model(tokens, cache)[0, -1]
        if temperature > 0:
            chances = (logits / temperature).softmax(dim=-1)
            token = chances.multinomial(1, generator=generator)
        else:
            token = logits.argmax(keepdim=True)
        generated.append(token)
        tokens = token[None]
    return torch.cat(generated)
