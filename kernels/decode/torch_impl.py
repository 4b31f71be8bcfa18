"""Exact attention of a few new tokens over a cache, in plain torch: any layout, no loops, nothing
read back.

The query heads that share a K/V head are the rows of one small matrix, so that K and V are read
once. A window or block pattern over keys in order is cut down to its range first: views where it
can, no mask where nothing is left to hide. Of raw keys only those are rotated that are scored so:
for ReRoPE, the newest. It traces under `torch.compile` with dynamic shapes, and is differentiable.

Shapes: q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), R = Hq / Hkv * Tq rows. Masks are
(1 or B, 1 or Hq, Tq, Tk), True where a query sees a key."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from effattn.kernels.flash.dropout import Dropout
from effattn.kernels.flash.pattern import Blocks, Layout, Pattern, Window
from effattn.kernels.flash.rules import Bias, Far
from effattn.kernels.flash.torch_dense import one_query, padding_mask

from . import torch_turn
from .torch_turn import products
from .turn import Turn

HALVES = (torch.bfloat16, torch.float16)


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
    counts: Tensor | None,
    need_lse: bool,
    turn: Turn | None = None,
    far: Far | None = None,
    bias: Bias | None = None,
    drop: Dropout | None = None,
    distance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(B, Hq, Tq, Dv) in q's dtype, and the log-sum-exp (B, Hq, Tq). Queries that see no key give 0
    and -inf.

    far, drop: as for flash attention, which hands its calls over to be traced. distance (1 or B,
    Tq, Tk): of pairs, for far and bias; None: by the layout.
    """
    queries = q.shape[2]
    if counts is None and far is None and drop is None:
        k, v, layout = _visible_range(k, v, pattern, layout, queries)
    plain = (
        softcap is None
        and q_first is None
        and not need_lse
        and turn is None
        and far is None
        and bias is None
        and drop is None
    )
    if counts is None:
        if (
            plain
            and queries == 1
            and q.dtype not in HALVES
            and (low := _known(pattern, layout)) is not None
        ):
            return _over_ring(q, k, v, layout, low, scale), None
        if queries == 1 and type(pattern) is Pattern and _in_order(layout) and plain:
            return one_query(q, k, v, padding_mask(layout, k), scale), None
        mask = _mask(q, k, pattern, layout, causal)
    else:
        mask = counts if counts.dtype == torch.bool else counts > 0
    repeated = counts is not None and counts.dtype != torch.bool
    if plain and not repeated:
        return _fused(q, k, v, mask, scale), None
    if (
        turn is not None
        and queries == 1
        and softcap is None
        and drop is None
        and not repeated
        and _in_order_behind(layout, mask)
    ):
        rows = _pack(q, k.shape[1])
        if torch_turn.fits(rows, k, v, turn):
            rows_far = _pack(turn.q_far, k.shape[1])
            out, lse = torch_turn.rerope(rows, rows_far, k, v, turn, layout, scale, mask, need_lse)
            return out.reshape(q.shape), lse.reshape(q.shape[:3]) if need_lse else None
    if distance is None and (far is not None or bias is not None):
        distance = _distance(layout, queries, k.shape[2], q.device)
    scores = _scores(q, k, pattern, layout, q_first, turn, far, distance) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + _pack_mask(bias.values(distance).transpose(0, 1), q.shape[1], k.shape[1])
    out, lse = _softmax(scores, v, mask, counts if repeated else None, q, drop)
    return out, lse if need_lse else None


# Which keys
# -------------------------------------------------------------------------------------------------


def _in_order(layout: Layout) -> bool:
    return layout.ring is None and not layout.slots and not layout.tail


def _in_order_behind(layout: Layout, mask: Tensor | None) -> bool:
    """The last keys are the newest ones, and all heads see the same."""
    return layout.ring is None and not layout.slots and (mask is None or mask.shape[1] == 1)


def _known(pattern: Pattern, layout: Layout) -> int | None:
    """Of an unpadded ring: from which token on the newest query sees all that the ring holds, the
    slots being seen anyway. None where more decides."""
    if layout.ring is None or layout.start is not None or layout.mask is not None:
        return None
    total, plain = layout.total, type(pattern) is Pattern
    if type(total) is not int or layout.slots_at is not None or layout.slots > pattern.first:
        return None
    if not plain and (
        not isinstance(pattern, (Window, Blocks)) or getattr(pattern, "shifted", False)
    ):
        return None
    low = 0 if plain else max(0, pattern.span(total - 1, total)[0])
    return low if not low or layout.slots == pattern.first else None


def _over_ring(q: Tensor, k: Tensor, v: Tensor, layout: Layout, low: int, scale: float) -> Tensor:
    """One query over the slots of a ring, and its tokens from number `low` on."""
    batch, heads, _, _ = q.shape
    seen = layout.ring >= low
    if layout.slots:
        seen = torch.cat([seen.new_ones(layout.slots), seen])
    scores = _pack(q, k.shape[1]) @ k.mT * scale
    shares = torch.where(seen, scores, -torch.inf).softmax(dim=-1)
    return (shares @ v).reshape(batch, heads, 1, v.shape[-1])


