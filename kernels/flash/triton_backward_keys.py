"""The backward kernel of flash attention for keys and values: a program has a tile of keys and goes
through the queries that see it. The legend is that of `triton_kernels`, the rest of the pass in
`triton_backward`."""

import triton
import triton.language as tl

from .triton_bias import biases_of
from .triton_pieces import (
    EDGE,
    FIRST,
    INNER,
    LOG2E,
    VARYING,
    bounds_of_keys,
    dot,
    drop_factor,
    dropped_by_queries,
    head_of,
    load_rows,
    narrow,
    next_tile,
    positions,
    queries_to_visit,
    save_rows,
    start_of,
)


@triton.jit
def _key_gradients(
    sums,
    k,
    v,
    j,
    bounds,
    queries,
    other,
    f_t,
    i_zero,
    h,
    run,
    place,
    numbers,
    units,
    biases,
    D: tl.constexpr,
    V: tl.constexpr,
    NEAR: tl.constexpr,
    RULE: tl.constexpr,
    SLOPE: tl.constexpr,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Adds to sums = (dk, dv) over a run of tiles of queries; the keys are at positions j (N, 1),
    scores are (N, M).
    """
    dk, dv = sums
    query, q_t, grad, g_t, lse2, delta, q_len = queries
    scale, unit, cap, drop = units
    j_low, j_high = bounds
    for t in range(0, run[3]):
        r = next_tile(t, run, KIND, BLOCK_M)
        rows = r + tl.arange(0, BLOCK_M)
        i = (i_zero + rows)[None, :]
        q = load_rows(query, r, q_t, q_len, D, BLOCK_M, BLOCK_D, KIND != INNER)
        do = load_rows(grad, r, g_t, q_len, V, BLOCK_M, BLOCK_V, KIND != INNER)
        # 0 for rows that are not there, which the bounds exclude: cp.async fills in zeros for
        # nothing
        l = (
            tl.load(lse2 + rows)
            if KIND == INNER
            else tl.load(lse2 + rows, mask=rows < q_len, other=0.0)
        )[None, :]
        d = (
            tl.load(delta + rows)
            if KIND == INNER
            else tl.load(delta + rows, mask=rows < q_len, other=0.0)
        )[None, :]
        s = dot(k, tl.trans(q), None)
        if KIND == FIRST:
            q_other = load_rows(other, r, f_t, q_len, D, BLOCK_M, BLOCK_D, True)
            s = tl.where(j < place[2], dot(k, tl.trans(q_other), None), s)
        if RULE is not None:
            s = RULE(s * scale, i, j, h, cap)
        biased = s
        if BIAS is not None:
            biased = s + BIAS(tl.abs(i - j), *biases[0]) * biases[1]
        p = tl.exp2(biased * unit - l)
        if KIND != INNER:
            near = (i >= j_low) & (i < j_high)
            if NEAR is not None:
                near = near & (NEAR(i, j, h, *numbers) | (j < place[2]))
            p = tl.where(near, p, 0.0)
        weights = p
        dp = dot(v, tl.trans(do), None)
        if len(drop) == 3:
            weights = dropped_by_queries(p, drop, rows, q_len) * drop_factor(drop[2])
            dp = dropped_by_queries(dp, drop, rows, q_len) * drop_factor(drop[2])
        dv = dot(narrow(weights, do.dtype), do, dv)
        ds = p * (dp - d)
        if RULE is not None:
            ds = ds * SLOPE(s, i, j, h, cap)
        if KIND == FIRST:
            dk = dot(narrow(tl.where(j < place[2], ds, 0.0), q.dtype), q_other, dk)
            ds = tl.where(j < place[2], 0.0, ds)
        dk = dot(narrow(ds, q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def backward_keys(
    q,
    k,
    v,
    q_first,
    mask,
    start,
    params_ptr,
    q_drop,
    k_drop,
    grad,
    lse2,
    delta,
    dk,
    dv,
    dv_near,
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
    g_b,
    g_h,
    g_t,
    dk_b,
    dk_h,
    dk_t,
    dv_b,
    dv_h,
    dv_t,
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
    QUERIES: tl.constexpr,
    NEAR: tl.constexpr,
    RULE: tl.constexpr,
    SLOPE: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dk and dv; one program per tile of keys, which adds up the heads of its group: no atomics,
    the same every time.

    dv_near, fp32 with dv's strides, is added to dv: what the NEARER part gave. A key that is not
    real (padding, or beyond the last) may gather anything in its own row, which is dropped at the
    end: INNER tiles need no mask for it."""
    tiles = tl.cdiv(k_len, BLOCK_N)
    program = tl.program_id(0)
    n, kv_head = program % tiles * BLOCK_N, program // tiles % (heads // group)
    row = program // tiles // (heads // group)
    base = tail - start_of(start, row)
    i_zero = base + k_len - slots - q_len  # position of the first row of queries
    place, numbers = (slots, base, first, window), (heads, a, b, c)
    if mask is not None:
        mask += tl.cast(row, tl.int64) * mask_b
    k_tile = load_rows(head_of(k, row, kv_head, k_b, k_h), n, k_t, k_len, D, BLOCK_N, BLOCK_D, True)
    v_tile = load_rows(head_of(v, row, kv_head, v_b, v_h), n, v_t, k_len, V, BLOCK_N, BLOCK_V, True)
    j = positions(n, mask, k_len, place, FIRST if PREFIX else EDGE, BLOCK_N)[:, None]
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    unit = LOG2E if RULE is not None else scale * LOG2E
    for g in range(0, group):
        h = kv_head * group + g
        at = tl.cast(row * heads + h, tl.int64) * q_len
        drop = (least,)
        if q_drop is not None:
            keys = n + tl.arange(0, BLOCK_N)
            of_k = k_drop + tl.cast(row, tl.int64) * drop_b + keys
            drop = (q_drop + at, tl.load(of_k, mask=keys < k_len, other=0)[:, None], least)
        units = (scale, unit, cap, drop)
        queries = (
            head_of(q, row, h, q_b, q_h),
            q_t,
            head_of(grad, row, h, g_b, g_h),
            g_t,
            lse2 + at,
            delta + at,
            q_len,
        )
        biases = biases_of(params_ptr, h, step, n_params, scale, BIAS, RULE)
        bounds = bounds_of_keys(j, h, i_zero + q_len, place, numbers, QUERIES, CAUSAL, PREFIX, PART)
        first_run, edge_run, inner_run = queries_to_visit(
            n,
            h,
            q_len,
            k_len,
            i_zero,
            place,
            numbers,
            QUERIES,
            NEAR,
            CAUSAL,
            PREFIX,
            q_first is not None,
            PART,
            BLOCK_M,
            STEP,
            BLOCK_N,
        )
        sums = (dk_acc, dv_acc)
        if q_first is not None:
            sums = _key_gradients(
                sums,
                k_tile,
                v_tile,
                j,
                bounds,
                queries,
                head_of(q_first, row, h, f_b, f_h),
                f_t,
                i_zero,
                h,
                first_run,
                place,
                numbers,
                units,
                biases,
                D,
                V,
                NEAR,
                RULE,
                SLOPE,
                BIAS,
                FIRST,
                STEP,
                BLOCK_D,
                BLOCK_V,
            )
        sums = _key_gradients(
            sums,
            k_tile,
            v_tile,
            j,
            bounds,
            queries,
            None,
            0,
            i_zero,
            h,
            edge_run,
            place,
            numbers,
            units,
            biases,
            D,
            V,
            NEAR,
            RULE,
            SLOPE,
            BIAS,
            EDGE,
            STEP,
            BLOCK_D,
            BLOCK_V,
        )
        dk_acc, dv_acc = _key_gradients(
            sums,
            k_tile,
            v_tile,
            j,
            bounds,
            queries,
            None,
            0,
            i_zero,
            h,
            inner_run,
            place,
            numbers,
            units,
            biases,
            D,
            V,
            NEAR,
            RULE,
            SLOPE,
            BIAS,
            INNER,
            BLOCK_M,
            BLOCK_D,
            BLOCK_V,
        )
    if dv_near is not None:
        dv_acc += load_rows(
            head_of(dv_near, row, kv_head, dv_b, dv_h), n, dv_t, k_len, V, BLOCK_N, BLOCK_V, True
        )
    dk_acc, dv_acc = tl.where(j >= 0, dk_acc * scale, 0.0), tl.where(j >= 0, dv_acc, 0.0)
    save_rows(dk_acc, head_of(dk, row, kv_head, dk_b, dk_h), n, dk_t, k_len, D, BLOCK_N, BLOCK_D)
    save_rows(dv_acc, head_of(dv, row, kv_head, dv_b, dv_h), n, dv_t, k_len, V, BLOCK_N, BLOCK_V)
