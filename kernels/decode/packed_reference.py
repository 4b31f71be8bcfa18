"""Attention over a packed cache by its definition: everything unpacked, fp64, one (Tq, keys) matrix
of scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..flash.pattern import Pattern
from ..flash.reference import attention as softmax
from ..flash.rules import Bias
from ..pack.reference import unpack
from .packed_cache import PackedCache
from .turn import Turn


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
) -> tuple[Tensor, Tensor]:
    """(B, Hq, Tq, Dv) in q's dtype and the log-sum-exp (B, Hq, Tq), fp64."""
    heads, queries, groups = q.shape[1], q.shape[2], q.shape[1] // cache.k.shape[1]
    k, v = (
        torch.cat(
            [x.double() for x in (first, unpack(codes, torch.float64), rest) if x is not None],
            dim=2,
        )
        for first, codes, rest in (
            (cache.k_first, cache.k, cache.k_rest),
            (cache.v_first, cache.v, cache.v_rest),
        )
    )
    i = cache.query_positions(queries)[:, None, :, None]
    at = cache.key_positions()
    j = at[:, None, None, :]
    h = torch.arange(heads)[None, :, None, None]
    seen = pattern.sees(i, j, h, heads, causal)
    first = (at >= 0) & (at < pattern.first)
    if turn is None:
        return softmax(
            q,
            k,
            v,
            seen,
            scale=scale,
            softcap=softcap,
            q_first=q_first,
            first=first,
            bias=bias,
            distance=(i - j)[:, 0],
        )

    def scores(queries: Tensor, keys: Tensor) -> Tensor:
        return queries.double() @ keys.repeat_interleave(groups, dim=1).mT * scale

    near = turn.keys(k, at)
    logits = scores(q, near)
    if q_first is not None:
        logits = torch.where(first[:, None, None, :], scores(q_first, near), logits)
    if turn.window is not None:
        logits = torch.where(
            i - j >= turn.window, scores(turn.q_far, turn.keys(k, at, far=True)), logits
        )
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.values((i - j)[:, 0]).double().transpose(0, 1)
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(dim=-1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return (weights @ v.repeat_interleave(groups, dim=1)).to(q.dtype), lse
