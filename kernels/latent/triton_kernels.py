"""Attention over latents in Triton, in two steps: scores, then the weighted sum of latents.

    score_keys      makes a tile's keys, W_UK c, turns them, and stores their scores
    score_latents   scores of queries that W_UK went into: where nothing turns
    gather          one split of the latents, weighed by the softmax of their scores

A score is 4 bytes a query head and token, a latent r numbers a token: what goes by way of memory
between the steps is little beside what they read. Any rank fits, since neither holds more than a
piece of a latent at once. Splits are merged by `decode`'s `combine`.

Shapes: q (B, Hq, Tq, D), c (B, T, r), W_UK (Hkv, D, r), scores (B, Hq Tq, T) in bits, -inf for what
is hidden, out ([splits,] B, Hq Tq, r). The other letters: `decode.triton_pieces`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode.triton_pieces import (
    LN2,
    LOG2E,
    dot,
    key_positions,
    narrow,
    sees,
    soften,
    tanh,
    tile_keys,
)
from ..decode.triton_turn import angles, cos_sin, load_pairs, pairs_product
from ..flash.triton_bias import params_of

CHANGING = (
    "mask_b",
    "step",
    "n_params",
    "scaling",
    "queries",
    "tail",
    "total",
    "slots",
    "first",
    "near_a",
    "near_b",
    "near_c",
    "head",
    "low",
    "high",
)


@triton.jit
def _expanded(c_at, is_key, key_at, rows: tl.constexpr, is_row, rank, BLOCK_K: tl.constexpr):
    """Some dimensions of a tile's keys, fp32 (N, X): latents at `c_at` (N, 1) times the rows of
    W_UK at `key_at` (X, 1)."""
    acc = tl.zeros([c_at.shape[0], rows], tl.float32)
    for done in range(0, rank, BLOCK_K):
        r = done + tl.arange(0, BLOCK_K)[None, :]
        c = tl.load(c_at + r, mask=is_key & (r < rank), other=0.0)
        w = tl.load(key_at + r, mask=is_row & (r < rank), other=0.0)
        acc = dot(c, tl.trans(w), acc)
    return acc


@triton.jit
def _pairs_expanded(
    c_at,
    is_key,
    key_at,
    rank,
    R2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Both halves of a tile's pairs, fp32 (N, BLOCK_R) each, from latents that are read once."""
    d = tl.arange(0, BLOCK_R)[:, None]
    step, apart = (2, 1) if INTERLEAVED else (1, R2)
    a_at, b_at = key_at + d * step * rank, key_at + (d * step + apart) * rank
    a = tl.zeros([c_at.shape[0], BLOCK_R], tl.float32)
    b = tl.zeros([c_at.shape[0], BLOCK_R], tl.float32)
    for done in range(0, rank, BLOCK_K):
        r = done + tl.arange(0, BLOCK_K)[None, :]
        c = tl.load(c_at + r, mask=is_key & (r < rank), other=0.0)
        there = (d < R2) & (r < rank)
        a = dot(c, tl.trans(tl.load(a_at + r, mask=there, other=0.0)), a)
        b = dot(c, tl.trans(tl.load(b_at + r, mask=there, other=0.0)), b)
    return a, b


@triton.jit
def _store(
    scores_ptr, s, i, j, rows, c, is_key, seen, queries, high, NEAR: tl.constexpr
):  # scores_ptr: of this row of the batch
    """Stores the scores s (M, N) of keys that are seen, -inf for the others."""
    h, t, is_row, heads = rows
    first, near_a, near_b, near_c = seen
    visible = sees(i, j, h[:, None], heads, is_key, first, near_a, near_b, near_c, NEAR, True)
    line = (h * queries + t).to(tl.int64)[:, None] * high
    tl.store(
        scores_ptr + line + c[None, :],
        tl.where(visible, s, float("-inf")),
        mask=is_row[:, None] & is_key[None, :],
    )


