"""Softmax attention by its definition, in fp64: slow and obvious. Tests compare the fast paths with
it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dropout import Dropout
from .rules import Bias, Far


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
    far: Far | None = None,
    bias: Bias | None = None,
    distance: Tensor | None = None,
    drop: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) -> out (B, Hq, Tq, Dv) and the
    log-sum-exp (B, Hq, Tq).

    counts: how many times each query sees each key, bool or int, broadcast to (B, Hq, Tq, Tk). A
    query that sees no key gives 0 and -inf. softcap: scores become softcap * tanh(score / softcap).
    sink_logits (Hq,): one more logit per head, in the denominator only (gpt-oss). q_first: the
    queries as the keys marked by `first` (B or 1, Tk) bool see them. far, bias: other scores for
    distant pairs, and what distances add to scores; `distance` (1 or B, Tq, Tk) is i - j of each
    pair, for those two. drop: weights that
    are 0, the log-sum-exp being that of all. fp64 throughout; out is in q's dtype."""
    groups = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(groups, dim=1)
    values = v.double().repeat_interleave(groups, dim=1)
    scores = q.double() @ keys.transpose(-1, -2) * scale
    if q_first is not None:
        other = q_first.double() @ keys.transpose(-1, -2) * scale
        scores = torch.where(first[:, None, None, :], other, scores)
    if far is not None:
        other = (
            far.q.double()
            @ far.k.double().repeat_interleave(groups, dim=1).transpose(-1, -2)
            * scale
        )
        scores = torch.where(distance[:, None] >= far.window, other, scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.values(distance).double().transpose(0, 1)
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
    weights = weights / torch.where(total > 0, total, 1.0)
    if drop is not None:
        weights = weights * drop.factors(weights.dtype)
    out = weights @ values
    return out.to(q.dtype), lse


def rotary_scores(
    q: Tensor,
    k: Tensor,
    distance: Tensor,
    inv_freq: Tensor,
    window: float = math.inf,
    slow: float = math.inf,
) -> Tensor:
    """Rotary scores pair by pair, (B, H, Tq, Tk) in fp64, of raw q (B, H, Tq, D) and k (B, H, Tk,
    D) whose two halves turn: (R^p q) . k, where p is the relative position that a pair is shown to
    be at. By `distance` (Tq, Tk) = i - j:

        p = distance                             below `window`: RoPE
        p = window + (distance - window) / slow  from it on: Leaky ReRoPE
                                                 (slow = inf: ReRoPE, slow = 1: RoPE)
    """
    position = torch.where(
        distance < window, distance.double(), window + (distance - window) / slow
    )
    angle = position[..., None] * inv_freq.double()
    (qa, qb), (ka, kb) = (x.double().chunk(2, dim=-1) for x in (q[:, :, :, None], k[:, :, None]))
    return ((qa * ka + qb * kb) * angle.cos() + (qa * kb - qb * ka) * angle.sin()).sum(dim=-1)
