"""Attention over latents in plain torch, a tile of tokens at a time: what is made of a tile never
leaves the processor's cache, and nothing as large as the past is ever made.

Keys of a tile are one product for all heads, with the dimensions that turn together beside each
other: as complex numbers they turn in one multiplication. Few tokens are one tile, which is done in
as few calls as can be: there a step is what the host does. Where nothing turns (NoPE, and ReRoPE's
far pairs) keys are not made either: W_UK goes into the query, and only latents are read.

B: rows; Hq, Hkv: query and key/value heads; T: tokens held; D, Dv: of a key, of a value; r: of a
latent; N = Hq Tq: all queries of all heads; n: tokens of a tile."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import torch
from torch import Tensor

from .. import decode
from ..decode.turn import Turn
from ..flash.pattern import Layout, Pattern
from ..flash.rules import Bias
from ..merge import merge

TILE = 2**19  # numbers of keys that are made at a time
_kept = threading.local()


def attention(
    q: Tensor,
    c: Tensor,
    maps,
    pattern: Pattern,
    layout: Layout,
    *,
    scale: float,
    softcap: float | None,
    q_first: Tensor | None,
    turn: Turn | None,
    bias: Bias | None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(B, Hq, Tq, Dv) in q's dtype, and if needed the log-sum-exp (B, Hq, Tq)."""
    tensors = (q, c, maps.key, maps.value)
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    in_order = layout.ring is None and not layout.slots
    far = turn is not None and turn.window is not None
    common = dict(scale=scale, softcap=softcap)
    if q_first is not None or bias is not None or learning or torch.compiler.is_compiling():
        parts = [_whole(q, c, maps, pattern, layout, common, q_first, turn, bias)]
    elif not far:
        if c.shape[1] <= _tile(maps):
            return _at_once(q, c, maps, pattern, layout, turn, need_lse=need_lse, **common)
        parts = [_tiles(q, c, maps, pattern, layout, turn, **common)]
    elif q.shape[2] == 1 and in_order and math.isinf(turn.slow) and turn.scaling == 1:
        new = max(c.shape[1] - turn.window, 0)
        near = replace(turn, window=None, q_far=None)
        parts = [_tiles(q, c, maps, pattern, layout, near, first=new, **common)]
        if new:
            parts.append(_tiles(turn.q_far, c, maps, pattern, layout, None, last=new, **common))
    else:
        parts = [_whole(q, c, maps, pattern, layout, common, None, turn, None)]
    sums, lse = parts[0] if len(parts) == 1 else merge(parts)
    out = maps.absorbed(sums)
    # a query that sees nothing gives 0, and not the bias of values
    return torch.where(lse[..., None] == -torch.inf, 0.0, out).to(q.dtype), lse


def _whole(q, c, maps, pattern, layout, common, q_first, turn, bias) -> tuple[Tensor, Tensor]:
    """Sums of latents by the decode kernel, all keys at once: sinks' queries, biases, gradients."""
    k = maps.keys(c)
    latents = c[:, None].expand(-1, k.shape[1], -1, -1)
    return decode.attention(
        q,
        k,
        latents,
        pattern,
        layout,
        causal=True,
        q_first=q_first,
        turn=turn,
        bias=bias,
        impl="torch",
        lse=True,
        **common,
    )


