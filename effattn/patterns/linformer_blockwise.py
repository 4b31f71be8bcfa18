"""A causal Linformer: finished blocks are projected to a few slots each, the one being written is
attended exactly.

B: rows; Hq, Hkv: query and key/value heads; Tq, Tk: queries, the last of all tokens, and keys; D,
Dv: of a key, of a value; S: slots of all blocks so far, `slots` of each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effattn.interface import Call, Cost, Shape, Traits
from effattn.kernels import decode, flash, linformer
from effattn.kernels.flash.pattern import Blocks, Layout
from effattn.kernels.linformer import Earlier
from effattn.kernels.merge import merge
from effattn.patterns.exact import check_size
from effattn.patterns.linformer import Projected, check_slots
from effattn.registry import register
from effattn.states.base import State
from effattn.states.full import FullState
from effattn.states.summaries import SlotState


@register("linformer_blockwise")
class LinformerBlockwise(Projected):
    """A query sees the slots of every block of `block` tokens that ended before its own block
    began, and the keys of its own block up to itself.

    A finished block becomes `k` * `block` / `max_length` slots, rounded up: E keys and F values,
    with E and F (slots, block) learned and the same for all blocks. So max_length tokens become k
    slots, and longer sequences go on at that rate; nothing is refused beyond it. A slot counts as
    the block / slots tokens that it stands for: that many in the softmax, as in Transformer-VQ, or
    a pooled past would lose against the few exact keys. With k = max_length and init="pool" this is
    exact causal attention.

    share, init, seed, kv_heads: as in `linformer`. Blocks begin at each row's first real token. The
    state holds the slots, and the tokens of the newest block as they came."""

    traits = Traits(
        exact=False, causal=True, bidirectional=False, learned=True, state="slots, last block"
    )

    def __init__(
        self,
        k: int = 256,
        max_length: int = 4096,
        block: int = 64,
        share: str = "head",
        init: str = "pool",
        seed: int = 0,
        kv_heads: int | None = None,
        impl: str = "auto",
    ):
        self.k, self.max_length = check_slots("linformer_blockwise", k, max_length)
        self.block = check_size("linformer_blockwise", "block", block)
        super().__init__(-(-k * block // max_length), block, share, init, seed, kv_heads, impl)

    def extra_repr(self) -> str:
        return (
            f"k={self.k}, max_length={self.max_length}, block={self.block}, {super().extra_repr()}"
        )

    def new_state(self) -> State:
        return FullState() if self.impl == "reference" else SlotState(self.block)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        layout = call.layout
        impl = self.runs(linformer.choose(self.impl, q.device))
        if impl == "reference":
            from effattn.kernels.linformer.reference import blockwise

            real = (
                torch.ones_like(k[:, 0, :, 0], dtype=torch.bool)
                if layout.mask is None
                else layout.mask
            )
            return blockwise(q, k, v, *self.weights, real, call.scale, self.block)
        slots_k, slots_v = self.finished(k, v, call, impl)
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, slots_k))
        few = q.shape[2] <= decode.MOST_QUERIES and not learning
        own = (decode if few else flash).attention(
            q, k, v, Blocks(size=self.block), layout, scale=call.scale, impl=impl, lse=True
        )
        if not slots_k.shape[2]:
            return own[0]
        run = self._few if few else self._many
        out, lse = run(
            q,
            slots_k,
            slots_v,
            layout,
            layout.tokens(k.shape[2]),
            scale=call.scale,
            impl=impl,
            lse=True,
        )
        # A slot stands for block / slots tokens: that factor on its weight is a constant on the
        # log-sum-exp of all slots, so the kernels need not know of it.
        return merge([own, (out, lse + math.log(self.block / self.slots))])[0]

    def _many(
        self, q: Tensor, slots_k: Tensor, slots_v: Tensor, layout: Layout, total: int, **options
    ):
        """Flash attention over the slots. Without padding they lie last, where the kernels skip
        what nobody sees.
        """
        count = slots_k.shape[2]
        if layout.start is None:
            return flash.attention(
                q,
                slots_k,
                slots_v,
                Earlier(size=self.block, slots=self.slots, offset=total - count),
                Layout(tail=total - count),
                causal=False,
                **options,
            )
        return flash.attention(
            q,
            slots_k,
            slots_v,
            Earlier(size=self.block, slots=self.slots),
            Layout(slots=count, tail=total, start=layout.start),
            causal=False,
            **options,
        )

    def _few(
        self, q: Tensor, slots_k: Tensor, slots_v: Tensor, layout: Layout, total: int, **options
    ):
        """The same for the decode kernels."""
        number = torch.arange(total - q.shape[2], total, device=q.device)[None]
        i = number if layout.start is None else number - layout.start[:, None]
        seen = (
            torch.arange(slots_k.shape[2], device=q.device)
            < (i.clamp(min=0) // self.block * self.slots)[..., None]
        )
        return decode.attention(q, slots_k, slots_v, counts=seen[:, None], causal=False, **options)

    def finished(self, k: Tensor, v: Tensor, call: Call, impl: str) -> tuple[Tensor, Tensor]:
        """Slots (B, Hkv, S, D) and (B, Hkv, S, Dv) of all blocks that any row may have finished,
        where S = (tokens // block) slots. A state then holds them, and has let go of the tokens
        that nobody needs any more."""
        layout, state = call.layout, call.state
        past = 0 if state is None else state.past
        total = layout.tokens(k.shape[2])
        held = (None, None) if state is None else (state.slots_k, state.slots_v)
        fill = self._fill if layout.start is None else self._fill_rows
        both = tuple(
            fill(x, weight, old, layout, past, total, impl)
            for x, weight, old in zip((k, v), self.weights, held, strict=True)
        )
        if state is not None:
            state.slots_k, state.slots_v = both
            state.let_go()
        return both

    def _fill(
        self, x, weight, old: Tensor | None, layout: Layout, past: int, total: int, impl: str
    ) -> Tensor:
        """Appends the slots of the blocks that ended in this call; all rows are alike."""
        # `old` may reach further: after a crop its last blocks are no longer finished
        done, now = past // self.block, total // self.block
        parts = [] if old is None else [old[:, :, : done * self.slots]]
        if now > done or old is None:
            low = done * self.block - layout.tail
            parts.append(
                self._project(x[:, :, low : low + (now - done) * self.block], weight, impl)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _fill_rows(
        self, x, weight, old: Tensor | None, layout: Layout, past: int, total: int, impl: str
    ) -> Tensor:
        """The same where rows begin at different tokens: each one's newly finished blocks go to
        their own slots.
        """
        batch, heads, tokens, dim = x.shape
        blocks = total // self.block
        candidates = min((total - past) // self.block + 1, blocks)
        start = layout.start[:, None]
        # (B, candidates): which blocks of its own each row may have finished in this call; the
        # shapes must not depend on how many it has, or every call would wait for the device
        which = (past - start).clamp(min=0) // self.block + torch.arange(
            candidates, device=x.device
        )
        number = (start + which * self.block)[..., None] + torch.arange(self.block, device=x.device)
        at = (number - layout.tail).flatten(1).clamp(max=tokens - 1)
        ended = number[..., -1] < total
        there = layout.mask.gather(1, at) & ended.repeat_interleave(self.block, dim=1)
        x = x.gather(2, at[:, None, :, None].expand(-1, heads, -1, dim))
        new = self._project(torch.where(there[:, None, :, None], x, 0.0), weight, impl)
        # one block more, cut off at the end, where `scatter` puts what has not ended
        room = new.new_zeros(batch, heads, (blocks + 1) * self.slots, dim)
        if old is not None:
            kept = min(old.shape[2], blocks * self.slots)
            room[:, :, :kept] = old[:, :, :kept]
        place = torch.where(ended, which, blocks)[..., None] * self.slots
        place = (
            (place + torch.arange(self.slots, device=x.device))
            .flatten(1)[:, None, :, None]
            .expand_as(new)
        )
        return room.scatter(2, place, new)[:, :, : blocks * self.slots]

    def _project(self, x: Tensor, weight: Tensor, impl: str) -> Tensor:
        """(B, Hkv, n * block, D) -> (B, Hkv, n * slots, D)"""
        batch, heads, tokens, dim = x.shape
        blocks = tokens // self.block
        if not blocks:
            return x.new_zeros(batch, heads, 0, dim)
        # blocks become rows of the batch
        rows = x.unflatten(2, (blocks, self.block)).transpose(1, 2).flatten(0, 1)
        slots = linformer.project(rows, weight, impl=impl)
        return slots.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)

    def cost(self, shape: Shape) -> Cost:
        """The products with the slots of earlier blocks and the keys of the own one, and the
        projection of the blocks that end in this call. Backward: that twice, and the scores
        again."""
        first, size = shape.keys - shape.queries, self.block
        i = torch.arange(first, shape.keys)
        pairs = shape.batch * shape.heads * int((i // size * self.slots + i % size + 1).sum())
        ending = shape.keys // size - first // size
        both = shape.head_dim + shape.value_dim
        projecting = 2 * shape.batch * shape.kv_heads * self.slots * ending * size * both
        token = shape.kv_bytes // shape.keys
        done = first // size * self.slots  # slots that were there before
        past = done + first % size
        weights = self.weight_bytes(shape.kv_heads, size) if ending else 0
        if shape.backward:
            return Cost(
                flops=2 * projecting + 2 * pairs * (3 * shape.head_dim + 2 * shape.value_dim),
                read_bytes=shape.query_bytes
                + (past + shape.queries) * token
                + weights
                + 2 * shape.output_bytes
                + shape.lse_bytes,
                write_bytes=shape.query_bytes + shape.kv_bytes + weights,
            )
        slots = shape.keys // size * self.slots
        return Cost(
            flops=projecting + 2 * pairs * both,
            read_bytes=shape.query_bytes + (past + shape.queries) * token + weights,
            write_bytes=shape.output_bytes,
            state_bytes=(slots + SlotState(size).held(shape.keys)) * token,
        )
