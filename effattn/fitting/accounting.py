"""What a plan takes, to the byte, before anything is built.

    ledger = Ledger(parts, context=2048, batch=4)
    ledger.totals(plan)["bytes"]

What is counted of a model that was built (`effattn.hf.weights.weight_bytes`, the storages of its
cache) is the same number; a test holds the one against the other."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from effattn import registry
from effattn.fitting.plan import BLOCKS, FULL, SINKS, LayerChoice, Plan
from effattn.hf import anatomy
from effattn.hf.layer import Layer
from effattn.hf.weights import numbers, weight_bytes
from effattn.profiling.cost import model_cost
from effattn.states import caches
from effattn.states.full import RingState

BLOCK = 64  # numbers that share a scale in nf4
CODE_BOOK = 16 * 4  # bytes of nf4's levels, which each module has
ROWS = ("bytes", "kv_bytes_per_token", "weight_bytes", "parameters")


def linear_bytes(outputs: int, inputs: int, bias: bool, itemsize: int, kind: str | None) -> int:
    """Bytes of a linear layer's weights. kind: "nf4" (two numbers a byte, a scale in fp32 for each
    64), "int8" (a scale in fp32 for each row), or None: `itemsize` a number."""
    count = outputs * inputs
    own = outputs * itemsize if bias else 0
    if kind == "nf4":
        return own + -(-count // 2) + 4 * -(-count // BLOCK) + CODE_BOOK
    return own + (count + 4 * outputs if kind == "int8" else count * itemsize)


class Ledger:
    """The costs of choices in one model. context, batch: of the cache that is counted."""

    def __init__(self, parts: anatomy.Anatomy, context: int, batch: int):
        self.parts, self.context, self.batch = parts, context, batch
        self.parent = Plan.of(parts)
        self.weights = weight_bytes(parts.model)
        self.parameters = sum(numbers(p) for p in parts.model.parameters())
        # of the parent: no candidate has wider activations, so that it bounds those of every plan
        step = model_cost(parts.model, batch, 1, context)
        self.activations = step.activation_bytes or 0
        self.block = lru_cache(maxsize=None)(self._block)

    def totals(self, plan: Plan) -> dict[str, float]:
        """Everything that a budget may limit, but speed: as `ROWS`, and cache_bytes."""
        found: dict[str, float] = {
            "weight_bytes": self.weights,
            "parameters": self.parameters,
            "cache_bytes": 0,
            "kv_bytes_per_token": 0,
        }
        for index, choice in enumerate(plan.layers):
            for block in BLOCKS:
                own = self.block(index, block, choice)
                parent = self.block(index, block, self.parent.layers[index])
                for name in ("weight_bytes", "parameters"):
                    found[name] += own[name] - parent[name]
                for name in ("cache_bytes", "kv_bytes_per_token"):
                    found[name] += own[name]
        found["bytes"] = found["weight_bytes"] + found["cache_bytes"] + self.activations
        return found

    def fixed(self) -> dict[str, float]:
        """What every plan has, whatever its layers become: rows without the blocks' own parts."""
        parent = self.totals(self.parent)
        for index, choice in enumerate(self.parent.layers):
            for block in BLOCKS:
                for name, value in self.block(index, block, choice).items():
                    if name in ROWS:
                        parent[name] -= value
        return {name: parent[name] for name in ROWS}

    def _block(self, index: int, block: str, choice: LayerChoice) -> dict[str, float]:
        layer = self.parts.layers[index]
        attention = block == "attention"
        linears = _attention(layer, choice) if attention else _ffn(layer, choice)
        kind = choice.attention_weights if attention else choice.ffn_weights
        cache, token = cache_bytes(layer, choice, self.context, self.batch) if attention else (0, 0)
        weights = sum(
            linear_bytes(rows, columns, module.bias is not None, module.weight.itemsize, kind)
            for module, rows, columns in linears
        )
        biased = [rows for module, rows, _ in linears if module.bias is not None]
        return {
            "weight_bytes": weights,
            "parameters": sum(rows * columns for _, rows, columns in linears) + sum(biased),
            "cache_bytes": cache,
            "kv_bytes_per_token": token,
            "bytes": weights + cache,
        }


