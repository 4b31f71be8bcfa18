"""The sizes of a live model's layers, fewer key/value heads here, a narrower FFN or none there, and
what its config then says (`effattn.hf.uneven`).

F: inner dimensions of an FFN."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from effattn.hf import anatomy, uneven
from effattn.hf.layer import Layer


def sizes(layer: Layer) -> dict[str, int]:
    """What the sizes of a layer are: key/value heads, and F; 0 for a part that is left out."""
    return {"kv_heads": layer.kv_heads, "ffn": layer.feed_forward.size}


@torch.no_grad()
def keep_ffn(layer: Layer, dimensions: Tensor) -> None:
    """Leaves a layer those inner dimensions of its FFN, int64 (n,), with new parameters in the same
    modules."""
    feed_forward = layer.feed_forward
    rows = feed_forward.rows(dimensions)
    for module in feed_forward.inputs:
        _set(module, module.weight[rows], None if module.bias is None else module.bias[rows])
    _set(feed_forward.output, feed_forward.output.weight[:, dimensions], feed_forward.output.bias)


def settle(model: nn.Module) -> None:
    """Writes the sizes that a model's layers now have into its config: once where all are alike, or
    else for those that differ from it. Unsupported for a class that cannot say it."""
    parts = anatomy.of(model)
    config, found = parts.config, [sizes(layer) for layer in parts]
    names = {
        "kv_heads": uneven.KV_HEADS,
        "ffn": parts.layers[0].family.ffn_size,
    }
    # What differed before is said anew, beside what is no size of these (query heads).
    head_dim, before = parts.head_dim, uneven.taken(config)
    said = {*names.values(), "skip"}
    kept = {
        index: {name: value for name, value in own.items() if name not in said}
        for index, own in before.items()
    }
    for name in names:
        alike = {one[name] for one in found if one[name]}
        if len(alike) == 1 and hasattr(config, names[name]):
            setattr(config, names[name], alike.pop())
    differ = {
        index: kept.get(index, {}) | _differs(config, names, own) for index, own in enumerate(found)
    }
    differ = {index: own for index, own in differ.items() if own}
    if not differ and not before:
        return
    if differ:
        config.head_dim = head_dim
        uneven.set_overrides(config, differ)
    for layer in parts:
        own = uneven.layer_config(config, layer.index) if differ else config
        for module in layer.block.modules():
            if isinstance(module, uneven.NoAttention):
                module.config = own
                vars(own)[uneven.HEADS] = 0
            elif uneven.is_of(getattr(module, "config", None), config):
                module.config = own


def _differs(config, names: dict[str, str], own: dict[str, int]) -> dict:
    """What a config must say of a layer of these sizes: those that are not the model's, and the
    parts that it has not."""
    parts = {"kv_heads": uneven.ATTENTION, "ffn": uneven.FFN}
    skip = [part for name, part in parts.items() if not own[name]]
    said: dict = {
        names[name]: size
        for name, size in own.items()
        if size and hasattr(config, names[name]) and size != getattr(config, names[name])
    }
    return said | ({"skip": skip} if skip else {})


@torch.no_grad()
def leave_out(layer: Layer, part: str) -> None:
    """Takes the attention (`uneven.ATTENTION`) or the FFN (`uneven.FFN`) out of a layer, with the
    norm before it. The model is asked anew (`anatomy.of`) what it then is, and `settle` writes its
    config."""
    own = copy.copy(layer.config)  # until the layer has a config of its own
    uneven.leave_out(layer.block, part, own, layer.index, layer.family)


@torch.no_grad()
def keep_heads(layer: Layer, kv_heads: int) -> None:
    """Leaves a layer its first key/value heads, with new parameters in the same modules."""
    for module in (layer.k.module, layer.v.module):
        keep = kv_heads * layer.head_dim
        _set(module, module.weight[:keep], None if module.bias is None else module.bias[:keep])
    layer.attention.num_key_value_groups = layer.heads // kv_heads
    if hasattr(layer.attention, "num_key_value_heads"):
        layer.attention.num_key_value_heads = kv_heads


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """New parameters in a linear, which says their sizes."""
    grad = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.clone(), requires_grad=grad)
    linear.out_features, linear.in_features = weight.shape
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=grad)
