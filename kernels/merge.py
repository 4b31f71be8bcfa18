"""Softmax attention in parts, put together: of the keys, or of the queries."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of disjoint key sets, from each set's (out, lse): (B, H, T,
    Dv), (B, H, T).

    Rows that see nothing anywhere give 0 and -inf, with gradients 0.
    """
    lses = torch.stack([lse for _, lse in parts])
    highest = lses.amax(dim=0)
    highest = torch.where(highest.isfinite(), highest, 0.0).detach()
    weights = torch.exp(lses - highest)
    total = weights.sum(dim=0)
    seen = total > 0
    shares = weights / torch.where(seen, total, 1.0)
    out = sum(
        out.to(share.dtype) * share[..., None]
        for (out, _), share in zip(parts, shares, strict=True)
    )
    lse = torch.where(seen, highest + torch.where(seen, total, 1.0).log(), -torch.inf)
    return out.to(parts[0][0].dtype), lse


def in_order(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of queries whose parts, one behind the other, have these; lse only if all have
    it.
    """
    if len(parts) == 1:
        return parts[0]
    out, lse = zip(*parts, strict=True)
    return torch.cat(out, dim=2), None if any(one is None for one in lse) else torch.cat(lse, dim=2)
