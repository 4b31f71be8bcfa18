"""Attention to chosen blocks in plain torch: tiles of queries that chose the same block.

A query and a block that it chose are a pair. Pairs are sorted by block, so that a tile has one
block's keys and up to `QUERIES` tokens that read it; what a pair gives is kept by itself, and a
query's pairs are put together by their log-sum-exps. Pairs whose block is a part of the window (or
of the sinks) are tiles of their own, with a mask. Linear in T in time and memory.

Shapes: P = B * H heads, G query heads each, n blocks a query. q (P, Tq, G, D), k and v (P N, block,
D or Dv): blocks of all heads one behind the other. A tile has S tokens, so S G rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..once import once_differentiable
from ..precision import as_given
from .selection import Rule, far_keys, work_dtype

LOG2E = math.log2(math.e)
QUERIES = 64  # tokens of a tile at most
WORK = 2**20  # bytes of scores that a thread has at a time, to stay in its cache
PAIRS = 2**22  # numbers of pairs' outputs at a time


def attention(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, chosen: Tensor, at: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Tq, D), k (B, H, T, D), v (B, H, T, Dv), chosen (B, H, Tq, n), at (1 or B, Tq) ->
    out (B, Hq, Tq, Dv) in float32 or better, and the log-sum-exp (B, Hq, Tq); 0 and -inf where
    nothing was chosen."""
    (batch, heads), queries = k.shape[:2], q.shape[2]
    count = k.shape[2] // rule.block
    # the queries of a token side by side, so that a tile takes one row for all of them
    rows = q.unflatten(1, (heads, -1)).transpose(2, 3).flatten(0, 1).contiguous()
    blocks = (
        x[:, :, : count * rule.block].unflatten(2, (count, rule.block)).flatten(0, 2)
        for x in (k, v)
    )
    at = at.expand(batch, queries).repeat_interleave(heads, dim=0)
    out, lse = _Attention.apply(
        rule,
        scale,
        chosen.flatten(0, 1),
        at,
        rows,
        *blocks,
    )
    out, lse = (
        x.unflatten(0, (batch, heads)).transpose(2, 3).flatten(1, 2) for x in (out, lse[..., None])
    )
    return out, lse[..., 0]


class _Attention(torch.autograd.Function):
    """Keeps the output and the log-sum-exp; backward computes the weights again."""

    @staticmethod
    def forward(
        ctx,
        rule,
        scale,
        chosen,
        at,
        q,
        k,
        v,
    ):
        work = work_dtype(q)
        out = q.new_zeros((*q.shape[:3], v.shape[2]), dtype=work)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=work)
        for part in _parts(rule, chosen, at, len(k), q.shape[2], v.shape[2]):
            _forward(part, scale, q, k, v, out.flatten(0, 1), lse.flatten(0, 1))
        ctx.given = rule, scale, chosen, at
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse / LOG2E

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, d_out, d_lse):
        rule, scale, chosen, at = ctx.given
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.zeros(x.shape, dtype=out.dtype, device=x.device) for x in (q, k, v)]
        # what all slopes of a row share: the softmax's, and the log-sum-exp's own
        share = (d_out * out).sum(dim=3) - d_lse
        rows = [x.flatten(0, 1) for x in (lse, share, d_out.contiguous())]
        for part in _parts(rule, chosen, at, len(k), q.shape[2], v.shape[2]):
            _backward(part, scale, q, k, v, *rows, *grads)
        given = (grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))
        return None, None, None, None, *given


@dataclass(frozen=True)
class Part:
    """The pairs of some tokens, M of them, numbered through all heads."""

    rule: Rule
    rows: Tensor  # (M,) int64: the tokens
    chosen: Tensor  # (M, n): blocks, numbered through all heads; -1: none
    own: Tensor  # (M, n): the same, in a token's own head
    at: Tensor  # (M,): positions
    group: int  # query heads of a key/value head
    size: int  # tokens of a tile


@dataclass(frozen=True)
class Tiles:
    """g tiles: pairs (g, S), M n where there is none; the tokens of those pairs, numbered through
    all heads; their blocks (g,); what the pairs see of it (g, S, block), None: everything."""

    pairs: Tensor
    rows: Tensor
    blocks: Tensor
    seen: Tensor | None


