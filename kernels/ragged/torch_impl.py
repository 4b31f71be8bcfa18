"""Ragged attention in plain torch: a product for each stored head, whose keys all rows that share
it read together; one product for all where they have the same number and share nothing. Packed keys
are unpacked first, for one call of one layer. See `effattn.kernels.ragged`."""

from __future__ import annotations

import torch
from torch import Tensor

from .kept import Ragged

MOST = 1024  # queries whose scores of one head are there at once


def attention(
    q: Tensor, kept: Ragged, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """As `effattn.kernels.ragged.attention`."""
    (batch, heads, queries, dim), kept = q.shape, kept.unpacked()
    kv_heads = kept.heads
    work, group = torch.promote_types(q.dtype, torch.float32), heads // kept.heads
    lines = q.reshape(batch, kv_heads, group * queries, dim)
    alike = len(set(kept.lengths)) == 1 and kept.rows == tuple(range(batch))
    if alike and kept.most and lines.shape[2] <= MOST:
        k, v = (x.view(batch, kv_heads, kept.most, -1) for x in (kept.k, kept.v))
        out, lse = _attend(lines.to(work), k.to(work), v.to(work), scale, softcap)
    else:
        out, lse = _one_by_one(lines, kept, work, scale, softcap)
    shape = (batch, heads, queries)
    return out.to(q.dtype).view(*shape, -1), lse.view(shape)


def _one_by_one(
    lines: Tensor, kept: Ragged, work: torch.dtype, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """lines (B, H, n, D): of each head, its queries."""
    batch, kv_heads, count, dim = lines.shape
    edges = kept.edges()
    out = lines.new_zeros(batch, kv_heads, count, kept.dims[1], dtype=work)
    lse = out.new_full((batch, kv_heads, count), -torch.inf)
    for stored in range(kept.stored):
        rows = [row for row, own in enumerate(kept.rows) if own == stored]
        for head in range(kv_heads):
            low, high = edges[stored * kv_heads + head], edges[stored * kv_heads + head + 1]
            if low == high:
                continue
            k, v = kept.k[low:high].to(work), kept.v[low:high].to(work)
            own = lines[rows, head].reshape(-1, dim).to(work)
            found = [_attend(some, k, v, scale, softcap) for some in own.split(MOST)]
            outs, sums = zip(*found, strict=True)
            out[rows, head] = torch.cat(outs).view(len(rows), count, -1)
            lse[rows, head] = torch.cat(sums).view(len(rows), count)
    return out, lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Of q (..., n, D) over all of k (..., m, D): out (..., n, Dv) and the log-sum-exp."""
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    highest = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - highest)
    total = weights.sum(dim=-1, keepdim=True)
    return (weights @ v) / total, (highest + total.log())[..., 0]