def _visible_range(k: Tensor, v: Tensor, pattern: Pattern, layout: Layout, queries: int):
    """k, v and their layout without keys that no query sees, as far as shapes alone tell."""
    if (
        layout.ring is not None
        or layout.slots_at is not None
        or not isinstance(pattern, (Window, Blocks))
    ):
        return k, v, layout
    total, first = layout.tokens(k.shape[2]), pattern.first
    oldest = total - queries
    # windows look the same wherever the row begins
    if layout.start is None or isinstance(pattern, Window):
        oldest = pattern.span(oldest, total)[0]
    else:  # borders differ from row to row
        oldest -= (pattern.look_back + 1) * pattern.size - 1
    cut = oldest - layout.tail  # keys after the slots that go
    # What stays in front must be exactly the first keys: slots that hold them all, or none at all.
    sinks_apart = layout.slots >= first or (not layout.slots and not layout.tail)
    if cut <= max(first - layout.slots, 0) or not sinks_apart:
        return k, v, layout
    # a padded row's first keys may lie behind the slots still
    if layout.slots and layout.start is not None:
        return k, v, layout
    # Nothing stays in front: what is left is a view.
    if not layout.slots and not first:
        mask = None if layout.mask is None else layout.mask[:, cut:]
        return k[:, :, cut:], v[:, :, cut:], replace(layout, tail=layout.tail + cut, mask=mask)
    if layout.slots >= first:  # the first keys are in front already
        at = torch.arange(layout.slots, device=k.device)[None]
        there = None if layout.mask is None else layout.mask[:, : layout.slots]
        later = None if layout.mask is None else layout.mask[:, layout.slots + cut :]
    else:  # they lie among the others, row by row at another place
        position = layout.key_positions(k.shape[2], k.device)
        at = torch.arange(first, device=k.device)[None]
        at = at if layout.start is None else at + layout.start[:, None]
        at = at.clamp(max=k.shape[2] - 1)
        held = position.expand(at.shape[0], -1) if at.shape[0] > 1 else position
        there = held.gather(1, at.expand(held.shape[0], -1)) == torch.arange(first, device=k.device)
        later = position[:, cut:] >= first
        if layout.start is None and layout.mask is None:
            there = later = None
    # The first keys and the newest ones become neighbours, the only copy there is.
    index = at.expand(k.shape[0], -1)[:, None, :, None].expand(-1, k.shape[1], -1, 1)
    k, v = (
        torch.cat(
            [x.gather(2, index.expand(-1, -1, -1, x.shape[3])), x[:, :, layout.slots + cut :]],
            dim=2,
        )
        for x in (k, v)
    )
    mask = None
    if there is not None:
        rows = max(there.shape[0], later.shape[0])
        mask = torch.cat([there.expand(rows, -1), later.expand(rows, -1)], dim=1)
    return k, v, replace(layout, slots=at.shape[1], tail=layout.tail + cut, mask=mask)


def _mask(q: Tensor, k: Tensor, pattern: Pattern, layout: Layout, causal: bool) -> Tensor | None:
    """None where one query sees all of the keys, which a window or a block of unpadded keys in
    order ends in.
    """
    queries, keys = q.shape[2], k.shape[2]
    padded = layout.start is not None or layout.mask is not None
    shifted = isinstance(pattern, Blocks) and pattern.shifted
    sinks_too = not layout.slots or layout.slots <= pattern.first
    if not padded and layout.ring is None and layout.slots_at is None and sinks_too and not shifted:
        if type(pattern) is Pattern and (queries == 1 or not causal):
            return None
        if queries == 1 and isinstance(pattern, (Window, Blocks)):
            total = layout.tokens(keys)
            if layout.tail >= pattern.span(total - 1, total)[0]:
                return None
    i = layout.query_positions(queries, keys, q.device)[:, None, :, None]
    j = layout.key_positions(keys, q.device)[:, None, None, :]
    heads = torch.arange(q.shape[1] if shifted else 1, device=q.device)[None, :, None, None]
    return pattern.sees(i, j, heads, q.shape[1], causal)


# Attention
# -------------------------------------------------------------------------------------------------


def _pack(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, Tq, n) -> (B, Hkv, R, n); one head's mask serves every K/V head."""
    batch, heads, queries, last = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * queries, last)


