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

from dataclasses import dataclass

from torch import nn

from effattn.errors import Unsupported
from effattn.hf import anatomy
from effattn.hf.weights import weight_bytes
from effattn.interface import Cost
from effattn.profiling import activations
from effattn.profiling.operations import Operation as Operation
from effattn.profiling.operations import Operations
from effattn.profiling.operations import layer_backend as layer_backend
from effattn.profiling.operations import linear_cost as linear_cost


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
        """Weights read, keys and values read and written: what a decoding step needs at least."""
        return sum(operation.weight_bytes + operation.kv_bytes for operation in self.operations)


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
    call = Operations(parts, batch, tokens, past, backward, logits if parts.causal else tokens)
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
