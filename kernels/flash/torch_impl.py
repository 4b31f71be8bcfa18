"""Exact attention in plain torch: CPU first, any device. Linear in memory: no (Tq, Tk) scores or
mask ever exist.

Dense attention is torch's fused kernel, in blocks of queries where something is padded. Everything
else is split into problems, which `torch_solve` solves: in tiles that visit only the keys some
query of the tile sees.

Shapes: q, q_first (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv); log-sum-exps (B, Hq, Tq);
positions (1 or B, T), negative where there is no token."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import Dropout
from .pattern import Blocks, Layout, Pattern, Window
from .rules import Bias, Far
from .torch_blocks import Problem, Side
from .torch_dense import dense
from .torch_dropped import Dropped
from .torch_solve import Piece, solve


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    layout: Layout,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
    q_first: Tensor | None,
    need_lse: bool,
    far: Far | None = None,
    bias: Bias | None = None,
    drop: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) -> (B, Hq, Tq, Dv) in q's dtype, and
    the log-sum-exp.

    A query that may see no key gives 0, and so do its gradients.
    """
    pattern = _simplest(pattern, layout.tokens(k.shape[2]), causal)
    ruled = any(x is not None for x in (softcap, far, bias, drop))
    special = ruled or (q_first is not None and pattern.first > 0) or need_lse
    if type(pattern) is Pattern and not special and not layout.slots and not layout.tail:
        return dense(q, k, v, causal, layout, scale), None
    # a loop over tiles does not trace; this does, at the cost of a mask
    if torch.compiler.is_compiling():
        from effattn.kernels.decode.torch_impl import attention as at_once

        return at_once(
            q,
            k,
            v,
            pattern,
            layout,
            causal=causal,
            scale=scale,
            softcap=softcap,
            q_first=q_first,
            counts=None,
            need_lse=need_lse,
            far=far,
            bias=bias,
            drop=drop,
        )
    table = (
        None
        if bias is None
        else bias.values(torch.arange(layout.tokens(k.shape[2]), device=q.device))
    )
    inputs = _Inputs(q, k, v, q_first, far and far.q, far and far.k, table, drop)
    return _in_tiles(
        inputs, pattern, layout, (causal, scale, softcap), far and far.window, need_lse
    )


def _simplest(pattern: Pattern, total: int, causal: bool) -> Pattern:
    """Dense where the pattern hides nothing at this length."""
    if type(pattern) is Window and pattern.back >= total and (causal or pattern.ahead >= total):
        return Pattern(pattern.first)
    if type(pattern) is Blocks and pattern.size >= total and not pattern.shifted:
        return Pattern(pattern.first)
    return pattern


# Patterns
# -------------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    q_first: Tensor | None
    q_far: Tensor | None
    k_far: Tensor | None
    table: Tensor | None  # of biases by distance, (Hq or 1, tokens)
    drop: Dropout | None

    def part(self, rows: Tensor | None, of_q: slice, of_k: slice) -> _Inputs:
        """Some rows of the batch, and some query heads with their K/V heads."""
        heads = (of_q, of_k, of_k, of_q, of_q, of_k)
        tensors = (
            x if x is None else x[:, h] if rows is None else x[rows][:, h]
            for x, h in zip(self[:-2], heads, strict=True)
        )
        table, drop = self.table, self.drop
        if drop is not None:
            own = slice(None) if rows is None else rows
            keys = drop.k if len(drop.k) == 1 else drop.k[own]
            drop = replace(drop, q=drop.q[own][:, of_q], k=keys)
        return _Inputs(*tensors, table if table is None or len(table) == 1 else table[of_q], drop)


def _in_tiles(inputs, pattern, layout, settings, window, need_lse) -> tuple[Tensor, Tensor | None]:
    """Splits the call into parts whose rows and heads share their borders, solves each, and joins
    the results.
    """
    row_parts, head_parts = (
        _rows(pattern, layout),
        _heads(pattern, inputs.q.shape[1], inputs.k.shape[1]),
    )
    simple = replace(pattern, shifted=False) if isinstance(pattern, Blocks) else pattern
    done = []
    for rows, residue in row_parts:
        part = (
            layout
            if rows is None
            else replace(
                layout,
                start=layout.start[rows],
                mask=None if layout.mask is None else layout.mask[rows],
            )
        )
        solved = []
        for of_q, of_k, shift in head_parts:
            some = inputs.part(rows, of_q, of_k)
            solved.append(
                solve(_pieces(some, simple, part, settings, window, residue, shift), need_lse)
            )
        done.append(solved[0] if len(solved) == 1 else _join(solved, dim=1))
    if len(done) == 1:
        return done[0]
    back = torch.cat([rows for rows, _ in row_parts]).argsort()
    return tuple(None if x is None else x[back] for x in _join(done, dim=0))


def _join(pieces: list[tuple[Tensor, Tensor | None]], dim: int) -> tuple[Tensor, Tensor | None]:
    return tuple(
        None if parts[0] is None else torch.cat(parts, dim=dim)
        for parts in zip(*pieces, strict=True)
    )


def _rows(pattern: Pattern, layout: Layout) -> list[tuple[Tensor | None, int]]:
    """Rows of the batch whose blocks begin at the same tokens, and how far their first token is
    past a border.
    """
    if layout.start is None or not isinstance(pattern, Blocks):
        return [(None, 0)]
    residues = (layout.start % pattern.size).tolist()
    if len(set(residues)) == 1:
        return [(None, residues[0])]
    return [
        (
            torch.tensor(
                [n for n, r in enumerate(residues) if r == residue], device=layout.start.device
            ),
            residue,
        )
        for residue in sorted(set(residues))
    ]


