"""Attention that selects: a window, sinks, and the blocks of keys that suit the query best.

Blocks chosen by a summary: Landmark attention (arXiv:2305.16300), Quest (arXiv:2406.10774), MoBA
(arXiv:2502.13189) and NSA (arXiv:2502.11089); with blocks of one key it is the exact kNN attention
of Memorizing Transformers (arXiv:2203.08913).

q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv); i, j: positions of queries and keys; N:
finished blocks; n: blocks that a query reads; W: numbers of a summary."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from effattn.errors import Unsupported, check_choice
from effattn.interface import Backend, Call, Cost, Shape, Traits
from effattn.kernels import decode, flash, topk
from effattn.kernels.flash.pattern import Layout, Window, layout_of
from effattn.kernels.merge import merge
from effattn.patterns.exact import check_size, torch_only
from effattn.positions.bound import Positions
from effattn.registry import register
from effattn.states.base import State
from effattn.states.blocks import BlockState
from effattn.states.full import FullState
from effattn.states.static_blocks import StaticBlocks

SUMMARISED = (BlockState, StaticBlocks)  # states with summaries that are read here


@register("topk")
class TopK(Backend):
    """A query sees its `window` newest keys, itself included, the `sinks` first ones, and all keys
    of the `blocks` best blocks of `block` keys; one softmax over all of them, each key once.

    Blocks begin at multiples of `block`, and a query chooses among those that are finished (their
    last key is not later than the query) and that are not seen anyway, by its score against a
    summary of the block's keys. summary: "mean", the mean key; "minmax", the most that a key
    between the block's smallest and largest numbers could score (Quest); "spread", between the two:
    the mean's score and half of what keys as far out as that could add; "learned", a mean weighted
    by softmax(pool . k) with a parameter `pool` (Hkv, D), zero at first, when it is "mean". The
    query heads of a group choose together, by the sum of their scores.

    block=1 is exact kNN attention; blocks that cover everything are dense attention, with window >=
    block (a block that is not finished is seen through the window only). Choosing has no gradient:
    q, k and v learn through what was chosen, and `pool` from a loss of its own, how far the scores
    are from the attention that blocks have, whenever a call with gradients trains it. A step of
    decoding reads window + sinks + blocks * block tokens and one summary a block."""

    traits = Traits(
        exact=False,
        causal=True,
        bidirectional=False,
        learned=False,
        state="full, summaries of blocks",
    )
    implementations = topk.IMPLEMENTATIONS
    extras = ("sink_logits",)
    group_decides = True

    def __init__(
        self,
        window: int,
        sinks: int = 0,
        block: int = 16,
        blocks: int = 8,
        summary: str = "mean",
        kv_heads: int | None = None,
        head_dim: int | None = None,
        impl: str = "auto",
    ):
        """kv_heads, head_dim: of a learned summary's parameter, which is made at the first call
        where they are not given."""
        super().__init__(impl)
        self.chosen_impl = topk.choose(impl)
        check_choice("topk: summary", summary, topk.SUMMARIES)
        self.rule = topk.Rule(
            check_size("topk", "window", window),
            check_size("topk", "sinks", sinks, least=0),
            check_size("topk", "block", block),
            check_size("topk", "blocks", blocks),
            summary,
        )
        self.pool = None
        if summary == "learned":
            self.traits = replace(self.traits, learned=True)
            self.per_kv_head = ("pool",)
            given = kv_heads is not None and head_dim is not None
            self.pool = (
                nn.Parameter(torch.zeros(kv_heads, head_dim)) if given else UninitializedParameter()
            )

    def extra_repr(self) -> str:
        rule = self.rule
        parts = [f"window={rule.window}"]
        parts += [f"sinks={rule.sinks}"] if rule.sinks else []
        parts += [f"block={rule.block}, blocks={rule.blocks}"]
        parts += [f"summary={rule.summary!r}"] if rule.summary != "mean" else []
        return ", ".join([*parts, super().extra_repr()])

    def check_call(self, q, k, v, causal, extras):
        if self.pool is None:
            return
        if is_lazy(self.pool):
            self.pool.materialize((k.shape[1], k.shape[3]), device=k.device, dtype=torch.float32)
            nn.init.zeros_(self.pool)
        if self.pool.shape != (k.shape[1], k.shape[3]):
            heads, dim = self.pool.shape
            raise ValueError(
                f"k: expected {heads} heads of size {dim}, as topk's pool has, got {k.shape[1]} of "
                f"size {k.shape[3]}"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # What is made at the first call has to be there before it can be loaded.
        given = state_dict.get(prefix + "pool")
        if given is not None and self.pool is not None and is_lazy(self.pool):
            self.pool.materialize(given.shape, device=given.device, dtype=given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def growth(self, shape: Shape) -> float:
        width, size = self.rule.width(shape.head_dim), max(4, shape.itemsize)
        summary = shape.batch * shape.kv_heads * width * size
        return super().growth(shape) + summary / self.rule.block

    def summarise(self, k: Tensor) -> Tensor:
        """k (B, Hkv, T, D), from a block's beginning on -> (B, Hkv, T // block, W), float32 or
        better."""
        return topk.summarise(self.rule, k, self.pool)

    def new_state(self) -> FullState:
        plain = self.impl == "reference"
        return FullState() if plain else BlockState(self.rule.block, self.summarise)

    def reads(self, state: State) -> bool:
        return getattr(state, "rule", None) == self.rule

    def places(self, rule: Positions) -> bool:
        """ReRoPE clipped within the window: all keys behind it stand at one position (LongLLaMA,
        arXiv:2307.03170), and blocks are chosen by their keys as they came."""
        clips = rule.far is not None and math.isinf(rule.far.slow)
        return clips and rule.bias is None and rule.far.window <= self.rule.window

    def turns_keys(self, q, k, v, layout, rule):
        # what is read of the past is turned when it is read, if it is in the window
        return rule.far is not None and self.impl != "reference" and self._read_few(q, k, v)

    def _read_few(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether keys are gathered for each query: without gradients."""
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return q.shape[2] <= decode.MOST_QUERIES and not (learning or self._trains)

    def run(self, q, k, v, causal, padding_mask, state, scale, rotary, extras):
        """As `Backend.run`; but a state holds rotated keys, since their summaries are made of
        those, unless far keys are not to be rotated."""
        clipped = isinstance(rotary, Positions) and rotary.far is not None
        packed = state is not None and state.packed
        if clipped and (packed or isinstance(state, StaticBlocks)):
            raise Unsupported(
                f"rotary: {rotary.spec!r} turns keys as {self.name} reads them, which packed and "
                "static caches do not go with here; valid is its own growing state"
            )
        if (packed or isinstance(state, SUMMARISED)) and rotary is not None and not clipped:
            total, layout = state.seq_len + k.shape[2], layout_of(padding_mask)
            at = (layout.query_positions(x.shape[2], total, x.device).clamp(min=0) for x in (q, k))
            q, k = rotary(q, k, *(x if padding_mask is not None else x[0] for x in at))
            rotary = None
        return super().run(q, k, v, causal, padding_mask, state, scale, rotary, extras)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        impl = self.runs(topk.choose(self.impl, q.device))
        layout = call.layout
        if impl == "reference":
            return self._reference(q, k, v, call)
        if call.state is not None and call.state.packed:
            near = Window(first=self.rule.sinks, back=self.rule.window)
            return self._beside(*call.state.attend(q, k, v, near, call, impl, True), call)
        if isinstance(layout.total, Tensor):
            return self._step(q, k, v, call)
        at = self._positions(q, k, layout)
        few = self._read_few(q, k, v) and call.far is None
        # as what is behind the window sees each other
        far_q, far_k = q, k
        if call.turn is not None:
            far_q = call.turn.q_far * call.turn.scaling
        elif call.far is not None:
            far_q, far_k = call.far.q, call.far.k
        keys = far_k if few and call.state is not None else _from_start(far_k, layout.start)
        summaries = (
            call.state.summaries
            if isinstance(call.state, SUMMARISED)
            else self.summarise(keys.detach())
        )
        chosen = topk.select(self.rule, far_q.detach(), summaries.detach(), at)
        if few:
            parts = self._few(q, far_q, k, v, chosen, at, call, impl)
        else:
            values = _from_start(v, layout.start)
            parts = self._many(q, far_q, k, v, keys, values, chosen, at, call, impl)
        return self._learning_from(self._beside(*merge(parts), call), far_q, keys, call)

    def _beside(self, out: Tensor, lse: Tensor, call: Call) -> Tensor:
        """`out` with `call.sink_logits`, a logit in the denominator only: out * Z / (Z +
        exp(logit)), and Z = exp(lse)."""
        if call.sink_logits is None:
            return out
        share = torch.sigmoid(lse - call.sink_logits.to(lse.dtype)[None, :, None])
        return (out.to(lse.dtype) * share[..., None]).to(out.dtype)

    @property
    def _trains(self) -> bool:
        """Whether the present call trains the summaries."""
        return self.pool is not None and self.pool.requires_grad and torch.is_grad_enabled()

    def _learning_from(self, out: Tensor, q: Tensor, keys: Tensor, call: Call) -> Tensor:
        """`out`, from which the summaries learn where they do. keys: from each row's start on."""
        if not self._trains:
            return out
        at = self._positions(q, keys, call.layout)
        return topk.with_pool_loss(out, q, keys, self.rule, self.pool, at, scale=call.scale)

    def _positions(self, q: Tensor, k: Tensor, layout: Layout) -> Tensor:
        """Of queries, (1 or B, Tq); negative for padding, which may lie on the right too."""
        queries, tokens = q.shape[2], k.shape[2]
        at = layout.query_positions(queries, tokens, q.device)
        return (
            at if layout.mask is None else torch.where(layout.mask[:, tokens - queries :], at, -1)
        )

    def _few(self, q, far_q, k, v, chosen, at, call: Call, impl: str):
        """The window, and what is gathered for each query: sinks and chosen blocks."""
        low = max(0, k.shape[2] - self.rule.window - q.shape[2] + 1)
        layout = call.layout
        mask = None if layout.mask is None else layout.mask[:, low:]
        near = decode.attention(
            q,
            k[:, :, low:],
            v[:, :, low:],
            Window(back=self.rule.window),
            Layout(tail=low, start=layout.start, mask=mask),
            scale=call.scale,
            turn=call.turn,
            impl=impl,
            lse=True,
        )
        return [near, self._gathered(far_q, k, v, chosen, at, call, impl)]

    def _gathered(self, q, k, v, chosen, at, call: Call, impl: str):
        """The sinks and the chosen blocks of each query."""
        return topk.attention_few(
            q,
            topk.reader(k, v),
            self.rule,
            chosen,
            at,
            call.layout.start,
            scale=call.scale,
            impl=impl,
        )

    def _step(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """One token over a static state, whose length is a tensor. k (B, Hkv, n, D), v: token t at
        place t, and one place more."""
        impl, layout, total = torch_only(self.impl), call.layout, call.layout.total
        width = min(self.rule.window, k.shape[2] - 1)
        number = total - width + torch.arange(width, device=q.device)  # the window's tokens
        place = number.clamp(min=0)
        real = layout.mask.index_select(1, place) & (number >= 0)
        at = layout.query_positions(1, k.shape[2], q.device)
        at = torch.where(layout.mask.index_select(1, (total - 1)[None]), at, -1)
        near = decode.attention(
            q,
            k.index_select(2, place),
            v.index_select(2, place),
            Window(back=self.rule.window),
            replace(layout, mask=real, ring=number),
            scale=call.scale,
            impl=impl,
            lse=True,
        )
        chosen = topk.select(self.rule, q, call.state.summaries, at)
        far = self._gathered(q, k, v, chosen, at, call, impl)
        return self._beside(*merge([near, far]), call)

    def _many(self, q, far_q, k, v, keys, values, chosen, at, call: Call, impl: str):
        """The window and the sinks, and the blocks of keys and values from each row's start on."""
        near = flash.attention(
            q,
            k,
            v,
            Window(first=self.rule.sinks, back=self.rule.window),
            call.layout,
            scale=call.scale,
            far=call.far,
            impl=impl,
            lse=True,
        )
        far = topk.attention(
            far_q, keys, values, self.rule, chosen, at, scale=call.scale, impl=impl
        )
        return [near, far]

    def _reference(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        from effattn.kernels.topk.reference import attention

        real = call.layout.mask
        if real is None:
            real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        given = {"scale": call.scale, "pool": self.pool, "sink_logits": call.sink_logits}
        out = attention(q, k, v, self.rule, real, **given, far=call.far)
        if call.far is not None:
            q, k = call.far.q, call.far.k
        return self._learning_from(out, q, _from_start(k, call.layout.start), call)

    def cost(self, shape: Shape) -> Cost:
        """Two products over the pairs that see each other, and one of each query (of a group, once)
        with the summaries of its candidates, which grows with T^2 / block. Counted is a query whose
        chosen blocks lie outside of the window and the sinks. Keys that a cached call may read: the
        window's, the sinks and those that were chosen, and the summaries. Backward: five products,
        as in the exact patterns; nothing is chosen again."""
        rule = self.rule
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        near = (i + 1).clamp(max=rule.window) + (i + 1 - rule.window).clamp(0, rule.sinks)
        far = ((i + 1) // rule.block * rule.block - near).clamp(min=0)
        seen = near + far.clamp(max=rule.blocks * rule.block)
        pairs = shape.batch * shape.heads * int(seen.sum())
        candidates = ((i + 1 - rule.window).clamp(min=0) // rule.block).sum()
        token = shape.kv_bytes // shape.keys
        read = min(shape.keys, int(seen.sum()))  # what no two queries read together
        if shape.backward:
            return Cost(
                flops=2 * pairs * (3 * shape.head_dim + 2 * shape.value_dim),
                read_bytes=shape.query_bytes
                + read * token
                + 2 * shape.output_bytes
                + shape.lse_bytes,
                write_bytes=shape.query_bytes + shape.kv_bytes,
            )
        lines, width = shape.batch * shape.kv_heads, rule.width(shape.head_dim)
        summary = lines * width * max(4, shape.itemsize)
        blocks = shape.keys // rule.block
        past = blocks if shape.keys > shape.queries else 0
        return Cost(
            flops=2 * pairs * (shape.head_dim + shape.value_dim)
            + 2 * lines * width * int(candidates),
            read_bytes=shape.query_bytes + read * token + past * summary,
            write_bytes=shape.output_bytes,
            state_bytes=shape.kv_bytes + blocks * summary,
        )


def _from_start(x: Tensor, start: Tensor | None) -> Tensor:
    """x (B, H, T, D) with each row from its first real token on; what is behind its last one is the
    last one again."""
    if start is None:
        return x
    at = start[:, None] + torch.arange(x.shape[2], device=x.device)
    at = at.clamp(max=x.shape[2] - 1)[:, None, :, None]
    return x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))
