"""Flash-decoding in Triton: `attend` takes one split of the keys, `combine` merges the splits by
log-sum-exp.

Shapes: q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), out ([splits,] B, Hq, Tq, Dv), lse
without Dv. The other letters: `triton_pieces`.

Lengths, which change at every step, are never specialised on: a kernel that compiled at one length
runs at all."""

from __future__ import annotations

import triton
import triton.language as tl

from ..flash.triton_bias import params_of
from .triton_pieces import (
    LN2,
    LOG2E,
    dot,
    finish,
    key_positions,
    narrow,
    sees,
    soften,
    tanh,
    tile_keys,
)

CHANGING = (
    "mask_b",
    "c_b",
    "c_h",
    "c_t",
    "step",
    "n_params",
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
    "tiles",
    "tiles_a_split",
)


@triton.jit(do_not_specialize=CHANGING)
def attend(
    q_ptr,
    q_first_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    start_ptr,
    mask_ptr,
    slots_at_ptr,
    ring_ptr,
    counts_ptr,
    params_ptr,
    q_b,
    q_h,
    q_t,
    f_b,
    f_h,
    f_t,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    mask_b,
    c_b,
    c_h,
    c_t,
    c_n,
    group,
    row_tiles,
    inner,
    outer,
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
    tiles,
    tiles_a_split,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEAR: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """One split of the keys for one row tile of one K/V head: its normalised output and its
    log-sum-exp.

    Grid (splits * row_tiles, Hkv, B). Pointers that are None are absent. Scores in bits are q k *
    inner, or with SOFTCAP tanh(q k * inner) * outer; BIAS, with n_params numbers a head, is added.
    The keys read are `head` ones from the front (HEAD: slots and first keys) and then those at
    [low, high), in `tiles` tiles of BLOCK_N."""
    split = tl.program_id(0) // row_tiles
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * group

    r = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = r < group * queries
    h = kv_head * group + r // queries
    t = r % queries
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    origin = 0 if start_ptr is None else tl.load(start_ptr + b).to(tl.int32)
    i = (total - queries + t - origin)[:, None]

    h_wide = h.to(tl.int64)[:, None]
    q_mask = is_row[:, None] & (d < D)[None, :]
    q = tl.load(
        q_ptr + b * q_b + h_wide * q_h + t[:, None] * q_t + d[None, :], mask=q_mask, other=0.0
    )
    if q_first_ptr is not None:
        q_first = tl.load(
            q_first_ptr + b * f_b + h_wide * f_h + t[:, None] * f_t + d[None, :],
            mask=q_mask,
            other=0.0,
        )
    if counts_ptr is not None:
        counts_ptr += b * c_b + h_wide * c_h + t[:, None].to(tl.int64) * c_t
    if mask_ptr is not None:
        mask_ptr += b * mask_b
    if BIAS is not None:
        params = params_of(params_ptr, tl.minimum(h, heads - 1)[:, None], step, n_params)
    k_ptr += b * k_b + kv_head.to(tl.int64) * k_h
    v_ptr += b * v_b + kv_head.to(tl.int64) * v_h

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = (tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), highest, tl.zeros([BLOCK_M], tl.float32))
    for tile in range(split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, tiles)):
        c, is_key = tile_keys(tile, origin, slots, tail, head, low, high, HEAD, BLOCK_N)
        c_wide = c.to(tl.int64)[:, None]
        k_mask = is_key[:, None] if D == BLOCK_D else is_key[:, None] & (d < D)[None, :]
        v_mask = is_key[:, None] if DV == BLOCK_DV else is_key[:, None] & (dv < DV)[None, :]
        k = tl.load(k_ptr + c_wide * k_n + d[None, :], mask=k_mask, other=0.0)
        v = tl.load(v_ptr + c_wide * v_n + dv[None, :], mask=v_mask, other=0.0)
        j = key_positions(c, is_key, origin, slots, tail, slots_at_ptr, ring_ptr, mask_ptr)

        s = dot(q, tl.trans(k), None)
        if q_first_ptr is not None:
            s = tl.where((j >= 0) & (j < first), dot(q_first, tl.trans(k), None), s)
        s = tanh(s * inner) * outer if SOFTCAP else s * inner
        if BIAS is not None:
            s += BIAS(tl.abs(i - j), *params) * LOG2E
        count = None
        if counts_ptr is not None:
            count = tl.load(
                counts_ptr + c.to(tl.int64)[None, :] * c_n,
                mask=is_row[:, None] & is_key[None, :],
                other=0,
            )
            count = count.to(tl.float32)
            visible = count > 0
        else:
            visible = sees(
                i, j, h[:, None], heads, is_key, first, near_a, near_b, near_c, NEAR, CAUSAL
            )
        sums = soften(sums, tl.where(visible, s, float("-inf")), v, count)
    finish(sums, out_ptr, lse_ptr, split, b, h, t, is_row, heads, queries, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["splits", "rows"])
def combine(
    parts_ptr,
    sums_ptr,
    out_ptr,
    lse_ptr,
    splits,
    rows,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One output row: parts (splits, rows, Dv) weighed by the softmax of their log-sum-exps sums
    (splits, rows).
    """
    row = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    highest = float("-inf")
    weight = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for done in range(0, splits, CHUNK):
        s = done + tl.arange(0, CHUNK)
        at = s.to(tl.int64) * rows + row
        sums = tl.load(sums_ptr + at, mask=s < splits, other=float("-inf")) * LOG2E
        there = (s < splits)[:, None] & (dv < DV)[None, :]
        parts = tl.load(parts_ptr + at[:, None] * DV + dv[None, :], mask=there, other=0.0)
        higher = tl.maximum(highest, tl.max(sums, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(sums - base)
        fade = tl.exp2(highest - base)
        weight = weight * fade + tl.sum(p, axis=0)
        acc = acc * fade + tl.sum(p[:, None] * parts, axis=0)
        highest = higher
    weight = tl.where(weight > 0, weight, 1.0)
    tl.store(out_ptr + row * DV + dv, narrow(acc / weight, out_ptr.dtype.element_ty), mask=dv < DV)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, (highest + tl.log2(weight)) * LN2)
