"""Linformer's projections along time, and who sees the slots they make; the attention itself is
`kernels.flash`.

    slots = project(k, E, padding_start, padding_mask)  # (B, H, T, D) -> (B, H, K, D)
    earlier = Earlier(size=64, slots=4)
    out, lse = flash.attention(q, slots_k, slots_v, earlier, causal=False, lse=True)

A slot is a weighted sum of tokens. arXiv:2006.04768.
"""

from __future__ import annotations

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from .pattern import Earlier

__all__ = ["IMPLEMENTATIONS", "Earlier", "choose", "project"]


def project(
    x: Tensor,
    weight: Tensor,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """out[b, h, i] = sum over p of weight[h, i, p] x[b, h, start[b] + p], the tokens that `mask`
    hides left out.

    x (B, H, T, D) of any float dtype; weight (H or 1, K, N), N >= T, in float32 or better; start
    (B,) int64, the number of each row's token that has weight[..., 0] (None: 0); mask (B, T) bool,
    True = real. Returns (B, H, K, D) in x's dtype, summed up in float32 or better. Differentiable
    in x and weight."""
    if choose(impl, x.device) == "triton":
        from .triton_impl import project as run
    else:
        from .torch_impl import project as run
    return run(x, weight, start, mask)
