"""LSH attention of a few new tokens over a cache: the rows that a query sees are gathered, and
attended to at once.

A query sees at most 2 chunk keys in a round, however long the sequence is, and `Ring` knows where
they lie. Forward only, by the decode kernels. Shapes: see `places`; C = 1 + 2 chunk R rows are
gathered for each query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import decode
from .places import Rule, normalized


@dataclass(frozen=True)
class Seen:
    """The newest keys of every bucket: that of rank x in bucket b of round r is row `rows`[r, b *
    ring + x % ring] of the store. T new keys are among them, the last Tq of which are the queries'
    own."""

    rule: Rule
    ring: int
    rows: Tensor  # (B, H, R, buckets * ring or more) int
    code: Tensor  # (B, H, R, N) int
    count: Tensor  # (B, H, R, buckets) int64: keys of each bucket before the new ones
    bucket: Tensor  # (B, H, R, T) int64 of the new keys; `buckets`: padding
    own: Tensor  # (B, H, T) int64: the store's rows of the new keys


def attention_few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bucket: Tensor,
    seen: Seen,
    *,
    scale: float,
    real: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """As `attention`, causal. q (B, Hq, Tq, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv), query_bucket
    (B, Hq, R, Tq) int64, real (B, Tq) bool: which queries are not padding."""
    rule, (batch, heads, queries, dim) = seen.rule, q.shape
    kv_heads, new = k.shape[1], seen.bucket.shape[-1]
    group = heads // kv_heads
    bucket = query_bucket.unflatten(1, (kv_heads, group)).transpose(2, 3)  # (B, H, R, G, Tq)
    bucket = bucket.clamp(max=rule.buckets - 1)  # padding, which sees nothing in the end

    now = torch.arange(new - queries, new, device=q.device)[:, None]
    older = torch.arange(new, device=q.device) < now
    same = seen.bucket[:, :, :, None, None] == bucket[..., None]  # (B, H, R, G, Tq, T)
    before = seen.count.gather(3, bucket.flatten(3)).view(bucket.shape) + (same & older).sum(dim=-1)
    newest = before + (seen.bucket[:, :, :, None, new - queries :] == bucket) - 1
    place = newest.clamp(min=0) // rule.chunk
    code = rule.code(bucket, newest.clamp(min=0))

    rank = (place[..., None] - 1) * rule.chunk + torch.arange(2 * rule.chunk, device=q.device)
    there = (rank >= 0) & (rank < before[..., None])
    at = (bucket[..., None] * seen.ring + rank % seen.ring).flatten(3)
    rows = seen.rows.gather(3, at).view(rank.shape).long().clamp(min=0)  # (B, H, R, G, Tq, 2 chunk)
    for r in range(1, rule.rounds):  # what an earlier round shows already
        for earlier in range(r):
            other = (
                seen.code[:, :, earlier]
                .gather(2, rows[:, :, r].flatten(2))
                .view(rows[:, :, r].shape)
            )
            apart = code[:, :, earlier, ..., None] - other
            there[:, :, r] &= (apart != 0) & (apart != rule.buckets)

    own = seen.own[:, :, None, new - queries :, None].expand(-1, -1, group, -1, -1)
    # (B, H, G, Tq, 2 chunk R)
    rows, there = (x.permute(0, 1, 3, 4, 2, 5).flatten(4) for x in (rows, there))
    alone = ~there.any(dim=-1, keepdim=True) if rule.shared_qk else torch.ones_like(there[..., :1])
    rows, there = torch.cat([own, rows], dim=-1), torch.cat([alone, there], dim=-1)
    if real is not None:
        there = there & real[:, None, None, :, None]
    count = rows.shape[-1]

    def gather(x: Tensor) -> Tensor:  # one query each, with keys of its own
        found = x.gather(2, rows.flatten(2)[..., None].expand(-1, -1, -1, x.shape[3]))
        return found.view(-1, 1, count, x.shape[3])

    keys = normalized(gather(k)) if rule.shared_qk else gather(k)
    out = decode.attention(
        q.reshape(-1, 1, 1, dim),
        keys,
        gather(v),
        counts=there.reshape(-1, 1, 1, count),
        scale=scale,
        impl=impl,
    )
    return out.view(batch, heads, queries, v.shape[3])