def _heads(pattern: Pattern, heads: int, kv_heads: int) -> list[tuple[slice, slice, int]]:
    """Query heads, their K/V heads, and how much earlier their borders lie. Where the halves of the
    query heads meet inside of a K/V head's group, that group is split."""
    if not isinstance(pattern, Blocks) or not pattern.shifted:
        return [(slice(None), slice(None), 0)]
    group, half, shift = heads // kv_heads, heads // 2, pattern.size // 2
    # K/V heads wholly in the first half; where the second's own begin
    low, high = (half // group, -(-half // group))
    cuts = [
        (0, low * group, 0, low, 0),
        (low * group, half, low, high, 0),
        (half, high * group, low, high, shift),
        (high * group, heads, high, kv_heads, shift),
    ]
    return [(slice(a, b), slice(c, d), s) for a, b, c, d, s in cuts if b > a]


def _pieces(inputs, pattern, layout, settings, window, residue, shift) -> list[Piece]:
    """One problem; or the near pairs, at distances below `window`, and the far ones, by their own
    queries and keys.
    """
    q, k, v, q_first, q_far, k_far, table, drop = inputs
    place = pattern, layout, settings, shift - residue, shift
    if window is None:
        return [_piece(q, k, v, q_first, table, *place, drop=drop)]
    near = _piece(q, k, v, None, None, *place, reach=window, drop=drop)
    # the first queries have no far key
    skipped = min(max(window - near.problem.first_query, 0), q.shape[2])
    if skipped == q.shape[2]:
        return [near]
    drop = drop and replace(drop, q=drop.q[:, :, skipped:])
    far = _piece(q_far[:, :, skipped:], k_far, v, None, None, *place, lag=window, drop=drop)
    return [near, *_without_mask(far)]


def _without_mask(piece: Piece) -> list[Piece]:
    """Dense causal queries at the end of many keys as the keys before them, which all are seen, and
    a square: what the fused kernel does without a mask."""
    problem, (q, k, v, *others) = piece
    before = problem.first_query - problem.lag - problem.first_key
    square = before + problem.queries == problem.keys
    if (
        not problem.dense
        or problem.hidden is not None
        or problem.side is not None
        or problem.drop is not None
        or not square
        or before <= 0
    ):
        return [piece]
    parts = [(False, 0, before), (True, before, problem.keys)]
    return [
        Piece(
            replace(
                problem,
                causal=causal,
                keys=k1 - k0,
                first_key=problem.first_key + k0,
                strips_made={},
            ),
            (q, k[:, :, k0:k1], v[:, :, k0:k1], *others),
        )
        for causal, k0, k1 in parts
    ]


def _piece(
    q, k, v, q_first, table, pattern, layout, settings, phase, shift, reach=None, lag=0, drop=None
) -> Piece:
    """Layouts' padding becomes `hidden` keys."""
    queries, keys = q.shape[2], k.shape[2]
    total = layout.tokens(keys)
    # then no key is `first`: all are seen anyway
    everywhere = type(pattern) is Pattern and q_first is None
    sinks = max(layout.slots, 0 if everywhere else min(pattern.first, total))
    problem = Problem(
        pattern,
        *settings,
        queries,
        keys - layout.slots,
        total - queries,
        layout.tail,
        phase=phase,
        start=layout.start,
        lag=lag,
        reach=reach,
    )
    side, k_side, v_side, position = None, None, None, None
    if layout.start is not None or layout.mask is not None or sinks:
        position = layout.key_positions(keys, q.device)
    numbers = drop and drop.k[:, None, :, None].expand(q.shape[0], -1, -1, -1)
    side_numbers = None
    if sinks:
        side, k_side, v_side, side_numbers = _gather_side(
            (k, v, numbers), position, sinks, pattern.first, shift
        )
    k0, k1 = problem.key_range(0, queries)
    k, v = (x[:, :, layout.slots + k0 : layout.slots + k1] for x in (k, v))
    hidden = (
        None if position is None else position[:, layout.slots + k0 : layout.slots + k1] < sinks
    )
    if hidden is not None and not hidden.any():
        hidden = None
    problem = replace(problem, keys=k1 - k0, first_key=layout.tail + k0, hidden=hidden, side=side)
    if drop is not None:
        numbers = numbers[:, :, layout.slots + k0 : layout.slots + k1]
        dropped = Dropped.of(drop, numbers, side_numbers, k.shape[1])
        problem = replace(problem, drop=dropped)
    return Piece(problem, (q, k, v, q_first if sinks else None, k_side, v_side, table))


def _gather_side(tensors, position: Tensor, sinks: int, first: int, shift: int):
    """The keys at positions below `sinks`, row by row, wherever they lie; of each of `tensors` (B,
    H, T, D).
    """
    k, keys = tensors[0], tensors[0].shape[2]
    inside = (position >= 0) & (position < sinks)
    at = torch.full((position.shape[0], sinks + 1), -1, device=k.device)
    numbers = torch.arange(keys, device=k.device).expand_as(position)
    at = at.scatter(1, torch.where(inside, position, sinks), numbers)[:, :sinks]
    index = at.clamp(min=0)[:, None, :, None].expand(k.shape[0], 1, -1, 1)
    gathered = (
        x if x is None else x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[-1]))
        for x in tensors
    )
    return Side(at >= 0, first, shift), *gathered
