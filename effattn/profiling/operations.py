"""The operations that one call of a model is made of, and what each must compute and move.

`effattn.profiling.cost` adds them up. A linear-like module says its cost itself, a backend and a
state theirs; what is here is the walk over the model's parts (`effattn.hf.anatomy`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from effattn.errors import Unsupported
from effattn.hf import anatomy, hooks
from effattn.hf.projection import Projection
from effattn.hf.swapped_layer import SwappedLayer
from effattn.hf.weights import is_packed, is_transposed, sizes, weight_bytes
from effattn.interface import Backend, Cost, Shape
from effattn.kernels.decode import MOST_QUERIES
from effattn.patterns.longformer import GlobalFull
from effattn.registry import backend as make_backend


@dataclass(frozen=True)
class Operation:
    """One kind of work in one layer (None: outside of the layers).

    name: "q_proj", "latent_proj" (what is remembered instead of keys and values), "k_proj",
    "v_proj", "o_proj", "attention", "cache" (storing the new keys and values), "ffn", "norms",
    "embedding" or "head". weight_bytes: what `cost` reads of the weights; kv_bytes: what attention
    reads of the state, or the cache writes into it."""

    layer: int | None
    name: str
    cost: Cost
    weight_bytes: int = 0
    kv_bytes: int = 0


def linear_cost(
    rows: int, inputs: int, outputs: int, itemsize: int, bias: bool = False, backward: bool = False
) -> Cost:
    """y = x W^T (+ b) for x (rows, inputs), W (outputs, inputs). backward: of its backward pass
    alone, two products: it reads dy, x and W and writes dx and dW (and db)."""
    x, y = rows * inputs * itemsize, rows * outputs * itemsize
    weight = (inputs + bias) * outputs * itemsize
    flops = 2 * rows * inputs * outputs
    if backward:
        return Cost(2 * flops, y + x + inputs * outputs * itemsize, x + weight)
    return Cost(flops, x + weight, y)


def layer_backend(layer: anatomy.Layer) -> Backend:
    """The backend that does what this layer does: the swapped one, or dense attention with the
    model's own window.
    """
    swapped = getattr(layer.attention, hooks.ATTRIBUTE, None)
    if swapped is not None and swapped.backend is not None:
        return swapped.backend
    return (
        make_backend("dense")
        if layer.window is None
        else make_backend("sliding", window=layer.window)
    )


def turns(swapped: SwappedLayer) -> bool:
    """Whether a swapped layer's keys turn as they are read."""
    if swapped.positions is not None:
        return swapped.positions.rule.turns
    return swapped.rotary is not None


