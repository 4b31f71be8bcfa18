"""Attention to the best finished blocks of keys: validates nothing but the implementation, chooses,
runs it.

    rule = Rule(window=512, sinks=4, block=64, blocks=8)
    chosen = select(rule, q, summarise(rule, k), at)
    out, lse = attention(q, k, v, rule, chosen, at)    # to be merged with the window and the sinks

Forward and backward, also through the log-sum-exp; the choice has no gradient. B: rows; Hq, H:
query and key/value heads; n: blocks of a query."""

from __future__ import annotations

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from ..rows import dense_rows
from .few import attention_few, reader
from .learning import with_pool_loss
from .selection import SUMMARIES, Rule, probes, select, summarise, work_dtype

__all__ = [
    "IMPLEMENTATIONS",
    "SUMMARIES",
    "Rule",
    "attention",
    "attention_few",
    "choose",
    "probes",
    "reader",
    "select",
    "summarise",
    "with_pool_loss",
    "work_dtype",
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    chosen: Tensor,
    at: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys of each query's chosen blocks, without those that are in
    its window or sinks.

    q (B, Hq, Tq, D); k (B, H, T, D), v (B, H, T, Dv), from each row's first real token on; chosen
    (B, H, Tq, n) as `select` gives it; at (1 or B, Tq) int64 positions of the queries; one float
    dtype and device, not checked here; scale defaults to D^-0.5. Returns out (B, Hq, Tq, Dv) and
    the log-sum-exp (B, Hq, Tq), both in float32 or better; 0 and -inf where nothing was chosen."""
    if choose(impl, q.device) == "triton":
        from .triton_impl import attention as run
    else:
        from .torch_impl import attention as run
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run(dense_rows(q), dense_rows(k), dense_rows(v), rule, chosen, at, scale=scale)
