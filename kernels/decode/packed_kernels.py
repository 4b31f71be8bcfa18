"""Flash-decoding over a packed cache: `attend_packed` takes one split of the packed keys and of
those in full precision.

M, N, i, j, h: `triton_pieces`. K and V come in pieces of channels that lie in one plane and share
scales (`pack.codes`), so each piece is a product of its own with its part of the queries, or into
its part of the output; tuples hold them. A code stands for itself plus 1 / 2.

    by           scale (1, .)
    k channel    W of a group  s = sum over pieces of q ((code + zero) scale)
    k token      N             s = sum over pieces of (q code + (sum of q) zero) scale
    v, below 8 bits            acc += p ((code + zero) scale)
    v token      N             acc += (p scale) code + sum over n of p scale zero
    v channel    W of a group  acc += (p code + (sum of p) zero) scale

Bound by instructions, not bytes, unless these are few. Two bytes of neighbouring channels are one
element, STEP = 2: matrix units want pairs of keys (of V) in a register, which the hardware brings
together for elements of 16 bits only. Channels of a piece are then STEP apart. Below 8 bits bf16
holds codes, and values are made whole; in 8 bits products are in fp16, with scales and queries made
1 at most, as bf16 would need a conversion a number. Scales are read as pairs, 4 bytes at least:
narrower ones would not be fetched ahead. Two warps: scales are in each warp's registers, so that
four would unpack them twice as often.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..flash.triton_bias import params_of
from .packed_pieces import (
    add_full,
    add_packed,
    full_scores,
    packed_keys,
    packed_scores,
    peak,
    pieces_of,
    side_by_side,
    strided_pieces,
    turned_scores,
    within,
)
from .triton_pieces import LN2, LOG2E, narrow, sees, tanh

CHANGING = (
    "mask_b",
    "step",
    "n_params",
    "queries",
    "total",
    "slots",
    "first",
    "near_a",
    "near_b",
    "near_c",
    "packed_from",
    "packed",
    "rest",
    "low",
    "rest_low",
    "packed_tiles",
    "tiles",
    "tiles_a_split",
    "window",
    "slow",
    "turn_scaling",
)


@triton.jit(do_not_specialize=CHANGING)
def attend_packed(
    q_ptr,
    q_first_ptr,
    q_far_ptr,
    kc_ptr,
    ks_ptr,
    kz_ptr,
    vc_ptr,
    vs_ptr,
    vz_ptr,
    k_rest_ptr,
    v_rest_ptr,
    k_first_ptr,
    v_first_ptr,
    out_ptr,
    lse_ptr,
    start_ptr,
    mask_ptr,
    packed_numbers_ptr,
    rest_numbers_ptr,
    total_ptr,
    inv_freq_ptr,
    params_ptr,
    q_b,
    q_h,
    q_t,
    f_b,
    f_h,
    f_t,
    r_b,
    r_h,
    r_t,
    kc_b,
    kc_h,
    kc_n,
    ks_b,
    ks_h,
    ks_n,
    vc_b,
    vc_h,
    vc_n,
    vs_b,
    vs_h,
    vs_n,
    kr_b,
    kr_h,
    kr_n,
    vr_b,
    vr_h,
    vr_n,
    kf_b,
    kf_h,
    kf_n,
    vf_b,
    vf_h,
    vf_n,
    mask_b,
    group,
    row_tiles,
    inner,
    outer,
    step,
    n_params,
    queries,
    total,
    slots,
    first,
    near_a,
    near_b,
    near_c,
    packed_from,
    packed,
    rest,
    low,
    rest_low,
    packed_tiles,
    tiles,
    tiles_a_split,
    turn_scaling,
    window,
    slow,
    K_CODE: tl.constexpr,
    V_CODE: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    NEAR: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOTS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One split of the keys for one row tile of one K/V head: its normalised output and its
    log-sum-exp.

    Grid (splits * row_tiles, Hkv, B). Pointers that are None are absent. Scores in bits are q k *
    inner, or with SOFTCAP tanh(q k * inner) * outer; BIAS, with n_params numbers a head, is added.
    Tiles: `packed_tiles` of BLOCK_N packed keys, [low, packed), then those of BLOCK_F keys among
    the slots and the newest, [rest_low, slots + rest). CODE: `packed_triton.code`. TURN: None, or
    (frequencies, far keys turn too)."""
    split = tl.program_id(0) // row_tiles
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * group
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    # bf16 has too few digits for 8-bit codes to be made cheaply
    K_DTYPE: tl.constexpr = tl.float16 if K_CODE[0] == 8 and dtype == tl.bfloat16 else dtype
    V_DTYPE: tl.constexpr = tl.float16 if V_CODE[0] == 8 and dtype == tl.bfloat16 else dtype
    KW: tl.constexpr = K_CODE[5]
    BLOCK_KW: tl.constexpr = K_CODE[6]
    KP: tl.constexpr = K_CODE[7]
    VW: tl.constexpr = V_CODE[5]
    BLOCK_VW: tl.constexpr = V_CODE[6]
    VP: tl.constexpr = V_CODE[7]

    r = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = r < group * queries
    h = kv_head * group + r // queries
    t = r % queries
    if total_ptr is not None:
        total = tl.load(total_ptr).to(tl.int32)
    origin = 0 if start_ptr is None else tl.load(start_ptr + b).to(tl.int32)
    i = (total - queries + t - origin)[:, None]

    exists, h_wide, t_wide = is_row[:, None], h.to(tl.int64)[:, None], t.to(tl.int64)[:, None]
    q_ptr += b * q_b + h_wide * q_h + t_wide * q_t
    q_first, q_far = None, None
    if TURN is None:
        q_packed = strided_pieces(q_ptr, exists, K_CODE)
        if dtype != K_DTYPE:
            q_packed, most = within(q_packed, K_DTYPE, KP * K_CODE[8])
    else:
        q = pieces_of(q_ptr, exists, KW, BLOCK_KW, KP)
    if q_first_ptr is not None:
        q_first = pieces_of(
            q_first_ptr + b * f_b + h_wide * f_h + t_wide * f_t, exists, KW, BLOCK_KW, KP
        )
    if q_far_ptr is not None:
        q_far = pieces_of(
            q_far_ptr + b * r_b + h_wide * r_h + t_wide * r_t, exists, KW, BLOCK_KW, KP
        )
    kv = kv_head.to(tl.int64)
    if mask_ptr is not None:
        mask_ptr += b * mask_b
    ks_ptr += b * ks_b + kv * ks_h
    vs_ptr += b * vs_b + kv * vs_h
    kz, vz = None, None
    if kz_ptr is not None:
        kz = kz_ptr + b * ks_b + kv * ks_h
    if vz_ptr is not None:
        vz = vz_ptr + b * vs_b + kv * vs_h
    k = (kc_ptr + b * kc_b + kv * kc_h, ks_ptr, kz, kc_n, ks_n)
    v = (vc_ptr + b * vc_b + kv * vc_h, vs_ptr, vz, vc_n, vs_n)
    turn = (inv_freq_ptr, turn_scaling, window, slow)
    if BIAS is not None:
        params = params_of(params_ptr, tl.minimum(h, heads - 1)[:, None], step, n_params)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = ()
    for _ in tl.static_range(VP * V_CODE[8]):
        acc += (tl.zeros([BLOCK_M, BLOCK_VW // V_CODE[8]], tl.float32),)
    begin, end = split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, tiles)

    for tile in range(begin, tl.minimum(end, packed_tiles)):
        n0 = tl.multiple_of(low + tile * BLOCK_N, BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        # where groups are of tokens, they are whole, and so are tiles
        there = tl.full([BLOCK_N], True, tl.int1) if K_CODE[3] or V_CODE[3] else n < packed
        number = n + packed_from
        if packed_numbers_ptr is not None:
            number = tl.load(packed_numbers_ptr + n, mask=there, other=-1).to(tl.int32)
        j = tl.where(number - origin >= slots, number - origin, -1)  # nearer ones are in the slots
        j = tl.where(number >= 0, j, -1)
        if mask_ptr is not None:
            j = tl.where(tl.load(mask_ptr + slots + n, mask=there, other=0) != 0, j, -1)
        j = j[None, :]
        if TURN is None:
            s = packed_scores(q_packed, k, n0, there, K_DTYPE, K_CODE)
            if dtype != K_DTYPE:
                s *= most
        else:
            s = turned_scores(
                q, q_far, packed_keys(k, n0, there, K_CODE), i, j, turn, dtype, K_CODE, TURN
            )
        s = tanh(s * inner) * outer if SOFTCAP else s * inner
        if BIAS is not None:
            s += BIAS(tl.abs(i - j), *params) * LOG2E
        if NEAR is None and CAUSAL:  # one comparison: what is not there lies behind every query
            visible = tl.where(there[None, :] & (j >= 0), j, 2**31 - 1) <= i
        else:
            visible = sees(
                i, j, h[:, None], heads, there, first, near_a, near_b, near_c, NEAR, CAUSAL
            )
        p, fade, highest = peak(tl.where(visible, s, float("-inf")), highest)
        weight = weight * fade + tl.sum(p, axis=1)
        acc = add_packed(acc, p, fade, v, n0, there, V_DTYPE, V_CODE)

    acc = side_by_side(acc, V_CODE)
    if TURN is None:  # as whole blocks, and not held meanwhile
        q = pieces_of(q_ptr, exists, KW, BLOCK_KW, KP)
    k_rest_ptr += b * kr_b + kv * kr_h
    v_rest_ptr += b * vr_b + kv * vr_h
    if SLOTS:
        k_first_ptr += b * kf_b + kv * kf_h
        v_first_ptr += b * vf_b + kv * vf_h
    for tile in range(tl.maximum(begin, packed_tiles), end):
        c = (tile - packed_tiles) * BLOCK_F + tl.arange(0, BLOCK_F)
        n = c - slots if SLOTS else c  # among the newest
        n += tl.where(n >= 0, rest_low, 0)
        there = n < rest
        number = total - rest + n
        if rest_numbers_ptr is not None:
            number = tl.load(rest_numbers_ptr + n, mask=there & (n >= 0), other=-1).to(tl.int32)
        j = tl.where((number - origin >= slots) & (number >= 0), number - origin, -1)
        k_at = k_rest_ptr + n.to(tl.int64)[:, None] * kr_n
        v_at = v_rest_ptr + n.to(tl.int64)[:, None] * vr_n
        if SLOTS:
            j = tl.where(c < slots, c, j)
            k_at = tl.where((c < slots)[:, None], k_first_ptr + c[:, None] * kf_n, k_at)
            v_at = tl.where((c < slots)[:, None], v_first_ptr + c[:, None] * vf_n, v_at)
        if mask_ptr is not None:
            at = tl.where(c < slots, c, slots + packed + n)
            j = tl.where(tl.load(mask_ptr + at, mask=there, other=0) != 0, j, -1)
        j = j[None, :]
        key = pieces_of(k_at, there[:, None], KW, BLOCK_KW, KP)
        if TURN is None:
            s = full_scores(q, key, KP)
            if q_first is not None:
                s = tl.where((j >= 0) & (j < first), full_scores(q_first, key, KP), s)
        else:
            s = turned_scores(q, q_far, key, i, j, turn, dtype, K_CODE, TURN)
            if q_first is not None:
                s = tl.where(
                    (j >= 0) & (j < first),
                    turned_scores(q_first, q_far, key, i, j, turn, dtype, K_CODE, TURN),
                    s,
                )
        s = tanh(s * inner) * outer if SOFTCAP else s * inner
        if BIAS is not None:
            s += BIAS(tl.abs(i - j), *params) * LOG2E
        visible = sees(i, j, h[:, None], heads, there, first, near_a, near_b, near_c, NEAR, CAUSAL)
        p, fade, highest = peak(tl.where(visible, s, float("-inf")), highest)
        weight = weight * fade + tl.sum(p, axis=1)
        acc = add_full(acc, p, fade, pieces_of(v_at, there[:, None], VW, BLOCK_VW, VP), VP)

    weight = tl.where(weight > 0, weight, 1.0)  # a row that saw nothing: 0, and -inf from `highest`
    row = ((split * tl.num_programs(2) + b) * heads + h) * queries + t  # int64, as b is
    d = tl.arange(0, BLOCK_VW)
    for part in tl.static_range(VP):
        out = narrow(acc[part] / weight[:, None], out_ptr.dtype.element_ty)
        at = out_ptr + row[:, None] * (VW * VP) + part * VW + d[None, :]
        tl.store(at, out, mask=exists & (d < VW)[None, :])
    if lse_ptr is not None:
        tl.store(lse_ptr + row, (highest + tl.log2(weight)) * LN2, mask=is_row)
