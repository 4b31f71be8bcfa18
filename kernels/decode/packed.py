"""Exact softmax attention over a cache whose older tokens are packed (`effattn.kernels.pack`): one
launch over the packed keys and those in full precision, so that no step unpacks the cache.

    # k, v: Codes of the older tokens; k_rest, v_rest: the newest ones in full precision
    cache = PackedCache(k, v, k_rest, v_rest, total=5000)
    out = attention(q, cache, Window(back=4096))  # q (B, Hq, Tq, D)

Forward only.
"""

from __future__ import annotations

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from ..flash.pattern import Layout, Pattern
from ..flash.rules import Bias
from ..flash.rules import check as check_rules
from ..pack.codes import Pages
from .packed_cache import PackedCache
from .turn import Turn
from .turn import check as check_turn

__all__ = ["IMPLEMENTATIONS", "PackedCache", "attention", "choose"]


def attention(
    q: Tensor,
    cache: PackedCache,
    pattern: Pattern | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    q_first: Tensor | None = None,
    turn: Turn | None = None,
    bias: Bias | None = None,
    impl: str = "auto",
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys that each query may see: (B, Hq, Tq, Dv) in q's dtype,
    any Tq.

    pattern: `Pattern`, `Window` or `Blocks` with `first`; scale defaults to D^-0.5; softcap c makes
    each score c tanh(score / c). q_first (B, Hq, Tq, D): the queries as keys at positions below
    `pattern.first` see them, which must all be slots. turn: keys are held raw and rotated when they
    are read. bias: what distances add to scores. With `lse` also the log-sum-exp of each query's
    scores (B, Hq, Tq), fp32. A query that sees nothing gives 0 and -inf. ValueError for what an
    implementation cannot do."""
    pattern = pattern or Pattern()
    if q_first is not None and pattern.first > cache.slots:
        raise ValueError(
            f"q_first: got pattern.first = {pattern.first}, but the cache holds {cache.slots} "
            f"first tokens in full precision; valid is at most {cache.slots}"
        )
    check_rules(None, bias, q, q, pattern, Layout(), causal, q_first)
    # first queries are slots here, which see no far keys
    check_turn(turn, bias, q, Pattern(), causal, None)
    name = choose(impl, q.device)
    if isinstance(cache.k, Pages) and name != "torch":
        raise ValueError(f"cache: got Pages, valid with {name!r} are Codes")
    if name == "triton":
        from .packed_triton import attention as run
    elif name == "reference":
        from .packed_reference import attention as run
    else:
        from .packed_torch import attention as run
    out, sums = run(
        q,
        cache,
        pattern,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        q_first=q_first if pattern.first else None,
        turn=turn,
        bias=bias,
        need_lse=lse,
    )
    # with `lse`, sums are there
    return (out, sums) if lse else out  # type: ignore[return-value]
