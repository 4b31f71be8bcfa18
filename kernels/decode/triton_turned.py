"""`attend` over keys that are stored before their rotation, which is done on the fly: once a key,
for all its queries.

A key's turning dimensions come as the two halves of its pairs, each a product of its own with that
half of the queries; the others (partial rotary) are a third. For ReRoPE and Leaky ReRoPE the tiles
are of three classes:

    CLOSE    near to all queries: q, keys at j
    DISTANT  far from all: q_far, keys at j / slow, for ReRoPE as they are stored
    EITHER   both products: tiles that straddle the window, keys in no order (slots, first, rings)

A program goes through its tiles of one class after the other, in the order EITHER, DISTANT, CLOSE.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..flash.triton_bias import params_of
from .triton_kernels import CHANGING
from .triton_pieces import LOG2E, finish, key_positions, narrow, sees, soften, tanh, tile_keys
from .triton_turn import angles, cos_sin, load_pairs, pairs_product

CLOSE, DISTANT, EITHER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _turned(k, j, inv_freq, slow, R2: tl.constexpr, REST: tl.constexpr, BLOCK_R: tl.constexpr):
    """Keys (N, ...) rotated to j / slow; rounded to their dtype, as keys in a cache are."""
    dtype: tl.constexpr = k[0].dtype
    cos, sin = cos_sin(angles(j, inv_freq, slow, R2, BLOCK_R))
    x, y = k[0].to(tl.float32), k[1].to(tl.float32)
    a, b = narrow(x * cos - y * sin, dtype), narrow(y * cos + x * sin, dtype)
    if REST > 0:
        return a, b, k[2]
    else:
        return a, b


@triton.jit
def _over_tiles(
    sums,
    begin,
    end,
    ahead,
    q,
    q_far,
    q_first,
    rows,
    keys,
    held,
    seen,
    turn,
    units,
    bias,
    counts_ptr,
    slots_at_ptr,
    ring_ptr,
    mask_ptr,
    D: tl.constexpr,
    DV: tl.constexpr,
    R2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SLOWED: tl.constexpr,
    NEAR: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD: tl.constexpr,
    CLASS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Goes on with sums over the tiles [begin, end) of a program's order; those of EITHER class
    from the number `ahead` on lie behind the DISTANT ones."""
    i, h, heads, is_row = rows
    k_ptr, k_n, v_ptr, v_n, c_n = keys
    origin, slots, tail, head, low, high = held
    first, near_a, near_b, near_c = seen
    inv_freq, scaling, window, slow, distant, straddling = turn
    inner, outer = units
    REST: tl.constexpr = D - 2 * R2
    dv = tl.arange(0, BLOCK_DV)
    for u in range(begin, end):
        if CLASS == EITHER:
            tile = tl.where(u < ahead, u, u + distant)
        elif CLASS == DISTANT:
            tile = u - straddling
        else:
            tile = u
        c, is_key = tile_keys(tile, origin, slots, tail, head, low, high, HEAD, BLOCK_N)
        c_wide = c.to(tl.int64)[:, None]
        k = load_pairs(
            k_ptr + c_wide * k_n, is_key[:, None], R2, REST, INTERLEAVED, BLOCK_R, BLOCK_P
        )
        v_mask = is_key[:, None] if DV == BLOCK_DV else is_key[:, None] & (dv < DV)[None, :]
        v = tl.load(v_ptr + c_wide * v_n + dv[None, :], mask=v_mask, other=0.0)
        j = key_positions(c, is_key, origin, slots, tail, slots_at_ptr, ring_ptr, mask_ptr)
        at = tl.reshape(j, [BLOCK_N])

        if CLASS != DISTANT:
            turned = _turned(k, at, inv_freq, 1.0, R2, REST, BLOCK_R)
            s = pairs_product(q, turned, scaling, REST)
            if q_first is not None:
                s = tl.where(
                    (j >= 0) & (j < first), pairs_product(q_first, turned, scaling, REST), s
                )
        if CLASS != CLOSE:
            far = pairs_product(
                q_far,
                _turned(k, at, inv_freq, slow, R2, REST, BLOCK_R) if SLOWED else k,
                scaling,
                REST,
            )
            s = far if CLASS == DISTANT else tl.where(i - j >= window, far, s)
        s = tanh(s * inner) * outer if SOFTCAP else s * inner
        if BIAS is not None:
            s += BIAS(tl.abs(i - j), *bias) * LOG2E
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
            visible = sees(i, j, h, heads, is_key, first, near_a, near_b, near_c, NEAR, CAUSAL)
        sums = soften(sums, tl.where(visible, s, float("-inf")), v, count)
    return sums


