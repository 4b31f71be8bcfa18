"""Exact attention in tiles: a block of queries against only the keys that one of them may see.
Linear in memory.

A `Problem` is a call, or a part of one, whose rows and heads share their borders (`torch_impl`
splits calls into them). In it the pattern is one function of (query, key) for all rows and heads
but for `hidden` keys (padding), and what does not fit that (sinks: keys at the first positions,
wherever they lie) is a separate, small `Side`.

Shapes: N = B * Hkv heads of keys and values, G query heads each. q (N, G, Tq, D), k (N, Tk, D), v
(N, Tk, Dv). A tile has S queries, so R = G * S rows of scores, against L keys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .pattern import Blocks, Pattern, Window
from .torch_bias import BiasTiles, Share
from .torch_dropped import Dropped

# Measured on 2 AVX2 cores with 512 KiB of L2 each, window 512, 8 heads of 64, 16384 tokens.
QUERIES = 64  # of a tile: 32 and 128 are 5 to 15 % slower
KEYS = 1024  # at a time; what further ones give is merged by a running maximum
WORK = 640 * 1024  # bytes of scores that a thread has at a time, to stay in its cache
# scores are kept times log2(e): exp2 takes 0.29 ns an element there, exp 0.52
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Side:
    """Keys at positions 0 .. P - 1 of each row, gathered: sinks, and keys that outlived their
    ring.
    """

    there: Tensor  # (1 or B, P) bool
    first: int  # positions below it are seen by all
    phase: int  # to add to positions before `near` looks at them


@dataclass(frozen=True)
class Part:
    """Some keys of a tile: columns [k0, k1) of the main keys or of the side, and what hides some of
    their scores.
    """

    side: bool
    other: bool  # scored with q_first
    k0: int
    k1: int
    # columns, and what to add to them: broadcast to (n, G, S, columns)
    masks: list[tuple[int, int, Tensor]]


@dataclass(frozen=True)
class Problem:
    """Queries, keys and their pattern. `first_query` and `first_key` are numbers of tokens in the
    sequence; a number plus `phase` is what `pattern.near` looks at. Of the pattern's keys only
    those at distances i - j in [lag, reach) count, the first if causal."""

    pattern: Pattern
    causal: bool
    scale: float
    softcap: float | None
    queries: int
    keys: int
    first_query: int
    first_key: int
    phase: int = 0
    start: Tensor | None = None  # (B,) int64, of queries that are padding
    hidden: Tensor | None = None  # (1 or B, keys) bool: keys that no query sees
    side: Side | None = None
    lag: int = 0
    reach: int | None = None
    drop: Dropped | None = None
    strips_made: dict = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        """Whether only causality hides a key, besides padding."""
        return type(self.pattern) is Pattern and self.reach is None

    def key_range(self, a: int, b: int) -> tuple[int, int]:
        """[k0, k1) of the keys that some of the queries [a, b) may see."""
        low, high = self.first_query + a, self.first_query + b
        k0, k1 = self.pattern.span(low + self.phase, high + self.phase)
        k0 = 0 if k0 is None else max(k0 - self.phase - self.first_key, 0)
        k1 = self.keys if k1 is None else min(k1 - self.phase - self.first_key, self.keys)
        if self.causal:
            k1 = min(k1, high - self.lag - self.first_key)
        if self.reach is not None:
            k0 = max(k0, low - self.reach + 1 - self.first_key)
        return k0, max(k0, k1)

    def tiles(self, step: int) -> Iterator[tuple[int, int, int, int]]:
        """(query, its end, key, its end) of each tile."""
        a = 0
        while a < self.queries:
            b = min(a + step, self.queries)
            # do not straddle a border: the next block's keys would be visited
            if isinstance(self.pattern, Blocks):
                size, number = self.pattern.size, self.first_query + self.phase
                border = (number + b) // size * size - number
                b = border if border > a else b
            k0, k1 = self.key_range(a, b)
            yield a, b, k0 - k0 % 16 if k1 - k0 > 128 else k0, k1  # aligned rows of scores
            a = b

    def strips(
        self, a: int, b: int, k0: int, k1: int, like: Tensor
    ) -> list[tuple[int, int, Tensor]]:
        """Where queries [a, b) do not see all of the keys [k0, k1): columns, and what to add to
        their scores (S, n).

        It depends on how far apart they are, and for blocks on where the borders are, not on where
        they are: so a window's two edge triangles are made once for all of its tiles."""
        low, first = self.first_query + a, self.first_key + k0
        where = {
            Pattern: 0,
            Window: 0,
            Blocks: (low + self.phase) % getattr(self.pattern, "size", 1),
        }
        key = b - a, k1 - k0, low - first, where.get(type(self.pattern), low)
        if self.dense and (not self.causal or low - self.lag - first >= k1 - k0 - 1):
            return []
        if key not in self.strips_made:
            i = torch.arange(low, low + b - a, device=like.device)[:, None]
            j = torch.arange(first, first + k1 - k0, device=like.device)
            near = self.pattern.near(i + self.phase, j + self.phase, None, 1)
            visible = self._within(
                i, j, torch.ones_like(i + j, dtype=torch.bool) if near is None else near
            )
            self.strips_made[key] = _strips(visible, like.dtype)
        return self.strips_made[key]

    def side_bias(self, a: int, b: int, dtype: torch.dtype) -> Tensor:
        """What to add to the scores of queries [a, b) against the side's keys, (1 or B, S, P)."""
        there = self.side.there
        i = torch.arange(self.first_query + a, self.first_query + b, device=there.device)[
            None, :, None
        ]
        if self.start is not None:
            i = i - self.start[:, None, None]
        j = torch.arange(there.shape[1], device=there.device)
        visible = self._within(i, j, there[:, None] & (i >= 0))
        near = self.pattern.near(i + self.side.phase, j + self.side.phase, None, 1)
        if near is not None:
            visible = visible & (near | (j < self.side.first))
        return torch.zeros(visible.shape, dtype=dtype, device=there.device).masked_fill_(
            ~visible, -torch.inf
        )

    def _within(self, i: Tensor, j: Tensor, visible: Tensor) -> Tensor:
        """`visible`, of the pairs whose distance counts."""
        if self.causal:
            visible = visible & (j <= i - self.lag)
        return visible if self.reach is None else visible & (i - j < self.reach)


