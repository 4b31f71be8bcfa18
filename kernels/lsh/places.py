"""Where hashing puts tokens: buckets, places inside of them, and which stretch of sorted keys a
query sees.

In each round a key falls into one of `buckets`. The keys of a bucket are numbered by age: a key's
rank is how many keys of its bucket came before it, and its place is (bucket, rank // chunk). A
query's place is that of the newest key of its bucket at or before its own position (of the first
key, if there is none yet): later tokens cannot move it. A query sees the keys of its own place and
of the place before, and without causality of the place behind too.

    B, H, G, R  batch, key/value heads, query heads each, rounds
    T, Tq       new tokens, of which the last Tq are queries
    M = Tq G    rows of queries of a head: row m is query m // G of its head m % G
    N           rows of a store of keys, of which the new tokens are the last
    L           of them in the order of a round
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HASHED = 2**20  # elements of x R at a time: 8 MiB in fp64
NO_KEY, NO_QUERY = -(2**30), -(2**29)  # codes of padding, far from all others and from each other


@dataclass(frozen=True)
class Rule:
    """How many rounds and buckets (an even number) there are, and how many keys share a place.
    `shared_qk`: a query is hashed as its key is, and sees that key only where it sees no other."""

    rounds: int
    buckets: int
    chunk: int
    shared_qk: bool = False

    def code(self, bucket: Tensor, rank: Tensor) -> Tensor:
        """One number for a place. Of the same bucket, and a number of places apart: codes that
        multiple of `buckets` apart."""
        return bucket + self.buckets * (rank // self.chunk)


def hash_tokens(x: Tensor, rotations: Tensor) -> Tensor:
    """argmax([xR; -xR]): x (B, H, T, D), rotations (R, D, buckets / 2) -> int64 (B, H, R, T).

    In fp32 at least: buckets do not depend on the dtype of x, or on autocast.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    rounds, _, half = rotations.shape
    turn = rotations.to(work).transpose(0, 1).reshape(x.shape[3], rounds * half)
    found = torch.empty(*x.shape[:2], rounds, x.shape[2], dtype=torch.int64, device=x.device)
    step = max(1, HASHED // (x.shape[0] * x.shape[1] * rounds * half))
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for at in range(0, x.shape[2], step):
            turned = (x[:, :, at : at + step].to(work) @ turn).unflatten(3, (rounds, half))
            sizes, largest = turned.abs().max(dim=4)
            negative = turned.gather(4, largest[..., None])[..., 0] != sizes
            found[..., at : at + step] = (largest + half * negative).transpose(2, 3)
    return found


def normalized(k: Tensor) -> Tensor:
    """Keys with a mean square of 1, as shared_qk attends to them; any shape (..., D)."""
    x = k.to(torch.promote_types(k.dtype, torch.float32))
    return (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)).to(k.dtype)