def _pack_mask(mask: Tensor, heads: int, kv_heads: int) -> Tensor:
    """(1 or B, 1 or Hq, Tq, Tk) -> (1 or B, 1 or Hkv, 1 or R, Tk)"""
    if mask.shape[1] == 1:
        return mask if mask.shape[2] == 1 else mask.repeat(1, 1, heads // kv_heads, 1)
    return _pack(mask, kv_heads)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, _ = q.shape
    rows = _pack(q, k.shape[1])
    if (
        q.device.type == "cpu"
        and q.dtype in HALVES
        and (rows.shape[2] == 1 or q.dtype == torch.float16)
    ):
        # Emulated, row by row. 512 keys, 8 heads, 2 AVX2 cores: 0.29 ms in bf16, 0.44 in fp16, 0.13
        # this way. Several rows in bf16 go through another product, which is fast.
        rows, k, v = rows.float(), k.float(), v.float()
    packed = None if mask is None else _pack_mask(mask, heads, k.shape[1])
    out = scaled_dot_product_attention(rows, k, v, attn_mask=packed, scale=scale)
    out = out.to(q.dtype).reshape(batch, heads, queries, v.shape[-1])
    # What a kernel returns for a query without keys differs between devices and versions.
    return out if mask is None else torch.where(mask.any(dim=-1, keepdim=True), out, 0.0)


# Scores
# -------------------------------------------------------------------------------------------------


def _scores(q, k, pattern, layout, q_first, turn, far, distance) -> Tensor:
    """Products of rows and keys in at least fp32, (B, Hkv, R, Tk)."""
    work, kv_heads = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    q, q_first = (None if x is None else _pack(x, kv_heads).to(work) for x in (q, q_first))
    position = layout.key_positions(k.shape[2], k.device)
    if turn is not None and turn.window is not None:
        return _near_and_far(q, _pack(turn.q_far, kv_heads).to(work), k, turn, layout, position)

    def scored(rows: Tensor) -> Tensor:
        return (
            rows @ k.to(work).transpose(-1, -2)
            if turn is None
            else products(rows, k, turn, position)
        )

    scores = scored(q)
    if q_first is not None:
        first = (position >= 0) & (position < pattern.first)
        scores = torch.where(first[:, None, None, :], scored(q_first), scores)
    if far is not None:
        is_far = distance[:, None] >= far.window
        other = _pack(far.q, kv_heads).to(work) @ far.k.to(work).transpose(-1, -2)
        scores = torch.where(_pack_mask(is_far, far.q.shape[1], kv_heads), other, scores)
    return scores


def _distance(layout: Layout, queries: int, keys: int, device: torch.device) -> Tensor:
    """i - j, int64 (1 or B, Tq, Tk)."""
    i, j = layout.query_positions(queries, keys, device), layout.key_positions(keys, device)
    return i[:, :, None] - j[:, None, :]


def _near_and_far(q, q_far, k, turn: Turn, layout: Layout, position: Tensor) -> Tensor:
    """Products of rows q and q_far (B, Hkv, R, D) with raw keys, (B, Hkv, R, Tk). In order, the
    keys are

        slots    may be either, row by row         old     far from all queries
        strip    near to some queries only         new     near to all

    and of a ring's all may be either.
    """
    queries, keys = turn.q_far.shape[2], k.shape[2]
    apart = keys if layout.ring is not None else layout.slots  # a ring's keys may be either
    new = max(keys - turn.window, apart)
    strip = max(new - queries + 1, apart)
    near = products(q, k[:, :, strip:], turn, position[:, strip:])
    if apart:
        near = torch.cat([products(q, k[:, :, :apart], turn, position[:, :apart]), near], dim=-1)
    if new == 0:
        return near
    far = products(q_far, k[:, :, :new], turn, position[:, :new], far=True)
    mixed = apart + new - strip
    if mixed == 0:
        return torch.cat([far, near], dim=-1)
    is_far = _distance(layout, queries, keys, k.device)[:, None] >= turn.window
    is_far = torch.cat([is_far[..., :apart], is_far[..., strip:new]], dim=-1)
    is_far = _pack_mask(is_far, turn.q_far.shape[1], k.shape[1])
    either = torch.where(
        is_far, torch.cat([far[..., :apart], far[..., strip:]], dim=-1), near[..., :mixed]
    )
    return torch.cat(
        [either[..., :apart], far[..., apart:strip], either[..., apart:], near[..., mixed:]], dim=-1
    )


def _softmax(
    scores: Tensor, v: Tensor, mask, counts, q: Tensor, drop: Dropout | None
) -> tuple[Tensor, Tensor]:
    """scores (B, Hkv, R, Tk) -> out (B, Hq, Tq, Dv) in q's dtype and the log-sum-exp (B, Hq,
    Tq).
    """
    work, kv_heads = scores.dtype, v.shape[1]
    if mask is not None:
        scores = scores.masked_fill(~_pack_mask(mask, q.shape[1], kv_heads), -torch.inf)
    # finite, for no NaN below
    highest = scores.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(work).min)
    weights = torch.exp(scores - highest)
    if counts is not None:
        weights = weights * _pack_mask(counts, q.shape[1], kv_heads)
    total = weights.sum(dim=-1, keepdim=True)
    seen = total > 0
    total = torch.where(seen, total, 1.0)
    weights = weights / total
    if drop is not None:
        weights = weights * _pack_mask(drop.factors(work), q.shape[1], kv_heads)
    out = weights @ v.to(work)
    lse = torch.where(seen, highest + total.log(), -torch.inf)
    return out.to(q.dtype).reshape(*q.shape[:3], v.shape[-1]), lse.reshape(q.shape[:3])
