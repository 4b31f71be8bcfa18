"""LSH attention by its definition, in fp64 and with a (T, T) matrix for everything: slow and
obvious.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .places import Rule, normalized


def visible(
    rule: Rule, query_bucket: Tensor, bucket: Tensor, causal: bool, real: Tensor | None = None
) -> Tensor:
    """Whether a query sees a key in any round, by hash: bool (B, Hq, T, T); its own key always, if
    it is real.

    query_bucket (B, Hq, R, T), bucket (B, Hkv, R, T), real (B, T) bool: tokens that are not
    padding."""
    tokens = bucket.shape[-1]
    bucket = bucket.repeat_interleave(query_bucket.shape[1] // bucket.shape[1], dim=1)
    i, j = (
        torch.arange(tokens, device=bucket.device)[:, None],
        torch.arange(tokens, device=bucket.device),
    )
    there = torch.ones(1, tokens, dtype=torch.bool, device=bucket.device) if real is None else real
    there = there[:, None, None, None, :]

    # older keys of its bucket
    rank = ((bucket[..., :, None] == bucket[..., None, :]) & (j < i) & there).sum(dim=-1)
    same = (query_bucket[..., :, None] == bucket[..., None, :]) & there  # (B, Hq, R, T, T)
    newest = ((same & (j <= i)).sum(dim=-1) - 1).clamp(min=0)
    behind = (newest // rule.chunk)[..., :, None] - (rank // rule.chunk)[..., None, :]
    near = (behind >= 0) & (behind <= 1) & (j <= i) if causal else behind.abs() <= 1
    seen = (same & near).any(dim=2) | (i == j)
    return seen if real is None else seen & real[:, None, None, :] & real[:, None, :, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    query_bucket: Tensor,
    bucket: Tensor,
    *,
    causal: bool,
    scale: float,
    real: Tensor | None = None,
) -> Tensor:
    """q (B, Hq, Tq, D), the last of T tokens; k (B, Hkv, T, D), v (B, Hkv, T, Dv) -> (B, Hq, Tq,
    Dv) in q's dtype.

    query_bucket (B, Hq, R, T): those of tokens before the queries are not looked at. Padding gives
    0."""
    queries, groups = q.shape[2], q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    keys = normalized(keys) if rule.shared_qk else keys
    seen = visible(rule, query_bucket, bucket, causal, real)[:, :, -queries:]
    scores = q.double() @ keys.transpose(-1, -2) * scale
    if rule.shared_qk:  # the own key only where there is no other
        own = torch.eye(k.shape[2], dtype=torch.bool, device=q.device)[-queries:]
        others = seen & ~own
        seen = others | (own & seen & ~others.any(dim=-1, keepdim=True))
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), dim=-1)
    return ((weights * seen.any(dim=-1, keepdim=True)) @ values).to(q.dtype)
