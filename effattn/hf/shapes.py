"""Layers of one model that are not of one size: fewer key/value heads here, a narrower FFN there.

A plain config says one number for all layers. Where all are the same `settle` writes it there, and
the checkpoint stays plain; where they are not, a checkpoint has what `record` says, of which
`rebuild` makes the empty modules before their weights are read.

F: inner dimensions of an FFN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effattn.hf import anatomy
from effattn.hf.layer import Layer
from effattn.hf.trusted import SHAPES

MARK = "effattn_shape"  # on a block whose sizes its config does not say


def sizes(layer: Layer) -> dict[str, int]:
    """What the sizes of a layer are: key/value heads, and F."""
    return {"kv_heads": layer.kv_heads, "ffn": layer.feed_forward.size}


def mark(layer: Layer) -> None:
    """Says of a layer that its sizes may be others than its config's."""
    setattr(layer.block, MARK, True)


@torch.no_grad()
def keep_ffn(layer: Layer, dimensions: Tensor) -> None:
    """Leaves a layer those inner dimensions of its FFN, int64 (n,), with new parameters in the same
    modules."""
    feed_forward = layer.feed_forward
    rows = feed_forward.rows(dimensions)
    for module in feed_forward.inputs:
        _set(module, module.weight[rows], None if module.bias is None else module.bias[rows])
    _set(feed_forward.output, feed_forward.output.weight[:, dimensions], feed_forward.output.bias)
    mark(layer)


def settle(model: nn.Module) -> None:
    """Writes into the config what all layers have in common, and takes the marks off where that is
    everything."""
    parts = anatomy.of(model)
    found = [sizes(layer) for layer in parts]
    uniform = {name: len({one[name] for one in found}) == 1 for name in SHAPES}
    if uniform["kv_heads"] and getattr(parts.config, "num_key_value_heads", None) is not None:
        parts.set_kv_heads(found[0]["kv_heads"])
    if uniform["ffn"]:
        setattr(parts.config, parts.layers[0].family.ffn_size, found[0]["ffn"])
    if all(uniform.values()):
        for layer in parts:
            vars(layer.block).pop(MARK, None)


def record(model: nn.Module) -> dict[str, dict[str, int]]:
    """Layer -> those of its sizes that the config does not say; {} for a model of one size."""
    if not any(MARK in vars(module) for module in model.modules()):
        return {}
    parts = anatomy.of(model)
    said = {
        "kv_heads": getattr(parts.config, "num_key_value_heads", None) or parts.heads,
        "ffn": getattr(parts.config, parts.layers[0].family.ffn_size),
    }
    found = {}
    for layer in parts:
        own = {name: size for name, size in sizes(layer).items() if size != said[name]}
        if own:
            found[str(layer.index)] = own
    return found


def rebuild(model: nn.Module, recorded: dict[str, dict[str, int]]) -> None:
    """Gives layers of a new model the recorded sizes; their weights mean nothing yet. ValueError
    for records that do not fit the model."""
    layers = {str(layer.index): layer for layer in anatomy.of(model)} if recorded else {}
    for index, entry in recorded.items():
        layer = layers.get(index)
        if layer is None or not _fits(layer, entry):
            raise ValueError(
                f"config.json: effattn: layers: {index!r}: {entry!r} does not fit the model"
            )
        if "kv_heads" in entry:
            _resize_heads(layer, entry["kv_heads"])
        if "ffn" in entry:
            keep_ffn(layer, torch.arange(entry["ffn"]))
        mark(layer)


def _fits(layer: Layer, entry: dict[str, int]) -> bool:
    """Whether the model can have such a layer: it is only ever made smaller."""
    own = sizes(layer)
    heads = entry.get("kv_heads", own["kv_heads"])
    return (
        own["kv_heads"] % heads == 0
        and entry.get("ffn", 1) <= own["ffn"]
        and ("kv_heads" not in entry or not layer.family.gqa)
    )


@torch.no_grad()
def _resize_heads(layer: Layer, kv_heads: int) -> None:
    if layer.family.fused is None:
        modules = {layer.k.module: kv_heads, layer.v.module: kv_heads}
    else:  # the rows of q, then of k, then of v
        modules = {layer.q.module: layer.heads + 2 * kv_heads}
    for module, heads in modules.items():
        keep = heads * layer.head_dim
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
