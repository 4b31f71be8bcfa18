"""Flex attention with any score_mod: tile by tile, all keys of a tile at once, on any device.

Shapes: q (B, Hq, Tq, D), k, v (B, Hkv, Tk, D), lse (B, Hq, Tq). A tile has S queries and L keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .tables import Tables, Tile, on_tile

ROOM = 2**19  # scores at a time: a few of them stay in a core's cache
ROOM_GPU = 2**26


class Part(NamedTuple):
    """One row, some query heads and their n K/V heads, G each, and one tile."""

    b: int
    of_q: slice
    of_kv: slice
    tile: Tile

    def queries(self, x: Tensor) -> Tensor:
        """x (B, Hq, Tq, ...) -> (n, G, S, ...)"""
        x = x[self.b, self.of_q, self.tile.a : self.tile.b]
        return x.unflatten(0, (self.of_kv.stop - self.of_kv.start, -1))

    def keys(self, x: Tensor) -> Tensor:
        """x (B, Hkv, Tk, D) -> (n, L, D)"""
        x = x[self.b, self.of_kv]
        parts = [x[:, first:end] for first, end, _ in self.tile.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def places(self, device) -> tuple[Tensor, Tensor, Tensor]:
        """Query heads (n G,), positions of queries (S,) and of keys (L,)."""
        j = [torch.arange(low, high, device=device) for low, high, _ in self.tile.runs]
        i = torch.arange(self.tile.a, self.tile.b, device=device)
        h = torch.arange(self.of_q.start, self.of_q.stop, device=device)
        return h, i, torch.cat(j)


def forward(
    tables: Tables,
    score_mod: Callable | None,
    scale: float,
    q,
    k,
    v,
):
    """-> out (B, Hq, Tq, D) and the log-sum-exp, fp32 or fp64: 0 and -inf where nothing is seen."""
    work = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape, dtype=work)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=work)
    for part in _parts(tables, q, k):
        s, _ = _products(
            part,
            q,
            k,
            work,
            scale,
        )
        s = _hidden(tables, part, _modified(score_mod, part, s)).view_as(s)
        top = s.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(work).min)
        p = (s - top).exp_()
        total = p.sum(dim=-1, keepdim=True)
        part.queries(lse).copy_((top + total.log())[..., 0])
        values = part.keys(v).to(work)
        got = (p.flatten(1, 2) @ values).view(*p.shape[:3], -1)
        part.queries(out).copy_(got / torch.where(total > 0, total, 1))
    return out, lse


def backward(
    tables: Tables,
    score_mod,
    scale: float,
    q,
    k,
    v,
    out,
    lse,
    d_out,
    d_lse,
    learned: list[Tensor],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of q, k, v, fp32 or fp64, and of what the score_mod has `learned`."""
    work = lse.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q, k, v))
    sums: list[Tensor | None] = [None] * len(learned)
    for part in _parts(tables, q, k):
        s, keys = _products(
            part,
            q,
            k,
            work,
            scale,
        )
        rows, d_rows = part.queries(q).to(work), part.queries(d_out)
        seen = part.queries(lse)[..., None]
        delta = (d_rows * part.queries(out)).sum(dim=-1, keepdim=True)
        if d_lse is not None:
            delta = delta - part.queries(d_lse)[..., None]
        with torch.enable_grad():
            given = s.requires_grad_()
            scores = _modified(score_mod, part, given)
        hidden = _hidden(tables, part, scores.detach()).view_as(s)
        p = torch.where(seen == -torch.inf, 0.0, (hidden - seen).exp())
        values = part.keys(v).to(work)
        dp = (d_rows.flatten(1, 2) @ values.mT).view_as(s)
        ds = torch.where(p > 0, p * (dp - delta), 0.0).view_as(scores)
        _add(part, dv, p.flatten(1, 2).mT @ d_rows.flatten(1, 2))
        if scores is not given:
            ds, *more = torch.autograd.grad(
                scores,
                [given, *learned],
                ds,
                allow_unused=True,
                materialize_grads=True,
            )
            sums = [b if a is None else a + b for a, b in zip(sums, more, strict=True)]
        ds = ds.view_as(s).flatten(1, 2)
        part.queries(dq).copy_((ds @ keys).view_as(rows) * scale)
        _add(part, dk, ds.mT @ rows.flatten(1, 2) * scale)
    return [dq, dk, dv], sums


def _parts(
    tables: Tables,
    q: Tensor,
    k: Tensor,
) -> Iterator[Part]:
    """All tiles, with as many K/V heads of one row as `ROOM` holds; one query head where tables
    differ by head."""
    room, groups = ROOM if q.device.type == "cpu" else ROOM_GPU, q.shape[1] // k.shape[1]
    for b in range(len(q)):
        by_head = tables.tiles[b if len(tables.tiles) > 1 else 0]
        for h, tiles in enumerate(by_head):
            for tile in tiles:
                if len(by_head) > 1:
                    kv = h // groups
                    yield Part(
                        b,
                        slice(h, h + 1),
                        slice(kv, kv + 1),
                        tile,
                    )
                    continue
                most = max(1, room // (groups * (tile.b - tile.a) * tile.keys))
                for first in range(0, k.shape[1], most):
                    end = min(first + most, k.shape[1])
                    yield Part(
                        b,
                        slice(first * groups, end * groups),
                        slice(first, end),
                        tile,
                    )


def _products(
    part: Part,
    q: Tensor,
    k: Tensor,
    work,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Scores before the score_mod, (n, G, S, L), and the keys (n, L, D), in `work`."""
    rows, keys = part.queries(q).to(work), part.keys(k).to(work)
    s = (rows.flatten(1, 2) @ keys.mT).mul_(scale)
    return s.view(*rows.shape[:3], -1), keys


def _modified(
    score_mod: Callable | None,
    part: Part,
    s: Tensor,
) -> Tensor:
    """score_mod's scores, (n G, S, L), of s (n, G, S, L); s itself without one."""
    if score_mod is None:
        return s
    h, i, j = part.places(s.device)
    return on_tile(
        score_mod,
        s.flatten(0, 1),
        part.b,
        h,
        i,
        j,
    ).to(s.dtype)


def _hidden(
    tables: Tables,
    part: Part,
    scores: Tensor,
) -> Tensor:
    """-inf for pairs that the mask hides; scores: (n G, S, L), or (n, G, S, L)."""
    if not any(asked for *_, asked in part.tile.runs):
        return scores
    h, i, j = part.places(scores.device)
    b = part.b if len(tables.tiles) > 1 else 0
    heads = h if len(tables.tiles[b]) > 1 else h[:1] * 0
    sees = torch.ones(
        len(heads),
        len(i),
        len(j),
        dtype=torch.bool,
        device=i.device,
    )
    c = 0
    for low, end, asked in part.tile.runs:
        at = slice(c, c + end - low)
        if asked:
            sees[..., at] = on_tile(
                tables.mask_mod,
                None,
                b,
                heads,
                i,
                j[at],
            )
        c += end - low
    return scores.masked_fill(~sees, -torch.inf)


def _add(
    part: Part,
    total: Tensor,
    grad: Tensor,
) -> None:
    """Adds the gradient of a part's keys (n, L, D) to that of all (B, Hkv, Tk, D)."""
    c = 0
    for first, end, _ in part.tile.runs:
        total[part.b, part.of_kv, first:end] += grad[:, c : c + end - first]
        c += end - first
