"""Transformer-VQ by its definition, in fp64: dense softmax attention to quantized keys. Slow and
obvious.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, codebook: Tensor, visible: Tensor, direct: Tensor, scale: float
) -> Tensor:
    """softmax(scale q c(k)^T) v, where c(k) is the word nearest to k (arXiv:2309.16354, eq. 6 and
    12).

    q (B, Hq, Tq, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv), codebook (Hkv, S, D); visible (1 or B,
    Tq, T) bool. Gradients go straight through to k (eq. 7) from the pairs in direct (Tq, T) bool,
    and to no key from the others, which only the codes connect. Returns (B, Hq, Tq, Dv) in q's
    dtype; a query that sees no key gives 0."""
    groups, words = q.shape[1] // k.shape[1], codebook.double()
    distances = (k.detach().double()[:, :, :, None] - words[None, :, None]).square().sum(-1)
    heads = torch.arange(len(words), device=k.device)[:, None]
    found = words[heads, distances.argmin(-1)]
    through = found + k.double() - k.detach().double()
    found, through, values = (x.repeat_interleave(groups, 1) for x in (found, through, v.double()))
    scores = torch.where(direct, q.double() @ through.mT, q.double() @ found.mT) * scale
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    seen = visible.any(-1)[:, None, :, None]
    weights = torch.softmax(scores.masked_fill(~seen, 0.0), dim=-1) * seen
    return (weights @ values).to(q.dtype)
