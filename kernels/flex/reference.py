"""Flex attention by its definition, in fp64 and all at once: slow and obvious. Tests compare the
tiles with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """query (B, Hq, Tq, D), key (B, Hkv, Tk, D), value (B, Hkv, Tk, Dv) -> out (B, Hq, Tq, Dv) and
    the log-sum-exp (B, Hq, Tq); 0 and -inf for queries that see nothing. Both functions get index
    tensors that broadcast, which is what scalars give one by one."""
    groups = query.shape[1] // key.shape[1]
    q = query.double()
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    b, h, i, j = (
        torch.arange(size, device=q.device).view(-1, *[1] * (3 - place))
        for place, size in enumerate(scores.shape)
    )
    if score_mod is not None:
        scores = score_mod(
            scores,
            b,
            h,
            i,
            j,
        )
    if mask_mod is not None:
        scores = torch.where(
            mask_mod(
                b,
                h,
                i,
                j,
            ),
            scores,
            -torch.inf,
        )
    blind = scores.amax(dim=-1, keepdim=True) == -torch.inf
    # a blind row's softmax would be NaN, and so would its gradients
    safe = torch.where(blind, 0.0, scores)
    out = torch.where(blind, 0.0, torch.softmax(safe, dim=-1) @ v)
    lse = torch.where(blind[..., 0], -torch.inf, torch.logsumexp(safe, dim=-1))
    return out, lse
