"""Flash attention in Triton: the forward kernel, for every pattern, score rule and key layout.

    B              batch
    H              query heads, `group` of them to a K/V head
    D, V           head size, value size; padded to BLOCK_D, BLOCK_V
    M, N           rows of queries and keys in a tile
    x_b, x_h, x_t  strides of x by row of the batch, head, token
    the other letters: `triton_pieces`

Softmax runs in base 2: `unit` takes the scores there, as scale * log2(e), or as log2(e) behind a
score rule, which works on scaled scores. RULE is such a rule, SLOPE its derivative, BIAS (with the
numbers in `biases`) is added by distance. Each kernel goes through its tiles by kind: FIRST, EDGE,
and INNER last, where registers are short and nothing but the sums is to stay alive. With other
queries and keys for FARTHER pairs (q_far, k_far), it goes through those and then through the NEARER
ones: two products only where tiles straddle the window."""

import triton
import triton.language as tl

from .triton_bias import biases_of
from .triton_pieces import (
    ALL,
    EDGE,
    FARTHER,
    FIRST,
    INNER,
    LN2,
    LOG2E,
    NEARER,
    VARYING,
    bounds_of_queries,
    dot,
    drop_factor,
    dropped_by_keys,
    head_of,
    keys_to_visit,
    load_rows,
    narrow,
    next_tile,
    positions,
    save_rows,
    start_of,
    visible,
)


