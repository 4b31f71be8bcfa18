"""What a plan takes, to the byte, before anything is built.

    ledger = Ledger(parts, context=2048, batch=4)
    ledger.totals(plan)["bytes"]

What is counted of a model that was built (`effattn.hf.weights.weight_bytes`, the storages of its
cache) is the same number; a test holds the one against the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from effattn import registry
from effattn.fitting import forms
from effattn.fitting.plan import BLOCKS, FULL, SINKS, LayerChoice, Plan, is_structured
from effattn.hf import anatomy, uneven
from effattn.hf.layer import Layer
from effattn.hf.weights import numbers, weight_bytes
from effattn.profiling.cost import model_cost
from effattn.states import caches
from effattn.states.full import ROOM, RingState

BLOCK = 64  # numbers that share a scale in nf4
CODE_BOOK = 16 * 4  # bytes of nf4's levels, which each module has
ROWS = ("bytes", "kv_bytes_per_token", "weight_bytes", "parameters")


@dataclass(frozen=True)
class Matrix:
    """One linear of a layer, as a choice has it: of these sizes, in a form (None: as `like` is)."""

    like: nn.Linear
    outputs: int
    inputs: int
    bias: bool
    form: str | None = None

    @classmethod
    def of(cls, like: nn.Linear, outputs: int, inputs: int, form: str | None) -> Matrix:
        """With the bias that it has."""
        return cls(like, outputs, inputs, like.bias is not None, form)

    def cost(self) -> tuple[int, int]:
        """(bytes, parameters). bitsandbytes: nf4 has two numbers a byte, a scale in fp32 for each
        64 and its levels; int8 a scale in fp32 for each row."""
        count, itemsize = self.outputs * self.inputs, self.like.weight.itemsize
        own, added = (self.outputs * itemsize, self.outputs) if self.bias else (0, 0)
        if self.form is None:
            return own + count * itemsize, count + added
        if is_structured("ffn_weights", self.form):
            made = forms.empty(self.form, self.like, self.outputs, self.inputs, "meta")
            return weight_bytes(made), sum(map(numbers, made.parameters()))
        if self.form == "nf4":
            return own + -(-count // 2) + 4 * -(-count // BLOCK) + CODE_BOOK, count + added
        return own + count + 4 * self.outputs, count + added


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
        self.cost = lru_cache(maxsize=None)(Matrix.cost)

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
        linears = (_attention if attention else _ffn)(layer, choice)
        costs = [self.cost(one) for one in linears]
        if linears:
            costs.append(_beside(layer, attention))
        weights, parameters = map(sum, zip((0, 0), *costs, strict=True))
        cache, token = cache_bytes(layer, choice, self.context, self.batch) if attention else (0, 0)
        return {
            "weight_bytes": weights,
            "parameters": parameters,
            "cache_bytes": cache,
            "kv_bytes_per_token": token,
            "bytes": weights + cache,
        }


def _beside(layer: Layer, attention: bool) -> tuple[int, int]:
    """(bytes, parameters) of what a block has beside its linears, and loses when it is left out:
    norms of queries and keys, and the one before it."""
    name = uneven.NORMS[uneven.ATTENTION if attention else uneven.FFN]
    before = getattr(layer.block, name, None)
    roots = [layer.attention if attention else layer.ffn, *([before] if before else [])]
    linears = _linears(layer, attention)
    own = {id(one) for linear in linears for one in linear.parameters()}
    found = {id(one): one for root in roots for one in (*root.parameters(), *root.buffers())}
    rest = [one for key, one in found.items() if key not in own]
    parameters = [one for one in rest if isinstance(one, nn.Parameter)]
    return sum(one.nbytes for one in rest), sum(map(numbers, parameters))


def _linears(layer: Layer, attention: bool) -> list[nn.Module]:
    """The modules of a block that a choice is about."""
    if attention:
        return layer.qkv_modules
    return [*layer.feed_forward.inputs, layer.feed_forward.output]


def _attention(layer: Layer, choice: LayerChoice) -> list[Matrix]:
    """The attention's linears."""
    if choice.kv_heads == 0:
        return []
    form = choice.attention_weights
    hidden = layer.q.module.in_features
    q, kv = layer.heads * layer.head_dim, choice.kv_heads * layer.head_dim
    o = Matrix.of(layer.o.module, layer.o.module.out_features, q, form)
    if layer.family.fused is not None:
        return [Matrix.of(layer.q.module, q + 2 * kv, hidden, form), o]
    both = [layer.k.module, layer.v.module]
    if choice.latent is not None:
        down = Matrix(layer.k.module, choice.latent, hidden, bias=False)
        memory = [down, *(Matrix(one, kv, choice.latent, bias=True) for one in both)]
    else:
        memory = [Matrix.of(one, kv, hidden, form) for one in both]
    return [Matrix.of(layer.q.module, q, hidden, form), *memory, o]


def _ffn(layer: Layer, choice: LayerChoice) -> list[Matrix]:
    """The same of the FFN's."""
    if choice.ffn == 0:
        return []
    own, form = layer.feed_forward, choice.ffn_weights
    inputs = [
        Matrix.of(one, one.out_features // own.size * choice.ffn, one.in_features, form)
        for one in own.inputs
    ]
    return [*inputs, Matrix.of(own.output, own.output.out_features, choice.ffn, form)]


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
    itemsize = layer.dtype.itemsize
    if choice.kv_heads == 0:
        return 0, 0
    if choice.latent is not None:
        # memory that grows has room for some tokens more, since the last but one
        held = context if context < 2 else max(2, context - 1) + ROOM
        return batch * held * choice.latent * itemsize, choice.latent * itemsize
    heads = _Heads(layer, choice.kv_heads)
    number = choice.kv_heads * (layer.head_dim + layer.value_dim) * itemsize
    bounded = choice.window is not None or layer.window is not None
    if choice.cache == FULL and choice.window is None:
        if layer.own_window is None:
            return batch * context * number, number
        # transformers' own ring is a view of what the last step saw, and counts in a tensor
        held = min(context, layer.own_window)
        return batch * held * number + 8, 0 if bounded else number
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
