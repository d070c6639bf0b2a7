"""Decoder layers of transformers that compute their linear layers as fused products.

A fused layer is an instance of a subclass of its class in transformers, which only has another
``forward``. Modules, names and state do not change.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from ...fusable import fused_products, why_called, why_not_fused
from ...prologue import ACTIVATIONS
from .rotation import NewToken, rotate_heads

_QKV = ("q_proj", "k_proj", "v_proj")
_OUT = ("o_proj",)
_GATE_UP = ("gate_proj", "up_proj")
_DOWN = ("down_proj",)

# Its hooks record what output_attentions and output_hidden_states ask for.
_RECORDERS = "transformers.utils.output_capturing"


_Kind = tuple[type[nn.Module], Any]


class FusedDecoderLayer(nn.Module):
    """The forward pass of a decoder layer, with four products.

    q, k and v with the norm in front of them; the output projection with its norm (BitNet) in front
    and the residual behind; gate and up with the norm in front of them; down with the gate and its
    norm (BitNet) in front and the residual behind. Attention is computed by the functions of the
    model's module in transformers.

    Each call decides which of these are computed as one product. The rest runs as in transformers:
    the modules are called. So does an attention or MLP that has hooks or is of another class. As
    one product, nothing between the hidden state and the output is rounded to 16 bits.
    """

    # Set by each subclass.
    unfused_class: type[nn.Module]
    _modeling: Any  # the module of the model in transformers
    # Classes with their forward, which a library can replace.
    _unfused: _Kind
    _attention: _Kind
    _mlp: _Kind
    _activations: dict[_Kind, str]
    _sliding_window: Callable[[Any], dict[str, Any]]
    _cache_update: Any  # of transformers, which a library can replace

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the layer, with the arguments and the result of transformers."""
        if "past_key_values" in kwargs:  # deprecated, as in transformers
            cache = kwargs.pop("past_key_values")
        if self._why_layer_called():
            unfused: Any = self.unfused_class.forward
            output: Tensor = unfused(
                *(self, hidden_states, attention_mask, position_ids, cache, use_cache),
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return output
        kwargs.update(position_ids=position_ids, use_cache=use_cache)
        hidden_states = self._attend(
            hidden_states, attention_mask, cache, position_embeddings, kwargs
        )
        return self._apply_mlp(hidden_states)

    def _attend(
        self,
        residual: Tensor,
        attention_mask: Any,
        cache: Any,
        position_embeddings: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:
        attention: Any = self._modules["self_attn"]
        norm: Any = self._modules["input_layernorm"]
        if self._why_attention_called():
            output, _ = attention(
                hidden_states=norm(residual),
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                cache=cache,
                **kwargs,
            )
            return residual + cast(Tensor, output)
        modeling, layers = self._modeling, attention._modules
        shape = (*residual.shape[:-1], -1, attention.head_dim)
        output = fused_products(attention, _QKV, residual, norm)
        together = None  # queries and keys in one tensor
        if output is None:
            x = norm(residual)
            q, k, v = (layers[name](x).view(shape).transpose(1, 2) for name in _QKV)
        else:
            heads = [layers[name].out_features // attention.head_dim for name in _QKV]
            output = output.view(shape).transpose(1, 2)
            q, k, v = output.split(heads, dim=1)
            together = output[:, : -heads[2]]
        if "q_norm" in layers:  # Qwen3: over each head
            q, k, together = layers["q_norm"](q), layers["k_norm"](k), None
        rotate = modeling.apply_rotary_pos_emb
        attend = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, modeling.eager_attention_forward
        )
        settings = {
            "dropout": attention.attention_dropout if attention.training else 0.0,
            "scaling": attention.scaling,
            **self._sliding_window(attention),
            **kwargs,
        }
        layer = self._layer_of(cache, attention.layer_idx)
        token = NewToken(rotate, q, k, v, *position_embeddings)
        output = weights = None
        if residual.shape[1] == 1 and hasattr(layer, "rotate_and_attend"):
            output = layer.rotate_and_attend(attend, token, attention_mask, **settings)
        if output is None:
            if hasattr(layer, "rotate_and_update"):
                q, k, v = layer.rotate_and_update(token)
            else:
                q, k = rotate_heads(rotate, q, k, together, *position_embeddings)
                if cache is not None:
                    k, v = cache.update(k, v, attention.layer_idx, kwargs=kwargs)
            output, weights = attend(attention, q, k, v, attention_mask, **settings)
        for record in attention._forward_hooks.values():  # see _RECORDERS
            record(attention, (), (None, weights))
        output = output.reshape(*shape[:-2], -1)
        return self._project(attention, _OUT, output, layers.get("attn_sub_norm"), residual)

    def _layer_of(self, cache: Any, index: int) -> Any:
        """The layer of a cache, or None if it has none, or an ``update`` that must be called."""
        layers = getattr(cache, "layers", ())
        if index >= len(layers) or "update" in vars(cache):
            return None
        return layers[index] if type(cache).update is self._cache_update else None

    def _apply_mlp(self, residual: Tensor) -> Tensor:
        mlp: Any = self._modules["mlp"]
        norm: Any = self._modules["post_attention_layernorm"]
        if self._why_mlp_called():
            return residual + cast(Tensor, mlp(norm(residual)))
        layers = mlp._modules
        sub_norm = layers.get("ffn_sub_norm")
        both = fused_products(mlp, _GATE_UP, residual, norm)
        if both is None:
            x = norm(residual)
            gate, up = (layers[name](x) for name in _GATE_UP)
        else:
            activation = self._activation(layers.get("act_fn"))
            if activation is not None:
                fused = fused_products(mlp, _DOWN, both, sub_norm, activation, residual)
                if fused is not None:
                    return fused
            gate, up = both.chunk(2, dim=-1)
        return self._project(mlp, _DOWN, mlp.act_fn(gate) * up, sub_norm, residual)

    def _project(
        self, parent: Any, names: tuple[str], x: Tensor, norm: Any, residual: Tensor
    ) -> Tensor:
        """Apply a norm, if there is one, and a layer, and add the residual."""
        output = fused_products(parent, names, x, norm, residual=residual)
        if output is not None:
            return output
        output = parent._modules[names[0]](x if norm is None else norm(x))
        return residual + cast(Tensor, output)

    def _activation(self, module: Any) -> str | None:
        """The name of a gate's activation; None if it cannot be a part of a product."""
        if module is None or why_called(module):
            return None
        return self._activations.get(_kind(module))

    def _why_layer_called(self) -> str:
        if self.unfused_class.forward is self._unfused[1]:
            return ""
        return f"the forward of {self.unfused_class.__name__} was replaced"

    def _why_attention_called(self) -> str:
        attention: Any = self._modules["self_attn"]
        if _kind(attention) != self._attention:
            return _why_other("self_attn", attention, self._attention)
        reason = why_called(attention, _RECORDERS)
        return f"self_attn {reason}" if reason else ""

    def _why_mlp_called(self) -> str:
        mlp: Any = self._modules["mlp"]
        if _kind(mlp) != self._mlp:
            return _why_other("mlp", mlp, self._mlp)
        reason = why_called(mlp)
        return f"mlp {reason}" if reason else ""

    def why_not_fused(self) -> list[str]:
        """Why products of this layer are not fused: one reason each; empty if all are."""
        if self._why_layer_called():
            return [self._why_layer_called()]
        modules: Any = self._modules
        attention, mlp = modules["self_attn"], modules["mlp"]
        reasons = [self._why_attention_called(), self._why_mlp_called()]
        if not reasons[0]:
            sub_norm = attention._modules.get("attn_sub_norm")
            reasons.append(why_not_fused(attention, _QKV, modules["input_layernorm"]))
            reasons.append(why_not_fused(attention, _OUT, sub_norm))
        if not reasons[1]:
            sub_norm = mlp._modules.get("ffn_sub_norm")
            reasons.append(why_not_fused(mlp, _GATE_UP, modules["post_attention_layernorm"]))
            reasons.append(why_not_fused(mlp, _DOWN, sub_norm))
            if self._activation(mlp._modules.get("act_fn")) is None:
                reasons.append(f"act_fn is not one of {', '.join(ACTIVATIONS)}, or has hooks")
        return [reason for reason in reasons if reason]

    def _get_name(self) -> str:
        return type(self).__qualname__


def _kind(module: nn.Module) -> _Kind:
    return type(module), type(module).forward


def _why_other(name: str, module: nn.Module, known: _Kind) -> str:
    kind = type(module).__name__
    if type(module) is known[0]:
        return f"the forward of {kind} was replaced"
    return f"{name} is a {kind}"


def _known_kind(cls: type[nn.Module]) -> _Kind:
    """A class of transformers with its own forward; with None if it was replaced already."""
    forward: Any = cls.forward
    is_own = (forward.__module__, forward.__qualname__) == (
        cls.__module__,
        f"{cls.__qualname__}.forward",
    )
    return cls, forward if is_own else None


def _no_window(attention: Any) -> dict[str, Any]:
    return {}


def _own_window(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window}


def _window_of_config(attention: Any) -> dict[str, Any]:
    return {"sliding_window": getattr(attention.config, "sliding_window", None)}


# For each model: the start of the names of its classes, and what attention gets beside the
# arguments that are the same for all.
_FAMILIES: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "bitnet": ("BitNet", _no_window),
    "llama": ("Llama", _no_window),
    "mistral": ("Mistral", _window_of_config),
    "qwen2": ("Qwen2", _own_window),
    "qwen3": ("Qwen3", _own_window),
}

KNOWN = [f"{prefix}DecoderLayer" for prefix, _ in _FAMILIES.values()]
"""The names of the classes of transformers that have a fused class."""


def fused_class(kind: type[nn.Module]) -> type[FusedDecoderLayer] | None:
    """The fused class for a class of decoder layers of transformers; None if there is none."""
    for family, (prefix, _) in _FAMILIES.items():
        if kind.__module__ == _modeling_name(family) and kind.__name__ == f"{prefix}DecoderLayer":
            fused = _make_class(family)
            return fused if fused.unfused_class is kind else None
    return None


def __getattr__(name: str) -> Any:
    """Return a fused class, for ``pickle``, which looks for it by its name in this module."""
    for family, (prefix, _) in _FAMILIES.items():
        if name == f"Fused{prefix}DecoderLayer":
            return _make_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _modeling_name(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


@functools.cache
def _make_class(family: str) -> type[FusedDecoderLayer]:
    """Make the fused class of a family when it is first needed: its module takes long to import."""
    from transformers.activations import ReLUSquaredActivation, SiLUActivation
    from transformers.cache_utils import Cache

    prefix, sliding_window = _FAMILIES[family]
    modeling = importlib.import_module(_modeling_name(family))
    base = getattr(modeling, f"{prefix}DecoderLayer")
    attributes = {
        "__module__": __name__,
        # pickle looks for this name; accelerate and FSDP look for __name__, which stays the same.
        "__qualname__": f"Fused{base.__name__}",
        "__doc__": FusedDecoderLayer.__doc__,
        "unfused_class": base,
        "_modeling": modeling,
        "_unfused": _known_kind(base),
        "_attention": _known_kind(getattr(modeling, f"{prefix}Attention")),
        "_mlp": _known_kind(getattr(modeling, f"{prefix}MLP")),
        "_activations": {
            _known_kind(nn.SiLU): "silu",
            _known_kind(SiLUActivation): "silu",
            _known_kind(ReLUSquaredActivation): "relu2",
        },
        "_sliding_window": staticmethod(sliding_window),
        "_cache_update": staticmethod(Cache.update),  # not a method of the layer
    }
    return type(base.__name__, (FusedDecoderLayer, base), attributes)
