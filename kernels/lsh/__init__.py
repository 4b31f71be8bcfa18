"""LSH attention, a causal-safe Reformer (arXiv:2001.04451): validates nothing but the
implementation, chooses, runs it.

    bucket, query_bucket = hash_tokens(k, rotations), hash_tokens(q, rotations)
    places = places_of(rule, query_bucket, bucket, ...)
    out = attention(q, k, v, places)

`places` says how hashing decides who sees whom. Forward and backward; buckets have no gradient.
"""

from __future__ import annotations

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from .few import Seen, attention_few
from .places import NO_KEY, Past, Places, Rule, hash_tokens, new_ranks, normalized, places_of

__all__ = [
    "IMPLEMENTATIONS",
    "NO_KEY",
    "Past",
    "Places",
    "Rule",
    "Seen",
    "attention",
    "attention_few",
    "choose",
    "hash_tokens",
    "new_ranks",
    "normalized",
    "places_of",
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Places,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(scale q k^T) v over the keys that each query sees in any round, each of them once,
    and its own.

    q (B, Hq, Tq, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv) of one float dtype and device, not checked
    here; scale defaults to D^-0.5. Returns (B, Hq, Tq, Dv) in q's dtype, 0 for padding. With
    `shared_qk` keys are normalised."""
    if choose(impl, q.device) == "triton":
        from .triton_impl import attention as run
    else:
        from .torch_impl import attention as run
    k = normalized(k) if places.rule.shared_qk else k
    return run(q, k, v, places, scale=q.shape[-1] ** -0.5 if scale is None else scale)
