"""Dilated attention as ordinary attention: tokens d apart form d sequences of their own, a d-th as
long.

(i - j) % d == 0 depends on differences only, so it does not matter from where tokens are counted:
padding needs no alignment, and a window of w keys d apart is a window of w neighbours.

B: rows; H, Hq, Hkv: heads; Tq, Tk: queries, the last of all tokens, and keys; D, Dv: of a key, of a
value; d: the dilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from effattn.kernels.flash.pattern import Layout, first_real

Run = Callable[[Tensor, Tensor, Tensor, Layout], tuple[Tensor, Tensor]]
MOST = 4096  # queries at a time on a CPU: what is reordered then stays in its caches


def by_residue(
    d: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    run: Run,
    *,
    lse: bool,
    strict: bool = False,
    back: int | None = None,
):
    """Attention inside every residue class of the token numbers modulo d.

    q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), keys in order and without slots.
    `run(q, k, v, layout)` attends over (B d, H, about T / d, D) and returns out and lse. strict: a
    query does not see its own token's key. back: causal queries see no key more than so many tokens
    before them, and nothing has gradients: then long sequences are taken in pieces on a CPU.
    Returns out (B, Hq, Tq, Dv), and the log-sum-exp (B, Hq, Tq) if `lse`."""
    queries, keys = q.shape[2], k.shape[2]
    if back is not None and q.device.type == "cpu" and queries > MOST:
        pieces = []
        for a in range(0, queries, MOST):
            b = min(a + MOST, queries)
            last = keys - queries + b
            first = max(0, last - (b - a) - back)
            part = replace(
                layout,
                tail=layout.tail + first,
                mask=None if layout.mask is None else layout.mask[:, first:last],
            )
            some = q[:, :, a:b], k[:, :, first:last], v[:, :, first:last]
            pieces.append(by_residue(d, *some, part, run, lse=True, strict=strict))
        out, sums = (torch.cat(each, dim=2) for each in zip(*pieces, strict=True))
        return (out, sums) if lse else out
    # Token number t goes to row t % d, place t // d. Both ends are filled up to whole multiples of
    # d, from `first_k` and `first_q` to `end`, so that this is a view; what fills is masked out.
    total, queries = layout.tokens(k.shape[2]), q.shape[2]
    first_k, first_q = layout.tail // d * d, (total - queries) // d * d
    end = -(-total // d) * d

    def split(x: Tensor, low: int, high: int) -> Tensor:
        """(B, H, T, D), of which the first token is number `low`, from number `high` on: (B d, H, T
        / d, D).
        """
        x = pad(x, (0, 0, low - high, end - total))
        x = x.view(*x.shape[:2], -1, d, x.shape[3]).permute(0, 3, 1, 2, 4)
        return x.reshape(-1, *x.shape[2:])

    parts_q = split(q, total - queries, first_q)
    parts_k, parts_v = (split(x, layout.tail, first_k) for x in (k, v))
    mask = layout.mask
    # none is needed where nothing was filled in, and the kernels are faster without
    if mask is None and (layout.tail > first_k or end > total or strict):
        mask = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device)
    if mask is not None:
        mask = pad(mask.expand(q.shape[0], -1), (layout.tail - first_k, end - total), value=False)
        mask = mask.view(q.shape[0], -1, d).transpose(1, 2).reshape(-1, mask.shape[1] // d)
    if strict:  # keys move up by one, so that a query's own key is the next one's
        parts_k, parts_v = (pad(x, (0, 0, 1, 0))[:, :, :-1] for x in (parts_k, parts_v))
        mask = pad(mask, (1, 0), value=False)[:, :-1]
    inner = Layout() if mask is None else Layout(start=first_real(mask), mask=mask)
    out, sums = run(parts_q, parts_k, parts_v, inner)

    def join(x: Tensor) -> Tensor:
        x = x.view(q.shape[0], d, *x.shape[1:]).movedim(1, 3).flatten(2, 3)
        return x[:, :, total - queries - first_q :][:, :, :queries]

    out = join(out)
    return (out, join(sums)) if lse else out
