"""LSH attention in plain torch: tiles of queries that share a place, against the keys of two places
(or three).

Queries and keys are sorted in every round, so that a tile's keys are one stretch of that order;
their rows are gathered for a few tiles at a time, never for a whole round. The own key comes first,
and makes the softmax of every query begin with something; a running maximum takes up one round
after the other. Linear in T in time and memory.

Shapes: P = B * Hkv heads. q (P, M, D), k (P, N, D), v (P, N, Dv), see `places`. A tile has S
queries and W keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..once import once_differentiable
from ..precision import as_given
from .places import NO_QUERY, Places

SELF = -1e5  # the score of a token's own key with shared_qk: below every other
FAR = 1e30  # below that
LOG2E = math.log2(math.e)
QUERIES = 80  # of a tile at most: a place of 64 keys has about as many queries, seldom more than 80
WORK = 2**20  # bytes of scores that a thread has at a time, to stay in its cache
ROWS = 2**20  # queries, times rounds, that are sorted into tiles at a time


def attention(q: Tensor, k: Tensor, v: Tensor, places: Places, *, scale: float) -> Tensor:
    """q (B, Hq, Tq, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv) -> (B, Hq, Tq, Dv) in q's dtype; 0 for
    padding.
    """
    batch, heads, queries, dim = q.shape
    rows = (
        q.unflatten(1, (k.shape[1], -1))
        .transpose(2, 3)
        .reshape(-1, places.query_code.shape[-1], dim)
    )
    out = _Attention.apply(places, scale, rows, k.flatten(0, 1), v.flatten(0, 1))
    out = (
        out.view(batch, k.shape[1], queries, -1, v.shape[-1])
        .transpose(2, 3)
        .reshape(batch, heads, queries, -1)
    )
    return out if places.real is None else torch.where(places.real[:, None, :, None], out, 0.0)


class _Attention(torch.autograd.Function):
    """Keeps the output and the log-sum-exp; backward computes the weights again."""

    @staticmethod
    def forward(ctx, places, scale, q, k, v):
        work = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty((*q.shape[:2], v.shape[-1]), dtype=work)
        lse = q.new_empty(q.shape[:2], dtype=work)
        for block in _blocks(places):
            p = block.heads
            _forward(block, scale, *(x[p].to(work) for x in (q, k, v)), out[p], lse[p])
        ctx.places, ctx.scale = places, scale
        ctx.save_for_backward(q, k, v, out, lse)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.zeros(x.shape, dtype=out.dtype, device=x.device) for x in (q, k, v)]
        for block in _blocks(ctx.places):
            p = block.heads
            given = (x[p].to(out.dtype) for x in (q, k, v, out, lse, d_out))
            _backward(block, ctx.scale, *given, *(x[p] for x in grads))
        return None, None, *(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))


@dataclass(frozen=True)
class Block:
    """The places of some heads, n of them."""

    places: Places
    heads: slice
    order: Tensor  # (n, R, L), and so on
    code: Tensor
    query_order: Tensor
    query_code: Tensor
    low: Tensor
    high: Tensor

    def own(self) -> Tensor:
        """The row of every query's own key, of the n N rows of all heads: (n M,)."""
        n, _, rows = self.code.shape
        query = torch.arange(self.query_code.shape[2], device=self.code.device) // self.places.group
        head = torch.arange(n, device=self.code.device)[:, None] * rows
        return (head + self.places.own + query).flatten()


@dataclass(frozen=True)
class Group:
    """Some tiles of a round: rows of queries (g, S), n M where there is none, rows of keys (g, W),
    both counted through all n heads; and which pairs count, (g, S, W): 0, or -1 for those that do
    not."""

    rows: Tensor
    keys: Tensor
    hidden: Tensor

    def hide(self, s: Tensor) -> Tensor:
        """Scores (g, S, W) of pairs that do not count, far below all others. Faster than
        masked_fill_.
        """
        return s.add_(self.hidden.to(s.dtype), alpha=FAR)


