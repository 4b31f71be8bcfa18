"""Attention over latents in plain torch: scores of all tokens, and the sum of latents that their
softmax weighs. Keys are made a tile of tokens at a time, which never leaves the processor's cache;
nothing as large as the past is made, but a number a query for each token.

Keys of a tile are one product for all heads, with the dimensions that turn together beside each
other: as complex numbers they turn in one multiplication. Few tokens are done in as few calls as
can be: there a step is what the host does. Where nothing turns (NoPE, and ReRoPE's
far pairs) keys are not made either: W_UK goes into the query, and only latents are read.

B: rows; Hq, Hkv: query and key/value heads; T: tokens held; D, Dv: of a key, of a value; r: of a
latent; N = Hq Tq: all queries of all heads; n: tokens of a tile."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .. import decode
from ..decode.turn import Turn
from ..flash.pattern import Layout, Pattern
from ..flash.rules import Bias
from .packed import PackedLatents, dense

TILE = 2**19  # numbers of keys that are made at a time
_kept = threading.local()


def attention(
    q: Tensor,
    c: Tensor | PackedLatents,
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
    far = turn is not None and turn.window is not None
    one = q.shape[2] == 1 and layout.ring is None and not layout.slots
    apart = not far or (one and math.isinf(turn.slow) and turn.scaling == 1)
    common = dict(scale=scale, softcap=softcap)
    unusual = q_first is not None or bias is not None or learning or not apart
    if unusual or torch.compiler.is_compiling():
        sums, lse = _whole(q, dense(c), maps, pattern, layout, common, q_first, turn, bias)
        return _values(sums, lse, maps, q.dtype), lse
    work = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(work) * scale
    if turn is None and maps.key_norm is None:
        scores = _absorbed(queries, c, maps)
    elif not far:
        scores = _expanded(queries, c, maps, turn, layout)
    else:
        new, near = max(c.shape[1] - turn.window, 0), replace(turn, window=None, q_far=None)
        scores = _expanded(queries, c, maps, near, layout, new)
        if new:
            behind = _far(turn.q_far.to(work) * scale, c[:, :new], maps)
            scores = torch.cat([behind, scores], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = None if _sees_all(q, pattern, layout) else _hidden(q, c, pattern, layout)
    if hidden is not None:
        by_head = scores.view(*q.shape[:3], -1)
        scores = by_head.masked_fill(hidden, -torch.inf).flatten(1, 2)
    weights = scores.softmax(dim=-1)
    if hidden is not None:  # a query that sees nothing
        weights = weights.nan_to_num(0.0)
    sums = _weighed(weights.to(c.dtype), c).to(work).view(*q.shape[:3], -1)
    if hidden is None and not need_lse:
        return maps.absorbed(sums).to(q.dtype), None
    lse = scores.logsumexp(dim=-1).view(q.shape[:3])
    return _values(sums, lse, maps, q.dtype), lse


def _values(sums: Tensor, lse: Tensor, maps, dtype: torch.dtype) -> Tensor:
    """(B, Hq, Tq, Dv) of sums of latents: 0, and not the bias of values, for a query that sees
    nothing."""
    return torch.where(lse[..., None] == -torch.inf, 0.0, maps.absorbed(sums)).to(dtype)


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


def _pieces(c: Tensor | PackedLatents) -> Iterator[tuple[slice, Tensor]]:
    """Runs of tokens, and their latents (B, n, r): all at once, but of packed ones a tile."""
    if isinstance(c, Tensor):
        yield slice(None), c
        return
    tile = max(64, TILE // c.rank)
    for low in range(0, c.shape[1], tile):
        at = slice(low, min(low + tile, c.shape[1]))
        yield at, c[:, at].unpacked()


def _weighed(weights: Tensor, c: Tensor | PackedLatents) -> Tensor:
    """weights (B, N, T) times latents: (B, N, r), packed ones' in fp32 at least."""
    if isinstance(c, Tensor):
        return weights @ c
    work = torch.promote_types(c.dtype, torch.float32)
    return sum((weights[..., at] @ some).to(work) for at, some in _pieces(c))


# Scores of queries (B, Hq, Tq, D), scaled, with all tokens: (B, N, T) in the queries' dtype
# -------------------------------------------------------------------------------------------------


def _absorbed(q: Tensor, c: Tensor | PackedLatents, maps) -> Tensor:
    """By queries that W_UK goes into."""
    batch, kv_heads = len(q), maps.key.shape[0]
    rows = q.reshape(batch, kv_heads, -1, q.shape[3])
    own = (rows @ maps.key.to(q)).flatten(1, 2).to(c.dtype)
    parts = [some @ own.transpose(1, 2) for _, some in _pieces(c)]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    scores = scores.transpose(1, 2).to(q.dtype)
    if maps.key_bias is None:
        return scores
    added = (rows * maps.key_bias.to(q)[:, None]).sum(dim=-1)
    return scores + added.view(batch, -1, 1)


