"""Attention to chosen blocks in Triton, forward and backward: one program a token for the queries
of a group, one a tile of a block's keys for their gradients.

    P = B * H heads, n blocks a token, SIZE keys a block      everything else: `selection`
    m = t * group + g a row of queries, x a place in a token's list of keys, j a key

A token's list is the keys of its n blocks, one behind the other, so that tiles are full whatever
the size of a block. Scores are in base 2: `unit` is scale * log2(e)."""

import triton
import triton.language as tl

from ..flash.triton_pieces import dot, narrow
from ..lsh.triton_pieces import gather, gather_queries, head_at, scatter, scatter_queries


@triton.jit
def _listed(chosen, x, size, most, here, window, sinks):
    """The keys at places x of a token's list, and whether the query at position `here` sees them
    because of it: they are neither in its window nor sinks."""
    inside = x < most * size
    block = tl.load(chosen + x // size, mask=inside, other=-1)
    j = block * size + x % size
    return tl.maximum(j, 0), inside & (block >= 0) & (here - j >= window) & (j >= sinks)


@triton.jit(do_not_specialize=["queries", "window", "sinks"])
def forward(
    q,
    k,
    v,
    chosen,
    at,
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
    queries,
    most,
    size,
    window,
    sinks,
    D: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out (B, Hq, Tq, V) float32 and lse (P, Tq, group) in base 2; one program a head and
    token."""
    p, t = tl.program_id(0) // queries, tl.program_id(0) % queries
    here = tl.load(at + p // heads * queries + t)
    chosen += tl.cast(tl.program_id(0), tl.int64) * most
    g = tl.arange(0, GROUP)
    m, there = t * group + g, g < group
    query = gather_queries(
        head_at(q, p, heads, q_b, group * q_h), m, q_h, q_t, group, there, D, BLOCK_D
    )
    key, value = head_at(k, p, heads, k_b, k_h), head_at(v, p, heads, v_b, v_h)
    acc = tl.zeros([GROUP, BLOCK_V], tl.float32)
    top = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    for x0 in range(0, most * size, BLOCK_N):
        j, seen = _listed(chosen, x0 + tl.arange(0, BLOCK_N), size, most, here, window, sinks)
        s = dot(query, tl.trans(gather(key, j, k_t, seen, D, BLOCK_D)), None)
        s = tl.where(seen[None, :], s * unit, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf would be NaN
        weight = tl.exp2(s - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 1)
        found = gather(value, j, v_t, seen, V, BLOCK_V)
        acc = dot(narrow(weight, found.dtype), found, acc * fade[:, None])
        top = higher
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    base = head_at(out, p, heads, o_b, group * o_h)
    scatter_queries(acc / total[:, None], base, m, o_h, o_t, group, there, V, BLOCK_V)
    line = tl.cast(tl.program_id(0), tl.int64) * group
    tl.store(lse + line + g, tl.where(blind, float("-inf"), top + tl.log2(total)), mask=there)


@triton.jit(do_not_specialize=["queries", "window", "sinks"])
def backward_queries(
    q,
    k,
    v,
    chosen,
    at,
    grad,
    lse,
    share,
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
    d_b,
    d_h,
    d_t,
    scale,
    unit,
    heads,
    group,
    queries,
    most,
    size,
    window,
    sinks,
    D: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dq (B, Hq, Tq, D); the same programs as `forward`. share (P, Tq, group): what all slopes of a
    row have in common."""
    p, t = tl.program_id(0) // queries, tl.program_id(0) % queries
    here = tl.load(at + p // heads * queries + t)
    chosen += tl.cast(tl.program_id(0), tl.int64) * most
    g = tl.arange(0, GROUP)
    m, there = t * group + g, g < group
    query = gather_queries(
        head_at(q, p, heads, q_b, group * q_h), m, q_h, q_t, group, there, D, BLOCK_D
    )
    do = gather_queries(
        head_at(grad, p, heads, g_b, group * g_h), m, g_h, g_t, group, there, V, BLOCK_V
    )
    line = tl.cast(tl.program_id(0), tl.int64) * group
    # a row that chose nothing has no key below, so that its -inf meets none
    m_lse = tl.load(lse + line + g, mask=there, other=0.0)
    m_share = tl.load(share + line + g, mask=there, other=0.0)
    key, value = head_at(k, p, heads, k_b, k_h), head_at(v, p, heads, v_b, v_h)
    acc = tl.zeros([GROUP, BLOCK_D], tl.float32)
    for x0 in range(0, most * size, BLOCK_N):
        j, seen = _listed(chosen, x0 + tl.arange(0, BLOCK_N), size, most, here, window, sinks)
        k_tile = gather(key, j, k_t, seen, D, BLOCK_D)
        s = dot(query, tl.trans(k_tile), None) * unit - m_lse[:, None]
        weight = tl.exp2(tl.where(seen[None, :], s, float("-inf")))
        dp = dot(do, tl.trans(gather(value, j, v_t, seen, V, BLOCK_V)), None)
        ds = weight * (dp - m_share[:, None])
        acc = dot(narrow(ds, k_tile.dtype), k_tile, acc)
    base = head_at(dq, p, heads, d_b, group * d_h)
    scatter_queries(acc * scale, base, m, d_h, d_t, group, there, D, BLOCK_D)


@triton.jit(do_not_specialize=["queries", "window", "sinks"])
def backward_keys(
    q,
    k,
    v,
    order,
    begin,
    at,
    grad,
    lse,
    share,
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
    queries,
    blocks,
    size,
    window,
    sinks,
    keys,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dk (P, T, D) and dv (P, T, V); one program per tile of a block's keys, which the tokens order
    [begin, end) of its block have chosen: no atomics, the same every time."""
    tiles = tl.cdiv(size, BLOCK_N)
    owner = tl.program_id(0) // tiles
    p, block = owner // blocks, owner % blocks
    place = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < size
    j = block * size + place
    k_tile = gather(head_at(k, p, heads, k_b, k_h), j, k_t, inside, D, BLOCK_D)
    v_tile = gather(head_at(v, p, heads, v_b, v_h), j, v_t, inside, V, BLOCK_V)
    query, given = head_at(q, p, heads, q_b, group * q_h), head_at(grad, p, heads, g_b, group * g_h)
    at += p // heads * queries
    line = tl.cast(p, tl.int64) * queries * group
    first, last = tl.load(begin + owner), tl.load(begin + owner + 1)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for y0 in range(0, (last - first) * group, BLOCK_M):
        y = y0 + tl.arange(0, BLOCK_M)
        there = y < (last - first) * group
        t = tl.load(order + first + y // group, mask=there, other=0)
        m = t * group + y % group
        far = tl.load(at + t, mask=there, other=0)[None, :] - j[:, None] >= window
        seen = far & (j >= sinks)[:, None] & inside[:, None] & there[None, :]
        m_lse = tl.load(lse + line + m, mask=there, other=0.0)
        m_share = tl.load(share + line + m, mask=there, other=0.0)
        q_tile = gather_queries(query, m, q_h, q_t, group, there, D, BLOCK_D)
        do = gather_queries(given, m, g_h, g_t, group, there, V, BLOCK_V)
        s = dot(k_tile, tl.trans(q_tile), None) * unit - m_lse[None, :]
        weight = tl.exp2(tl.where(seen, s, float("-inf")))
        dv_acc = dot(narrow(weight, do.dtype), do, dv_acc)
        ds = weight * (dot(v_tile, tl.trans(do), None) - m_share[None, :])
        dk_acc = dot(narrow(ds, q_tile.dtype), q_tile, dk_acc)
    row = tl.cast(p, tl.int64) * keys
    scatter(dk_acc * scale, dk + row * D, j, D, inside, D, BLOCK_D)
    scatter(dv_acc, dv + row * V, j, V, inside, V, BLOCK_V)
