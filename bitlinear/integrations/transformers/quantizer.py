"""``save_pretrained`` and ``from_pretrained`` for models with deployed layers."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ... import foreign
from ...conversion.replacement import find_parents, set_child
from ...linear import BitLinear
from ...state import check_packed
from .config import METHOD, BitLinearConfig, check_describable, describe, layer_from_settings
from .fusion import fuse
from .int8_head import int8_modules, put_empty_head
from .layers import bitlinear_layers, pretrained_models, ternary_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger("bitlinear")

_Model = TypeVar("_Model", bound=nn.Module)


def attach(model: _Model) -> _Model:
    """Make ``save_pretrained`` write deployed layers so that ``from_pretrained`` loads them.

    ``bitlinear.deploy`` and ``bitlinear.integrations.transformers.convert`` call it. Each save
    describes the layers in ``config.json`` as they are at that time: which linear layers are
    deployed, their ``eps``, and so on. A process that loads the model imports bitlinear first.

    Args:
        model: A ``PreTrainedModel``, or a module around one or several. Models without a deployed
            layer stay as they are. So do models that another method has quantised; a warning is
            logged for them.

    Returns:
        ``model``.
    """
    outermost: list[PreTrainedModel] = []
    for inner in pretrained_models(model):
        if not _has_own_layers(inner):
            continue
        quantizer = getattr(inner, "hf_quantizer", None)
        if quantizer is not None and not isinstance(quantizer, BitLinearQuantizer):
            _logger.warning(
                "this %s is quantised by transformers, with %s, and also has layers of bitlinear: "
                "from_pretrained cannot load the files that save_pretrained writes of it; %s",
                type(inner).__name__,
                type(quantizer).__name__,
                f"call {foreign.CONVERT_BITNET} before you save it"
                if foreign.bitnet_layers(inner)
                else "save its state_dict instead",
            )
            continue
        # is_quantized stays False: if it is set, float(), half() and Trainer raise.
        inner.hf_quantizer = BitLinearQuantizer(describe(inner))
        if not any(inner in other.modules() for other in outermost):
            outermost.append(inner)
            inner.config.quantization_config = inner.hf_quantizer.quantization_config
    return model


@register_quantizer(METHOD)
class BitLinearQuantizer(HfQuantizer):  # type: ignore[misc]
    """The part of ``from_pretrained`` that puts deployed layers into a model before the weights."""

    requires_calibration = True  # For transformers: only a converted checkpoint can be loaded.
    is_trainable = True  # Adapters train; the weights of the layers are constants.
    is_compileable = True

    def is_serializable(self) -> bool:
        """Return True: a model with deployed layers can be saved."""
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Describe the layers as they are now; ``save_pretrained`` calls this first.

        Raises:
            ValueError: A deployed layer cannot be described.
        """
        check_describable(model)
        layers = ternary_layers(model)
        trainable = [name for name, layer in layers.items() if not layer.is_deployed]
        if trainable:
            _logger.warning(
                "%d of %d BitLinear layers are not deployed (the first is %s): save_pretrained "
                "writes their floating-point weights, and from_pretrained makes plain layers of "
                "torch of them; deploy the model first, or convert it again after loading",
                len(trainable),
                len(layers),
                trainable[0],
            )
        for inner in pretrained_models(model):
            if isinstance(getattr(inner.config, "quantization_config", None), BitLinearConfig):
                del inner.config.quantization_config
        if _has_own_layers(model):
            self.quantization_config = model.config.quantization_config = describe(model)
        return _unshared_state(model), {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        # In an architecture other than the saved one, the last layer may be a new head.
        is_other = type(model).__name__ not in (model.config.architectures or ())
        kept = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, add_default_skips=is_other
        )
        prefix = f"{model.base_model_prefix}."
        parents = find_parents(model)
        deployed = set()
        for name, module in list(model.named_modules()):
            names = {name, prefix + name, name.removeprefix(prefix)}
            is_float = foreign.is_linear(module) and not isinstance(module, BitLinear)
            if is_float and names.isdisjoint(kept):
                new = layer_from_settings(module, config.settings_of(names))
                set_child(parents[id(module)], new)
                deployed.add(id(new))
        put_empty_head(model, has_embedding=config.int8_embedding, has_head=config.int8_head)
        # The file also holds the tensors that were tied to a weight or bias that is packed now.
        for inner in pretrained_models(model):
            tied = getattr(inner, "all_tied_weights_keys", {})
            for pair in list(tied.items()):
                owners = (inner.get_submodule(key.rpartition(".")[0]) for key in pair)
                if any(id(owner) in deployed for owner in owners):
                    del tied[pair[0]]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from .decoding import speed_up_decoding

        # transformers sets the tensors one by one, and initialises missing ones at random.
        for name, module in int8_modules(model).items():
            _check_loaded(name, module)
        for name, layer in bitlinear_layers(model).items():
            state = _check_loaded(name, layer)
            try:
                check_packed(layer, state)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from error
        if self.quantization_config.fuse:
            fuse(model)
        attach(model)  # The models inside can be saved by themselves.
        speed_up_decoding(model)


def _has_own_layers(model: nn.Module) -> bool:
    """Whether a model has layers that only :class:`BitLinearQuantizer` can load."""
    deployed = any(layer.is_deployed for layer in ternary_layers(model).values())
    return deployed or bool(int8_modules(model))


def _check_loaded(name: str, layer: nn.Module) -> dict[str, Any]:
    """Raise ValueError unless the checkpoint had all tensors of a layer; return its state."""
    state = layer.state_dict(keep_vars=True)
    missing = [key for key in state if not hasattr(state[key], "_is_hf_initialized")]
    # On several devices, a hook of accelerate has moved the tensors and lost the mark.
    if missing and not hasattr(layer, "_hf_hook"):
        raise ValueError(
            f"{name}: the checkpoint has no {', '.join(missing)} for this layer: it is "
            f"incomplete, of another model, or has scales in fp16 (bitlinear.halve_scales), which "
            f"only bitlinear.load_deployed reads; download or save it again"
        )
    return state


def _unshared_state(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The state of ``model``, in which layers share no tensors: all but the first get copies.

    transformers refuses to save shared tensors, unless the class of the model declares them.

    Returns:
        None if no layer shares its tensors.
    """
    users = Counter(
        layer.w_packed.data_ptr()
        for layer in bitlinear_layers(model).values()
        if layer.is_deployed and not layer.w_packed.is_meta
    )
    if not any(count > 1 for count in users.values()):
        return None
    state: dict[str, Tensor] = model.state_dict()
    seen: set[int] = set()
    for name, tensor in state.items():
        if name.endswith((".w_packed", ".w_scale")):
            if tensor.data_ptr() in seen:
                state[name] = tensor.clone()
            seen.add(tensor.data_ptr())
    return state
