"""Softmax attention by its definition, in fp64: slow and obvious. Tests compare the fast paths with it."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    q_first: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) -> out (B, Hq, Tq, Dv) and the log-sum-exp (B, Hq, Tq).

    counts: how many times each query sees each key, bool or int, broadcast to (B, Hq, Tq, Tk). A query that sees no
    key gives 0 and -inf. softcap: scores become softcap * tanh(score / softcap). sink_logits (Hq,): one more logit per
    head, in the denominator only (gpt-oss). q_first: the queries as the keys marked by `first` (B or 1, Tk) bool see
    them. fp64 throughout; out is in q's dtype.
    """
    groups = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(groups, dim=1)
    values = v.double().repeat_interleave(groups, dim=1)
    scores = q.double() @ keys.transpose(-1, -2) * scale
    if q_first is not None:
        other = q_first.double() @ keys.transpose(-1, -2) * scale
        scores = torch.where(first[:, None, None, :], other, scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    counts = counts.expand(scores.shape).double()
    scores = scores.masked_fill(counts == 0, -torch.inf)
    highest = scores.amax(dim=-1, keepdim=True).detach()
    highest = torch.where(highest.isfinite(), highest, 0.0)
    weights = torch.exp(scores - highest) * counts
    total = weights.sum(dim=-1, keepdim=True)
    seen = total > 0
    lse = torch.where(seen, highest + torch.where(seen, total, 1.0).log(), -torch.inf)[..., 0]
    if sink_logits is not None:
        total = total + torch.exp(sink_logits.double()[None, :, None, None] - highest)
    out = (weights / torch.where(total > 0, total, 1.0)) @ values
    return out.to(q.dtype), lse