def _strips(visible: Tensor, dtype: torch.dtype) -> list[tuple[int, int, Tensor]]:
    columns = (~visible.all(dim=0)).nonzero()[:, 0].tolist()
    jumps = [n for n in range(1, len(columns)) if columns[n] > columns[n - 1] + 1]
    if not columns:
        return []
    runs = [(columns[0], columns[-1] + 1)]
    if len(jumps) == 1:  # the two edges of a window, with columns between them that all see
        runs = [(columns[0], columns[jumps[0] - 1] + 1), (columns[jumps[0]], columns[-1] + 1)]
    added = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, -torch.inf
    )
    return [(c0, c1, added[:, c0:c1].contiguous()) for c0, c1 in runs]


class Space:
    """Memory for temporaries, reused from tile to tile."""

    def __init__(self, like: Tensor):
        self.like, self.held = like, {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = self.like.new_empty(size)
        return self.held[name][:size].view(shape)


class Tiles:
    """The tiles of a problem, for some of the N heads at a time: what forward and backward both
    walk through.
    """

    def __init__(self, problem: Problem, q: Tensor, k: Tensor, other: Tensor | None, buffers: int):
        self.problem, self.like, self.other = problem, q, other is not None
        heads, self.groups = q.shape[:2]
        threads = torch.get_num_threads() if q.device.type == "cpu" else 64
        room = threads * WORK // (q.element_size() * buffers)
        step = QUERIES
        widest = min(KEYS, max((k1 - k0 for _, _, k0, k1 in problem.tiles(step)), default=1) or 1)
        while step > 16 and step * self.groups * widest > room:  # many query heads share a K/V head
            step //= 2
        self.rows, self.tiles = step, list(problem.tiles(step))
        rounds = -(-heads * step * self.groups * widest // room)
        self.step = -(-heads // min(rounds, heads))
        self.heads = heads
        self.key_bias, self.hidden_before = None, None
        if problem.hidden is not None:
            bias = torch.zeros(problem.hidden.shape, dtype=q.dtype, device=q.device)
            self.key_bias = self._per_head(bias.masked_fill_(problem.hidden, -torch.inf))
            self.hidden_before = [0, *problem.hidden.any(dim=0).cumsum(0).tolist()]

    def _per_head(self, x: Tensor) -> Tensor:
        """(1 or B, ...) -> (1 or N, ...)"""
        return x if x.shape[0] == 1 else x.repeat_interleave(self.heads // x.shape[0], dim=0)

    def __iter__(self) -> Iterator[tuple[slice, int, int, list[Part]]]:
        """(heads, query, its end, parts) of each tile."""
        for h in range(0, self.heads, self.step):
            heads = slice(h, min(h + self.step, self.heads))
            for a, b, k0, k1 in self.tiles:
                parts = [self._main(heads, a, b, c, min(c + KEYS, k1)) for c in range(k0, k1, KEYS)]
                yield (
                    heads,
                    a,
                    b,
                    parts + (self._sides(heads, a, b) if self.problem.side is not None else []),
                )

    def _main(self, heads: slice, a: int, b: int, k0: int, k1: int) -> Part:
        masks = self.problem.strips(a, b, k0, k1, self.like)
        if self.hidden_before is not None and self.hidden_before[k1] > self.hidden_before[k0]:
            bias = self.key_bias if self.key_bias.shape[0] == 1 else self.key_bias[heads]
            masks = [*masks, (0, k1 - k0, bias[:, None, None, k0:k1])]
        return Part(False, False, k0, k1, masks)

    def _sides(self, heads: slice, a: int, b: int) -> list[Part]:
        bias = self._per_head(self.problem.side_bias(a, b, self.like.dtype))
        bias = bias[:, None] if bias.shape[0] == 1 else bias[heads, None]
        count, first = bias.shape[-1], min(self.problem.side.first, bias.shape[-1])
        cuts = [(True, 0, first), (False, first, count)] if self.other else [(False, 0, count)]
        return [
            Part(True, other, p0, p1, [(0, p1 - p0, bias[..., p0:p1])])
            for other, p0, p1 in cuts
            if p1 > p0
        ]


def _score(problem: Problem, s: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """rows (n, R, D), keys (n, L, D) -> s (n, R, L): scores times log2(e), or tanh's value with
    softcap.
    """
    scale = problem.scale * LOG2E if problem.softcap is None else problem.scale / problem.softcap
    torch.baddbmm(s, rows, keys.transpose(1, 2), beta=0, alpha=scale, out=s)
    return s if problem.softcap is None else s.tanh_()


def _finish(
    problem: Problem, s: Tensor, part: Part, groups: int, biases: Iterable[Share]
) -> Tensor:
    """What follows the product and the soft cap: biases, and -inf for what is hidden."""
    if problem.softcap is not None:
        s.mul_(problem.softcap * LOG2E)
    by_group = s.view(s.shape[0], groups, -1, s.shape[-1])
    for heads, bias in biases:
        by_group[heads].add_(bias)
    for c0, c1, added in part.masks:
        by_group[..., c0:c1].add_(added)
    return s


def forward(problem: Problem, q, k, v, q_first, k_side, v_side, table) -> tuple[Tensor, Tensor]:
    """-> out (N, G, Tq, Dv) and the log-sum-exp (N, G, Tq), 0 and -inf for queries that see
    nothing.

    table (Hq or 1, n): biases by distance, from 0 to the farthest that there is; None: none.
    """
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3])
    space = Space(q)
    groups, dim, value_dim = q.shape[1], q.shape[3], v.shape[2]
    tiles = Tiles(problem, q, k, q_first, 1)
    bias = _bias_tiles(tiles, table, k, False)
    for heads, a, b, parts in tiles:
        n, size = heads.stop - heads.start, groups * (b - a)
        if not parts:
            out[heads, :, a:b], lse[heads, :, a:b] = 0, -torch.inf
            continue
        rows = q[heads, :, a:b].reshape(n, size, dim)
        top = total = got = None
        for part in parts:
            keys, values = (k_side, v_side) if part.side else (k, v)
            keys, values = keys[heads, part.k0 : part.k1], values[heads, part.k0 : part.k1]
            queries = q_first[heads, :, a:b].reshape(n, size, dim) if part.other else rows
            s = _score(problem, space("scores", n, size, part.k1 - part.k0), queries, keys)
            _finish(problem, s, part, groups, _biases(bias, part, heads, a, b))
            highest = s.amax(dim=-1, keepdim=True).clamp_(min=-1e30)  # -inf - -inf would be NaN
            if top is not None:
                highest = torch.maximum(top, highest)
            s.sub_(highest).exp2_()
            sums = s.sum(dim=-1, keepdim=True)  # of all weights, dropped ones too
            if problem.drop is not None:
                s.mul_(problem.drop.factors(s, part, heads, a, b))
            if top is None:
                total, got = sums, torch.bmm(s, values, out=space("out", n, size, value_dim))
            else:
                keep = top.sub_(highest).exp2_()
                total = total.mul_(keep).add_(sums)
                torch.baddbmm(got.mul_(keep), s, values, out=got)
            top = highest
        lse[heads, :, a:b] = (top + total.log2()).mul_(1 / LOG2E).view(n, groups, b - a)
        got.div_(total.clamp_(min=1e-30))  # 0 where nothing was seen; otherwise it is at least 1
        out[heads, :, a:b] = got.view(n, groups, b - a, value_dim)
    return out, lse


def _bias_tiles(tiles: Tiles, table: Tensor | None, k: Tensor, gradients: bool) -> BiasTiles | None:
    if table is None:
        return None
    rows = 1 if tiles.problem.start is None else len(tiles.problem.start)
    kv_heads = table.shape[0] // tiles.groups if table.shape[0] > 1 else k.shape[0] // rows
    return BiasTiles(table * LOG2E, tiles.problem, tiles.rows, kv_heads, tiles.groups, gradients)


def _biases(bias: BiasTiles | None, part: Part, heads: slice, a: int, b: int) -> Iterable[Share]:
    if bias is None:
        return ()
    return (bias.side if part.side else bias.main)(heads, a, b, part.k0, part.k1)


def backward(
    problem: Problem,
    q,
    k,
    v,
    q_first,
    k_side,
    v_side,
    table,
    out,
    lse,
    d_out,
    d_lse,
    learned: bool = False,
):
    """Gradients of q, k, v, q_first, k_side, v_side, table in the shapes that `forward` takes; the
    table's only if it is `learned`, None otherwise."""
    tensors = (q, k, v, q_first, k_side, v_side)
    dq, dk, dv, dq_first, dk_side, dv_side = (
        None if x is None else torch.zeros_like(x) for x in tensors
    )
    space = Space(q)
    groups, dim = q.shape[1], q.shape[3]
    tiles = Tiles(problem, q, k, q_first, 2)
    bias = _bias_tiles(tiles, table, k, learned)
    for heads, a, b, parts in tiles:
        n, size = heads.stop - heads.start, groups * (b - a)
        rows, d_rows = (x[heads, :, a:b].reshape(n, size, x.shape[-1]) for x in (q, d_out))
        sums = lse[heads, :, a:b].reshape(n, size, 1) * LOG2E
        delta = (d_rows * out[heads, :, a:b].reshape(d_rows.shape)).sum(dim=-1, keepdim=True)
        if d_lse is not None:
            delta -= d_lse[heads, :, a:b].reshape(n, size, 1)
        blind = sums == -torch.inf
        sums.masked_fill_(blind, torch.inf)  # so that every weight is 0
        delta.masked_fill_(blind, 0)
        for part in parts:
            columns = heads, slice(part.k0, part.k1)
            keys, values, d_keys, d_values = (
                x[columns]
                for x in ((k_side, v_side, dk_side, dv_side) if part.side else (k, v, dk, dv))
            )
            queries = q_first[heads, :, a:b].reshape(n, size, dim) if part.other else rows
            s = _score(problem, space("scores", n, size, part.k1 - part.k0), queries, keys)
            slope = None if problem.softcap is None else 1 - s.square()  # of the soft cap
            _finish(problem, s, part, groups, _biases(bias, part, heads, a, b)).sub_(sums).exp2_()
            factors = problem.drop and problem.drop.factors(s, part, heads, a, b)
            weights = s if factors is None else s * factors
            torch.baddbmm(d_values, weights.transpose(1, 2), d_rows, out=d_values)
            ds = torch.bmm(d_rows, values.transpose(1, 2), out=space("gradients", *s.shape))
            ds = ds if factors is None else ds.mul_(factors)
            ds.sub_(delta).mul_(s)
            if learned:
                add = bias.add_side if part.side else bias.add_main
                add(ds.view(n, groups, b - a, -1), heads, a, b, part.k0, part.k1)
            if slope is not None:
                ds.mul_(slope)
            d_queries = (dq_first if part.other else dq)[heads, :, a:b]
            d_queries += torch.bmm(ds, keys).mul_(problem.scale).view(d_queries.shape)
            torch.baddbmm(d_keys, ds.transpose(1, 2), queries, alpha=problem.scale, out=d_keys)
    return dq, dk, dv, dq_first, dk_side, dv_side, bias.gradient() if learned else None