def sort_buckets(bucket: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """int64 (..., T) of 0 .. buckets -> the order that sorts each line, oldest first in a bucket,
    (..., T); and where each bucket begins in it, (..., buckets + 1)."""
    lines, length = bucket.reshape(-1, bucket.shape[-1]), bucket.shape[-1]
    line = torch.arange(len(lines), device=bucket.device)[:, None]
    order = (
        torch.sort((lines + line * (buckets + 1)).flatten(), stable=True)[1].view(lines.shape)
        - line * length
    )
    sizes = torch.zeros(len(lines), buckets + 2, dtype=torch.int64, device=bucket.device)
    sizes.scatter_add_(1, lines + 1, torch.ones_like(lines))
    return order.view(bucket.shape), sizes.cumsum(1)[:, :-1].view(*bucket.shape[:-1], buckets + 1)


def new_ranks(bucket: Tensor, buckets: int, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ranks of new keys: bucket int64 (B, H, R, T), `buckets` for padding, count (B, H, R, buckets)
    of the keys before.

    -> rank int64 (B, H, R, T), and the counts after them.
    """
    order, begin = sort_buckets(bucket, buckets)
    place = torch.arange(bucket.shape[-1], device=bucket.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place) - begin.gather(-1, bucket)
    added = begin.diff(dim=-1)
    if count is None:
        return rank, added
    past = torch.cat([count, torch.zeros_like(count[..., :1])], dim=-1)
    return rank + past.gather(-1, bucket), count + added


@dataclass(frozen=True)
class Past:
    """Keys before the new ones: their rows of the store and their buckets (`Rule.buckets`: none),
    int64 (B, H, R, P), oldest first in each bucket; and how many keys of each bucket there were,
    held or not, (B, H, R, buckets)."""

    rows: Tensor
    bucket: Tensor
    count: Tensor


@dataclass(frozen=True)
class Places:
    """Who sees whom. A query sees the keys at low .. high - 1 in the order of each round, but not
    its own key there, which it always sees, and none that an earlier round shows it (`code` and
    `query_code` tell). All int64."""

    rule: Rule
    causal: bool
    own: int  # the store's row of the first query's key
    order: Tensor  # (B, H, R, L): rows of the store
    code: Tensor  # (B, H, R, N)
    query_order: Tensor  # (B, H, R, M): rows of queries, by bucket and age
    # (B, H, R, buckets + 1): where each bucket begins there, and last where padding does
    query_begin: Tensor
    query_code: Tensor  # (B, H, R, M)
    low: Tensor  # (B, H, R, M); along query_order, neither this nor `high` falls
    high: Tensor  # (B, H, R, M)
    real: Tensor | None  # (B, Tq) bool: queries that are not padding

    @property
    def group(self) -> int:
        """Query heads to a key/value head: row m is query m // group of the head m % group among
        them.
        """
        return self.query_code.shape[-1] // self.queries

    @property
    def queries(self) -> int:
        """Tq, queries of a head."""
        return self.code.shape[-1] - self.own

    @property
    def width(self) -> int:
        """The most keys that `low` and `high` have between them."""
        return min((2 if self.causal else 3) * self.rule.chunk, self.order.shape[-1])


def places_of(
    rule: Rule,
    query_bucket: Tensor,
    bucket: Tensor,
    code: Tensor,
    causal: bool,
    real: Tensor | None = None,
    past: Past | None = None,
) -> Places:
    """The places of queries, the last Tq of the T new tokens, and the order of the keys.

    query_bucket (B, Hq, R, Tq) and bucket (B, H, R, T) int64, `rule.buckets` for padding; code (B,
    H, R, N) of the store's rows, of which the new tokens are the last; real (B, T) bool."""
    heads, queries = bucket.shape[1], query_bucket.shape[-1]
    own, first, none = code.shape[-1] - queries, bucket.shape[-1] - queries, rule.buckets
    query_bucket = query_bucket.unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2)  # (B, H, R, Tq, G)
    if real is not None:
        real = real[:, first:]
        query_bucket = torch.where(real[:, None, None, :, None], query_bucket, none)
    own_bucket = bucket[..., first:]
    rows = torch.arange(code.shape[-1] - bucket.shape[-1], code.shape[-1], device=bucket.device)
    rows = rows.expand(bucket.shape)
    if past is not None:
        first += past.rows.shape[-1]
        rows, bucket = (
            torch.cat([past.rows, rows], dim=-1),
            torch.cat([past.bucket, bucket], dim=-1),
        )

    order, begin = sort_buckets(bucket, none)
    length = order.shape[-1]

    # How far the keys before a query reach: each bucket's are in order of their numbers.
    number = bucket.gather(-1, order) * length + order
    flat = query_bucket.flatten(3)
    now = torch.arange(first, first + queries, device=bucket.device)[:, None]
    before = torch.searchsorted(number, (query_bucket * length + now).flatten(3).contiguous())
    so_far = before + (query_bucket == own_bucket[..., None]).flatten(3)  # the own key included
    begins = begin.gather(-1, flat)
    missing = 0  # keys of the bucket that are not held any more: the first one's rank
    if past is not None:
        held = (past.bucket[..., None] == torch.arange(none, device=bucket.device)).sum(dim=-2)
        missing = torch.nn.functional.pad(past.count - held, (0, 1)).gather(-1, flat)
    rank = (so_far - begins + missing - 1).clamp(min=0)
    place = rank // rule.chunk
    low = begins + ((place - 1) * rule.chunk - missing).clamp(min=0)
    high = before
    if not causal:
        ends = torch.nn.functional.pad(begin[..., 1:], (0, 1), value=length).gather(-1, flat)
        high = torch.minimum(begins + (place + 2) * rule.chunk - missing, ends)
    padding = flat == none
    return Places(
        rule,
        causal,
        own,
        rows.gather(-1, order),
        code,
        *sort_buckets(flat, none),
        torch.where(padding, NO_QUERY, rule.code(flat, rank)),
        low.masked_fill(padding, length),
        high.masked_fill(padding, length),
        real,
    )
