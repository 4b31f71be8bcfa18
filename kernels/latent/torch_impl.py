"""Attention over latents in plain torch: keys are made, values are not.

B: rows; Hq, Hkv: query and key/value heads; T: tokens held; D, Dv: of a key, of a value; r: of a
latent."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import decode
from ..decode.turn import Turn
from ..flash.pattern import Layout, Pattern
from ..flash.rules import Bias


def attention(
    q: Tensor,
    c: Tensor,
    maps,
    pattern: Pattern,
    layout: Layout,
    *,
    scale: float,
    softcap: float | None,
    q_first: Tensor | None,
    turn: Turn | None,
    bias: Bias | None,
) -> tuple[Tensor, Tensor]:
    """(B, Hq, Tq, Dv) in q's dtype, and the log-sum-exp (B, Hq, Tq)."""
    k = maps.keys(c)
    # one latent for all heads: they stand where values do, and their sum is mapped afterwards
    latents = c[:, None].expand(-1, k.shape[1], -1, -1)
    sums, lse = decode.attention(
        q,
        k,
        latents,
        pattern,
        layout,
        causal=True,
        scale=scale,
        softcap=softcap,
        q_first=q_first,
        turn=turn,
        bias=bias,
        impl="torch",
        lse=True,
    )
    out = maps.absorbed(sums)
    if maps.value_bias is not None:  # a query that sees nothing gives 0 all the same
        out = torch.where(lse[..., None] == -torch.inf, 0.0, out)
    return out.to(q.dtype), lse