@triton.jit(
    do_not_specialize=(*CHANGING, "window", "slow", "scaling", "ahead", "distant", "straddling")
)
def attend_turned(
    q_ptr,
    q_far_ptr,
    q_first_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    inv_freq_ptr,
    start_ptr,
    mask_ptr,
    slots_at_ptr,
    ring_ptr,
    counts_ptr,
    params_ptr,
    q_b,
    q_h,
    q_t,
    r_b,
    r_h,
    r_t,
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
    scaling,
    window,
    slow,
    ahead,
    distant,
    straddling,
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
    R2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SLOWED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEAR: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """As `attend`. R2 frequencies; SLOWED: far keys turn too (Leaky ReRoPE). Without q_far all
    tiles are CLOSE; with it there are, in order, `ahead` tiles of EITHER class, `distant` ones,
    `straddling` of EITHER class, and CLOSE ones."""
    split = tl.program_id(0) // row_tiles
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * group

    r = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = r < group * queries
    h = kv_head * group + r // queries
    t = r % queries
    origin = 0 if start_ptr is None else tl.load(start_ptr + b).to(tl.int32)
    rows = ((total - queries + t - origin)[:, None], h[:, None], heads, is_row)

    h_wide, t_wide, exists = h.to(tl.int64)[:, None], t[:, None].to(tl.int64), is_row[:, None]
    q = load_pairs(
        q_ptr + b * q_b + h_wide * q_h + t_wide * q_t,
        exists,
        R2,
        D - 2 * R2,
        INTERLEAVED,
        BLOCK_R,
        BLOCK_P,
    )
    q_far = None
    if q_far_ptr is not None:
        at = q_far_ptr + b * r_b + h_wide * r_h + t_wide * r_t
        q_far = load_pairs(at, exists, R2, D - 2 * R2, INTERLEAVED, BLOCK_R, BLOCK_P)
    q_first = None
    if q_first_ptr is not None:
        at = q_first_ptr + b * f_b + h_wide * f_h + t_wide * f_t
        q_first = load_pairs(at, exists, R2, D - 2 * R2, INTERLEAVED, BLOCK_R, BLOCK_P)
    if counts_ptr is not None:
        counts_ptr += b * c_b + h_wide * c_h + t_wide * c_t
    if mask_ptr is not None:
        mask_ptr += b * mask_b
    bias = None
    if BIAS is not None:
        bias = params_of(params_ptr, tl.minimum(h, heads - 1)[:, None], step, n_params)
    k_ptr += b * k_b + kv_head.to(tl.int64) * k_h
    v_ptr += b * v_b + kv_head.to(tl.int64) * v_h
    keys, held = (k_ptr, k_n, v_ptr, v_n, c_n), (origin, slots, tail, head, low, high)
    seen, units = (first, near_a, near_b, near_c), (inner, outer)
    turn = (inv_freq_ptr, scaling, window, slow, distant, straddling)

    begin, end = split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, tiles)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = (tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), highest, tl.zeros([BLOCK_M], tl.float32))
    if q_far_ptr is not None:
        until = tl.minimum(tl.maximum(begin, ahead + straddling), end)
        sums = _over_tiles(
            sums,
            begin,
            until,
            ahead,
            q,
            q_far,
            q_first,
            rows,
            keys,
            held,
            seen,
            turn,
            units,
            bias,
            counts_ptr,
            slots_at_ptr,
            ring_ptr,
            mask_ptr,
            D,
            DV,
            R2,
            INTERLEAVED,
            SLOWED,
            NEAR,
            CAUSAL,
            SOFTCAP,
            BIAS,
            HEAD,
            EITHER,
            BLOCK_R,
            BLOCK_P,
            BLOCK_DV,
            BLOCK_N,
        )
        begin, until = until, tl.minimum(tl.maximum(until, ahead + straddling + distant), end)
        sums = _over_tiles(
            sums,
            begin,
            until,
            ahead,
            q,
            q_far,
            q_first,
            rows,
            keys,
            held,
            seen,
            turn,
            units,
            bias,
            counts_ptr,
            slots_at_ptr,
            ring_ptr,
            mask_ptr,
            D,
            DV,
            R2,
            INTERLEAVED,
            SLOWED,
            NEAR,
            CAUSAL,
            SOFTCAP,
            BIAS,
            HEAD,
            DISTANT,
            BLOCK_R,
            BLOCK_P,
            BLOCK_DV,
            BLOCK_N,
        )
        begin = until
    sums = _over_tiles(
        sums,
        begin,
        end,
        ahead,
        q,
        q_far,
        q_first,
        rows,
        keys,
        held,
        seen,
        turn,
        units,
        bias,
        counts_ptr,
        slots_at_ptr,
        ring_ptr,
        mask_ptr,
        D,
        DV,
        R2,
        INTERLEAVED,
        SLOWED,
        NEAR,
        CAUSAL,
        SOFTCAP,
        BIAS,
        HEAD,
        CLOSE,
        BLOCK_R,
        BLOCK_P,
        BLOCK_DV,
        BLOCK_N,
    )
    finish(sums, out_ptr, lse_ptr, split, b, h, t, is_row, heads, queries, DV, BLOCK_DV)
