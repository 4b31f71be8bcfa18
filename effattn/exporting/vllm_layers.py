"""Layers that differ, as vLLM reads them: `block_configs`, by its AnyModel and by DeciLM.

    blocks, heads = block_configs(parts)
    weights = padded(parts, heads)

Each block says how many K/V heads its attention has (AnyModel) and how many query heads share one
(DeciLM), how wide its FFN is, or that one of them is a `no_op`. Both have one number of query heads
for all layers: where a layer has fewer, the others are zeros that add nothing, in the same groups.
Its K and V, which are what is cached, stay as few as they are."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from effattn.errors import Unsupported
from effattn.hf import anatomy, uneven

MOST = 2  # times the query heads of the layer that has most: beyond that, zeros cost too much


def check(parts: anatomy.Anatomy) -> None:
    """Unsupported for layers that differ in another class, or in numbers of heads that no one
    number of query heads fits."""
    if not uneven.overrides(parts.config):
        return
    if parts.family != "llama":
        kind = type(parts.model).__name__
        raise Unsupported(f"vllm: layers that differ are exported of Llama; this is a {kind}")
    _query_heads(parts)


def block_configs(parts: anatomy.Anatomy) -> tuple[list[dict[str, Any]], int]:
    """(what each layer is, the query heads of all)."""
    heads = _query_heads(parts)
    blocks = []
    for layer in parts.layers:
        attention: dict[str, Any] = {"no_op": not layer.attends}
        if layer.attends:
            attention["num_key_value_heads"] = layer.kv_heads
            attention["n_heads_in_group"] = heads // layer.kv_heads
        width = layer.feed_forward.size
        ffn: dict[str, Any] = {"no_op": not width} | ({"intermediate_size": width} if width else {})
        blocks.append({"attention": attention, "ffn": ffn})
    return blocks, heads


def padded(parts: anatomy.Anatomy, heads: int) -> tuple[dict[str, Tensor], int]:
    """(the model's weights with `heads` query heads in every layer, how many of them are zeros)."""
    state = dict(parts.model.state_dict())
    names = {id(module): name for name, module in parts.model.named_modules()}
    zeros = 0
    for layer in parts.layers:
        if not layer.attends or layer.heads == heads:
            continue
        zeros += heads - layer.heads
        groups = (layer.kv_heads, layer.heads // layer.kv_heads, heads // layer.kv_heads)
        query, out = names[id(layer.q.module)], names[id(layer.o.module)]
        for name in (f"{query}.weight", f"{query}.bias"):
            if name in state:
                state[name] = _wider(state[name], *groups)
        state[f"{out}.weight"] = _wider(state[f"{out}.weight"].T, *groups).T.contiguous()
    return state, zeros


def _wider(rows: Tensor, kv_heads: int, group: int, wider: int) -> Tensor:
    """Rows (kv_heads * group * D, ...) of query heads -> (kv_heads * wider * D, ...): those of
    zeros come last in each group."""
    grouped = rows.reshape(kv_heads, group, -1, *rows.shape[1:])
    new = grouped.new_zeros(kv_heads, wider, *grouped.shape[2:])
    new[:, :group] = grouped
    return new.reshape(-1, *rows.shape[1:])


def _query_heads(parts: anatomy.Anatomy) -> int:
    """The fewest query heads that every layer's fit in, in groups of the same size."""
    there = [layer for layer in parts.layers if layer.attends]
    least = max(layer.heads for layer in there)
    step = math.lcm(*(layer.kv_heads for layer in there))
    heads = math.ceil(least / step) * step
    if heads > MOST * least:
        counts = sorted({layer.kv_heads for layer in there})
        raise Unsupported(
            f"vllm: layers have {', '.join(map(str, counts))} K/V heads, and vLLM one number of "
            f"query heads for all, of which each is a divisor: {heads}, more than {MOST} times the "
            f"{least} that there are"
        )
    return heads


def config_of(parts: anatomy.Anatomy) -> dict[str, Any]:
    """config.json of such a model, without what is each layer's own."""
    blocks, heads = block_configs(parts)
    said = parts.config.to_dict()
    for name in ("per_layer_config", uneven.GLOBAL):
        said.pop(name, None)
    there = [layer for layer in parts.layers if layer.attends]
    return said | {
        "architectures": ["AnyModel"],
        "base_architecture": type(parts.model).__name__,
        "model_type": "anymodel",
        "block_configs": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": max(layer.kv_heads for layer in there),
        "intermediate_size": max(layer.feed_forward.size for layer in parts.layers),
        "head_dim": there[0].head_dim,
        "dtype": str(parts.model.dtype).removeprefix("torch."),
    }
