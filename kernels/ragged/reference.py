"""The definition, one query head at a time, in fp64. See `effattn.kernels.ragged`."""

from __future__ import annotations

import torch
from torch import Tensor

from .kept import Ragged


def attention(
    q: Tensor, kept: Ragged, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys of a query's K/V head; scores s become softcap
    tanh(s / softcap)."""
    batch, heads, queries, _ = q.shape
    group, edges = heads // kept.heads, kept.edges()
    out = q.new_zeros(batch, heads, queries, kept.dims[1], dtype=torch.float64)
    lse = out.new_full((batch, heads, queries), -torch.inf)
    for row in range(batch):
        for head in range(heads):
            at = kept.rows[row] * kept.heads + head // group
            k, v = (x.double() for x in kept.read(edges[at], edges[at + 1]))
            scores = scale * q[row, head].double() @ k.T
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if len(k):
                out[row, head] = scores.softmax(dim=-1) @ v
                lse[row, head] = scores.logsumexp(dim=-1)
    return out.to(q.dtype), lse.to(torch.promote_types(q.dtype, torch.float32))
