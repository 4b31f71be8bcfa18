"""For patterns laid out on a grid of positions: rows moved so that each one's first real token
comes first.

q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv); out (B, Hq, Tq, Dv), and its log-sum-exps
`sums` (B, Hq, Tq).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effattn.interface import Call
from effattn.kernels import decode
from effattn.kernels.flash.pattern import Layout


def whole(q: Tensor, k: Tensor, layout: Layout) -> bool:
    """Whether the call is a whole sequence: every token is a query, and no past was evicted."""
    return q.shape[2] == k.shape[2] and layout.tail == 0 and layout.slots == 0


def aligned(
    run: Callable[[Tensor, Tensor, Tensor, Layout], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """run(q, k, v, layout) with padding on the right only, so that a token's number is its
    position; (out, lse) as they were. Left padding costs a copy of q, k, v and out; a row of
    padding only comes out as 0 and -inf."""
    if layout.start is None:
        return run(q, k, v, layout)
    tokens = q.shape[2]
    places = torch.arange(tokens, device=q.device)
    # where each position's token is now; padding comes round last
    there = (places + layout.start[:, None]) % tokens
    back = (places - layout.start[:, None]) % tokens

    def move(x: Tensor, at: Tensor) -> Tensor:
        return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    mask = layout.mask.gather(1, there)
    q, k, v = (move(x, there) for x in (q, k, v))
    out, sums = run(q, k, v, Layout(mask=mask))
    out, sums = move(out, back), move(sums[..., None], back)[..., 0]
    seen = (places >= layout.start[:, None])[:, None]  # padding on the left sees nothing
    return torch.where(seen[..., None], out, 0.0), torch.where(seen, sums, -torch.inf)


def in_pieces(backend, q: Tensor, k: Tensor, v: Tensor, call: Call, impl: str, lse: bool):
    """A chunk after an evicted past, through the decode kernels, 16 queries at a time.

    Grids need whole sequences, and here the past lies in a ring and slots; the decode kernels take
    a table of who sees whom (`counts`), of any layout. Such chunks are rare and short."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        impl = "torch"  # the Triton decode kernel has no backward
    counts = backend.counts(q, k, call)
    step = decode.MOST_QUERIES
    pieces = [
        decode.attention(
            q[:, :, at : at + step],
            k,
            v,
            None,
            call.layout,
            scale=call.scale,
            softcap=call.softcap,
            counts=counts[:, :, at : at + step],
            impl=impl,
            lse=True,
        )
        for at in range(0, q.shape[2], step)
    ]
    out, sums = (torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))
    return (out, sums) if lse else out
