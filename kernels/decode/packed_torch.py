"""Attention over a packed cache in plain torch: any number of queries, no copy of the cache in full
precision. What CPU users get.

Scores are made for as many keys at once as `SCORES` allows, a span, and spans are merged by
log-sum-exp: decoding is one softmax over all keys, and a chunk of a long prompt walks through the
cache. `packed_tiles` makes them from the codes.

Shapes: q (B, Hq, Tq, D); rows (Z, R, D) for Z = B * Hkv heads, R = Hq / Hkv * Tq queries that share
a K/V head; scores (Z, R, keys of a span)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..flash.pattern import Blocks, Pattern, Window
from ..flash.rules import Bias
from ..merge import in_order
from .packed_cache import PackedCache
from .packed_tiles import TILE, Full, Packed, Stretch
from .turn import Turn

SCORES = 2**23  # of one query token's span, 32 MiB in fp32: decoding has no more than it must
MANY = 2**18  # ... of a span where there are more, 1 MiB
SHORTEST = 64  # keys of a span
USUAL = 512  # ... that as many queries walk together as leave room for


def attention(
    q: Tensor,
    cache: PackedCache,
    pattern: Pattern,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
    q_first: Tensor | None,
    turn: Turn | None,
    bias: Bias | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `packed.attention`; products in fp32, or fp64 for fp64 queries."""
    if type(pattern) not in (Pattern, Window, Blocks):
        raise ValueError(
            f"packed attention: got a {type(pattern).__name__}, valid are Pattern, Window and "
            "Blocks"
        )
    parts, step = [], max(1, MANY // (q.shape[0] * q.shape[1] * USUAL))
    for start in range(0, q.shape[2], step):
        queries = slice(start, start + step)
        walk = Walk(q, cache, pattern, queries, causal, scale, softcap, q_first, turn, bias)
        parts.append(walk.run(need_lse))
    return in_order(parts)


class Walk:
    """Some of the queries, and their way through the cache."""

    def __init__(self, q, cache, pattern, queries, causal, scale, softcap, q_first, turn, bias):
        self.cache, self.pattern, self.causal, self.softcap, self.turn = (
            cache,
            pattern,
            causal,
            softcap,
            turn,
        )
        self.bias = bias
        self.dtype, self.heads, self.total, kv_heads = (
            q.dtype,
            q.shape[1],
            q.shape[2],
            cache.k.shape[1],
        )
        work = torch.promote_types(q.dtype, torch.float32)

        def rows(x: Tensor | None) -> Tensor | None:
            """(B, Hq, Tq, D) -> (B, Hkv, R, D)"""
            if x is None:
                return None
            x = x[:, :, queries].to(work) * scale
            return x.reshape(x.shape[0], kv_heads, -1, x.shape[3])

        self.rows, self.rows_first = rows(q), rows(q_first)
        self.rows_far = rows(turn.q_far) if turn else None
        self.queries, self.tokens = queries, len(range(self.total)[queries])
        self.room = SCORES if self.tokens == 1 else MANY
        self._i = self._positions = None
        # The queries' numbers, where the host knows them and rows differ in nothing but their keys.
        self.low = self.high = None
        if isinstance(cache.total, int):
            self.low = cache.total - self.total + queries.start
            self.high = self.low + self.tokens - 1

    def run(self, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        """The output (B, Hq, Tq, Dv), and log-sum-exps (B, Hq, Tq) if asked for."""
        shape = (len(self.rows), self.heads, self.tokens)
        highest = total = out = None
        spans = list(self.spans())
        plain = len(spans) == 1 and not need_lse and all(map(self.all_seen, spans[0]))
        for span in spans:
            s = (
                torch.cat([self.scores(part) for part in span], dim=-1)
                if len(span) > 1
                else self.scores(span[0])
            )
            if plain:  # what follows in general, in one call
                return self.weighed(span, s.softmax(dim=-1)).to(self.dtype).view(*shape, -1), None
            top = s.amax(dim=-1, keepdim=True)
            higher = top if highest is None else torch.maximum(highest, top)
            # finite: no inf - inf where nothing is seen
            base = higher.clamp(min=torch.finfo(s.dtype).min)
            p = (s - base).exp_()
            products, seen = self.weighed(span, p), p.sum(dim=-1, keepdim=True)
            if highest is not None:
                fade = (highest - base).exp_()
                products, seen = products + out * fade, seen + total * fade
            highest, total, out = higher, seen, products
        if out is None:
            dim = self.cache.v.dim
            empty = self.rows.new_full(shape, -torch.inf)
            return self.rows.new_zeros(*shape, dim, dtype=self.dtype), empty if need_lse else None
        out = (out / torch.where(total > 0, total, 1.0)).to(self.dtype).reshape(*shape, -1)
        return out, (highest + total.log()).reshape(shape) if need_lse else None

    @staticmethod
    def weighed(span: list[Stretch], p: Tensor) -> Tensor:
        """p v: (B, Hkv, R, n), n the keys of the span -> (B, Hkv, R, Dv)."""
        if len(span) == 1:
            return span[0].weigh(p)
        weights = p.split([part.keys for part in span], dim=-1)
        first, *others = (part.weigh(w) for part, w in zip(span, weights, strict=True))
        for other in others:
            first += other
        return first

    # Which keys
    # ----------------------------------------------------------------------------------------------

    def spans(self) -> Iterator[list[Stretch]]:
        """Stretches, as many at once as their scores have room."""
        lines = self.rows.shape[0] * self.rows.shape[1] * self.rows.shape[2]
        span, keys = [], 0
        for part in self.parts():
            if span and (keys + part.keys) * lines > self.room:
                yield span
                span, keys = [], 0
            span.append(part)
            keys += part.keys
        if span:
            yield span

    def parts(self) -> Iterator[Stretch]:
        """What some query may see, in the cache's order."""
        cache, slots = self.cache, self.cache.slots
        if slots:
            yield Full(cache.k_first, cache.v_first, 0, None if cache.start is not None else 0)
        k, v, low, length = cache.k, cache.v, self.lowest(), self.length()
        number = cache.packed_from if cache.packed_numbers is None else None
        unit = math.lcm(k.coding.unit, v.coding.unit)
        begin = (
            0
            if low is None or number is None
            else min(max(0, low - number) // unit * unit, k.tokens)
        )
        for start in range(begin, k.tokens, length):
            part, at = (
                slice(start, min(start + length, k.tokens)),
                None if number is None else number + start,
            )
            codes = (k, v) if part == slice(0, k.tokens) else (k[part], v[part])
            yield Packed(*codes, slots + start, at)
        rest = cache.k_rest.shape[2]
        number = cache.total - rest if cache.rest_numbers is None else None
        begin = 0 if low is None or number is None else min(max(0, low - number), rest)
        for start in range(begin, rest, length):
            part, at = (
                slice(start, min(start + length, rest)),
                None if number is None else number + start,
            )
            yield Full(
                cache.k_rest[:, :, part], cache.v_rest[:, :, part], slots + k.tokens + start, at
            )

    def length(self) -> int:
        """Of the longest stretch: it has room for its scores, and where keys turn, for these."""
        batch, kv_heads, rows, dim = self.rows.shape
        room = self.room // (batch * kv_heads * rows)
        if self.turn:
            room = min(room, TILE // (batch * kv_heads * dim))
        unit = math.lcm(self.cache.k.coding.unit, self.cache.v.coding.unit)
        return max(unit, max(SHORTEST, room) // unit * unit)

    def lowest(self) -> int | None:
        """The number of the oldest key behind the slots that some query may see; None: not
        known.
        """
        if self.low is None or self.pattern.first > self.cache.slots:
            return None
        # each row has its own borders
        if isinstance(self.pattern, Blocks) and self.cache.start is not None:
            return self.low - (self.pattern.look_back + 1) * self.pattern.size + 1
        return self.pattern.span(self.low, self.high + 1)[0]

    def positions(self, part: Stretch) -> Tensor:
        """(1 or B, n), -1 for what is not to be seen."""
        if self._positions is None:
            self._positions = self.cache.key_positions()
        return self._positions[:, part.index : part.index + part.keys]

    @property
    def i(self) -> Tensor:
        """(1 or B, T): the queries' positions."""
        if self._i is None:
            self._i = self.cache.query_positions(self.total)[:, self.queries]
        return self._i

    def all_seen(self, part: Stretch) -> bool:
        """Whether every query sees every key, as far as the host knows."""
        cache, pattern = self.cache, self.pattern
        if (
            self.low is None
            or part.number is None
            or cache.start is not None
            or cache.mask is not None
        ):
            return False
        last = part.number + part.keys - 1
        if part.index >= cache.slots > part.number or (self.causal and last > self.low):
            return False
        if type(pattern) is Pattern or last < pattern.first:
            return True
        ahead = self.causal or last < self.low + getattr(pattern, "ahead", 0)
        return type(pattern) is Window and part.number > self.high - pattern.back and ahead

    # Scores
    # ----------------------------------------------------------------------------------------------

    def scores(self, part: Stretch) -> Tensor:
        """(B, Hkv, R, n) in fp32, -inf where a query does not see a key."""
        if self.turn is None:
            s = part.scores(self.rows)
            if self.rows_first is not None and part.index < self.cache.slots:
                s = self.of_first(part, part.scores(self.rows_first), s)
        else:
            s = self.turned(part)
        if self.softcap is not None:
            s = self.softcap * torch.tanh(s / self.softcap)
        all_seen = self.all_seen(part)
        if all_seen and self.bias is None:
            return s
        i, j = self.i[:, None, :, None], self.positions(part)[:, None, None, :]
        if self.bias is not None:
            self.by_head(s).add_(self.bias.values((i - j)[:, 0]).transpose(0, 1))
        if all_seen:
            return s
        shifted = isinstance(self.pattern, Blocks) and self.pattern.shifted
        h = torch.arange(self.heads if shifted else 1, device=s.device)[None, :, None, None]
        return (
            self.by_head(s)
            .masked_fill(~self.pattern.sees(i, j, h, self.heads, self.causal), -torch.inf)
            .view(s.shape)
        )

    def turned(self, part: Stretch) -> Tensor:
        """The scores of keys that are rotated now: near, far, or some of each."""
        turn, k, at = self.turn, part.unpacked().to(self.rows.dtype), self.positions(part)
        apart = (
            None
            if self.low is None or part.number is None
            else (self.low - part.number - part.keys + 1, self.high - part.number)
        )
        all_far = turn.window is not None and apart is not None and apart[0] >= turn.window
        near = far = None
        if not all_far or (self.rows_first is not None and part.index < self.cache.slots):
            keys = turn.keys(k, at).mT
            near = self.rows @ keys
            if self.rows_first is not None and part.index < self.cache.slots:
                near = self.of_first(part, self.rows_first @ keys, near)
        if turn.window is not None and (apart is None or apart[1] >= turn.window):
            far = self.rows_far @ turn.keys(k, at, far=True).mT
        if near is None or far is None:
            return far if near is None else near
        distance = self.i[:, None, :, None] - at[:, None, None, :]
        return torch.where(distance >= turn.window, self.by_head(far), self.by_head(near)).reshape(
            near.shape
        )

    def of_first(self, part: Stretch, first: Tensor, others: Tensor) -> Tensor:
        """`first` for the keys at positions below `pattern.first`, which are slots."""
        at = torch.arange(part.keys, device=first.device) + part.index
        return torch.where(at < self.pattern.first, first, others)

    def by_head(self, s: Tensor) -> Tensor:
        """(B, Hkv, R, n) -> (B, Hq, Tq, n), a view."""
        return s.view(s.shape[0], self.heads, self.tokens, s.shape[3])
