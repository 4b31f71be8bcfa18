"""Linear attention whose sums forget what the tokens say, and the gated delta rule, which takes out
of them what it is about to write. Checks nothing but the implementation, chooses, runs it.

    out, memory = attention(q, k, v, log_decay=g)                # gated linear attention
    out, memory = attention(q, k, v, log_decay=g, beta=beta)     # gated delta rule
    out, memory = attention(q, k, v, log_decay=g, memory=memory, keep=True)
    memory = fold(k, v, log_decay=g, memory=memory)              # only the sums

Gated linear attention: GLA, arXiv:2312.06635; Mamba-2, arXiv:2405.21060. The delta rule:
arXiv:2406.06484, gated arXiv:2412.06464. q and k are features already; `reference.py` has the
definition.

B: rows; Hq, H: query and key/value heads; T: tokens; F: features of a key; V: of a value."""

from __future__ import annotations

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from ..linear import Memory
from .gates import LOWEST

__all__ = ["IMPLEMENTATIONS", "LOWEST", "Memory", "attention", "choose", "fold"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool = False,
    mask: Tensor | None = None,
    scale: float = 1.0,
    memory: Memory | None = None,
    keep: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Memory | None]:
    """o_t = scale q_t S_t, divided by q_t n_t if `normalize` (then without scale; 0 where that is
    0).

        S_t = diag(a_t) S_(t-1) + k_t v_t^T                             without beta
        S_t = (1 - beta_t k_t k_t^T) diag(a_t) S_(t-1) + beta_t k_t v_t^T    with it

    n_t is S_t of values that are all 1. q (B, Hq, Tq, F), k (B, H, T, F), v (B, H, T, V) of one
    float dtype and device, Hq a multiple of H, not checked here; queries are the last keys.
    log_decay: log a, in [`LOWEST`, 0], (B, H, T, 1) or one for each feature (B, H, T, F); None: 0.
    beta (B, H, T) in [0, 1], with keys no longer than 1, and without `normalize`; mask (B, T) bool:
    real keys; memory: what came before k and v, sums (B, H, F, V) and norms (B, H, F). Returns out
    (B, Hq, Tq, V) in q's dtype, and with `keep` the memory after k and v, in fp32 or better.
    Forward and backward, also through the memory."""
    if choose(impl, k.device) == "triton":
        from .triton_impl import attention as run
    else:
        from .torch_impl import attention as run
    out, sums, norms = run(
        q,
        k,
        v,
        log_decay=log_decay,
        beta=beta,
        normalize=normalize,
        mask=mask,
        scale=scale,
        memory=memory,
        keep=keep,
    )
    return out, Memory(sums, norms, None) if keep else None


def fold(
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool = False,
    mask: Tensor | None = None,
    memory: Memory | None = None,
    impl: str = "auto",
) -> Memory:
    """The memory after k and v, as `attention` would return it."""
    nothing = k[:, :, :0]
    _, after = attention(
        nothing,
        k,
        v,
        log_decay=log_decay,
        beta=beta,
        normalize=normalize,
        mask=mask,
        memory=memory,
        keep=True,
        impl=impl,
    )
    assert after is not None
    return after