def _attention(layer: Layer, choice: LayerChoice) -> list[tuple[nn.Linear, int, int]]:
    """(module, outputs, inputs) of the attention's linears."""
    hidden = layer.q.module.in_features
    q, kv = layer.heads * layer.head_dim, choice.kv_heads * layer.head_dim
    o = (layer.o.module, layer.o.module.out_features, q)
    if layer.family.fused is not None:
        return [(layer.q.module, q + 2 * kv, hidden), o]
    return [
        (layer.q.module, q, hidden),
        (layer.k.module, kv, hidden),
        (layer.v.module, kv, hidden),
        o,
    ]


def _ffn(layer: Layer, choice: LayerChoice) -> list[tuple[nn.Linear, int, int]]:
    """The same of the FFN's."""
    own = layer.feed_forward
    inputs = [
        (one, one.out_features // own.size * choice.ffn, one.in_features) for one in own.inputs
    ]
    return [*inputs, (own.output, own.output.out_features, choice.ffn)]


class _Heads:
    """The sizes of a layer's keys and values as a choice has them."""

    def __init__(self, layer: Layer, kv_heads: int):
        self.kv_heads, self.head_dim, self.value_dim = kv_heads, layer.head_dim, layer.value_dim


def pattern_of(layer: Layer, choice: LayerChoice) -> str:
    """The pattern that a choice gives a layer whose attention is swapped."""
    if choice.window is not None:
        return f"sliding(window={choice.window}, sinks={SINKS})"
    return "dense" if layer.own_window is None else f"sliding(window={layer.own_window})"


def cache_bytes(layer: Layer, choice: LayerChoice, context: int, batch: int) -> tuple[int, float]:
    """(bytes of the layer's cache after `context` tokens of `batch` rows, bytes that it grows by
    with each further token: 0 where its number of tokens is bounded)."""
    heads = _Heads(layer, choice.kv_heads)
    itemsize = layer.dtype.itemsize
    number = choice.kv_heads * (layer.head_dim + layer.value_dim) * itemsize
    bounded = choice.window is not None or layer.window is not None
    if choice.cache == FULL and choice.window is None:
        if not bounded:
            return batch * context * number, number
        # transformers' own ring is a view of what the last step saw, and counts in a tensor
        held = context if layer.window is None else min(context, layer.window)
        return batch * held * number + 8, 0
    backend = registry.backend(pattern_of(layer, choice))
    kind = caches.parse(choice.cache)
    if kind is None:
        state = backend.new_state()
        assert isinstance(state, RingState)
        # beside the ring lie which tokens are the first ones, and where each place's token is
        tables = 8 * (SINKS + 2 * state.ring) if context > state.ring else 0
        return batch * state.held(context) * number + tables, 0
    kind = kind.fit(heads)
    held = kind.new_state(backend).predicted_bytes(
        context, batch, choice.kv_heads, layer.head_dim, itemsize, layer.value_dim
    )
    return held, 0 if bounded else kind.bytes_per_token(heads)


@torch.no_grad()
def counted(model: nn.Module, context: int, batch: int) -> dict[str, int]:
    """What a model takes that was built: bytes of its weights, and of the cache that `batch` rows
    of `context` tokens leave, every storage that is kept alive. The last two tokens are decoded:
    what a prompt leaves of transformers' own rings are views of all its tokens."""
    from effattn.evaluate.streaming import cache_bytes as held_by
    from effattn.quant.sensitivity.lanes import prefilled

    table = model.get_input_embeddings().weight
    ids = torch.zeros(batch, context, dtype=torch.long, device=table.device)
    cache = prefilled(model, ids[:, : max(1, context - 2)])
    for at in range(max(1, context - 2), context):
        model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
    return {"weight_bytes": weight_bytes(model), "cache_bytes": held_by(cache)}