@triton.jit(do_not_specialize=CHANGING)
def score_keys(
    q_ptr,
    q_first_ptr,
    c_ptr,
    key_ptr,
    key_bias_ptr,
    scores_ptr,
    inv_freq_ptr,
    start_ptr,
    mask_ptr,
    slots_at_ptr,
    ring_ptr,
    params_ptr,
    q_b,
    q_h,
    q_t,
    f_b,
    f_h,
    f_t,
    c_b,
    c_n,
    rank,
    mask_b,
    group,
    row_tiles,
    inner,
    outer,
    step,
    n_params,
    scaling,
    queries,
    tail,
    total,
    slots,
    first,
    near_a,
    near_b,
    near_c,
    head,
    low,
    high,
    D: tl.constexpr,
    R2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NEAR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Scores of the queries of one K/V head with one tile of tokens, whose keys are made here.

    Grid (Hkv * row_tiles, tiles, B): the heads of a tile run beside each other, and share its
    latents in the second cache. Arguments as those of `decode.triton_turned.attend_turned`; keys
    read are those of `tile_keys`, of which there are `high`."""
    kv_head = tl.program_id(0) // row_tiles
    b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0) // row_tiles * group
    REST: tl.constexpr = D - 2 * R2

    r = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = r < group * queries
    h = kv_head * group + r // queries
    t = r % queries
    origin = 0 if start_ptr is None else tl.load(start_ptr + b).to(tl.int32)
    i = (total - queries + t - origin)[:, None]
    h_wide, t_wide, exists = h.to(tl.int64)[:, None], t[:, None].to(tl.int64), is_row[:, None]
    at = q_ptr + b * q_b + h_wide * q_h + t_wide * q_t
    q = load_pairs(at, exists, R2, REST, INTERLEAVED, BLOCK_R, BLOCK_P)

    c, is_key = tile_keys(tl.program_id(1), origin, slots, tail, head, low, high, HEAD, BLOCK_N)
    if mask_ptr is not None:
        mask_ptr += b * mask_b
    j = key_positions(c, is_key, origin, slots, tail, slots_at_ptr, ring_ptr, mask_ptr)
    c_at = c_ptr + b * c_b + c.to(tl.int64)[:, None] * c_n
    key_at = key_ptr + kv_head.to(tl.int64) * D * rank
    x, y = _pairs_expanded(c_at, is_key[:, None], key_at, rank, R2, INTERLEAVED, BLOCK_R, BLOCK_K)
    d = tl.arange(0, BLOCK_R)
    p = tl.arange(0, BLOCK_P)
    if key_bias_ptr is not None:
        key_bias_ptr += kv_head * D
        step_d, apart = (2, 1) if INTERLEAVED else (1, R2)
        x += tl.load(key_bias_ptr + d * step_d, mask=d < R2, other=0.0)[None, :]
        y += tl.load(key_bias_ptr + d * step_d + apart, mask=d < R2, other=0.0)[None, :]
    dtype: tl.constexpr = c_ptr.dtype.element_ty
    cos, sin = cos_sin(angles(tl.reshape(j, [BLOCK_N]), inv_freq_ptr, 1.0, R2, BLOCK_R))
    turned = (narrow(x * cos - y * sin, dtype), narrow(y * cos + x * sin, dtype))
    if REST > 0:
        at_rest = key_at + (2 * R2 + p)[:, None] * rank
        z = _expanded(c_at, is_key[:, None], at_rest, BLOCK_P, (p < REST)[:, None], rank, BLOCK_K)
        if key_bias_ptr is not None:
            z += tl.load(key_bias_ptr + 2 * R2 + p, mask=p < REST, other=0.0)[None, :]
        turned = (turned[0], turned[1], narrow(z, dtype))

    s = pairs_product(q, turned, scaling, REST)
    if q_first_ptr is not None:
        at = q_first_ptr + b * f_b + h_wide * f_h + t_wide * f_t
        q_first = load_pairs(at, exists, R2, REST, INTERLEAVED, BLOCK_R, BLOCK_P)
        s = tl.where((j >= 0) & (j < first), pairs_product(q_first, turned, scaling, REST), s)
    s = tanh(s * inner) * outer if SOFTCAP else s * inner
    if BIAS is not None:
        params = params_of(params_ptr, tl.minimum(h, heads - 1)[:, None], step, n_params)
        s += BIAS(tl.abs(i - j), *params) * LOG2E
    scores_ptr += b * heads * queries * high
    rows, seen = (h, t, is_row, heads), (first, near_a, near_b, near_c)
    _store(scores_ptr, s, i, j, rows, c, is_key, seen, queries, high, NEAR)


@triton.jit(do_not_specialize=CHANGING)
def score_latents(
    q_ptr,
    c_ptr,
    scores_ptr,
    start_ptr,
    mask_ptr,
    slots_at_ptr,
    ring_ptr,
    params_ptr,
    q_b,
    q_h,
    q_t,
    c_b,
    c_n,
    rank,
    mask_b,
    heads,
    inner,
    step,
    n_params,
    queries,
    tail,
    total,
    slots,
    first,
    near_a,
    near_b,
    near_c,
    head,
    low,
    high,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NEAR: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Scores of queries q (B, Hq, Tq, r) with one tile of latents. Grid (row_tiles, tiles, B)."""
    b = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = r < heads * queries
    h, t = r // queries, r % queries
    origin = 0 if start_ptr is None else tl.load(start_ptr + b).to(tl.int32)
    i = (total - queries + t - origin)[:, None]
    c, is_key = tile_keys(tl.program_id(1), origin, slots, tail, head, low, high, HEAD, BLOCK_N)
    if mask_ptr is not None:
        mask_ptr += b * mask_b
    j = key_positions(c, is_key, origin, slots, tail, slots_at_ptr, ring_ptr, mask_ptr)
    q_at = q_ptr + b * q_b + h.to(tl.int64)[:, None] * q_h + t.to(tl.int64)[:, None] * q_t
    c_at = c_ptr + b * c_b + c.to(tl.int64)[:, None] * c_n
    s = _expanded(q_at, is_row[:, None], c_at, BLOCK_N, is_key[:, None], rank, BLOCK_K) * inner
    if BIAS is not None:
        params = params_of(params_ptr, tl.minimum(h, heads - 1)[:, None], step, n_params)
        s += BIAS(tl.abs(i - j), *params) * LOG2E
    scores_ptr += b * heads * queries * high
    rows, seen = (h, t, is_row, heads), (first, near_a, near_b, near_c)
    _store(scores_ptr, s, i, j, rows, c, is_key, seen, queries, high, NEAR)


@triton.jit(
    do_not_specialize=("lines", "slots", "tail", "head", "low", "high", "tiles", "tiles_a_split")
)
def gather(
    scores_ptr,
    c_ptr,
    out_ptr,
    lse_ptr,
    start_ptr,
    c_b,
    c_n,
    rank,
    lines,
    row_tiles,
    slots,
    tail,
    head,
    low,
    high,
    tiles,
    tiles_a_split,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr,
):
    """One split of the tokens for BLOCK_R numbers of their latents: the normalised sum that the
    softmax of scores weighs, and its log-sum-exp.

    Grid (splits * row_tiles, pieces of r, B); lines: Hq Tq. Tokens read: as `score_keys`."""
    split = tl.program_id(0) // row_tiles
    b = tl.program_id(2).to(tl.int64)
    line = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = line < lines
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    origin = 0 if start_ptr is None else tl.load(start_ptr + b).to(tl.int32)
    scores_ptr += (b * lines + line[:, None]) * high
    c_ptr += b * c_b + r[None, :]

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = (tl.zeros([BLOCK_M, BLOCK_R], tl.float32), highest, tl.zeros([BLOCK_M], tl.float32))
    for tile in range(split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, tiles)):
        n, is_key = tile_keys(tile, origin, slots, tail, head, low, high, HEAD, BLOCK_N)
        there = is_key[:, None] & (r < rank)[None, :]
        c = tl.load(c_ptr + n.to(tl.int64)[:, None] * c_n, mask=there, other=0.0)
        mask = is_row[:, None] & is_key[None, :]
        s = tl.load(scores_ptr + n[None, :], mask=mask, other=float("-inf"))
        sums = soften(sums, s, c, None)
    acc, highest, weight = sums
    weight = tl.where(weight > 0, weight, 1.0)
    row = (split * tl.num_programs(2) + b) * lines + line  # int64, as b is
    acc = narrow(acc / weight[:, None], out_ptr.dtype.element_ty)
    where = is_row[:, None] & (r < rank)[None, :]
    tl.store(out_ptr + row[:, None] * rank + r[None, :], acc, mask=where)
    if lse_ptr is not None:  # noqa: SIM102 - known when this compiles, the other is not
        if tl.program_id(1) == 0:
            tl.store(lse_ptr + row, (highest + tl.log2(weight)) * LN2, mask=is_row)
