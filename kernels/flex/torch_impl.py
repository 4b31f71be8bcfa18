"""Flex attention in plain torch: the autograd function, and tiles through the CPU's fused kernel,
as many that look alike as fit at a time, where a score_mod adds to scores at most; all others are
in `torch_scores`.

Shapes: q (B, Hq, Tq, D), k, v (B, Hkv, Tk, D), lse (B, Hq, Tq). A tile has S queries and L keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..once import once_differentiable
from ..overlapping import add_overlapping, computable, every
from ..precision import as_given
from ..rows import dense_rows
from . import torch_scores
from .probes import by_distance, is_additive
from .tables import Tables, Tile, on_tiles

ROOM = 4 * 2**20  # elements of masks, or of gradients that are still to be added up, at a time
BLIND = 1e30  # the log-sum-exp that makes all weights 0


class Flex(torch.autograd.Function):
    """Keeps the output and the log-sum-exp; backward computes the weights again."""

    @staticmethod
    def forward(ctx, tables: Tables, score_mod: Callable | None, scale: float, q, k, v, *learned):
        added = score_mod is None or (not learned and is_additive(score_mod, q))
        fused = added and q.device.type == "cpu"
        if fused:
            out, lse = _forward(
                tables,
                score_mod,
                scale,
                q,
                k,
                v,
            )
        else:
            out, lse = torch_scores.forward(
                tables,
                score_mod,
                scale,
                q,
                k,
                v,
            )
        ctx.call = tables, score_mod, scale, fused
        ctx.save_for_backward(
            q,
            k,
            v,
            *learned,
            out,
            lse,
        )
        ctx.set_materialize_grads(False)
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable
    @as_given
    def backward(
        ctx,
        d_out,
        d_lse,
    ):
        tables, score_mod, scale, fused = ctx.call
        q, k, v, *learned, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out.to(out.dtype)
        given = tables, score_mod, scale, q, k, v, out, lse, d_out, d_lse
        if fused:
            grads, learned = _backward(*given), []
        else:
            grads, learned = torch_scores.backward(*given, learned)
        grads = [grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)]
        return None, None, None, *grads, *learned


def _forward(
    tables: Tables,
    score_mod,
    scale: float,
    q,
    k,
    v,
) -> tuple[Tensor, Tensor]:
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=work)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=work)
    q, k, v = computable((q, k, v))
    for rows, heads, of_kv, (a, size, count, stride), tile, mask in _parts(
        tables,
        score_mod,
        q,
        k,
        False,
    ):
        at = a, size, count, stride
        for b in rows:
            got, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                every(q[b, heads], *at),
                _keys(k[b, of_kv], tile, at),
                _keys(v[b, of_kv], tile, at),
                0.0,
                False,
                attn_mask=mask,
                scale=scale,
            )
            outs, all_sums = every(out[b, heads], *at), every(lse[b, heads, :, None], *at)
            outs.copy_(got)
            all_sums.copy_(sums[..., None])
            if mask is not None:  # what the kernel gives for those that see nothing is not said
                blind = mask.amax(dim=-1, keepdim=True) == -torch.inf
                outs.masked_fill_(blind, 0)
                all_sums.masked_fill_(blind, -torch.inf)
    return out, lse


def _backward(
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
) -> list[Tensor]:
    work, dim = lse.dtype, q.shape[-1]
    q, k, v = computable((q, k, v))
    if d_lse is not None:
        # one more column, as `flash.torch_fused` has it: its product is the gradient of the sums
        d_lse = d_lse.masked_fill(lse == -torch.inf, 0)[..., None].to(work)
        q, k, v = (torch.nn.functional.pad(x, (0, 8)) for x in (q, k, v))
        d_out = torch.nn.functional.pad(torch.cat([d_out, torch.ones_like(d_lse)], -1), (0, 7))
        out = torch.nn.functional.pad(torch.cat([out, -d_lse], -1), (0, 7))
    lse = torch.where(lse == -torch.inf, BLIND, lse)
    d_out, out = (dense_rows(x.to(q.dtype)) for x in (d_out, out))
    dq, dk, dv = (torch.zeros(x.shape, dtype=work) for x in (q, k, v))
    for rows, heads, of_kv, at, tile, mask in _parts(
        tables,
        score_mod,
        q,
        k,
        True,
    ):
        for b in rows:
            got = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                every(d_out[b, heads], *at),
                every(q[b, heads], *at),
                _keys(k[b, of_kv], tile, at),
                _keys(v[b, of_kv], tile, at),
                every(out[b, heads], *at),
                every(lse[b, heads, :, None], *at)[..., 0],
                0.0,
                False,
                attn_mask=mask,
                scale=scale,
            )
            every(dq[b, heads], *at).copy_(got[0])
            _add_keys(
                dk[b, of_kv],
                got[1],
                tile,
                at,
            )
            _add_keys(
                dv[b, of_kv],
                got[2],
                tile,
                at,
            )
    return [x[..., :dim] for x in (dq, dk, dv)]


def _parts(
    tables: Tables,
    score_mod: Callable | None,
    q: Tensor,
    k: Tensor,
    gradients: bool,
) -> Iterator[tuple]:
    """(rows of the batch, query heads, their key heads, (first query, S, tiles, tokens from one to
    the next), the first tile, what to add to its scores) of tiles that look alike."""
    batch, heads, groups = len(q), q.shape[1], q.shape[1] // k.shape[1]
    same = by_distance(tables.mask_mod, q) and by_distance(score_mod, q, score=True)
    apart = len(tables.tiles) > 1 or score_mod is not None  # the rows of the batch
    for row in range(batch if apart else 1):
        rows = range(row, row + 1) if apart else range(batch)
        b = row if len(tables.tiles) > 1 else 0
        for h in range(len(tables.tiles[b])):
            whole = len(tables.tiles[b]) == 1
            of_q = slice(0, heads) if whole else slice(h, h + 1)
            of_kv = slice(0, k.shape[1]) if whole else slice(h // groups, h // groups + 1)
            many = of_q.stop - of_q.start
            # of what there is room for: gradients of a tile's keys, or masks
            width = many * q.shape[3] * gradients
            masks = 0 if same else many if score_mod is not None else 1
            for tile, tiles, stride in tables.series(b, h):
                size = tile.b - tile.a
                most = max(1, ROOM // (max(size * masks, width, 1) * tile.keys))
                mask = None
                for done in range(0, tiles, most):
                    at = tile.a + done * stride, size, min(most, tiles - done), stride
                    if mask is None or not same:
                        look = at[0], size, 1 if same else at[2], stride
                        mask = _added(
                            tables,
                            score_mod,
                            (b, h, row, of_q),
                            tile,
                            look,
                            q,
                        )
                    yield rows, of_q, of_kv, at, tile, mask


def _added(
    tables: Tables,
    score_mod: Callable | None,
    where: tuple,
    tile: Tile,
    at: tuple,
    like: Tensor,
) -> Tensor | None:
    """What to add to the scores of tiles, (n, 1 or heads, S, L); None: nothing. where: row and head
    of the mask, row and query heads of the call."""
    if score_mod is None and not any(asked for *_, asked in tile.runs):
        return None
    b, h, row, of_q = where
    a, size, count, stride = at
    first = a + stride * torch.arange(count)[:, None]
    i = first + torch.arange(size)
    parts = []
    for low, end, asked in tile.runs:
        j = first + torch.arange(low - tile.a, end - tile.a)
        # what is added is larger than half precision can tell apart
        work = torch.promote_types(like.dtype, torch.float32)
        added = torch.zeros(
            count,
            1,
            size,
            end - low,
            dtype=work,
        )
        if score_mod is not None:
            zero, heads = added.new_zeros(()), torch.arange(of_q.start, of_q.stop)
            added = on_tiles(
                partial(score_mod, zero),
                row,
                heads,
                i,
                j,
            ).to(work)
        if asked:
            sees = on_tiles(
                tables.mask_mod,
                b,
                torch.tensor([h]),
                i,
                j,
            )
            added = added.masked_fill(~sees, -torch.inf)
        parts.append(added)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


def _keys(
    x: Tensor,
    tile: Tile,
    at: tuple,
) -> Tensor:
    """x (H, T, D) -> the keys of tiles, (n, H, L, D): views where they lie in one piece."""
    a, _, count, stride = at
    if tile.joined:
        return every(
            x,
            tile.runs[0][0] + a - tile.a,
            tile.keys,
            count,
            stride,
        )
    return torch.cat([x[:, first:end] for first, end, _ in tile.runs], dim=1)[None]


def _add_keys(
    total: Tensor,
    parts: Tensor,
    tile: Tile,
    at: tuple,
) -> None:
    """Adds parts (n, H, L, D) where `_keys` of `total` took them from."""
    a, _, count, stride = at
    if tile.joined:
        return add_overlapping(
            total,
            parts,
            tile.runs[0][0] + a - tile.a,
            tile.keys,
            count,
            stride,
        )
    c = 0
    for first, end, _ in tile.runs:
        total[:, first:end] += parts[0, :, c : c + end - first]
        c += end - first
    return None
