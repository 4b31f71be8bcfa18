"""y = W x + bias for a Monarch matrix W = P L P' R: validates nothing but the implementation,
chooses, runs it.

    y = linear(x, right, left, bias)

    N rows of x, b blocks, p inputs and s outputs of a block, r rank of a pair of blocks
    right (b, b·r, p)  the blocks of R; row j·r + a of block i is number a of what input block i
                       says to output block j
    left  (b, s, b·r)  the blocks of L; column i·r + a of block j is what it hears there

P' brings (i, j, a) into the order (j, i, a), and P brings (j, t) into (t, j): output t of block j
is y[t·b + j]. So the submatrix of output block j and input block i has rank r, and W has b·b·r·(p +
s) parameters. With r = 1 and n = b² this is Monarch as Dao et al. 2022 define it (arXiv:2204.00595,
section 3.1); other sizes generalise it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose

__all__ = ["IMPLEMENTATIONS", "choose", "linear"]


def linear(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """W x + bias. x (..., n), right (b, b·r, p), left (b, s, b·r), bias (out_features,): one float
    dtype and device.

    n <= b·p: inputs beyond n count as zeros. out_features <= b·s (the default): outputs beyond are
    dropped. Returns (..., out_features) in x's dtype; the intermediate numbers are rounded to it,
    sums are fp32 (torch: as its matrix products do). Gradients for all four. Under autocast
    everything but fp64 is cast to its dtype, as in nn.Linear."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, right, left = x.to(dtype), right.to(dtype), left.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return linear(x, right, left, bias, out_features=out_features, impl=impl)
    out_features = left.shape[0] * left.shape[1] if out_features is None else out_features
    kind = choose(impl, x.device)
    if kind == "triton":
        from .triton_impl import linear as run
    elif kind == "reference":
        from .reference import linear as run
    else:
        from .torch_impl import linear as run
    y = run(x.reshape(-1, x.shape[-1]), right, left, bias, out_features)
    return y.view(*x.shape[:-1], out_features)
