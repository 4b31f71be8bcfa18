"""The definition: every key and every value is made of its latent, and attention is plain. Slow.

B: rows; Hq, Hkv: query and key/value heads; T: tokens held; D, Dv: of a key, of a value; r: of a
latent."""

from __future__ import annotations

import torch
from torch import Tensor

from ..decode.turn import Turn
from ..flash.pattern import Layout, Pattern


def attention(
    q: Tensor,
    c: Tensor,
    maps,
    pattern: Pattern,
    layout: Layout,
    *,
    scale: float,
    turn: Turn | None = None,
) -> Tensor:
    """q (B, Hq, Tq, D), c (B, T, r) -> (B, Hq, Tq, Dv) in fp64, causal. turn: without a window."""
    q, c = q.double(), c.double()
    position = layout.key_positions(c.shape[1], c.device)
    k, v = maps.keys(c), maps.values(c)
    if turn is not None:
        k = turn.keys(k, position)
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    i = layout.query_positions(q.shape[2], c.shape[1], q.device)[:, None, :, None]
    heads = torch.arange(q.shape[1], device=q.device)[None, :, None, None]
    sees = pattern.sees(i, position[:, None, None, :], heads, q.shape[1], causal=True)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~sees, -torch.inf)
    return scores.softmax(dim=-1).nan_to_num(0.0) @ v
