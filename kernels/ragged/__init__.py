"""Exact attention over keys of which each head has its own number: those that an eviction left.

    out, lse = attention(q, kept, scale=0.125)              # q (B, Hq, Tq, D), kept a `Ragged`

Every query sees every key that its head has, so that there are no positions here; what came since
is attended to apart, and both are merged by log-sum-exp (`effattn.kernels.merge`). Forward only.

B: rows; Hq, H: query and key/value heads; Tq: queries; D, Dv: of a key, of a value."""

from __future__ import annotations

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from ..rows import dense_rows
from .kept import Ragged, encode

__all__ = ["IMPLEMENTATIONS", "Ragged", "attention", "choose", "encode"]


def attention(
    q: Tensor, kept: Ragged, *, scale: float, softcap: float | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Tq, Dv) in q's dtype and the log-sum-exp (B, Hq, Tq), float32 or better; 0 and
    -inf where a head has no keys. ValueError for other heads or rows than `kept` has."""
    if len(q) != len(kept.rows) or q.shape[1] % kept.heads or q.shape[3] != kept.dims[0]:
        raise ValueError(
            f"q: got {tuple(q.shape)}, valid are {len(kept.rows)} rows, a multiple of "
            f"{kept.heads} heads, and {kept.dims[0]} numbers"
        )
    if choose(impl, q.device) == "triton":
        from .triton_impl import attention as run
    elif impl == "reference":
        from .reference import attention as run
    else:
        from .torch_impl import attention as run
    return run(dense_rows(q), kept, scale=scale, softcap=softcap)