@triton.jit
def _attend(
    sums,
    q,
    other,
    i,
    bounds,
    h,
    keys,
    mask,
    run,
    place,
    numbers,
    units,
    biases,
    D: tl.constexpr,
    V: tl.constexpr,
    NEAR: tl.constexpr,
    RULE: tl.constexpr,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Goes on with sums = (acc (M, V), top score (M,), total weight (M,)) over a run of tiles of
    keys.
    """
    acc, top, total = sums
    key, k_t, value, v_t, k_len = keys
    scale, unit, cap, drop = units
    for t in range(0, run[3]):
        n = next_tile(t, run, KIND, BLOCK_N)
        k = load_rows(key, n, k_t, k_len, D, BLOCK_N, BLOCK_D, KIND != INNER)
        j = positions(n, mask, k_len, place, KIND, BLOCK_N)[None, :]
        if KIND == INNER and mask is not None:
            real = (tl.load(mask + n + tl.arange(0, BLOCK_N)) != 0)[None, :]
        s = dot(q, tl.trans(k), None)
        if KIND == FIRST and other is not None:
            s = tl.where(j < place[2], dot(other, tl.trans(k), None), s)
        if RULE is not None:
            s = RULE(s * scale, i, j, h, cap)
        if BIAS is not None:
            s += BIAS(tl.abs(i - j), *biases[0]) * biases[1]
        if KIND != INNER:
            s = tl.where(
                visible(i, j, h, bounds, place, numbers, NEAR, KIND == FIRST), s, float("-inf")
            )
        elif mask is not None:
            s = tl.where(real, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * unit)
        # a row that has seen nothing yet: -inf minus -inf would be NaN
        safe = (
            higher
            if KIND == INNER and mask is None
            else tl.where(higher == float("-inf"), 0.0, higher)
        )
        p = tl.exp2(s * unit - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(p, 1)
        if len(drop) == 3:
            p = dropped_by_keys(p, drop, n, k_len, BLOCK_N)
        v = load_rows(value, n, v_t, k_len, V, BLOCK_N, BLOCK_V, KIND != INNER)
        acc = dot(narrow(p, v.dtype), v, acc * fade[:, None])
        top = higher
    return acc, top, total


@triton.jit
def _attend_part(
    sums,
    q,
    other,
    i,
    i_low,
    i_last,
    h,
    keys,
    mask,
    place,
    numbers,
    units,
    biases,
    D: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    NEAR: tl.constexpr,
    RULE: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The same over all tiles of a PART."""
    bounds = bounds_of_queries(i, h, place[3], numbers, KEYS, CAUSAL, PART)
    first_run, edge_run, inner_run = keys_to_visit(
        i_low, i_last, h, keys[4], place, numbers, KEYS, NEAR, CAUSAL, PREFIX, PART, BLOCK_N, STEP
    )
    if PREFIX:
        sums = _attend(
            sums,
            q,
            other,
            i,
            bounds,
            h,
            keys,
            mask,
            first_run,
            place,
            numbers,
            units,
            biases,
            D,
            V,
            NEAR,
            RULE,
            BIAS,
            FIRST,
            STEP,
            BLOCK_D,
            BLOCK_V,
        )
    sums = _attend(
        sums,
        q,
        None,
        i,
        bounds,
        h,
        keys,
        mask,
        edge_run,
        place,
        numbers,
        units,
        biases,
        D,
        V,
        NEAR,
        RULE,
        BIAS,
        EDGE,
        STEP,
        BLOCK_D,
        BLOCK_V,
    )
    return _attend(
        sums,
        q,
        None,
        i,
        bounds,
        h,
        keys,
        mask,
        inner_run,
        place,
        numbers,
        units,
        biases,
        D,
        V,
        NEAR,
        RULE,
        BIAS,
        INNER,
        BLOCK_N,
        BLOCK_D,
        BLOCK_V,
    )


@triton.jit(do_not_specialize=VARYING)
def forward(
    q,
    k,
    v,
    q_first,
    q_far,
    k_far,
    mask,
    start,
    params_ptr,
    q_drop,
    k_drop,
    out,
    lse,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    f_b,
    f_h,
    f_t,
    qf_b,
    qf_h,
    qf_t,
    kf_b,
    kf_h,
    kf_t,
    o_b,
    o_h,
    o_t,
    mask_b,
    drop_b,
    least,
    scale,
    cap,
    step,
    n_params,
    heads,
    group,
    q_len,
    k_len,
    slots,
    tail,
    first,
    window,
    a,
    b,
    c,
    D: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    NEAR: tl.constexpr,
    RULE: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out (B, H, Tq, V) and lse (B, H, Tq) fp32; one program per tile of queries, the longest rows
    first.
    """
    tiles = tl.cdiv(q_len, BLOCK_M)
    program = tl.program_id(0)
    r = (tiles - 1 - program % tiles) * BLOCK_M
    h, row = program // tiles % heads, program // tiles // heads
    base = tail - start_of(start, row)
    i_low = base + k_len - slots - q_len + r  # position of the first query
    i_last = i_low + tl.minimum(BLOCK_M, q_len - r) - 1
    i = (i_low + tl.arange(0, BLOCK_M))[:, None]
    place, numbers = (slots, base, first, window), (heads, a, b, c)
    rows = r + tl.arange(0, BLOCK_M)
    at = tl.cast(row * heads + h, tl.int64) * q_len + rows
    drop = (least,)
    if q_drop is not None:
        of_q = tl.load(q_drop + at, mask=rows < q_len, other=0)[:, None]
        drop = (of_q, k_drop + tl.cast(row, tl.int64) * drop_b, least)
    unit = LOG2E if RULE is not None else scale * LOG2E
    units = (scale, unit, cap, drop)
    biases = biases_of(params_ptr, h, step, n_params, scale, BIAS, RULE)
    value = head_of(v, row, h // group, v_b, v_h)
    if mask is not None:
        mask += tl.cast(row, tl.int64) * mask_b
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = (acc, top, tl.zeros([BLOCK_M], tl.float32))
    if q_far is not None:
        far_tile = load_rows(
            head_of(q_far, row, h, qf_b, qf_h), r, qf_t, q_len, D, BLOCK_M, BLOCK_D, True
        )
        keys = (head_of(k_far, row, h // group, kf_b, kf_h), kf_t, value, v_t, k_len)
        sums = _attend_part(
            sums,
            far_tile,
            None,
            i,
            i_low,
            i_last,
            h,
            keys,
            mask,
            place,
            numbers,
            units,
            biases,
            D,
            V,
            KEYS,
            NEAR,
            RULE,
            BIAS,
            CAUSAL,
            PREFIX,
            FARTHER,
            BLOCK_N,
            STEP,
            BLOCK_D,
            BLOCK_V,
        )
    q_tile = load_rows(head_of(q, row, h, q_b, q_h), r, q_t, q_len, D, BLOCK_M, BLOCK_D, True)
    keys = (head_of(k, row, h // group, k_b, k_h), k_t, value, v_t, k_len)
    other = None
    if q_first is not None:
        other = load_rows(
            head_of(q_first, row, h, f_b, f_h), r, f_t, q_len, D, BLOCK_M, BLOCK_D, True
        )
    acc, top, total = _attend_part(
        sums,
        q_tile,
        other,
        i,
        i_low,
        i_last,
        h,
        keys,
        mask,
        place,
        numbers,
        units,
        biases,
        D,
        V,
        KEYS,
        NEAR,
        RULE,
        BIAS,
        CAUSAL,
        PREFIX,
        ALL if q_far is None else NEARER,
        BLOCK_N,
        STEP,
        BLOCK_D,
        BLOCK_V,
    )
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    if q_drop is not None:
        acc = acc * drop_factor(least)
    save_rows(
        acc / total[:, None], head_of(out, row, h, o_b, o_h), r, o_t, q_len, V, BLOCK_M, BLOCK_V
    )
    found = tl.where(blind, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse + at, found, mask=rows < q_len)