def _tile(maps) -> int:
    """Tokens of a tile."""
    kv_heads, size, _ = maps.key.shape
    return max(64, TILE // (kv_heads * size))


def _at_once(
    q: Tensor,
    c: Tensor,
    maps,
    pattern: Pattern,
    layout: Layout,
    turn: Turn | None,
    *,
    scale: float,
    softcap: float | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`attention` of so few tokens that they are one tile."""
    batch, heads, queries, size = q.shape
    work = torch.promote_types(q.dtype, torch.float32)
    kv_heads = maps.key.shape[0]
    rows = (q.to(work) * scale).view(batch, kv_heads, -1, size)
    if turn is None and maps.key_norm is None:
        key = maps.key.to(work)
        scores = (rows @ key).view(batch, heads * queries, -1).to(c.dtype) @ c.transpose(1, 2)
        if maps.key_bias is not None:
            added = (rows * maps.key_bias.to(work)[:, None]).sum(dim=-1)
            scores = scores + added.view(batch, -1, 1)
    else:
        k = maps.keys(c).transpose(1, 2).to(work)
        if turn is not None:
            half = len(turn.inv_freq)
            turns = _turns_of(turn, layout, c.shape[1], work, c.device)
            k, rows = _paired_keys(k, turn, turns), _paired(rows, half, turn.interleaved)
        scores = _products(rows, k.permute(0, 2, 3, 1)).view(batch, heads * queries, -1)
    scores = scores.to(work)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = None
    if not _sees_all(q, pattern, layout):
        position = layout.key_positions(c.shape[1], c.device)
        hidden = _hidden(q, position, pattern, layout)
        by_head = scores.view(batch, heads, queries, -1)
        scores = by_head.masked_fill(hidden, -torch.inf).flatten(1, 2)
    weights = scores.softmax(dim=-1)
    if hidden is not None:  # a query that sees nothing
        weights = weights.nan_to_num(0.0)
    sums = (weights.to(c.dtype) @ c).to(work).view(batch, heads, queries, -1)
    out = maps.absorbed(sums)
    if hidden is None and not need_lse:
        return out.to(q.dtype), None
    lse = scores.logsumexp(dim=-1).view(batch, heads, queries)
    # it gives 0, and not the bias of values
    return torch.where(lse[..., None] == -torch.inf, 0.0, out).to(q.dtype), lse


def _products(rows: Tensor, k: Tensor) -> Tensor:
    """rows (B, Hkv, N, D) times k (B, Hkv, D, n); one row of a batch without torch's own checks."""
    return torch.bmm(rows[0], k[0]) if len(rows) == 1 else rows @ k


def _paired(x: Tensor, half: int, interleaved: bool) -> Tensor:
    """x (..., D) with the dimensions that turn together beside each other."""
    if interleaved:
        return x
    pairs = x[..., : 2 * half].unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2)
    return pairs if 2 * half == x.shape[-1] else torch.cat([pairs, x[..., 2 * half :]], dim=-1)


def _paired_keys(k: Tensor, turn: Turn, turns: Tensor) -> Tensor:
    """k (B, n, Hkv, D), turned by `turns` (1 or B, n, R/2), in pairs."""
    half = len(turn.inv_freq)
    if turn.interleaved:
        pairs = torch.view_as_complex(k[..., : 2 * half].unflatten(-1, (half, 2)).contiguous())
    else:
        pairs = torch.complex(k[..., :half], k[..., half : 2 * half])
    turned = torch.view_as_real(pairs * turns[:, :, None]).flatten(-2)
    rest = k[..., 2 * half :]
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def _tiles(
    q: Tensor,
    c: Tensor,
    maps,
    pattern: Pattern,
    layout: Layout,
    turn: Turn | None,
    *,
    scale: float,
    softcap: float | None,
    first: int = 0,
    last: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sums of the latents of tokens [first, last), (B, Hq, Tq, r) in at least fp32, and
    the log-sum-exps (B, Hq, Tq)."""
    batch, heads, queries, _ = q.shape
    work = torch.promote_types(q.dtype, torch.float32)
    rank = maps.rank
    scored = _Scores(q.to(work) * scale, maps, turn, c.dtype)
    tile = _tile(maps)
    position = layout.key_positions(c.shape[1], c.device)
    hidden = _hidden(q, position, pattern, layout)
    highest = q.new_full((batch, heads * queries, 1), torch.finfo(work).min, dtype=work)
    total = torch.zeros_like(highest)
    sums = q.new_zeros(batch, heads * queries, rank, dtype=work)
    last = c.shape[1] if last is None else last
    for low in range(first, last, tile):
        at = slice(low, min(low + tile, last))
        some = c[:, at]
        scores = scored(some, position[:, at])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if hidden is not None:
            by_head = scores.view(batch, heads, queries, -1)
            scores = by_head.masked_fill(hidden[..., at], -torch.inf).flatten(1, 2)
        new = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        weights = torch.exp(scores - new)
        shrunk, highest = torch.exp(highest - new), new
        total = total * shrunk + weights.sum(dim=-1, keepdim=True)
        sums = sums * shrunk + (weights.to(c.dtype) @ some).to(work)
    seen = total > 0
    total = torch.where(seen, total, 1.0)
    lse = torch.where(seen, highest + total.log(), -torch.inf)
    return (sums / total).view(batch, heads, queries, rank), lse.view(batch, heads, queries)


def _in_order(layout: Layout) -> bool:
    """Whether the key c is the token tail + c, and real, in every row."""
    padded = layout.start is not None or layout.mask is not None
    return layout.ring is None and not layout.slots and not padded


def _sees_all(q: Tensor, pattern: Pattern, layout: Layout) -> bool:
    """Whether every query sees every key."""
    return q.shape[2] == 1 and type(pattern) is Pattern and _in_order(layout)


def _hidden(q: Tensor, position: Tensor, pattern: Pattern, layout: Layout) -> Tensor | None:
    """(1 or B, 1 or Hq, Tq, T): the keys that a query does not see; None where it sees all."""
    if _sees_all(q, pattern, layout):
        return None
    i = layout.query_positions(q.shape[2], position.shape[1], q.device)[:, None, :, None]
    heads = torch.arange(q.shape[1], device=q.device)[None, :, None, None]
    return ~pattern.sees(i, position[:, None, None, :], heads, q.shape[1], causal=True)


class _Scores:
    """Scores of rows q (B, Hq, Tq, D), scaled, with the tokens of a tile."""

    def __init__(self, q: Tensor, maps, turn: Turn | None, dtype: torch.dtype):
        kv_heads, size, _ = maps.key.shape
        self.maps, self.turn, self.kv_heads = maps, turn, kv_heads
        rows = q.reshape(q.shape[0], kv_heads, -1, size)
        self.absorbed = turn is None and maps.key_norm is None
        if self.absorbed:  # (B, N, r), and what the bias adds to every token's score
            key = maps.key.to(rows)
            self.rows, self.added = (rows @ key).flatten(1, 2).to(dtype), rows.new_zeros(())
            if maps.key_bias is not None:
                added = (rows * maps.key_bias.to(rows)[:, None]).sum(dim=-1, keepdim=True)
                self.added = added.flatten(1, 2)
            return
        order = _pairs(size, turn, q.device)
        self.rows, self.order = rows[..., order], order
        if maps.key_norm is None:
            self.weight = maps.key[:, order].flatten(0, 1).to(dtype)
            own = maps.key_bias
            self.bias = None if own is None else own[:, order].flatten().to(dtype)

    def __call__(self, c: Tensor, position: Tensor) -> Tensor:
        """c (B, n, r) at position (1 or B, n) -> (B, N, n), in at least fp32."""
        if self.absorbed:
            return self.rows @ c.transpose(1, 2) + self.added
        if self.maps.key_norm is None:
            k = torch.nn.functional.linear(c, self.weight, self.bias)
            k = k.unflatten(-1, (self.kv_heads, -1)).to(self.rows.dtype)
        else:
            k = self.maps.keys(c).transpose(1, 2)[..., self.order].to(self.rows.dtype)
        if self.turn is not None:
            k = _turned(k, self.turn, position)
        return (self.rows @ k.permute(0, 2, 3, 1)).flatten(1, 2)


def _pairs(size: int, turn: Turn | None, device) -> Tensor:
    """The order of a key's dimensions in which those that turn together are neighbours."""
    at = torch.arange(size, device=device)
    if turn is None or turn.interleaved:
        return at
    half = len(turn.inv_freq)
    return torch.cat(
        [torch.stack([at[:half], at[half : 2 * half]], dim=1).flatten(), at[2 * half :]]
    )


def _turned(k: Tensor, turn: Turn, position: Tensor) -> Tensor:
    """k (B, n, Hkv, D) in pairs, turned to `position` (1 or B, n), in place: it is a tile's own."""
    half = len(turn.inv_freq)
    pairs = torch.view_as_complex(k[..., : 2 * half].unflatten(-1, (half, 2)))
    pairs.mul_(_turns(turn, position, k.dtype)[:, :, None])
    return k


def _turns_of(
    turn: Turn, layout: Layout, tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`_turns` of all tokens of a layout; of tokens in order, a part of the table as it lies."""
    if not _in_order(layout):
        return _turns(turn, layout.key_positions(tokens, device), dtype)
    end = layout.tail + tokens
    return _table(turn, end, dtype, device)[None, layout.tail : end]


def _turns(turn: Turn, position: Tensor, dtype: torch.dtype) -> Tensor:
    """By which keys turn, complex (1 or B, n, R/2)."""
    table = _table(turn, int(position.amax()) + 1, dtype, position.device)
    return table[position.clamp(min=0)]


def _table(turn: Turn, most: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """By which keys at positions up to `most` turn. All layers of a model and all steps ask for the
    same: a table is kept, and made anew, twice as long, when it is too short."""
    held, asked = getattr(_kept, "table", None), (dtype, turn.scaling, device)
    if held is None or held[0] != asked or len(held[2]) < most or _differ(held[1], turn.inv_freq):
        size = 1 << max(most - 1, 1023).bit_length()
        with torch.inference_mode(False), torch.no_grad():
            at = torch.arange(size, device=device)[None]
            table = torch.complex(*turn.cos_sin(at, dtype))[0]
            held = _kept.table = asked, turn.inv_freq.clone(), table
    return held[2]


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or a.device != b.device or not torch.equal(a, b)