def _far(q: Tensor, c: Tensor | PackedLatents, maps) -> Tensor:
    """Of ReRoPE's far pairs, whose keys do not turn."""
    if maps.key_norm is None:
        return _absorbed(q, c, maps)
    k, kv_heads = maps.keys(dense(c)).to(q), maps.key.shape[0]
    return (q.reshape(len(q), kv_heads, -1, q.shape[3]) @ k.transpose(2, 3)).flatten(1, 2)


def _expanded(
    q: Tensor,
    c: Tensor | PackedLatents,
    maps,
    turn: Turn | None,
    layout: Layout,
    first: int = 0,
) -> Tensor:
    """By keys that are made, and turned, a tile at a time, from the token `first` on."""
    kv_heads, size, _ = maps.key.shape
    tokens, tile = c.shape[1], max(64, TILE // (kv_heads * size))
    rows = q.reshape(len(q), kv_heads, -1, size)
    if turn is not None:
        rows = _paired(rows, len(turn.inv_freq), turn.interleaved)
    keys = _Keys(maps, turn, q.dtype, c.dtype, few=tokens - first <= tile)
    turns = None if turn is None else _turns(turn, layout, tokens, q.dtype, c.device)
    parts = []
    for low in range(first, tokens, tile):
        at = slice(low, min(low + tile, tokens))
        k = keys(dense(c[:, at]), None if turns is None else turns[:, at])
        parts.append(_products(rows, k.permute(0, 2, 3, 1)).view(len(q), -1, k.shape[1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _Keys:
    """Keys of a tile of latents, turned, with the dimensions that turn together beside each other.

    few: of one tile, for which it does not pay to sort the rows of W_UK."""

    def __init__(self, maps, turn: Turn | None, work: torch.dtype, dtype: torch.dtype, few: bool):
        self.maps, self.turn, self.work = maps, turn, work
        self.kv_heads, size, _ = maps.key.shape
        self.sorted = not few and maps.key_norm is None
        if self.sorted:
            order = torch.arange(size, device=maps.key.device)
            if turn is not None:
                order = _paired(order, len(turn.inv_freq), turn.interleaved)
            self.weight = maps.key[:, order].flatten(0, 1).to(dtype)
            own = maps.key_bias
            self.bias = None if own is None else own[:, order].flatten().to(dtype)

    def __call__(self, c: Tensor, turns: Tensor | None) -> Tensor:
        """c (B, n, r) and turns (1 or B, n, R/2) -> (B, n, Hkv, D)."""
        if not self.sorted:
            k = self.maps.keys(c).transpose(1, 2).to(self.work)
            return k if turns is None else _paired_keys(k, self.turn, turns)
        k = torch.nn.functional.linear(c, self.weight, self.bias)
        k = k.unflatten(-1, (self.kv_heads, -1)).to(self.work)
        if turns is not None:  # in place: a tile's own
            pairs = k[..., : 2 * turns.shape[-1]].unflatten(-1, (-1, 2))
            torch.view_as_complex(pairs).mul_(turns[:, :, None])
        return k


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


def _in_order(layout: Layout) -> bool:
    """Whether the key c is the token tail + c, and real, in every row."""
    padded = layout.start is not None or layout.mask is not None
    return layout.ring is None and not layout.slots and not padded


def _sees_all(q: Tensor, pattern: Pattern, layout: Layout) -> bool:
    """Whether every query sees every key."""
    return q.shape[2] == 1 and type(pattern) is Pattern and _in_order(layout)


def _hidden(q: Tensor, c: Tensor | PackedLatents, pattern: Pattern, layout: Layout) -> Tensor:
    """(1 or B, 1 or Hq, Tq, T): the keys that a query does not see."""
    position = layout.key_positions(c.shape[1], c.device)[:, None, None]
    i = layout.query_positions(q.shape[2], c.shape[1], q.device)[:, None, :, None]
    heads = torch.arange(q.shape[1], device=q.device)[None, :, None, None]
    return ~pattern.sees(i, position, heads, q.shape[1], causal=True)


def _turns(
    turn: Turn, layout: Layout, tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """By which the keys of a layout turn, complex (1 or B, T, R/2); of tokens in order, a part of
    the table as it lies."""
    if _in_order(layout):
        end = layout.tail + tokens
        return _table(turn, end, dtype, device)[None, layout.tail : end]
    position = layout.key_positions(tokens, device)
    table = _table(turn, int(position.amax()) + 1, dtype, device)
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
