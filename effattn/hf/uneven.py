"""Layers that differ: their own number of heads, FFN width, or no attention or FFN at all.

    config.per_layer_config = {3: {"intermediate_size": 512}, 5: {"skip": ["attention"]}}

is how transformers writes it, and its classes build such layers themselves once its modelling half
is there (transformers#45332). Until then a class is built as if all layers were alike, and those
that differ are put in their places before any weight is read; the class itself stays as it is.

A layer without attention or FFN has none of its weights, nor those of the norm before it. The first
layer keeps its attention: transformers asks it how long the cache is."""

from __future__ import annotations

import functools
import operator
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from effattn.errors import Unsupported
from effattn.hf.families import FAMILIES
from effattn.hf.names import DIFFER

ATTENTION, FFN = "attention", "mlp"  # what `skip` calls them
NORMS = {ATTENTION: "input_layernorm", FFN: "post_attention_layernorm"}
GLOBAL = "allow_global_per_layer_attribute_access"
HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"


class NoAttention(nn.Module):
    """In the place of a layer's attention: adds nothing to the hidden states, caches nothing.

    Its projections are linears without rows, and no parts of it, so that the layer can be asked
    like any other."""

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config, index: int, names: tuple[str, ...]):
        super().__init__()
        self.config, self.layer_idx = config, index
        self.head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.__dict__ |= _empty(config.hidden_size, names)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        """hidden_states (B, T, D) -> zeros of that shape."""
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """In the place of a layer's FFN: adds nothing to the hidden states."""

    def __init__(self, config, names: tuple[str, ...]):
        super().__init__()
        self.__dict__ |= _empty(config.hidden_size, names)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (B, T, D) -> zeros of that shape."""
        return torch.zeros_like(hidden_states)


def _empty(hidden: int, names: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Linears by these names, the last of them from nothing to the hidden size, the others the
    other way."""
    sizes = {name: (0, hidden) if name == names[-1] else (hidden, 0) for name in names}
    with warnings.catch_warnings():  # that there is nothing to draw
        warnings.simplefilter("ignore", UserWarning)
        return {name: nn.Linear(*size, bias=False) for name, size in sizes.items()}


def overrides(config) -> dict[int, dict[str, Any]]:
    """What a config says of single layers; {} where all are alike."""
    spec = vars(config).get(DIFFER)
    return {} if spec is None else spec.per_layer_overrides


def taken(config) -> dict[int, dict[str, Any]]:
    """The same, taken off the config, which then is one of layers that are alike."""
    found = overrides(config)
    for name in (DIFFER, GLOBAL):
        vars(config).pop(name, None)
    return found


def set_overrides(config, layers: dict[int, dict[str, Any]]) -> None:
    """Writes what differs into a config. Unsupported, naming the class, for one that cannot say
    it."""
    if not layers:
        return
    check(config, layers)
    # A transformers that does not know `skip` would build what is left out, and draw its weights:
    # a size of its own makes it refuse the config.
    sizes = {
        ATTENTION: {KV_HEADS: _another(config)},
        FFN: {FAMILIES[config.model_type].ffn_size: 1},
    }
    said = {
        index: functools.reduce(operator.or_, [sizes[part] for part in own.get("skip", ())], {})
        | own
        for index, own in layers.items()
    }
    config.per_layer_config = said
    # Llama's config asks for the query heads when it is read, of a model as a whole
    if HEADS in config.per_layer_attributes:
        config.allow_global_per_layer_attribute_access = True


def _another(config) -> int:
    """A number of K/V heads that is not the model's."""
    return 1 if getattr(config, KV_HEADS) != 1 else getattr(config, HEADS)


def check(config, layers: dict[int, dict[str, Any]]) -> None:
    """Unsupported for layers that this class, or this version of transformers, cannot have."""
    kind = type(config).__name__
    if not hasattr(PreTrainedConfig, "per_layer_config"):
        raise Unsupported(f"{kind}: layers that differ need a transformers with per_layer_config")
    family = FAMILIES.get(config.model_type)
    if family is None or not family.explicit_head_dim or family.fused or not family.ffn_in:
        raise Unsupported(
            f"{kind} cannot have layers that differ: its class has fused projections, experts, or "
            "a head size of its own making"
        )
    if ATTENTION in layers.get(0, {}).get("skip", ()):
        raise Unsupported(
            "layers: the first layer keeps its attention: transformers asks it how long the cache "
            "is"
        )


def rebuild(model: nn.Module, layers: dict[int, dict[str, Any]]) -> None:
    """Puts layers of these settings into a new model that was built without them, and the settings
    back on its config. Their weights mean nothing yet."""
    if not layers:
        return
    config = model.config
    set_overrides(config, layers)
    family = FAMILIES[config.model_type]
    blocks = model.get_submodule(family.layers)
    for index, block in enumerate(blocks):
        own = layer_config(config, index)
        if index in layers:
            block = blocks[index] = _built(type(block), own, index, family)
        for module in block.modules():
            if getattr(module, "config", None) is config:
                module.config = own


def _built(kind: type[nn.Module], config, index: int, family) -> nn.Module:
    """One layer of a class, by its own config."""
    block = kind(config, index)
    for part in set(config.skip):
        leave_out(block, part, config, index, family)
    return block


def check_norms(block: nn.Module, index: int) -> None:
    """Unsupported for a layer of which no part can be left out."""
    norms = {name for name, _ in block.named_children() if "norm" in name}
    if norms != set(NORMS.values()):
        raise Unsupported(
            f"layer {index}: a {type(block).__name__} has other norms than one before each part, "
            "none can be left out"
        )


def leave_out(block: nn.Module, part: str, config, index: int, family) -> None:
    """Takes the attention or the FFN out of a layer, with the norm before it. config: of this layer
    alone. Unsupported for a class that has other norms."""
    check_norms(block, index)
    if part == ATTENTION:
        names = (family.q, family.k, family.v, family.o)
        setattr(block, family.attention, NoAttention(config, index, names))
        vars(config)[HEADS] = 0
    else:
        parent = family.ffn[0]
        names = tuple(path.removeprefix(f"{parent}.") for path in (*family.ffn_in, family.ffn_out))
        setattr(block, parent, NoFeedForward(config, names))
    setattr(block, NORMS[part], nn.Identity())


def layer_config(config, index: int):
    """The config of one layer, which follows the model's in how attention is computed."""
    own = config.per_layer_config[index]
    own = own if own is not config else type(config).from_dict(config.to_dict())
    vars(own).pop("_attn_implementation_internal", None)
    vars(own)["_whole"] = config
    own.__class__ = _following(type(config))
    return own


def is_of(own, config) -> bool:
    """Whether a module's config is that of its model, or what `layer_config` made of it."""
    return own is config or (own is not None and vars(own).get("_whole") is config)


@functools.cache
def _following(kind: type) -> type:
    """A class of configs whose attention's implementation is that of the whole model's, where
    transformers writes it."""

    def implementation(self):
        return vars(self)["_whole"]._attn_implementation_internal

    def to_dict(self):
        return vars(self)["_whole"].to_dict()

    fields = {
        "_attn_implementation_internal": property(implementation),
        "to_dict": to_dict,
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), fields)