def _blocks(places: Places) -> Iterator[Block]:
    names = ("order", "code", "query_order", "query_code", "low", "high")
    tensors = {name: getattr(places, name).flatten(0, 1) for name in names}
    heads, rounds, rows = tensors["low"].shape
    step = max(1, ROWS // (rounds * max(rows, tensors["order"].shape[2])))
    for at in range(0, heads, step):
        part = slice(at, min(at + step, heads))
        yield Block(places, part, **{name: x[part] for name, x in tensors.items()})


def _groups(block: Block, itemsize: int) -> Iterator[Group]:
    """The tiles of all rounds. A group's size does not depend on what is in it, so that the last
    bits of a row's result do not depend on how many others there are."""
    places, device = block.places, block.code.device
    heads, rounds, rows = block.low.shape
    step = places.rule.buckets
    size = min(QUERIES, -(-places.rule.chunk * 5 // 64) * 16)
    threads = torch.get_num_threads() if device.type == "cpu" else 256
    count = max(1, min(threads * WORK // (size * places.width * itemsize), heads * rows))
    code, query_code = _narrow(block)
    query_code = pad(query_code.transpose(0, 1).flatten(1), (0, 1))
    code = code.transpose(0, 1).flatten(1)
    if places.causal:
        query_code = query_code - step // 2  # halfway between the two places that a query sees
    columns = torch.arange(places.width, device=device, dtype=code.dtype)
    own = None if places.causal else pad(block.own(), (0, 1), value=-1).int()
    for r in range(rounds):
        tiles = _tiles(block, r, size, count)
        for at in range(0, len(tiles[0]), count):
            row, key, width = (x[at : at + count] for x in tiles)
            # Compared by arithmetic, which takes a tenth of the time on a CPU: what is 0 in the end
            # does not count.
            seen = (width.to(code.dtype)[..., None] - columns).clamp_(min=0)
            mine = query_code[:r].index_select(1, row.flatten()).view(r, *row.shape, 1)
            others = code[:r].index_select(1, key.flatten()).view(r, len(key), 1, places.width)
            for earlier in range(r):
                apart = (mine[earlier] - others[earlier]).abs_()
                apart.sub_(step // 2).abs_()
                if not places.causal:  # three places
                    apart.sub_(step // 2).abs_()
                torch.minimum(seen, apart, out=seen)
            if own is not None:
                away = (own[row][..., None] - key.int()[:, None]).abs_().clamp_(max=1)
                seen.mul_(away.to(seen.dtype))
            yield Group(row, key, seen.clamp_(max=1).sub_(1))


def _narrow(block: Block) -> tuple[Tensor, Tensor]:
    """code and query_code in the smallest type that holds their differences, and widths: two bytes
    take half as long as four."""
    step, width = block.places.rule.buckets, block.places.width
    highest = max(int(block.code.max()), int(block.query_code.max()))
    if step >= 2**12 or highest >= 2**14 - step or width >= 2**15:
        return block.code.int(), block.query_code.int()
    return tuple(x.clamp(min=-(2**14) + step).short() for x in (block.code, block.query_code))


def _tiles(block: Block, r: int, size: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of round r, with empty ones to make their number a multiple of `count`: rows of queries
    (t, S), rows of keys (t, W), and how many of those each query sees (t, S)."""
    heads, _, rows = block.low.shape
    length, store, device = block.order.shape[2], block.code.shape[2], block.code.device
    head = torch.arange(heads, device=device)[:, None]
    query = block.query_order[:, r]
    low, high, code = (x[:, r].gather(1, query) for x in (block.low, block.high, block.query_code))
    code = torch.where(high > low, code, NO_QUERY)
    fresh = torch.ones_like(code, dtype=torch.bool)
    fresh[:, 1:] = code[:, 1:] != code[:, :-1]
    run = fresh.flatten().cumsum(0) - 1  # of queries in one place
    begin = fresh.flatten().nonzero()[:, 0]
    end = pad(begin[1:], (0, 1), value=heads * rows)
    number = torch.arange(heads * rows, device=device)
    first = (((number - begin[run]) % size == 0) & (code.flatten() != NO_QUERY)).nonzero()[:, 0]

    slot = first[:, None] + torch.arange(size, device=device)
    there = slot < end[run[first]][:, None]
    slot = slot.clamp(max=heads * rows - 1).flatten()
    row = torch.where(
        there, (query + head * rows).flatten().index_select(0, slot).view(there.shape), heads * rows
    )
    low = low.flatten()[first][:, None]
    width = torch.where(there, high.flatten().index_select(0, slot).view(there.shape) - low, 0)
    column = torch.arange(block.places.width, device=device).minimum(
        width.amax(dim=1, keepdim=True) - 1
    )
    key = first[:, None] // rows * length + low + column
    key = (
        (block.order[:, r] + head * store)
        .flatten()
        .index_select(0, key.flatten())
        .view(column.shape)
    )
    empty = (0, 0, 0, -len(first) % count)
    return pad(row, empty, value=heads * rows), pad(key, empty), pad(width, empty)


def _forward(block: Block, scale: float, q, k, v, out, lse) -> None:
    """q (n, M, D), k (n, N, D), v (n, N, Dv) -> out (n, M, Dv) and the log-sum-exp in base 2 (n,
    M).
    """
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    own, scale = block.own(), scale * LOG2E
    top = pad(_own_scores(block, q, k[own], scale), (0, 1))
    total, sums = torch.ones_like(top), pad(v[own], (0, 0, 0, 1))
    s = None
    for group in _groups(block, q.element_size()):
        rows = group.rows
        s = q.new_empty(group.hidden.shape) if s is None else s
        torch.baddbmm(
            s, _take(q, rows), _take(k, group.keys).transpose(1, 2), beta=0, alpha=scale, out=s
        )
        group.hide(s)
        flat = rows.flatten()
        before = top.index_select(0, flat).view(rows.shape)
        highest = torch.maximum(before, s.amax(dim=2))
        s.sub_(highest[..., None]).exp2_()
        fade = before.sub_(highest).exp2_()
        top.index_copy_(0, flat, highest.flatten())
        whole = total.index_select(0, flat).view(rows.shape).mul_(fade).add_(s.sum(dim=2))
        total.index_copy_(0, flat, whole.flatten())
        found = torch.baddbmm(_take(sums, rows).mul_(fade[..., None]), s, _take(v, group.keys))
        sums.index_copy_(0, flat, found.flatten(0, 1))
    out.copy_(sums[:-1].div_(total[:-1, None]).view(out.shape))
    lse.copy_((top + total.log2())[:-1].view(lse.shape))


def _backward(block: Block, scale: float, q, k, v, out, lse, d_out, dq, dk, dv) -> None:
    """Adds to the gradients dq (n, M, D), dk (n, N, D), dv (n, N, Dv)."""
    delta = (d_out * out).sum(dim=2).flatten()
    q, k, v, d_out, dq, dk, dv = (x.flatten(0, 1) for x in (q, k, v, d_out, dq, dk, dv))
    own, lse = block.own(), lse.flatten()
    mine = k[own], v[own]
    p = torch.exp2(_own_scores(block, q, mine[0], scale * LOG2E) - lse)
    dv.index_add_(0, own, p[:, None] * d_out)
    if not block.places.rule.shared_qk:
        ds = (p * ((d_out * mine[1]).sum(dim=1) - delta) * scale)[:, None]
        dq += ds * mine[0]
        dk.index_add_(0, own, ds * q)
    lse = pad(lse, (0, 1), value=torch.inf)
    delta = pad(delta, (0, 1))
    for group in _groups(block, 2 * q.element_size()):
        rows, keys = group.rows, _take(k, group.keys)
        queries, given = _take(q, rows).mul_(scale), _take(d_out, rows)
        s = group.hide(torch.bmm(queries, keys.transpose(1, 2)).mul_(LOG2E))
        s.sub_(lse[rows][..., None]).exp2_()
        _add_rows(dv, group.keys, torch.bmm(s.transpose(1, 2), given))
        ds = (
            torch.bmm(given, _take(v, group.keys).transpose(1, 2))
            .sub_(delta[rows][..., None])
            .mul_(s)
        )
        _add_rows(dk, group.keys, torch.bmm(ds.transpose(1, 2), queries))
        there = rows < len(q)
        dq.index_add_(0, rows[there], torch.bmm(ds, keys)[there].mul_(scale))


def _own_scores(block: Block, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Of every query and its own key (n M, D): (n M,), times log2(e)."""
    if block.places.rule.shared_qk:
        return q.new_full((len(q),), SELF * LOG2E)
    return (q * k).sum(dim=1).mul_(scale)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (n, D), (g, S) of them; any where there is none. `x[rows]` takes three times as
    long on a CPU.
    """
    return x.index_select(0, rows.flatten().clamp(max=len(x) - 1)).view(*rows.shape, -1)


def _add_rows(total: Tensor, rows: Tensor, parts: Tensor) -> None:
    total.index_add_(0, rows.flatten(), parts.flatten(0, 1))
