"""Projection along time in plain torch: one matrix product, with every row of the batch in its
columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project(x: Tensor, weight: Tensor, start: Tensor | None, mask: Tensor | None) -> Tensor:
    """As `effattn.kernels.linformer.project`."""
    batch, heads, tokens, dim = x.shape
    work = torch.promote_types(x.dtype, torch.float32)
    if start is not None or mask is not None:
        x = shifted(x, start, mask)
    weight = weight[:, :, :tokens].to(work)
    # A batched product would copy the weight for each row: rows (and heads that share it) are
    # columns instead.
    order = (2, 0, 1, 3) if len(weight) == 1 else (1, 2, 0, 3)
    columns = x.to(work).permute(order).reshape(len(weight), tokens, -1)
    out = weight @ columns  # (H or 1, K, columns)
    out = (
        out.view(weight.shape[1], batch, heads, dim)
        if len(weight) == 1
        else out.unflatten(2, (batch, dim))
    )
    return out.permute((1, 2, 0, 3) if len(weight) == 1 else (2, 0, 1, 3)).to(x.dtype)


def shifted(x: Tensor, start: Tensor | None, mask: Tensor | None) -> Tensor:
    """x (B, H, T, D) with each row's token number start[b] at 0; what `mask` hides, and what is
    past the end, is 0.
    """
    tokens = x.shape[2]
    if start is not None:
        number = start[:, None] + torch.arange(tokens, device=x.device)
        at = number.clamp(max=tokens - 1)
        there = number < tokens
        mask = there if mask is None else mask.gather(1, at) & there
        x = x.gather(2, at[:, None, :, None].expand_as(x))
    return torch.where(mask[:, None, :, None], x, 0.0)
