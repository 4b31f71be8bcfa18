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
from .triton_pieces import (
    counted,
    gather,
    gather_queries,
    head_at,
    own_scores,
    scatter,
    scatter_queries,
)


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
    # what any of the tile's queries sees is one stretch of sorted keys; `counted` masks the rest
    first = tl.min(tl.where(there, m_low, length), 0)
    last = tl.max(m_high, 0)
    query = gather_queries(
        head_at(q, p, heads, q_b, group * q_h), m, q_h, q_t, group, there, D, BLOCK_D
    )
    key, value = head_at(k, p, heads, k_b, k_h), head_at(v, p, heads, v_b, v_h)
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
        s = dot(query, tl.trans(gather(key, n, k_t, inside, D, BLOCK_D)), None)
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
        s = tl.where(seen, s * unit, float("-inf"))
        # online softmax: earlier sums are faded when a higher score comes
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf would be NaN
        weight = tl.exp2(s - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 1)
        found = gather(value, n, v_t, inside, V, BLOCK_V)
        acc = dot(narrow(weight, found.dtype), found, acc * fade[:, None])
        top = higher
    # in this round such a query sees nobody: weight 0 when the rounds are joined
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    # parts and sums have rounds first
    at = tl.cast(r * (tl.num_programs(0) // (tiles * ROUNDS)) + p, tl.int64) * rows
    scatter(acc / total[:, None], parts + at * V, m, V, there, V, BLOCK_V)
    tl.store(sums + at + m, tl.where(blind, float("-inf"), top + tl.log2(total)), mask=there)


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
    query = gather_queries(
        head_at(q, p, heads, q_b, group * q_h), m, q_h, q_t, group, there, D, BLOCK_D
    )
    key = gather(head_at(k, p, heads, k_b, k_h), mine, k_t, there, D, BLOCK_D)
    # the own key starts the sum with weight 1: every row has seen something, total is never 0
    top = own_scores(query, key, unit, SHARED, BLOCK)
    total = tl.full([BLOCK], 1.0, tl.float32)
    acc = gather(head_at(v, p, heads, v_b, v_h), mine, v_t, there, V, BLOCK_V).to(tl.float32)
    lines = tl.num_programs(0) // tiles
    for r in range(0, ROUNDS):
        at = tl.cast(r * lines + p, tl.int64) * rows
        s = tl.load(sums + at + m, mask=there, other=float("-inf"))
        higher = tl.maximum(top, s)
        fade, weight = tl.exp2(top - higher), tl.exp2(s - higher)
        total = total * fade + weight
        # nothing was written for padding
        found = gather(parts + at * V, m, V, there & (weight > 0), V, BLOCK_V)
        acc = acc * fade[:, None] + weight[:, None] * found
        top = higher
    base = head_at(out, p, heads, o_b, group * o_h)
    scatter_queries(acc / total[:, None], base, m, o_h, o_t, group, there, V, BLOCK_V)
    tl.store(lse + tl.cast(p, tl.int64) * rows + m, top + tl.log2(total), mask=there)