def _parts(
    rule: Rule, chosen: Tensor, at: Tensor, blocks: int, group: int, dim: int
) -> Iterator[Part]:
    """chosen (P, Tq, n) and at (P, Tq), some tokens at a time."""
    heads, queries, most = chosen.shape
    if not chosen.numel():
        return
    first = torch.arange(heads, device=at.device)[:, None, None] * (blocks // heads)
    everywhere = torch.where(chosen >= 0, chosen + first, -1).flatten(0, 1)
    chosen, at = chosen.flatten(0, 1), at.reshape(-1)
    step = min(max(1, PAIRS // (most * group * dim)), heads * queries)
    # how many tokens read a block of a part, if all are read alike: tiles are no longer than that.
    # Told from sizes alone, so that no token decides in which tiles another one is computed.
    mean = step * most // (-(-step // queries) * (blocks // heads))
    size = min(QUERIES, max(16, 1 << mean.bit_length()))
    for low in range(0, heads * queries, step):
        rows = torch.arange(low, min(low + step, heads * queries), device=at.device)
        part = slice(low, low + step)
        yield Part(
            rule,
            rows,
            everywhere[part],
            chosen[part],
            at[part],
            group,
            size,
        )


class Table(NamedTuple):
    """All tiles of a part with a mask, or all without: pairs (m, S) and blocks (m,)."""

    pairs: Tensor
    blocks: Tensor
    masked: bool


def _tables(part: Part) -> list[Table]:
    """All pairs of a part in tiles, those without a mask first. A tile's size does not depend on
    what is in it, so that the last bits of a row's result do not depend on other rows."""
    rule = part.rule
    near = part.at[:, None] - rule.block * (part.own + 1) + 1 < rule.window
    near |= part.own * rule.block < rule.sinks
    found = []
    for masked in (False, True):
        there = (part.chosen >= 0) & (near == masked)
        pair = there.flatten().nonzero()[:, 0]
        if len(pair):
            block, order = part.chosen.flatten()[pair].int().sort(stable=True)
            cut = _cut(pair[order], block, part.size, part.chosen.numel())
            found.append(Table(*cut, masked))
    return found


def _tiles(part: Part, tables: list[Table], itemsize: int) -> Iterator[Tiles]:
    """The tiles of tables in their order, as many at a time as stay in a cache."""
    rule, most = part.rule, part.chosen.shape[1]
    threads = torch.get_num_threads() if part.at.device.type == "cpu" else 256
    count = max(1, threads * WORK // (part.size * part.group * rule.block * itemsize))
    for tile, blocks, masked in tables:
        for low in range(0, len(tile), count):
            pairs, some = tile[low : low + count], blocks[low : low + count]
            token = (pairs // most).clamp(max=len(part.rows) - 1)
            seen = None
            if masked:
                own = part.own.flatten()[pairs.clamp(max=part.own.numel() - 1)]
                seen = far_keys(rule, part.at[token], own[..., None])[:, :, 0]
            yield Tiles(pairs, part.rows[token], some, seen)


def _cut(
    pair: Tensor,
    block: Tensor,
    size: int,
    none: int,
) -> tuple[Tensor, Tensor]:
    """Sorted pairs (m,) and their blocks -> tiles (g, size) of pairs, `none` where a block has no
    more, and the tiles' blocks (g,)."""
    fresh = torch.ones_like(block, dtype=torch.bool)
    fresh[1:] = block[1:] != block[:-1]
    run, begin = fresh.cumsum(0) - 1, fresh.nonzero()[:, 0]
    end = torch.cat([begin[1:], begin.new_full((1,), len(pair))])
    number = torch.arange(len(pair), device=pair.device)
    first = ((number - begin[run]) % size == 0).nonzero()[:, 0]
    slot = first[:, None] + torch.arange(size, device=pair.device)
    there = slot < end[run[first]][:, None]
    tile = torch.where(there, pair[slot.clamp(max=len(pair) - 1)], none)
    return tile, block[first]


def _scores(
    tiles: Tiles,
    scale: float,
    q: Tensor,
    k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (g, S G, D) times `scale`, keys (g, block, D), and their scores (g, S G, block);
    -inf for what is not seen."""
    queries = _take(q.flatten(0, 1).flatten(1), tiles.rows)
    queries = queries.view(len(queries), -1, q.shape[3]).mul_(scale)
    keys = k.index_select(0, tiles.blocks).to(queries.dtype)
    s = torch.bmm(queries, keys.mT)
    if tiles.seen is not None:
        s.view(*tiles.seen.shape[:2], -1, s.shape[2]).masked_fill_(
            ~tiles.seen[:, :, None], -torch.inf
        )
    return queries, keys, s


def _forward(part: Part, scale: float, q, k, v, out, lse) -> None:
    """Writes out (P Tq, G, Dv) and the log-sum-exp in base 2 (P Tq, G) of a part's tokens.

    What pairs give stays where their tiles lie, and a token collects its own from there: one pass
    over it, where putting each to its token first took four times as long."""
    (tokens, most), group, dim = part.chosen.shape, q.shape[2], v.shape[2]
    tables = _tables(part)
    places = sum(table.pairs.numel() for table in tables)
    # one more, for what is no pair
    parts = out.new_empty((places + 1, group, dim))
    sums = out.new_empty((places + 1, group))
    parts[-1], sums[-1] = 0, -torch.inf
    place = part.rows.new_full((tokens * most + 1,), places)
    low = 0
    for tiles in _tiles(part, tables, out.element_size()):
        high = low + tiles.pairs.numel()
        _, _, s = _scores(tiles, scale * LOG2E, q, k)
        top = s.amax(dim=2, keepdim=True)
        s.sub_(top).exp2_()
        total = s.sum(dim=2, keepdim=True)
        values = v.index_select(0, tiles.blocks).to(s.dtype)
        found = torch.bmm(s, values, out=parts[low:high].view(*s.shape[:2], dim))
        found.div_(total)
        sums[low:high] = top.add_(total.log2_()).view(-1, group)
        place[tiles.pairs.flatten()] = torch.arange(low, high, device=place.device)
        low = high
    place = place[:-1].view(tokens, most)
    weights = sums[place]
    top = weights.amax(dim=1, keepdim=True)
    top = torch.where(top > -torch.inf, top, 0.0)
    weights.sub_(top).exp2_()
    total = weights.sum(dim=1, keepdim=True)
    seen = total > 0
    weights.div_(torch.where(seen, total, 1.0))
    heads = torch.arange(group, device=place.device)[:, None]
    found = torch.nn.functional.embedding_bag(
        (place[:, None] * group + heads).flatten(0, 1),
        parts.flatten(0, 1),
        per_sample_weights=weights.mT.flatten(0, 1),
        mode="sum",
    )
    out.index_copy_(0, part.rows, found.view(tokens, group, dim))
    lse.index_copy_(0, part.rows, torch.where(seen, top + total.log2_(), -torch.inf)[:, 0])


def _backward(
    part: Part,
    scale: float,
    q,
    k,
    v,
    lse,
    share,
    d_out,
    dq,
    dk,
    dv,
) -> None:
    """Adds to the gradients dq (P, Tq, G, D), dk (P N, block, D), dv (P N, block, Dv)."""
    none, group = part.chosen.numel(), q.shape[2]
    dq = dq.flatten(0, 1).flatten(1)
    for tiles in _tiles(part, _tables(part), 2 * lse.element_size()):
        queries, keys, s = _scores(tiles, scale, q, k)
        rows = tiles.rows.flatten()
        g, m = len(keys), queries.shape[1]
        given = d_out[rows].view(g, m, -1)
        p = s.mul_(LOG2E).sub_(lse[rows].view(g, m, 1)).exp2_()
        # what is no pair has no weight
        p.view(g, -1, group * s.shape[2]).masked_fill_(tiles.pairs[..., None] == none, 0)
        _add(dv, tiles.blocks, torch.bmm(p.mT, given))
        values = v.index_select(0, tiles.blocks).to(p.dtype)
        ds = torch.bmm(given, values.mT).sub_(share[rows].view(g, m, 1)).mul_(p)
        _add(dk, tiles.blocks, torch.bmm(ds.mT, queries))
        dq.index_add_(0, rows, torch.bmm(ds, keys).mul_(scale).view(len(rows), -1))


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (n, ...), (g, S) of them -> (g, S, ...), a copy in float32 or better."""
    found = x.index_select(0, rows.flatten())
    return found.to(work_dtype(found)).view(*rows.shape, -1)


def _add(
    total: Tensor,
    rows: Tensor,
    parts: Tensor,
) -> None:
    total.flatten(1).index_add_(0, rows, parts.flatten(1))
