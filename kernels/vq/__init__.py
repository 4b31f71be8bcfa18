"""Attention to keys that are words of a codebook (Transformer-VQ, arXiv:2309.16354), at a cost
linear in time.

    # (B, Hkv, T): which word each key becomes
    codes = nearest(k, codebook)
    # per block: values and tokens of each code
    sums, counts = summarise(v, codes, words=512, size=256)
    # softmax over the codes, counted
    out, lse = read(q, codebook, sums, counts, size=256)

All tokens with one code have one score: they are one entry of the softmax, with their number as its
weight and the mean of their values as its value. Nothing is approximated but the keys."""

from __future__ import annotations

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose

__all__ = ["IMPLEMENTATIONS", "choose", "nearest", "read", "summarise"]


def nearest(k: Tensor, codebook: Tensor, impl: str = "auto") -> Tensor:
    """(B, H, T) int64: for each key of k (B, H, T, D), the word of codebook (H, S, D) at the least
    distance.

    Computed in float32 or better, whatever k's dtype, so that a key has the same code in every
    call."""
    if choose(impl, k.device) == "triton":
        from .triton_impl import nearest as run
    else:
        from .torch_impl import nearest as run
    return run(k.detach(), codebook.detach())


def summarise(
    v: Tensor,
    codes: Tensor,
    *,
    words: int,
    real: Tensor | None = None,
    size: int | None = None,
    first: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Per block of `size` tokens (None: all are one) and code: the sum of the values, and how many
    tokens there are.

    v (B, H, T, Dv); codes (B, H, T) int64 below `words`; real (B, T) bool: tokens that count (None:
    all); the first token has number `first`, and blocks begin at multiples of size, so that the
    first and last may be incomplete. Returns sums (B, H, blocks, words, Dv) float32 (float64 for
    float64), differentiable in v, and counts (B, H, blocks, words) int32."""
    size = first + v.shape[2] if size is None else size
    if choose(impl, v.device) == "triton":
        from .triton_impl import summarise as run
    else:
        from .torch_impl import summarise as run
    return run(v, codes, words, real, size, first)


def read(
    q: Tensor,
    codebook: Tensor,
    sums: Tensor,
    counts: Tensor,
    *,
    scale: float,
    size: int | None = None,
    first: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax(scale q c + log count) over the codes of what each block of queries has to read.

    q (B, Hq, T, D), its first token with number `first`; codebook (Hkv, S, D); sums (B, Hkv, N, S,
    Dv) and counts (B, Hkv, N, S) as `summarise` gives them, for the N blocks of `size` tokens that
    queries are in (None: all in one). Returns out (B, Hq, T, Dv) in q's dtype and the log-sum-exp
    (B, Hq, T) float32 or better, 0 and -inf where all counts are 0. Differentiable in q and sums,
    also through the log-sum-exp."""
    size = first + q.shape[2] if size is None else size
    if choose(impl, q.device) == "triton":
        from .triton_impl import read as run
    else:
        from .torch_impl import read as run
    return run(q, codebook.detach(), sums, counts, scale, size, first)
