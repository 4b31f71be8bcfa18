"""Attention to a window, sinks and the best blocks, by its definition: in fp64, with a (T, T)
matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..flash.rules import Far
from .selection import Rule, probes, summarise


def visible(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    real: Tensor,
    pool: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees, bool (B, Hq, Tq, T). q (B, Hq, Tq, D), the last of T tokens; k
    (B, H, T, D); real (B, T) bool: tokens that are not padding, side by side in each row."""
    (batch, heads, queries, _), (kv_heads, tokens) = q.shape, k.shape[1:3]
    number = torch.arange(tokens, device=q.device)
    seen = torch.zeros(
        batch,
        heads,
        queries,
        tokens,
        dtype=torch.bool,
        device=q.device,
    )
    for row in range(batch):
        there = number[real[row]]
        probe = probes(rule, q[row : row + 1].double(), kv_heads)[0]
        summary = summarise(rule, k[row : row + 1, :, there].double(), pool)[0]
        for at, token in enumerate(there.tolist()):
            query = token - (tokens - queries)
            if query < 0:
                continue
            for head in range(heads):
                group = head // (heads // kv_heads)
                mine = seen[row, head, query]
                mine[there[max(0, at - rule.window + 1) : at + 1]] = True
                mine[there[: min(rule.sinks, at + 1)]] = True
                blocks = range((at + 1) // rule.block)
                far = [n for n in blocks if not _known(mine[there], n, rule.block)]
                scores = summary[group, far] @ probe[group, query]
                for place in scores.argsort(descending=True)[: rule.blocks].tolist():
                    first = far[place] * rule.block
                    mine[there[first : first + rule.block]] = True
    return seen


def _known(
    seen: Tensor,
    block: int,
    size: int,
) -> bool:
    """Whether the window and the sinks show the whole block."""
    return bool(seen[block * size : (block + 1) * size].all())


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    real: Tensor,
    *,
    scale: float,
    pool: Tensor | None = None,
    sink_logits: Tensor | None = None,
    far: Far | None = None,
) -> Tensor:
    """q (B, Hq, Tq, D), the last of T tokens; k (B, H, T, D), v (B, H, T, Dv) -> (B, Hq, Tq, Dv) in
    q's dtype.

    sink_logits (Hq,): a logit a head that stands in the denominator only. far: blocks are chosen,
    and pairs at a distance of `far.window` or more are scored, by its queries and keys."""
    by_q, by_k = (q, k) if far is None else (far.q, far.k)
    seen = visible(rule, by_q.detach(), by_k.detach(), real, pool)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.double() @ keys.mT
    if far is not None:
        other = far.q.double() @ far.k.double().repeat_interleave(group, dim=1).mT
        number = torch.arange(k.shape[2], device=q.device)
        distance = number[-q.shape[2] :, None] - number
        scores = torch.where(distance >= far.window, other, scores)
    scores = (scores * scale).masked_fill(~seen, torch.finfo(torch.float64).min)
    if sink_logits is not None:
        extra = sink_logits.double()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], dim=3)
    weights = torch.softmax(scores, dim=3)[..., : k.shape[2]]
    return ((weights * seen.any(dim=3, keepdim=True)) @ values).to(q.dtype)
