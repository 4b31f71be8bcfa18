"""Linformer and its blockwise causal form by their definitions, row by row in fp64: slow and
obvious.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def linformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    E: Tensor,
    F: Tensor,
    real: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """softmax(scale q (E k)^T) (F v), arXiv:2006.04768 eq. 7, over the slots that some token feeds.

    With `window`, which is odd, also over the keys of so many tokens around a query; a slot counts
    as N / K tokens then (LongT5's transient global attention, arXiv:2112.07916, section 3.1).

    q (B, Hq, Tq, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv); E, F (Hkv or 1, K, N >= T): column p is
    for the p-th token from the row's first real one; real (B, T) bool. Queries are the last tokens;
    those before the first real one give
    0. Returns (B, Hq, Tq, Dv) in q's dtype.
    """
    rows, groups, tokens = [], q.shape[1] // k.shape[1], k.shape[2]
    number = torch.arange(tokens, device=q.device)
    for b in range(len(q)):
        first = number[real[b]].min() if real[b].any() else tokens
        here = number[real[b]]
        of_k, of_v = (w.double()[:, :, here - first] for w in (E, F))
        slots_k = (of_k @ k[b].double()[:, here]).repeat_interleave(groups, 0)
        slots_v = (of_v @ v[b].double()[:, here]).repeat_interleave(groups, 0)
        fed = (of_k != 0).any(-1).any(0)
        scores, values = (q[b].double() @ slots_k.mT * scale)[..., fed], slots_v[:, fed]
        asking = number[tokens - q.shape[2] :]
        if window is not None:
            scores = scores + math.log(E.shape[2] / E.shape[1])
            own_k, own_v = (x[b].double()[:, here].repeat_interleave(groups, 0) for x in (k, v))
            near = (asking[:, None] - here).abs() <= window // 2
            own = (q[b].double() @ own_k.mT * scale).masked_fill(~near, -torch.inf)
            scores, values = torch.cat([scores, own], dim=-1), torch.cat([values, own_v], dim=1)
        out = torch.softmax(scores, dim=-1) @ values  # no slots: an empty sum, 0
        rows.append(out * (asking >= first)[:, None])
    return torch.stack(rows).to(q.dtype)


def blockwise(
    q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, real: Tensor, scale: float, size: int
) -> Tensor:
    """Query by query: softmax over the slots E k_n of every finished block n before the query's
    own, each counted as size / K tokens, and over the keys of its own block up to itself.

    Shapes as in `linformer`; E, F (Hkv or 1, K, size). Blocks begin at the row's first real token.
    """
    rows, groups, tokens = [], q.shape[1] // k.shape[1], k.shape[2]
    E, F = E.double(), F.double()
    bonus = math.log(size / E.shape[1])
    for b in range(len(q)):
        start = int(real[b].int().argmax()) if real[b].any() else tokens
        outs = []
        for i in range(tokens - q.shape[2], tokens):
            border = start + max(i - start, 0) // size * size
            # padding on the left: none
            own = torch.arange(border, max(border, i + 1), device=q.device)
            own = own[real[b][own]]
            keys, values, bonuses = [], [], []
            for low in range(start, border, size):
                there = real[b, low : low + size].double()[:, None]
                keys.append(E @ (k[b].double()[:, low : low + size] * there))
                values.append(F @ (v[b].double()[:, low : low + size] * there))
                bonuses += [bonus] * E.shape[1]
            keys = torch.cat([*keys, k[b].double()[:, own]], dim=1).repeat_interleave(groups, 0)
            values = torch.cat([*values, v[b].double()[:, own]], dim=1).repeat_interleave(groups, 0)
            bonuses = torch.tensor(bonuses + [0.0] * len(own), dtype=torch.float64, device=q.device)
            scores = (keys @ q[b, :, i].double()[..., None])[..., 0] * scale + bonuses
            outs.append((torch.softmax(scores, dim=-1)[:, None] @ values)[:, 0])
        rows.append(torch.stack(outs, dim=1))
    return torch.stack(rows).to(q.dtype)
