"""The backward kernels of LSH attention in Triton: for each token's own key, for queries, for keys.
The letters are those of `triton_kernels`."""

import triton
import triton.language as tl

from ..flash.triton_pieces import dot, narrow
from .triton_pieces import (
    counted,
    gather,
    gather_queries,
    head_at,
    own_scores,
    scatter,
)


@triton.jit(do_not_specialize=["own"])
def backward_own(
    q,
    k,
    v,
    out,
    grad,
    lse,
    delta,
    dq,
    dk,
    dv,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    o_b,
    o_h,
    o_t,
    g_b,
    g_h,
    g_t,
    scale,
    unit,
    heads,
    group,
    rows,
    store,
    own,
    D: tl.constexpr,
    V: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """delta (P, M): what all weights' gradients of a row share; and what own keys add to dq (P, M,
    D), dk (P, N, D) and dv (P, N, V). One program per tile of tokens, which adds up the heads of a
    group."""
    queries = rows // group
    tiles = tl.cdiv(queries, BLOCK)
    p = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    there = t < queries
    key = gather(head_at(k, p, heads, k_b, k_h), own + t, k_t, there, D, BLOCK_D).to(tl.float32)
    value = gather(head_at(v, p, heads, v_b, v_h), own + t, v_t, there, V, BLOCK_V).to(tl.float32)
    dk_sum, dv_sum = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_V], tl.float32)
    line = tl.cast(p, tl.int64) * rows
    for g in range(0, group):
        # the heads of a group read the same keys: summed here, without atomics
        m = t * group + g
        query = gather_queries(
            head_at(q, p, heads, q_b, group * q_h), m, q_h, q_t, group, there, D, BLOCK_D
        )
        query = query.to(tl.float32)
        do = gather_queries(
            head_at(grad, p, heads, g_b, group * g_h), m, g_h, g_t, group, there, V, BLOCK_V
        )
        o = gather_queries(
            head_at(out, p, heads, o_b, group * o_h), m, o_h, o_t, group, there, V, BLOCK_V
        )
        do = do.to(tl.float32)
        # the softmax's Jacobian needs sum_j p_j (do . v_j), which is do . out: no keys needed
        d = tl.sum(o.to(tl.float32) * do, 1)
        tl.store(delta + line + m, d, mask=there)
        weight = tl.exp2(
            own_scores(query, key, unit, SHARED, BLOCK)
            - tl.load(lse + line + m, mask=there, other=0.0)
        )
        dv_sum += weight[:, None] * do
        ds = weight * (tl.sum(do * value, 1) - d) * scale
        # with queries as keys a token's own score is masked to a constant: it has a weight (of the
        # value), but no slope
        if SHARED:
            ds = ds * 0
        dk_sum += ds[:, None] * query
        scatter(ds[:, None] * key, dq + line * D, m, D, there, D, BLOCK_D)
    line = tl.cast(p, tl.int64) * store
    scatter(dk_sum, dk + line * D, own + t, D, there, D, BLOCK_D)
    scatter(dv_sum, dv + line * V, own + t, V, there, V, BLOCK_V)