@dataclass(frozen=True)
class Operations:
    """The operations of one call of a model: `tokens` new ones of each of `batch` rows after `past`
    in the cache, in the model's order. logits: positions whose logits are computed."""

    parts: anatomy.Anatomy
    batch: int
    tokens: int
    past: int
    backward: bool
    logits: int

    @property
    def rows(self) -> int:
        """New tokens of all rows."""
        return self.batch * self.tokens

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the activations."""
        return self.parts.embeddings.weight.element_size()

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.parts.config.hidden_size

    def layer(self, layer: anatomy.Layer) -> Iterator[Operation]:
        """Those of one layer: projections, attention and its cache, FFN, norms."""
        yield self._projection(layer, "q_proj", layer.q)
        if layer.latent is not None:
            yield Operation(layer.index, "latent_proj", *self._linear(layer.latent.down, self.rows))
        for name in ("k", "v"):
            yield self._projection(layer, f"{name}_proj", getattr(layer, name))
        yield from self._attention(layer)
        yield self._projection(layer, "o_proj", layer.o)
        experts = getattr(layer.config, "num_experts_per_tok", None)
        cost, weights = self._products(layer.ffn, experts, set(layer.norms))
        yield Operation(layer.index, "ffn", cost, weights)
        widths = {
            layer.q_norm: layer.heads * layer.head_dim,
            layer.k_norm: layer.kv_heads * layer.head_dim,
        }
        yield self._norms(
            layer.index, {norm: widths.get(norm, self.hidden) for norm in layer.norms}
        )

    def _attention(self, layer: anatomy.Layer) -> Iterator[Operation]:
        keys = self.past + self.tokens
        shape = Shape(
            self.batch,
            layer.heads,
            layer.kv_heads,
            self.tokens,
            keys,
            layer.head_dim,
            layer.value_dim,
            self.itemsize,
            layer.causal,
            self.backward,
        )
        backend = layer_backend(layer)
        cost = backend.cost(shape)
        if self.backward or not layer.causal:
            yield Operation(layer.index, "attention", replace(cost, state_bytes=0))
            return
        # A decoding step reads the state and writes its token into it ("cache"); what the state is
        # made of, it says itself where it is not plain keys and values.
        token = shape.kv_bytes // keys
        swapped = getattr(layer.attention, hooks.ATTRIBUTE, None)
        if layer.latent is not None and swapped is not None and swapped.latent is not None:
            yield from self._over_latents(layer, shape, cost, swapped)
            return
        state = (
            backend.new_state()
            if swapped is None or swapped.backend is None
            else swapped.new_state()
        )
        # packed: what it held before is read, and the new tokens in full precision as they come
        if hasattr(state, "predicted_bytes"):
            sizes = (self.batch, layer.kv_heads, layer.head_dim, self.itemsize, layer.value_dim)
            before, after = (
                state.predicted_bytes(count, *sizes) if count else 0 for count in (self.past, keys)
            )
            written = self.tokens * token
            cost = replace(cost, read_bytes=shape.query_bytes + before + written, state_bytes=after)
        elif hasattr(state, "cost"):
            held = state.cost(shape)
            cost = replace(
                cost, read_bytes=shape.query_bytes + held.read_bytes, state_bytes=held.state_bytes
            )
            written = held.write_bytes
        else:
            if layer.window is not None and (swapped is None or swapped.backend is None):
                # transformers' own ring holds a token less than the window, and what came with the
                # last call
                cost = replace(cost, state_bytes=min(keys, layer.window - 1) * token)
            twice = (
                2
                if isinstance(state, GlobalFull) and hooks.GLOBAL in layer.attention._modules
                else 1
            )
            # keys and values of the second projections, too
            cost = replace(cost, state_bytes=twice * cost.state_bytes)
            written = min(twice * self.tokens * token, cost.state_bytes)
        yield Operation(
            layer.index, "attention", cost, kv_bytes=cost.read_bytes - shape.query_bytes
        )
        yield Operation(layer.index, "cache", Cost(0, written, written), kv_bytes=written)

    def _over_latents(
        self, layer: anatomy.Layer, shape: Shape, cost: Cost, swapped: SwappedLayer
    ) -> Iterator[Operation]:
        """Attention that costs `cost` over plain keys and values, over latents: of each token, r
        numbers are read. Few queries make keys of them, if these turn, and sum latents; many make
        both of what was before."""
        rank, kv_heads, turned = layer.latent.rank, layer.kv_heads, turns(swapped)
        token = rank * self.itemsize
        if swapped.cache is not None:
            token = swapped.cache.latent_bytes(rank)
        plain, latent = shape.kv_bytes // shape.keys, self.batch * token
        seen = (cost.read_bytes - shape.query_bytes) // plain
        expanded = 2 * self.batch * rank * kv_heads * seen
        if self.tokens <= MOST_QUERIES:
            pairs = cost.flops // (shape.head_dim + shape.value_dim)  # twice, of all rows
            absorbed = 2 * self.rows * shape.heads * rank
            flops = pairs * (rank + (shape.head_dim if turned else rank))
            flops += absorbed * shape.value_dim
            flops += expanded * shape.head_dim if turned else absorbed * shape.head_dim
        else:
            before = seen - min(seen, self.tokens)
            flops = cost.flops + expanded // max(seen, 1) * before * (
                shape.head_dim + shape.value_dim
            )
        read, written = seen * latent, self.tokens * latent
        held = cost.state_bytes // plain * latent
        changed = replace(cost, flops=flops, read_bytes=shape.query_bytes + read, state_bytes=held)
        yield Operation(layer.index, "attention", changed, kv_bytes=read)
        written = min(written, held)
        yield Operation(layer.index, "cache", Cost(0, written, written), kv_bytes=written)

    def _projection(self, layer: anatomy.Layer, name: str, projection: Projection) -> Operation:
        """q, k, v or o; of a fused module, the share of its outputs. Twice for a layer with second
        projections.
        """
        module = projection.module
        cost, weights = self._linear(module, self.rows)
        if hooks.GLOBAL in layer.attention._modules and not projection.output:
            cost, weights = cost + cost, 2 * weights
        if layer.family.fused and not projection.output:
            parts, whole = projection.heads * projection.head_dim, sizes(module)[0]
            cost = Cost(
                *(n * parts // whole for n in (cost.flops, cost.read_bytes, cost.write_bytes))
            )
            weights = weights * parts // whole
        return Operation(layer.index, name, cost, weights)

    def _linear(self, module: nn.Module, rows: int) -> tuple[Cost, int]:
        """The cost of one linear-like module, and its weight bytes."""
        if hasattr(module, "cost"):
            return module.cost(rows, backward=self.backward), weight_bytes(module)
        if is_packed(module) and isinstance(module, nn.Linear):
            return self._packed_linear(module, rows)
        if isinstance(module, nn.Linear) or is_transposed(module):
            outputs, inputs = sizes(module)
            return linear_cost(
                rows,
                inputs,
                outputs,
                module.weight.element_size(),
                module.bias is not None,
                self.backward,
            ), weight_bytes(module)
        raise Unsupported(
            f"cost: {type(module).__name__} is not a Linear and does not say what it costs; it "
            "needs a method cost(rows, backward=False) -> Cost"
        )

    def _packed_linear(self, module: nn.Linear, rows: int) -> tuple[Cost, int]:
        """As bitsandbytes does it: the products of a plain linear, and packed bytes read. Its
        weight does not train.
        """
        inputs, outputs, weights = module.in_features, module.out_features, weight_bytes(module)
        x, y = rows * inputs * self.itemsize, rows * outputs * self.itemsize
        moved = (y, x) if self.backward else (x, y)
        return Cost(2 * rows * inputs * outputs, moved[0] + weights, moved[1]), weights

    def _products(
        self, module: nn.Module, chosen: int | None, norms: set[nn.Module]
    ) -> tuple[Cost, int]:
        """Every product in an FFN: linear modules, routers, and experts that are stacked in one
        parameter. Of the experts, the `chosen` ones of each token compute; as many as there are
        rows for are read."""
        if module in norms:
            return Cost(), 0
        if hasattr(module, "cost") or isinstance(module, nn.Linear) or is_transposed(module):
            return self._linear(module, self.rows)
        total, weights = Cost(), 0
        own = list(module.parameters(recurse=False))
        experts = any(p.dim() == 3 for p in own)
        if experts and chosen is None:
            raise Unsupported(
                f"cost: {type(module).__name__} has experts, and config.num_experts_per_tok is "
                "not set"
            )
        for p in own:
            size = p.element_size()
            if experts:
                count = p.shape[0]
                used = min(count, self.rows * chosen)
                weights += used * (p.numel() // count) * size
                if p.dim() == 3:
                    inside = linear_cost(
                        self.rows * chosen,
                        *_inputs_outputs(p, self.hidden),
                        size,
                        False,
                        self.backward,
                    )
                    # that one expert's product does not count
                    more = (used - 1) * (p.numel() // count) * size
                    total += inside + Cost(0, more, more if self.backward else 0)
            elif p.dim() == 2:
                total += linear_cost(self.rows, p.shape[1], p.shape[0], size, False, self.backward)
                weights += p.numel() * size
        for child in module.children():
            cost, read = self._products(child, chosen, norms)
            total, weights = total + cost, weights + read
        return total, weights

    def _norms(self, layer: int | None, widths: dict[nn.Module, int]) -> Operation:
        cost, weights = Cost(), 0
        for norm, width in widths.items():
            moved, own = self.rows * width * self.itemsize, weight_bytes(norm)
            cost += Cost(
                0, moved * (2 if self.backward else 1) + own, moved + (own if self.backward else 0)
            )
            weights += own
        return Operation(layer, "norms", cost, weights)

    def embedding(self) -> Operation:
        """Rows are looked up: as many of the table as there are tokens, of positions (OPT, BERT)
        one a token."""
        inside = {m for layer in self.parts.layers for m in layer.block.modules()}
        tables = [
            m for m in self.parts.model.modules() if isinstance(m, nn.Embedding) and m not in inside
        ]
        read = 0
        for table in tables:
            lookups = self.rows if table is self.parts.embeddings else self.tokens
            row_bytes = table.embedding_dim * table.weight.element_size()
            read += min(lookups, table.num_embeddings) * row_bytes
        written = self.rows * self.hidden * self.itemsize
        if self.backward:
            return Operation(None, "embedding", Cost(0, written, sum(map(weight_bytes, tables))))
        return Operation(None, "embedding", Cost(0, read, written), read)

    def end(self) -> Iterator[Operation]:
        """The final norm and the head."""
        if self.parts.final_norm is not None:
            yield self._norms(None, {self.parts.final_norm: self.hidden})
        head = self.parts.model.get_output_embeddings()
        if head is not None and self.logits:
            yield Operation(None, "head", *self._linear(head, self.batch * self.logits))


def _inputs_outputs(p: nn.Parameter, hidden: int) -> tuple[int, int]:
    """(inputs, outputs) of stacked experts (E, a, b): the product counts both alike, whichever way
    round they lie.
    """
    a, b = p.shape[1:]
    return (b, a) if a != hidden else (a, b)
