"""The character model: its cache, its generation, and the layers that are converted."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

import bitlinear
from scripts.char_model import Cache, CharModel, generate


def network(kind, depth=2):
    model = CharModel(characters=50, width=32, depth=depth, heads=2, context=16)
    if kind != "linear":
        bitlinear.convert(model)
    return bitlinear.deploy(model) if kind == "deployed" else model


class LayerInputs:
    """The inputs of the BitLinear layers of a model in one call, to compare with other calls.

    If a sum differs in its last bit, an activation can be quantised to the next integer, and later
    layers amplify the difference. So :meth:`compare` compares the inputs of each layer, and then
    replaces them by the recorded ones.
    """

    def __init__(self, model):
        self._layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, bitlinear.BitLinear)
        }
        self._inputs = {}

    @contextlib.contextmanager
    def _hooks(self, hook):
        handles = [
            layer.register_forward_pre_hook(functools.partial(hook, name))
            for name, layer in self._layers.items()
        ]
        yield
        for handle in handles:
            handle.remove()

    def record(self):
        return self._hooks(lambda name, _, args: self._inputs.update({name: args[0]}))

    def compare(self, positions, **tolerance):
        """Compare the inputs in a call with the tokens at ``positions``, a slice."""

        def hook(name, _, args):
            wanted = self._inputs[name][:, positions]
            torch.testing.assert_close(args[0], wanted, **tolerance)
            return wanted

        return self._hooks(hook)


@pytest.mark.parametrize("kind", ["linear", "ternary", "deployed"])
@torch.inference_mode()
def test_the_cache_changes_nothing(kind):
    model = network(kind)
    tokens = torch.randint(50, (3, 16))
    inputs, tolerance = LayerInputs(model), {"rtol": 1e-4, "atol": 1e-4}
    with inputs.record():
        wanted = model(tokens)
    cache = Cache(model, batch=3)
    for positions in (slice(5), *(slice(i, i + 1) for i in range(5, 16))):
        # Between two compared inputs lie a few sums of fp32, and the layers in front of them gave
        # equal bits. The tolerance is a thousand units in the last place.
        with inputs.compare(positions, **tolerance):
            logits = model(tokens[:, positions], cache)
        torch.testing.assert_close(logits, wanted[:, positions], **tolerance)


@pytest.mark.parametrize("kind", ["linear", "ternary", "deployed"])
@torch.inference_mode()
def test_the_likeliest_character_goes_on(kind):
    """Both make the same calls, so their bits are equal on every CPU."""
    model, prompt = network(kind), torch.randint(50, (4,))
    cache, tokens, written = Cache(model), prompt[None], []
    for _ in range(12):
        token = model(tokens, cache)[0, -1].argmax(keepdim=True)
        written.append(token)
        tokens = token[None]
    assert torch.equal(generate(model, prompt, 12), torch.cat(written))


@torch.inference_mode()
def test_the_cache_keeps_the_last_characters():
    model = network("linear", depth=1)  # in deeper models, keys depend on evicted characters
    tokens = torch.randint(50, (1, 45))
    cache = Cache(model)
    for token in tokens.split(1, dim=1):
        last = model(token, cache)
    torch.testing.assert_close(last, model(tokens[:, -16:])[:, -1:], rtol=1e-4, atol=1e-4)
    assert len(generate(model, tokens[0], 3)) == 3


def test_only_the_head_stays_float():
    layers = dict(network("deployed").named_modules())
    assert type(layers["lm_head"]) is torch.nn.Linear
    deployed = [layer for layer in layers.values() if isinstance(layer, bitlinear.BitLinear)]
    assert len(deployed) == 8
    assert all(layer.is_deployed for layer in deployed)


def test_drawn_characters_depend_on_the_seed_alone():
    model, prompt = network("linear"), torch.tensor([3])
    one, again, other = (generate(model, prompt, 20, 1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
