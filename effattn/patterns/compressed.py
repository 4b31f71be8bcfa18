"""Compressed memory (Compressive Transformer, Rae et al., arXiv:1911.05507, section 3.1): what a
window evicts is kept as means of `group` tokens, in a memory that is bounded itself.

A query attends to the concatenation of three memories, oldest first,

    [ k_0 .. k_(s-1) ; mean(k_(gc) .. k_(gc+c-1)) for the n newest groups g ; k_(ec) .. k_i ]

and to values alike: s sinks, the means of f_c = mean pooling over groups of c, and the newest
tokens. A group is whole tokens until all of it is beyond the window: e = i // c - window / c + 1 is
the first group of the window. As in the paper positions are places in that concatenation, so that a
mean takes one. A mean counts as the c tokens that it stands for, log(c) on its score, or a pooled
past would lose against exact keys (the paper adds nothing; its memories are trained).

q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv); R: 1, or B where rows are padded; M: means
of a call."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effattn.interface import Cost, Shape
from effattn.kernels import decode, flash
from effattn.kernels.flash.pattern import Blocks, Layout, Window, layout_of
from effattn.kernels.merge import merge
from effattn.states.base import State
from effattn.states.compressed import CompressedState, taken
from effattn.states.full import FullState


@dataclass(frozen=True)
class Compressed:
    """window, sinks: tokens, both multiples of `group`; means: groups that are remembered."""

    window: int
    sinks: int
    group: int
    means: int

    @property
    def look_back(self) -> int:
        """Groups before a query's own that its window has."""
        return self.window // self.group - 1

    @property
    def farthest(self) -> int:
        """The last place of the cache."""
        return self.sinks + self.means + self.window - 1

    def first_group(self, i):
        """The first group that the query at position i sees token by token, sinks apart."""
        return (i // self.group - self.look_back).clamp(min=self.sinks // self.group)

    def new_state(self, impl: str) -> State:
        """Everything for the reference."""
        if impl == "reference":
            return FullState()
        return CompressedState(self.window, self.sinks, self.group, self.means)

    def held(self, tokens: int) -> int:
        """Places of tokens, sinks and means that a state has after `tokens`."""
        state = CompressedState(self.window, self.sinks, self.group, self.means)
        return state.held(tokens) + self.sinks + state.places

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state, rotary, impl: str, **how
    ) -> tuple[Tensor, Tensor]:
        """The output (B, Hq, Tq, Dv) and its log-sum-exp (B, Hq, Tq), on checked arguments. how:
        scale and softcap."""
        layout = layout_of(mask)
        if state is not None:
            k, v, layout = state.append(k, v, mask)
        if impl == "reference":
            return reference(self, q, k, v, mask, rotary, **how)
        first = layout.start
        if first is None:
            first = torch.zeros(1, dtype=torch.int64, device=q.device)
        total = layout.tokens(k.shape[2])
        # without a state the means from before the queries are made here, too
        before = min(self.means, (total - q.shape[2]) // self.group)
        held = before if state is None else state.places
        call = _Call(self, q.shape[2], total, first, layout.start is not None, held)
        low = 0 if state is None else held
        means = [call.means_of(x, layout.tail, low) for x in (k, v)]
        if state is not None:
            state.begin()
            old = state.before(first)
            means = [torch.cat(both, dim=2) for both in zip(old, means, strict=True)]
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *means))
        few = q.shape[2] <= decode.MOST_QUERIES and not learning
        how |= {"impl": impl, "lse": True}
        parts = [self._near(q, k, v, layout, state, rotary, few, how)]
        if call.seen > call.empty:
            some = (x[:, :, call.empty : call.seen] for x in means)
            out, lse = call.far(q, *some, rotary, few, how)
            parts.append((out, lse + math.log(self.group)))
        if state is not None:
            state.finish(*means, first, call.padded)
        return merge(parts) if len(parts) > 1 else parts[0]

    def _near(self, q, k, v, layout: Layout, state, rotary, few: bool, how: dict):
        """The window and the sinks."""
        if layout.tail:  # sinks may have left it
            slots, mask = min(self.sinks, layout.tail), layout.mask
            k = torch.cat([state.sinks_k[:, :, :slots], k], dim=2)
            v = torch.cat([state.sinks_v[:, :, :slots], v], dim=2)
            if mask is not None:
                number = layout.start[:, None] + torch.arange(slots, device=k.device)
                mask = torch.cat([number < layout.tail, mask], dim=1)
            layout = replace(layout, slots=slots, mask=mask)
        q_first = None
        if rotary is not None:
            at_q = layout.query_positions(q.shape[2], k.shape[2], q.device).clamp(min=0)
            at_k = layout.key_positions(k.shape[2], k.device).clamp(min=0)
            begins = self.first_group(at_q)
            older = (begins - self.sinks // self.group).clamp(max=self.means)
            place = self.sinks + older + at_q - begins * self.group
            raw = q
            q, k = rotary(raw, k, _alike(at_q), _alike(at_k))
            if self.sinks:
                q_first, _ = rotary(raw, k[:, :, :1], _alike(place), _alike(at_k[:, :1]))
        pattern = Blocks(size=self.group, look_back=self.look_back, first=self.sinks)
        run = (decode if few else flash).attention
        return run(q, k, v, pattern, layout, q_first=q_first, **how)

    def cost(self, shape: Shape) -> Cost:
        """Two products over what a query sees, a mean as a key; what a cached call reads; backward:
        five products, as in the exact patterns."""
        past = shape.keys - shape.queries
        i = torch.arange(past, shape.keys)
        begins, sinks = self.first_group(i), self.sinks // self.group
        older = (begins - sinks).clamp(max=self.means)
        pairs = shape.batch * shape.heads * int((i + 1 - begins * self.group + older).sum())
        pairs += shape.batch * shape.heads * int((i + 1).clamp(max=self.sinks).sum())
        token, both = shape.kv_bytes // shape.keys, shape.head_dim + shape.value_dim
        read = shape.queries
        if past:
            read += int(past - begins[0] * self.group + older[0]) + min(self.sinks, past)
        if shape.backward:
            return Cost(
                flops=2 * pairs * (3 * shape.head_dim + 2 * shape.value_dim),
                read_bytes=shape.query_bytes
                + read * token
                + 2 * shape.output_bytes
                + shape.lse_bytes,
                write_bytes=shape.query_bytes + shape.kv_bytes,
            )
        return Cost(
            flops=2 * pairs * both,
            read_bytes=shape.query_bytes + read * token,
            write_bytes=shape.output_bytes,
            state_bytes=self.held(shape.keys) * token,
        )


@dataclass(frozen=True)
class _Call:
    """Where the queries and means of a call lie: `queries` last ones of `total` tokens, of which
    each row's begin at number `first` (R,).

    Queries of one group see the same means. So a group is one query for the kernel, and its tokens
    are heads. Groups of queries count from the first query's; place m of the means is m - held
    groups after the first that it does not see, so that the queries of group b see the places
    [held + b - means, held + b): a plain causal window over groups."""

    made: Compressed
    queries: int
    total: int
    first: Tensor
    padded: bool  # whether rows may begin elsewhere than at the first token
    held: int  # places of means from before the call

    @property
    def past(self) -> int:
        """Tokens before the call."""
        return self.total - self.queries

    @property
    def groups(self) -> int:
        """Of queries, at most."""
        size = self.made.group
        before = size - 1 if self.padded else self.past % size
        return -(-(self.queries + before) // size)

    @property
    def seen(self) -> int:
        """Places that some query sees, or lie before those."""
        return self.held + self.groups - 1

    @property
    def empty(self) -> int:
        """First places that no row has anything at."""
        if self.padded:
            return 0
        begins = self.past // self.made.group - self.made.look_back
        return max(0, self.made.sinks // self.made.group - begins + self.held)

    def numbers(self, low: int, high: int) -> Tensor:
        """Of the groups at these places, in their rows: (R, high - low); negative for none."""
        made = self.made
        begins = (self.past - self.first) // made.group - made.look_back
        return begins[:, None] + torch.arange(low, high, device=self.first.device) - self.held

    def means_of(self, x: Tensor, tail: int, low: int) -> Tensor:
        """Of tokens x (B, H, K, D), the first of which is number `tail`: the means at the places
        from `low` on, up to all groups that may leave the window until the call's end, (B, H, n,
        D). What ends later, or was not there, is nothing of meaning."""
        size = self.made.group
        group = self.numbers(low, self.held + self.groups)
        token = group[..., None] * size + torch.arange(size, device=x.device)
        at = (self.first[:, None, None] + token - tail).clamp(0, x.shape[2] - 1)
        found = taken(x, at.flatten(1)).unflatten(2, (-1, size))
        return found.to(torch.promote_types(x.dtype, torch.float32)).mean(dim=3).to(x.dtype)

    def far(self, q: Tensor, means_k: Tensor, means_v: Tensor, rotary, few: bool, how: dict):
        """Attention over the means at the places [empty, seen)."""
        made, low = self.made, self.empty
        group = self.numbers(low, self.seen)
        number = torch.arange(self.past, self.total, device=q.device)
        at_q = number - self.first[:, None]
        if rotary is not None:
            begins = made.first_group(at_q.clamp(min=0))
            place = at_q.clamp(min=0) - begins * (made.group - 1)
            q, means_k = rotary(q, means_k, _alike(place), _alike(group.clamp(min=0)))
        real = group >= made.sinks // made.group
        if few:
            own = at_q // made.group - (self.past - self.first[:, None]) // made.group
            place = torch.arange(low, self.seen, device=q.device)
            last = (self.held + own)[..., None]
            counts = (place < last) & (place >= last - made.means) & real[:, None]
            return decode.attention(
                q, means_k, means_v, counts=counts[:, None], causal=False, **how
            )
        mask = real.expand(q.shape[0], -1) if self.padded else None
        start = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device) if self.padded else None
        layout = Layout(tail=1 + low, start=start, mask=mask)
        window = Window(back=made.means)
        out, lse = flash.attention(self._folded(q), means_k, means_v, window, layout, **how)
        return self._unfolded(out), self._unfolded(lse[..., None])[..., 0]

    @property
    def _offset(self) -> Tensor:
        """The first query's place in its group, (R, 1)."""
        return ((self.past - self.first) % self.made.group)[:, None]

    def _folded(self, q: Tensor) -> Tensor:
        """q (B, Hq, Tq, D) -> (B, Hq * group, groups, D)."""
        size = self.groups * self.made.group
        at = (torch.arange(size, device=q.device) - self._offset).clamp(0, self.queries - 1)
        rows = taken(q, at).unflatten(2, (self.groups, self.made.group))
        return rows.transpose(2, 3).flatten(1, 2)

    def _unfolded(self, x: Tensor) -> Tensor:
        """(B, Hq * group, groups, D) -> (B, Hq, Tq, D)."""
        rows = x.unflatten(1, (-1, self.made.group)).transpose(2, 3).flatten(2, 3)
        return taken(rows, torch.arange(self.queries, device=x.device) + self._offset)


def _alike(positions: Tensor) -> Tensor:
    """(R, n) as a rotary rule takes it: (n,) where all rows are alike."""
    return positions[0] if positions.shape[0] == 1 else positions


def reference(
    made: Compressed,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rotary,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, query by query: the cache that it has, at its places."""
    repeat = q.shape[1] // k.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    sums = torch.full(q.shape[:3], -torch.inf, dtype=q.dtype, device=q.device)
    past, c = k.shape[2] - q.shape[2], made.group
    for row in range(q.shape[0]):
        real = torch.arange(k.shape[2], device=q.device)
        real = real if mask is None else real[mask[row]]
        own_k, own_v = (x[row][:, real].repeat_interleave(repeat, 0) for x in (k, v))
        for i, number in enumerate(real.tolist()):
            if number < past:
                continue
            begins = max(i // c - made.window // c + 1, made.sinks // c)
            groups = range(max(begins - made.means, made.sinks // c), begins)
            keys, values = (
                torch.cat(
                    [
                        x[:, : min(made.sinks, i + 1)],
                        *(x[:, g * c : g * c + c].mean(1, keepdim=True) for g in groups),
                        x[:, begins * c : i + 1],
                    ],
                    dim=1,
                )
                for x in (own_k, own_v)
            )
            query, place = q[row, :, number - past, None], torch.arange(keys.shape[1])
            if rotary is not None:
                place = place.to(q.device)
                query, keys = (x[0] for x in rotary(query[None], keys[None], place[-1:], place))
            scores = (query @ keys.mT)[:, 0] * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            at = min(made.sinks, i + 1)
            weighs = torch.zeros_like(scores)
            weighs[:, at : at + len(groups)] = math.log(c)
            scores = scores + weighs
            out[row, :, number - past] = (scores.softmax(-1)[:, None] @ values)[:, 0]
            sums[row, :, number - past] = scores.logsumexp(-1)
    return out, sums
