"""Exact softmax attention of a few new tokens over a cache: split over the keys, the GQA group
packed into the tile.

    out = attention(q, k, v, Window(back=512), state_layout)            # q (B, Hq, 1 to 16, D)

    out = attention(q, k, v, turn=Turn(inv_freq))                  # k as it was before its rotation

Forward only. The cache may be a ring (`Layout.ring`), which no other kernel reads.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from ..flash.dropout import Dropout
from ..flash.pattern import IN_ORDER, Layout, Pattern
from ..flash.rules import Bias
from ..flash.rules import check as check_rules
from ..rows import dense_rows
from .turn import Turn, check

__all__ = ["IMPLEMENTATIONS", "MOST_QUERIES", "Turn", "attention", "choose"]

MOST_QUERIES = 16
# by the name of the implementation: an import at each step is dear
_loaded: dict[str, Callable] = {}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | None = None,
    layout: Layout | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    q_first: Tensor | None = None,
    counts: Tensor | None = None,
    turn: Turn | None = None,
    bias: Bias | None = None,
    drop: Dropout | None = None,
    impl: str = "auto",
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `effattn.kernels.flash.attention`, for Tq <= 16 and without gradients.

    counts, (1 or B, 1 or Hq, Tq, Tk) bool or integer: how often each query sees each key, instead
    of the pattern and causality (padding included); for patterns that have no predicate. turn: k is
    as it was before its rotation. bias, drop: as there; the
    latter in torch alone. ValueError for what they do not go with (a turn with a window: no q_first
    or bias, only `causal`)."""
    pattern, layout = pattern or Pattern(), layout or IN_ORDER
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    q_first = dense_rows(q_first)
    check_rules(None, bias, q, k, pattern, layout, causal, q_first)
    check(turn, bias, q, pattern, causal, q_first)
    rules = {} if drop is None else {"drop": drop}
    impl = choose(impl, q.device)
    if drop is not None and impl == "triton":
        raise ValueError("drop: the Triton decode kernel has no dropout; valid is impl='torch'")
    run = _loaded.get(impl) or _load(impl)
    out, sums = run(
        q,
        k,
        v,
        pattern,
        layout,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        q_first=q_first,
        counts=counts,
        need_lse=lse,
        turn=turn,
        bias=bias,
        **rules,
    )
    # with `lse`, sums are there
    return (out, sums) if lse else out  # type: ignore[return-value]


def _load(impl: str) -> Callable:
    """The implementation; one that is not asked for is not imported."""
    if impl == "triton":
        from .triton_impl import attention as run
    else:
        from .torch_impl import attention as run
    _loaded[impl] = run
    return run
