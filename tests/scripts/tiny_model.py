"""The shape of the smallest model that every contestant can be."""

from __future__ import annotations

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 2, 256, 512, 4, 2, 64
TINY = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
}
# Per layer: q and o, k and v, gate and up and down.
WEIGHTS = LAYERS * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
LINEARS = 7 * LAYERS
