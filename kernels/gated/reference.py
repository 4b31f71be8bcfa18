"""Gated linear attention and the gated delta rule by their definition, token by token: slow and
obvious."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool = False,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(B, Hq, Tq, V). q (B, Hq, Tq, F), k (B, H, T, F), v (B, H, T, V); queries are the last keys;
    log_decay (B, H, T, 1 or F); beta (B, H, T); mask (B, T) bool: real keys."""
    groups, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    sums = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    norms = k.new_zeros(*k.shape[:2], k.shape[3])
    outs = []
    for t in range(keys):
        key, value = k[:, :, t], v[:, :, t]
        kept, total = sums, norms
        if log_decay is not None:
            decay = log_decay[:, :, t].exp()
            kept, total = decay[..., None] * sums, decay * norms
        if beta is not None:
            # what the memory says of this key already
            known = torch.einsum("bhf,bhfv->bhv", key, kept)
            value = beta[:, :, t, None] * (value - known)
        new = kept + key[..., None] * value[:, :, None]
        total = total + key
        if mask is not None:
            real = mask[:, t, None, None]
            new, total = torch.where(real[..., None], new, sums), torch.where(real, total, norms)
        sums, norms = new, total
        at = t - (keys - queries)
        if at < 0:
            continue
        query = q[:, :, at].unflatten(1, (-1, groups))
        out = torch.einsum("bhgf,bhfv->bhgv", query, sums)
        if normalize:
            share = torch.einsum("bhgf,bhf->bhg", query, norms)[..., None]
            out = torch.where(share == 0, 0.0, out / torch.where(share == 0, 1.0, share))
        else:
            out = out * scale
        outs.append(out.flatten(1, 2))
    return torch.stack(outs, dim=2)
