"""LSH attention in Triton: tiles of sorted queries against the stretch of sorted keys that they
see.

    P = B * Hkv heads, R rounds                              everything else: `places`
    m a row of queries, x a place in a round's order, n a row of the store

Rows of q, k and v are read through the order; no sorted copy of them exists. `forward` leaves each
round's result in `parts` (R, P, M, V) and its log-sum-exp in `sums` (R, P, M), and `combine` adds
the own key and joins them. low and high do not fall along the sorted queries, so that all tiles
together visit L keys and 2 chunk more for each tile, however unevenly the buckets are filled.
Scores are in base 2: `unit` is scale * log2(e)."""

import triton
import triton.language as tl

from ..flash.triton_pieces import dot, narrow

SELF = tl.constexpr(-1.4426950408889634e5)  # a token's own key with shared_qk: below every other


@triton.jit
def _gather(base, rows, stride, there, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a tensor (rows int32 of any order), 0 where there is none."""
    d = tl.arange(0, COLUMNS)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * stride + d
    return tl.load(pointers, mask=there[:, None] & (d < WIDTH), other=0.0)


@triton.jit
def _scatter(x, base, rows, stride, there, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    d = tl.arange(0, COLUMNS)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * stride + d
    tl.store(pointers, narrow(x, base.dtype.element_ty), mask=there[:, None] & (d < WIDTH))


@triton.jit
def _gather_queries(
    base, m, stride_h, stride_t, group, there, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows m of the queries of a key/value head, whose first query head is at `base`."""
    d = tl.arange(0, COLUMNS)[None, :]
    at = (m % group).to(tl.int64) * stride_h + (m // group).to(tl.int64) * stride_t
    return tl.load(base + at[:, None] + d, mask=there[:, None] & (d < WIDTH), other=0.0)


@triton.jit
def _scatter_queries(
    x, base, m, stride_h, stride_t, group, there, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    d = tl.arange(0, COLUMNS)[None, :]
    at = (m % group).to(tl.int64) * stride_h + (m // group).to(tl.int64) * stride_t
    tl.store(
        base + at[:, None] + d, narrow(x, base.dtype.element_ty), mask=there[:, None] & (d < WIDTH)
    )


@triton.jit
def _head(base, p, heads, stride_b, stride_h):
    """Where head p of all rows of the batch begins; stride_h: from one to the next."""
    return base + (p // heads).to(tl.int64) * stride_b + (p % heads).to(tl.int64) * stride_h


@triton.jit
def _count(x, m, n, there_m, there_n, low, high, r, codes, numbers, CAUSAL: tl.constexpr):
    """Which pairs count in round r. x, n and there_n are of the keys, m, low, high and there_m of
    the queries, one kind in columns and the other in rows."""
    query_code, code = codes
    rows, store, group, own, step = numbers
    seen = (x >= low) & (x < high)
    if not CAUSAL:
        seen = seen & (n != own + m // group)
    for earlier in range(0, r):
        apart = tl.load(query_code + earlier * rows + m, mask=there_m, other=0)
        apart = apart - tl.load(code + earlier * store + n, mask=there_n, other=0)
        seen = seen & (apart != 0) & (apart != step)
        if not CAUSAL:
            seen = seen & (apart != -step)
    return seen


@triton.jit(do_not_specialize=["own", "tiles"])
def forward(
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
    parts,
    sums,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
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
    """parts and sums; one program per tile of a round's sorted queries, from begin to end (P, R,
    tiles).

    Tiles begin with the buckets, so that a row's result does not depend, in its last bits, on what
    is in others."""
    program = tl.program_id(0)
    r, p = program // tiles % ROUNDS, program // tiles // ROUNDS
    line = tl.cast(p * ROUNDS + r, tl.int64)
    i = tl.load(begin + program) + tl.arange(0, BLOCK_M)
    there = i < tl.load(end + program)
    m = tl.load(query_order + line * rows + i, mask=there, other=0)
    m_low = tl.load(low + line * rows + m, mask=there, other=0)
    m_high = tl.load(high + line * rows + m, mask=there, other=0)
    first = tl.min(tl.where(there, m_low, length), 0)
    last = tl.max(m_high, 0)
    query = _gather_queries(
        _head(q, p, heads, q_b, group * q_h), m, q_h, q_t, group, there, D, BLOCK_D
    )
    key, value = _head(k, p, heads, k_b, k_h), _head(v, p, heads, v_b, v_h)
    line_p = tl.cast(p * ROUNDS, tl.int64)
    codes, numbers = (
        (query_code + line_p * rows, code + line_p * store),
        (rows, store, group, own, step),
    )
    order += line * length

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for x0 in range(first, last, BLOCK_N):
        x = x0 + tl.arange(0, BLOCK_N)
        inside = x < last
        n = tl.load(order + x, mask=inside, other=0)
        s = dot(query, tl.trans(_gather(key, n, k_t, inside, D, BLOCK_D)), None)
        seen = _count(
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
        s = tl.where(seen, s * unit, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf would be NaN
        weight = tl.exp2(s - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 1)
        found = _gather(value, n, v_t, inside, V, BLOCK_V)
        acc = dot(narrow(weight, found.dtype), found, acc * fade[:, None])
        top = higher
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    # parts and sums have rounds first
    at = tl.cast(r * (tl.num_programs(0) // (tiles * ROUNDS)) + p, tl.int64) * rows
    _scatter(acc / total[:, None], parts + at * V, m, V, there, V, BLOCK_V)
    tl.store(sums + at + m, tl.where(blind, float("-inf"), top + tl.log2(total)), mask=there)


@triton.jit
def _own_scores(query, key, unit, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    if SHARED:
        return tl.full([BLOCK], SELF, tl.float32)
    return tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * unit


@triton.jit(do_not_specialize=["own"])
def combine(
    q,
    k,
    v,
    parts,
    sums,
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
    o_b,
    o_h,
    o_t,
    unit,
    heads,
    group,
    rows,
    own,
    ROUNDS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out (B, Hq, Tq, V) and lse (P, M) in base 2; one program per tile of rows of queries."""
    tiles = tl.cdiv(rows, BLOCK)
    p = tl.program_id(0) // tiles
    m = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    there = m < rows
    mine = own + m // group
    query = _gather_queries(
        _head(q, p, heads, q_b, group * q_h), m, q_h, q_t, group, there, D, BLOCK_D
    )
    key = _gather(_head(k, p, heads, k_b, k_h), mine, k_t, there, D, BLOCK_D)
    top = _own_scores(query, key, unit, SHARED, BLOCK)
    total = tl.full([BLOCK], 1.0, tl.float32)
    acc = _gather(_head(v, p, heads, v_b, v_h), mine, v_t, there, V, BLOCK_V).to(tl.float32)
    lines = tl.num_programs(0) // tiles
    for r in range(0, ROUNDS):
        at = tl.cast(r * lines + p, tl.int64) * rows
        s = tl.load(sums + at + m, mask=there, other=float("-inf"))
        higher = tl.maximum(top, s)
        fade, weight = tl.exp2(top - higher), tl.exp2(s - higher)
        total = total * fade + weight
        # nothing was written for padding
        found = _gather(parts + at * V, m, V, there & (weight > 0), V, BLOCK_V)
        acc = acc * fade[:, None] + weight[:, None] * found
        top = higher
    base = _head(out, p, heads, o_b, group * o_h)
    _scatter_queries(acc / total[:, None], base, m, o_h, o_t, group, there, V, BLOCK_V)
    tl.store(lse + tl.cast(p, tl.int64) * rows + m, top + tl.log2(total), mask=there)


# ---- backward


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
    key = _gather(_head(k, p, heads, k_b, k_h), own + t, k_t, there, D, BLOCK_D).to(tl.float32)
    value = _gather(_head(v, p, heads, v_b, v_h), own + t, v_t, there, V, BLOCK_V).to(tl.float32)
    dk_sum, dv_sum = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_V], tl.float32)
    line = tl.cast(p, tl.int64) * rows
    for g in range(0, group):
        m = t * group + g
        query = _gather_queries(
            _head(q, p, heads, q_b, group * q_h), m, q_h, q_t, group, there, D, BLOCK_D
        )
        query = query.to(tl.float32)
        do = _gather_queries(
            _head(grad, p, heads, g_b, group * g_h), m, g_h, g_t, group, there, V, BLOCK_V
        )
        o = _gather_queries(
            _head(out, p, heads, o_b, group * o_h), m, o_h, o_t, group, there, V, BLOCK_V
        )
        do = do.to(tl.float32)
        d = tl.sum(o.to(tl.float32) * do, 1)
        tl.store(delta + line + m, d, mask=there)
        weight = tl.exp2(
            _own_scores(query, key, unit, SHARED, BLOCK)
            - tl.load(lse + line + m, mask=there, other=0.0)
        )
        dv_sum += weight[:, None] * do
        ds = weight * (tl.sum(do * value, 1) - d) * scale
        if SHARED:
            ds = ds * 0
        dk_sum += ds[:, None] * query
        _scatter(ds[:, None] * key, dq + line * D, m, D, there, D, BLOCK_D)
    line = tl.cast(p, tl.int64) * store
    _scatter(dk_sum, dk + line * D, own + t, D, there, D, BLOCK_D)
    _scatter(dv_sum, dv + line * V, own + t, V, there, V, BLOCK_V)


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
    i = tl.load(begin + program) + tl.arange(0, BLOCK_M)
    there = i < tl.load(end + program)
    m = tl.load(query_order + line * rows + i, mask=there, other=0)
    m_low = tl.load(low + line * rows + m, mask=there, other=0)
    m_high = tl.load(high + line * rows + m, mask=there, other=0)
    first = tl.min(tl.where(there, m_low, length), 0)
    last = tl.max(m_high, 0)
    query = _gather_queries(
        _head(q, p, heads, q_b, group * q_h), m, q_h, q_t, group, there, D, BLOCK_D
    )
    do = _gather_queries(
        _head(grad, p, heads, g_b, group * g_h), m, g_h, g_t, group, there, V, BLOCK_V
    )
    line_p = tl.cast(p, tl.int64) * rows
    m_lse = tl.load(lse + line_p + m, mask=there, other=0.0)
    m_delta = tl.load(delta + line_p + m, mask=there, other=0.0)
    key, value = _head(k, p, heads, k_b, k_h), _head(v, p, heads, v_b, v_h)
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
        k_tile = _gather(key, n, k_t, inside, D, BLOCK_D)
        s = dot(query, tl.trans(k_tile), None)
        seen = _count(
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
        weight = tl.exp2(tl.where(seen, s * unit - m_lse[:, None], float("-inf")))
        dp = dot(do, tl.trans(_gather(value, n, v_t, inside, V, BLOCK_V)), None)
        ds = weight * (dp - m_delta[:, None])
        acc = dot(narrow(ds, k_tile.dtype), k_tile, acc)
    at = tl.cast(r * (tl.num_programs(0) // (tiles * ROUNDS)) + p, tl.int64) * rows
    _scatter(acc * scale, dq + at * D, m, D, there, D, BLOCK_D)


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
    x = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = x < length
    n = tl.load(order + line * length + x, mask=inside, other=0)
    k_tile = _gather(_head(k, p, heads, k_b, k_h), n, k_t, inside, D, BLOCK_D)
    v_tile = _gather(_head(v, p, heads, v_b, v_h), n, v_t, inside, V, BLOCK_V)
    query, given = _head(q, p, heads, q_b, group * q_h), _head(grad, p, heads, g_b, group * g_h)
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
        q_tile = _gather_queries(query, m, q_h, q_t, group, there, D, BLOCK_D)
        do = _gather_queries(given, m, g_h, g_t, group, there, V, BLOCK_V)
        s = dot(k_tile, tl.trans(q_tile), None)
        seen = _count(
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
    _scatter(dk_acc * scale, dk + at * D, n, D, inside, D, BLOCK_D)
    _scatter(dv_acc, dv + at * V, n, V, inside, V, BLOCK_V)
