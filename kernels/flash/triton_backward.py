"""The backward kernels of flash attention: per query, and for queries (`triton_backward_keys`: for
keys). The legend is that of `triton_kernels`.

With other queries and keys for FARTHER pairs, the two last are launched once for each PART, with
that part's queries and keys: the log-sum-exp is that of all, so each part's weights are, too."""

import triton
import triton.language as tl

from .triton_bias import biases_of
from .triton_pieces import (
    EDGE,
    FIRST,
    INNER,
    LOG2E,
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


@triton.jit(do_not_specialize=["q_len"])
def backward_rows(
    out,
    grad,
    lse,
    grad_lse,
    delta,
    lse2,
    o_b,
    o_h,
    o_t,
    g_b,
    g_h,
    g_t,
    heads,
    q_len,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Per query, (B, H, Tq) fp32: delta, the part of d score / weight that all its keys share, and
    lse in base 2.

    A query that saw nothing gets lse2 = +inf, so that exp2(s - lse2) is 0 for whatever is scored.
    """
    tiles = tl.cdiv(q_len, BLOCK_M)
    program = tl.program_id(0)
    r, h, row = program % tiles * BLOCK_M, program // tiles % heads, program // tiles // heads
    rows = r + tl.arange(0, BLOCK_M)
    at = tl.cast(row * heads + h, tl.int64) * q_len + rows
    exists = rows < q_len
    found = tl.load(lse + at, mask=exists, other=0.0)
    x = load_rows(head_of(out, row, h, o_b, o_h), r, o_t, q_len, V, BLOCK_M, BLOCK_V, True).to(
        tl.float32
    )
    dx = load_rows(head_of(grad, row, h, g_b, g_h), r, g_t, q_len, V, BLOCK_M, BLOCK_V, True).to(
        tl.float32
    )
    # the softmax's Jacobian: sum_j p_j (do . v_j) = do . out, without visiting a key
    shared = tl.sum(x * dx, 1)
    # d lse / d score is the weight itself, so its gradient joins the shared part
    if grad_lse is not None:
        shared -= tl.load(grad_lse + at, mask=exists, other=0.0)
    blind = found == float("-inf")
    tl.store(delta + at, tl.where(blind, 0.0, shared), mask=exists)
    tl.store(lse2 + at, tl.where(blind, float("inf"), found * LOG2E), mask=exists)


@triton.jit
def _query_gradient(
    dq,
    dother,
    q,
    other,
    grad,
    lse2,
    delta,
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
    SLOPE: tl.constexpr,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """As `_attend`; dq and dother (the gradient of `other`) are not yet multiplied by scale. dother
    is a tensor without `other`, too: Triton 3.6 compiles no jitted function that returns None.
    """
    key, k_t, value, v_t, k_len = keys
    scale, unit, cap, drop = units
    for t in range(0, run[3]):
        n = next_tile(t, run, KIND, BLOCK_N)
        # inner tiles lie whole inside the keys and are seen by all queries: no bounds, no predicate
        k = load_rows(key, n, k_t, k_len, D, BLOCK_N, BLOCK_D, KIND != INNER)
        v = load_rows(value, n, v_t, k_len, V, BLOCK_N, BLOCK_V, KIND != INNER)
        j = positions(n, mask, k_len, place, KIND, BLOCK_N)[None, :]
        if KIND == INNER and mask is not None:
            real = (tl.load(mask + n + tl.arange(0, BLOCK_N)) != 0)[None, :]
        s = dot(q, tl.trans(k), None)
        # the first tokens are scored by a query of their own (sinks that stand at fixed positions)
        if KIND == FIRST and other is not None:
            s = tl.where(j < place[2], dot(other, tl.trans(k), None), s)
        if RULE is not None:
            s = RULE(s * scale, i, j, h, cap)
        biased = s
        if BIAS is not None:
            biased = s + BIAS(tl.abs(i - j), *biases[0]) * biases[1]
        # the forward's weights again, from its log-sum-exp: none was stored
        p = tl.exp2(biased * unit - lse2)
        if KIND != INNER:
            p = tl.where(visible(i, j, h, bounds, place, numbers, NEAR, KIND == FIRST), p, 0.0)
        elif mask is not None:
            p = tl.where(real, p, 0.0)
        dp = dot(grad, tl.trans(v), None)
        if len(drop) == 3:
            dp = dropped_by_keys(dp, drop, n, k_len, BLOCK_N) * drop_factor(drop[2])
        ds = p * (dp - delta)
        if RULE is not None:
            ds = ds * SLOPE(s, i, j, h, cap)
        # each pair's gradient goes to the query that scored it
        if KIND == FIRST and other is not None:
            dother = dot(narrow(tl.where(j < place[2], ds, 0.0), k.dtype), k, dother)
            ds = tl.where(j < place[2], 0.0, ds)
        dq = dot(narrow(ds, k.dtype), k, dq)
    return dq, dother


@triton.jit(do_not_specialize=VARYING)
def backward_queries(
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
    dq,
    dq_first,
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
    dq_b,
    dq_h,
    dq_t,
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
    """dq, and dq_first with the same strides; one program per tile of queries, which visits the
    keys as `forward`.
    """
    tiles = tl.cdiv(q_len, BLOCK_M)
    program = tl.program_id(0)
    # causal: the last tiles see most keys and begin first, so that no long one is left at the end
    r = (tiles - 1 - program % tiles) * BLOCK_M
    h, row = program // tiles % heads, program // tiles // heads
    base = tail - start_of(start, row)
    i_low = base + k_len - slots - q_len + r
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
    bounds = bounds_of_queries(i, h, window, numbers, KEYS, CAUSAL, PART)
    first_run, edge_run, inner_run = keys_to_visit(
        i_low,
        i_low + tl.minimum(BLOCK_M, q_len - r) - 1,
        h,
        k_len,
        place,
        numbers,
        KEYS,
        NEAR,
        CAUSAL,
        PREFIX,
        PART,
        BLOCK_N,
        STEP,
    )
    q_tile = load_rows(head_of(q, row, h, q_b, q_h), r, q_t, q_len, D, BLOCK_M, BLOCK_D, True)
    g_tile = load_rows(head_of(grad, row, h, g_b, g_h), r, g_t, q_len, V, BLOCK_M, BLOCK_V, True)
    l_tile = tl.load(lse2 + at, mask=rows < q_len, other=float("inf"))[:, None]
    d_tile = tl.load(delta + at, mask=rows < q_len, other=0.0)[:, None]
    keys = (
        head_of(k, row, h // group, k_b, k_h),
        k_t,
        head_of(v, row, h // group, v_b, v_h),
        v_t,
        k_len,
    )
    if mask is not None:
        mask += tl.cast(row, tl.int64) * mask_b
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dother = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if PREFIX:
        other = None
        if q_first is not None:
            other = load_rows(
                head_of(q_first, row, h, f_b, f_h), r, f_t, q_len, D, BLOCK_M, BLOCK_D, True
            )
        acc, dother = _query_gradient(
            acc,
            dother,
            q_tile,
            other,
            g_tile,
            l_tile,
            d_tile,
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
            SLOPE,
            BIAS,
            FIRST,
            STEP,
            BLOCK_D,
            BLOCK_V,
        )
        if q_first is not None:
            save_rows(
                dother * scale,
                head_of(dq_first, row, h, dq_b, dq_h),
                r,
                dq_t,
                q_len,
                D,
                BLOCK_M,
                BLOCK_D,
            )
    acc, _ = _query_gradient(
        acc,
        dother,
        q_tile,
        None,
        g_tile,
        l_tile,
        d_tile,
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
        SLOPE,
        BIAS,
        EDGE,
        STEP,
        BLOCK_D,
        BLOCK_V,
    )
    acc, _ = _query_gradient(
        acc,
        dother,
        q_tile,
        None,
        g_tile,
        l_tile,
        d_tile,
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
        SLOPE,
        BIAS,
        INNER,
        BLOCK_N,
        BLOCK_D,
        BLOCK_V,
    )
    save_rows(acc * scale, head_of(dq, row, h, dq_b, dq_h), r, dq_t, q_len, D, BLOCK_M, BLOCK_D)
