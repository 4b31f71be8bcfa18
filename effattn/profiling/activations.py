"""What is alive at once in a forward pass of a transformers model without gradients: where the
memory's peak lies.

It walks through one pass and adds up, moment by moment, what Python still has a name for: that, and
nothing else, is what the allocator holds. Modelled after transformers' own layers (norm, attention,
residual, norm, FFN, residual), run eagerly, with SDPA's fused kernels and a `DynamicCache`.

The state counts as what it occupies in memory, which may be more than what it means: transformers'
ring of a windowed layer is a view of all tokens of the last call. What kernels take for themselves
is not counted: SDPA on a CPU, a tile of less than 1 MiB a thread; activation functions that
transformers composes in Python (`gelu_new`), a few more tensors; a swapped backend, its tiles and
reordered copies. For those the peak is a lower bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from effattn.hf import anatomy, hooks
from effattn.hf.families import sliding_window
from effattn.hf.weights import is_transposed, sizes
from effattn.projections.base import StructuredLinear
from effattn.states.full import FullState

FLOAT = 4  # bytes: transformers' RMSNorm computes in float32, SDPA keeps its log-sum-exps in it
INDEX = 8  # bytes of a position


@dataclass(frozen=True)
class Peak:
    """Bytes: the most activations at any moment, and the most of activations, state and its copies
    together.
    """

    activations: int
    total: int


def peak(
    parts: anatomy.Anatomy, batch: int, tokens: int, past: int, logits: int, state_after: list[int]
) -> Peak:
    """The peak of one call, as `effattn.profiling.cost.model_cost` describes it, without weights.
    state_after: bytes of each layer's state once the call is over; empty for a model without a
    cache."""
    moments = list(_Pass(parts, batch, tokens, past, logits, state_after).moments())
    return Peak(max(live for live, _ in moments), max(live + state for live, state in moments))


@dataclass(frozen=True)
class _Pass:
    parts: anatomy.Anatomy
    batch: int
    tokens: int
    past: int
    logits: int
    state_after: list[int]

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def itemsize(self) -> int:
        return self.parts.embeddings.weight.element_size()

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states."""
        return self.rows * self.parts.config.hidden_size * self.itemsize

    def moments(self) -> Iterator[tuple[int, int]]:
        """(activations, state) in bytes."""
        state = [self._state(layer, self.past) for layer in self.parts.layers]
        for layer in self.parts.layers:
            # The model keeps the embeddings to its end, and each layer's input until it has the
            # output.
            entry = self._positions() + self.hidden * (2 if layer.index else 1)
            yield entry + self._norm(), sum(state)
            yield from self._attention(layer, entry + self.hidden, state)
            # Now the first residual sum is the second residual; the layer's input stays with the
            # caller.
            yield entry + self.hidden + self._norm(), sum(state)
            yield entry + 2 * self.hidden + self._ffn(layer), sum(state)
        yield self._positions() + 2 * self.hidden + self._norm(), sum(state)
        vocabulary = self.parts.embeddings.num_embeddings
        yield self.hidden + self.batch * self.logits * vocabulary * self.itemsize, sum(state)

    def _positions(self) -> int:
        """What all layers share: position ids, RoPE's cosines and sines, and the masks, one for
        each kind of layer.
        """
        # layers of the same kind share one mask, which transformers makes once
        rotary = max(layer.rotary_dims for layer in self.parts.layers)
        masks = {
            layer.window: self._mask(layer) for layer in self.parts.layers if not _swapped(layer)
        }
        return self.tokens * (INDEX + 2 * rotary * self.itemsize) + sum(masks.values())

    def _mask(self, layer: anatomy.Layer) -> int:
        """Bytes of a layer's mask; without padding, SDPA mostly needs none."""
        pairs = self.batch * self.tokens * self._keys(layer)
        if _eager(layer):
            return pairs * self.itemsize
        return pairs if self._masked(layer) else 0

    def _keys(self, layer: anatomy.Layer) -> int:
        past = self.past if layer.window is None else min(self.past, layer.window - 1)
        return past + self.tokens

    def _masked(self, layer: anatomy.Layer) -> bool:
        """Whether the layer needs a mask beyond SDPA's own causal one, which takes queries for the
        first tokens.
        """
        windowed = layer.window is not None and layer.window < self._keys(layer)
        return self.tokens > 1 and layer.causal and (windowed or self.past > 0)

    def _norm(self) -> int:
        """RMSNorm holds two float32 tensors at once, whatever the dtype: x and x², then the product
        and its scaling.
        """
        return self.hidden // self.itemsize * 2 * FLOAT

    def _attention(
        self, layer: anatomy.Layer, entry: int, state: list[int]
    ) -> Iterator[tuple[int, int]]:
        """`entry`: what is alive when q is projected, the normed input included. Updates
        `state`.
        """
        q = self.rows * layer.heads * layer.head_dim * self.itemsize
        k = self.rows * layer.kv_heads * layer.head_dim * self.itemsize
        v = self.rows * layer.kv_heads * layer.value_dim * self.itemsize
        out = self.rows * layer.heads * layer.value_dim * self.itemsize
        turned = layer.rotary_dims / layer.head_dim
        # (q cos) + (rotate_half(q) sin) has three temporaries; then the same of k, with the old and
        # the new q around.
        yield entry + q + k + v + int(3 * q * turned), sum(state)
        yield entry + 2 * q + k + v + int(3 * k * turned), sum(state)
        held = entry + q
        if not self.state_after:
            held += k + v
        elif _owns_state(layer):
            # a ring or the like: the new tokens are written into it, and attended over as they are
            held += k + v
            state[layer.index] = self.state_after[layer.index]
        else:
            # torch.cat: old and new keys side by side, then old and new values; k and v are alive
            # until both are done. A windowed layer lets go of the old ones only then.
            old, new = state[layer.index], self._state(layer, self.past, self.tokens)
            share = layer.head_dim / (layer.head_dim + layer.value_dim)
            windowed = sliding_window(layer.attention, layer.config) is not None
            yield held + k + v, sum(state) + int(new * share)
            yield held + k + v, sum(state) + new - (0 if windowed else int(old * share))
            state[layer.index] = new
        yield held + out + self._scores(layer), sum(state)
        yield held + out + self.hidden, sum(state)

    def _scores(self, layer: anatomy.Layer) -> int:
        """What attention itself holds beside q, k, v, its mask and its output: SDPA's log-sum-exps;
        with a mask, that mask in numbers, and keys and values repeated for every head. "eager": the
        weights twice (in float32, and what they are made from), and the repetition too."""
        sums = self.rows * layer.heads * max(FLOAT, self.itemsize)
        if _swapped(layer) or not (_eager(layer) or self._masked(layer)):
            return sums
        pairs = self.batch * self.tokens * self._keys(layer)
        repeated = 0
        if layer.heads > layer.kv_heads:
            dims = layer.heads * (layer.head_dim + layer.value_dim)
            repeated = self.batch * self._keys(layer) * dims * self.itemsize
        if not _eager(layer):
            return repeated + sums + pairs * self.itemsize
        return repeated + pairs * layer.heads * (
            self.itemsize + (2 if self.itemsize < FLOAT else 1) * max(FLOAT, self.itemsize)
        )

    def _state(self, layer: anatomy.Layer, past: int, new: int = 0) -> int:
        """Bytes that transformers' cache occupies for this layer after `past` tokens and a call of
        `new` more.
        """
        if not self.state_after:
            return 0
        if _owns_state(layer):
            return self.state_after[layer.index] if past else 0
        if layer.window is not None:
            past = min(past, layer.window - 1)
        return (
            self.batch
            * (past + new)
            * layer.kv_heads
            * (layer.head_dim + layer.value_dim)
            * self.itemsize
        )

    def _ffn(self, layer: anatomy.Layer) -> int:
        """The widest moment of the FFN: activation(gate), up and their product, before the first
        two are released.
        """
        linears = [
            m
            for m in layer.ffn.modules()
            if isinstance(m, nn.Linear | StructuredLinear) or is_transposed(m)
        ]
        # a packed weight and a Monarch matrix have parameters of three dimensions, too
        own = {p for m in linears for p in m.parameters()}
        experts = [p for p in layer.ffn.parameters() if p.dim() == 3 and p not in own]
        if experts:
            # a copy of x for each chosen expert, with gate and up in one, activation and product;
            # or 4 of x
            wide = min(p.numel() // p.shape[0] for p in experts) // self.parts.config.hidden_size
            pairs = self.rows * layer.config.num_experts_per_tok
            return (
                pairs
                * self.itemsize
                * max(self.parts.config.hidden_size + 4 * wide, 4 * self.parts.config.hidden_size)
            )
        if not linears:
            return 0
        wide, first = sizes(linears[-1])[1], sizes(linears[0])[0]
        tensors = 2 if len(linears) == 2 else 3  # without a gate: before and after the activation
        if len(linears) == 2 and first == 2 * wide:
            tensors = 4  # gate and up are two halves of one tensor, which stays whole
        return self.rows * tensors * wide * self.itemsize


def _eager(layer: anatomy.Layer) -> bool:
    """Whether the layer runs transformers' own attention in plain torch, also beside swapped
    layers.
    """
    swapped = getattr(layer.attention, hooks.ATTRIBUTE, None)
    if swapped is None:
        return layer.config._attn_implementation == "eager"
    return swapped.backend is None and swapped.original == "eager"


def _swapped(layer: anatomy.Layer) -> bool:
    swapped = getattr(layer.attention, hooks.ATTRIBUTE, None)
    return swapped is not None and swapped.backend is not None


def _owns_state(layer: anatomy.Layer) -> bool:
    """Whether the layer was swapped to a backend with another state than everything that came."""
    return (
        _swapped(layer)
        and type(getattr(layer.attention, hooks.ATTRIBUTE).backend.new_state()) is not FullState
    )
