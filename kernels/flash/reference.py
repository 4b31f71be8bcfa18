"""Softmax attention by its definition, in fp64: slow and obvious. Tests compare the fast paths with it."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, padding_mask: Tensor | None, scale: float) -> Tensor:
    """q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) -> (B, Hq, Tq, Dv) in q's dtype.

    Query i sits at position Tk - Tq + i. A query that may see no key gives 0.
    """
    groups = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(groups, dim=1)
    values = v.double().repeat_interleave(groups, dim=1)
    scores = q.double() @ keys.transpose(-1, -2) * scale

    queries, total = scores.shape[-2:]
    i = torch.arange(total - queries, total, device=q.device)[:, None]
    j = torch.arange(total, device=q.device)[None, :]
    visible = (j <= i) if causal else torch.ones(queries, total, dtype=torch.bool, device=q.device)
    visible = visible[None, None]
    if padding_mask is not None:
        visible = visible & padding_mask[:, None, None, :]

    # A finite fill and a product afterwards: -inf would turn a row without keys (and its gradient) into NaN.
    weights = torch.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), dim=-1) * visible
    return (weights @ values).to(q.dtype)
