"""What a whole model must compute and move: the sum over its operations, and the memory it needs at
once.

    cost = model_cost(model, batch=8, tokens=1, past=16384)         # one decoding step
    cost.step_bytes, cost.total.flops, cost.peak_bytes, cost.by_name()["attention"]

It looks at shapes only, so that a model on the meta device does: a 70B configuration is costed
without its memory.

Each operation reads its inputs and weights once and writes its outputs once; elementwise work
between them counts as fused (no bytes), and operations are those of matrix products (a multiply-add
is 2), as in `Backend.cost`.

How a new part joins:

- a linear-like module (packed weights, Monarch) defines `cost(rows, backward=False) -> Cost`; its
  weight bytes are those of its parameters and buffers;
- a `State` that does not hold plain keys and values (a quantized cache, recurrent sums) defines
  `cost(shape) -> Cost`: what attention reads back of it, what storing the call's new tokens writes,
  and its `state_bytes` after them;
- a backend defines `Backend.cost`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from effattn.errors import Unsupported
from effattn.hf import anatomy, hooks
from effattn.hf.projection import Projection
from effattn.hf.weights import is_packed, weight_bytes
from effattn.interface import Backend, Cost, Shape
from effattn.patterns.longformer import GlobalFull
from effattn.profiling import activations
from effattn.registry import backend as make_backend


@dataclass(frozen=True)
class Operation:
    """One kind of work in one layer (None: outside of the layers).

    name: "q_proj", "k_proj", "v_proj", "o_proj", "attention", "cache" (storing the new keys and
    values), "ffn", "norms", "embedding" or "head". weight_bytes: what `cost` reads of the weights;
    kv_bytes: what attention reads of the state, or the cache writes into it."""

    layer: int | None
    name: str
    cost: Cost
    weight_bytes: int = 0
    kv_bytes: int = 0


@dataclass(frozen=True)
class ModelCost:
    """One call of a model. `weight_bytes`: of all parameters and buffers; `kv_bytes`: of the state
    after the call; `activation_bytes`: the largest set of activations alive at once, beside weights
    and state; `peak_bytes`: the most memory at once, all of them and the copies that transformers'
    cache makes. The last two are for a forward pass without gradients, None for a backward pass."""

    operations: tuple[Operation, ...]
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int | None
    peak_bytes: int | None

    @property
    def total(self) -> Cost:
        """Of all operations: operations, bytes moved, bytes remembered."""
        return sum((operation.cost for operation in self.operations), Cost())

    def by_name(self) -> dict[str, Cost]:
        """Operation's name -> its cost over all layers, in the model's order."""
        return self._sums("name")

    def by_layer(self) -> dict[int | None, Cost]:
        """Layer -> its cost; None: what is outside of the layers."""
        return self._sums("layer")

    def _sums(self, key: str) -> dict:
        sums: dict = {}
        for operation in self.operations:
            name = getattr(operation, key)
            sums[name] = sums.get(name, Cost()) + operation.cost
        return sums

    @property
    def step_bytes(self) -> int:
        """Weights read, keys and values read and written: what a decoding step cannot do without."""
        return sum(operation.weight_bytes + operation.kv_bytes for operation in self.operations)


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


def model_cost(
    model: nn.Module,
    batch: int,
    tokens: int,
    past: int = 0,
    backward: bool = False,
    logits: int = 1,
) -> ModelCost:
    """The cost of a forward pass over `tokens` new tokens of each of `batch` rows, after `past`
    ones in the cache.

    tokens=context: prefill; tokens=1, past=context: a decoding step. logits: how many positions'
    logits are computed (generate() computes the last one's; encoders compute all). backward: of the
    backward pass of the same call, alone; a training step is the sum of both, with logits=tokens.
    ValueError for sizes that cannot be, Unsupported for unknown architectures and modules."""
    for argument, value, least in (
        ("batch", batch, 1),
        ("tokens", tokens, 1),
        ("past", past, 0),
        ("logits", logits, 0),
    ):
        if type(value) is not int or value < least:
            raise ValueError(
                f"{argument}: got {value!r}, valid is a whole number of at least {least}"
            )
    if logits > tokens:
        raise ValueError(f"logits: got {logits} positions, valid is at most tokens ({tokens})")
    parts = anatomy.of(model)
    if past and not parts.causal:
        raise Unsupported(
            f"{type(model).__name__} has no cache (it is not causal); valid is past=0"
        )
    call = _Call(parts, batch, tokens, past, backward, logits if parts.causal else tokens)
    operations = (
        call.embedding(),
        *(o for layer in parts.layers for o in call.layer(layer)),
        *call.end(),
    )
    weights = weight_bytes(model)
    state = {o.layer: o.cost.state_bytes for o in operations if o.name == "attention"}
    live = None
    if not backward:
        live = activations.peak(parts, batch, tokens, past, call.logits, list(state.values()))
    return ModelCost(
        operations,
        weights,
        sum(state.values()),
        None if live is None else live.activations,
        None if live is None else weights + live.total,
    )


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


@dataclass(frozen=True)
class _Call:
    parts: anatomy.Anatomy
    batch: int
    tokens: int
    past: int
    backward: bool
    logits: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def itemsize(self) -> int:
        return self.parts.embeddings.weight.element_size()

    @property
    def hidden(self) -> int:
        return self.parts.config.hidden_size

    def layer(self, layer: anatomy.Layer) -> Iterator[Operation]:
        for name in ("q", "k", "v"):
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
        state = (
            backend.new_state()
            if swapped is None or swapped.backend is None
            else swapped.new_state()
        )
        # packed: what it held before is read, and the new tokens in full precision as they come
        if hasattr(state, "predicted_bytes"):
            sizes = (self.batch, layer.kv_heads, layer.head_dim, self.itemsize)
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

    def _projection(self, layer: anatomy.Layer, name: str, projection: Projection) -> Operation:
        """q, k, v or o; of a fused module, the share of its outputs. Twice for a layer with second
        projections.
        """
        module = projection.module
        cost, weights = self._linear(module, self.rows)
        if hooks.GLOBAL in layer.attention._modules and not projection.output:
            cost, weights = cost + cost, 2 * weights
        if layer.family.fused and not projection.output:
            parts, whole = projection.heads * projection.head_dim, module.out_features
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
        if isinstance(module, nn.Linear):
            return linear_cost(
                rows,
                module.in_features,
                module.out_features,
                module.weight.element_size(),
                module.bias is not None,
                self.backward,
            ), weight_bytes(module)
        raise Unsupported(
            f"cost: {type(module).__name__} is not a Linear and does not say what it costs; it "
            "needs a method "
            "cost(rows, backward=False) -> Cost"
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
        if hasattr(module, "cost") or isinstance(module, nn.Linear):
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
