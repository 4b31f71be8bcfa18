"""Exact softmax attention of whole sequences and chunks: validates nothing but the implementation,
chooses, runs it.

    out = attention(q, k, v, Window(back=512), causal=True)
    # to merge parts by log-sum-exp
    out, lse = attention(q, k, v, Blocks(size=64), layout, lse=True)

Forward and backward, also through the log-sum-exp. A pattern (`pattern.py`) says who sees whom, a
rule (`rules.py`) how a pair's score depends on its distance."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..rows import dense_rows
from .dropout import Dropout
from .pattern import Blocks, Layout, Pattern, Window
from .rules import Bias, Far, check

__all__ = [
    "IMPLEMENTATIONS",
    "Bias",
    "Blocks",
    "Dropout",
    "Far",
    "Layout",
    "Pattern",
    "Window",
    "attention",
    "choose",
]

IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")


def choose(impl: str = "auto", device: torch.device | str | None = None) -> str:
    """The implementation that `impl` runs on `device` (None: before any tensor is seen, the
    machine's best).

    "auto": "triton" on a GPU, "torch" elsewhere. ValueError for unknown names and for "triton"
    where it cannot run: without a GPU, unless TRITON_INTERPRET=1 is set (its interpreter is slow,
    and meant for tests)."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, valid are {', '.join(map(repr, IMPLEMENTATIONS))}")
    if device is None:
        gpu = torch.cuda.is_available()
    else:
        gpu = (device if isinstance(device, torch.device) else torch.device(device)).type == "cuda"
    if impl == "auto":
        return "triton" if gpu else "torch"
    if impl == "triton" and not gpu and os.environ.get("TRITON_INTERPRET") != "1":
        where = "this machine has none" if device is None else f"the tensors are on {device}"
        raise ValueError(
            f"impl: 'triton' needs a GPU, {where}; valid here are 'auto' and 'torch' "
            "(or TRITON_INTERPRET=1, set before triton is imported, for tests)"
        )
    return impl


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
    far: Far | None = None,
    bias: Bias | None = None,
    drop: Dropout | None = None,
    impl: str = "auto",
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys that each query may see.

    q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) of one float dtype and device, Hq a
    multiple of Hkv, not checked here. Queries are the last Tq tokens of the layout; scale defaults
    to D^-0.5; softcap c makes each score c tanh(score / c); q_first (B, Hq, Tq, D) are the queries
    as keys at positions below `pattern.first` see them; `far` has other queries and keys for
    distant pairs, `bias` adds to scores by distance: ValueError for what they do not go with (far:
    no `causal`, q_first or bias); `drop`, with numbers of these queries and keys, says which
    weights are 0. Returns out (B, Hq, Tq, Dv) in q's dtype, and with `lse` the log-sum-exp of each
    query's scores (B, Hq, Tq), fp32 (fp64 for fp64 inputs). A query that sees
    nothing gives 0 and -inf."""
    pattern, layout = pattern or Pattern(), layout or Layout()
    # neither kernels nor torch's own take all strides
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    q_first = dense_rows(q_first)
    far = check(far, bias, q, k, pattern, layout, causal, q_first)
    if choose(impl, q.device) == "triton":
        from .triton_impl import attention as run
    else:
        from .torch_impl import attention as run
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
        need_lse=lse,
        far=far,
        bias=bias,
        drop=drop,
    )
    # with `lse`, sums are there
    return (out, sums) if lse else out  # type: ignore[return-value]