@triton.jit(do_not_specialize=["own", "tiles"])
def backward_queries(
    q,
    k,
    v,
    order,
    code,
    query_order,
    query_code,
    low,
    high,
    begin,
    end,
    grad,
    lse,
    delta,
    dq,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    g_b,
    g_h,
    g_t,
    scale,
    unit,
    heads,
    group,
    rows,
    length,
    store,
    own,
    step,
    tiles,
    ROUNDS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dq (R, P, M, D); the same programs and tiles as `forward`."""
    program = tl.program_id(0)
    r, p = program // tiles % ROUNDS, program // tiles // ROUNDS
    line = tl.cast(p * ROUNDS + r, tl.int64)
    # the tile's queries are neighbours in the round's order, and so are the keys that they see
    i = tl.load(begin + program) + tl.arange(0, BLOCK_M)
    there = i < tl.load(end + program)
    m = tl.load(query_order + line * rows + i, mask=there, other=0)
    m_low = tl.load(low + line * rows + m, mask=there, other=0)
    m_high = tl.load(high + line * rows + m, mask=there, other=0)
    first = tl.min(tl.where(there, m_low, length), 0)
    last = tl.max(m_high, 0)
    query = gather_queries(
        head_at(q, p, heads, q_b, group * q_h), m, q_h, q_t, group, there, D, BLOCK_D
    )
    do = gather_queries(
        head_at(grad, p, heads, g_b, group * g_h), m, g_h, g_t, group, there, V, BLOCK_V
    )
    line_p = tl.cast(p, tl.int64) * rows
    m_lse = tl.load(lse + line_p + m, mask=there, other=0.0)
    m_delta = tl.load(delta + line_p + m, mask=there, other=0.0)
    key, value = head_at(k, p, heads, k_b, k_h), head_at(v, p, heads, v_b, v_h)
    line_p = tl.cast(p * ROUNDS, tl.int64)
    codes, numbers = (
        (query_code + line_p * rows, code + line_p * store),
        (rows, store, group, own, step),
    )
    order += line * length

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for x0 in range(first, last, BLOCK_N):
        x = x0 + tl.arange(0, BLOCK_N)
        inside = x < last
        n = tl.load(order + x, mask=inside, other=0)
        k_tile = gather(key, n, k_t, inside, D, BLOCK_D)
        s = dot(query, tl.trans(k_tile), None)
        seen = counted(
            x[None, :],
            m[:, None],
            n[None, :],
            there[:, None],
            inside[None, :],
            m_low[:, None],
            m_high[:, None],
            r,
            codes,
            numbers,
            CAUSAL,
        )
        # lse joins all rounds and the own key, so these are the final weights, not the round's
        weight = tl.exp2(tl.where(seen, s * unit - m_lse[:, None], float("-inf")))
        dp = dot(do, tl.trans(gather(value, n, v_t, inside, V, BLOCK_V)), None)
        ds = weight * (dp - m_delta[:, None])
        acc = dot(narrow(ds, k_tile.dtype), k_tile, acc)
    # one result a round, which torch adds up: rounds sort differently, so adding here would be
    # atomic
    at = tl.cast(r * (tl.num_programs(0) // (tiles * ROUNDS)) + p, tl.int64) * rows
    scatter(acc * scale, dq + at * D, m, D, there, D, BLOCK_D)


@triton.jit(do_not_specialize=["own", "tiles"])
def backward_keys(
    q,
    k,
    v,
    order,
    code,
    query_order,
    query_code,
    low,
    high,
    begin,
    end,
    grad,
    lse,
    delta,
    dk,
    dv,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    g_b,
    g_h,
    g_t,
    scale,
    unit,
    heads,
    group,
    rows,
    length,
    store,
    own,
    step,
    tiles,
    ROUNDS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dk (R, P, N, D) and dv (R, P, N, V); one program per tile of a round's sorted keys, which the
    sorted queries from begin to end (P, R, tiles) see: no atomics, the same every time."""
    program = tl.program_id(0)
    r, p = program // tiles % ROUNDS, program // tiles // ROUNDS
    line = tl.cast(p * ROUNDS + r, tl.int64)
    # keys are the tile here: each one's gradient has one writer a round
    x = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = x < length
    n = tl.load(order + line * length + x, mask=inside, other=0)
    k_tile = gather(head_at(k, p, heads, k_b, k_h), n, k_t, inside, D, BLOCK_D)
    v_tile = gather(head_at(v, p, heads, v_b, v_h), n, v_t, inside, V, BLOCK_V)
    query, given = head_at(q, p, heads, q_b, group * q_h), head_at(grad, p, heads, g_b, group * g_h)
    line_p = tl.cast(p * ROUNDS, tl.int64)
    codes, numbers = (
        (query_code + line_p * rows, code + line_p * store),
        (rows, store, group, own, step),
    )
    first, last = tl.load(begin + program), tl.load(end + program)
    line_p = tl.cast(p, tl.int64) * rows

    dk_acc, dv_acc = (
        tl.zeros([BLOCK_N, BLOCK_D], tl.float32),
        tl.zeros([BLOCK_N, BLOCK_V], tl.float32),
    )
    for i0 in range(first, last, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        there = i < last
        m = tl.load(query_order + line * rows + i, mask=there, other=0)
        m_low = tl.load(low + line * rows + m, mask=there, other=0)
        m_high = tl.load(high + line * rows + m, mask=there, other=0)
        m_lse = tl.load(lse + line_p + m, mask=there, other=0.0)
        m_delta = tl.load(delta + line_p + m, mask=there, other=0.0)
        q_tile = gather_queries(query, m, q_h, q_t, group, there, D, BLOCK_D)
        do = gather_queries(given, m, g_h, g_t, group, there, V, BLOCK_V)
        s = dot(k_tile, tl.trans(q_tile), None)
        seen = counted(
            x[:, None],
            m[None, :],
            n[:, None],
            there[None, :],
            inside[:, None],
            m_low[None, :],
            m_high[None, :],
            r,
            codes,
            numbers,
            CAUSAL,
        )
        weight = tl.exp2(tl.where(seen, s * unit - m_lse[None, :], float("-inf")))
        dv_acc = dot(narrow(weight, do.dtype), do, dv_acc)
        ds = weight * (dot(v_tile, tl.trans(do), None) - m_delta[None, :])
        dk_acc = dot(narrow(ds, q_tile.dtype), q_tile, dk_acc)
    at = tl.cast(r * (tl.num_programs(0) // (tiles * ROUNDS)) + p, tl.int64) * store
    scatter(dk_acc * scale, dk + at * D, n, D, inside, D, BLOCK_D)
    scatter(dv_acc, dv + at * V, n, V, inside, V, BLOCK_V)
