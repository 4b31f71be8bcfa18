"""Flash attention in Triton: one forward and three backward kernels, for every pattern, score rule and key layout.

A pattern (the table in `triton_impl`) is two jitted functions of positions, KEYS and QUERIES: the interval that a token
sees, and the one that it is seen from; and NEAR, a predicate, if there are holes in them. The kernels ask these twice:
with scalars, which tiles to visit; with vectors, which pairs count. A score rule is RULE and its derivative. Tiles come in three kinds: INNER (all pairs count: no predicate), EDGE (the pattern's borders, the diagonal, the
ends) and FIRST (slots and keys that all queries see, which alone may be scored with other queries).

    B batch, H query heads, a K/V head serves `group` of them       D head size, V value size, padded to BLOCK_D, BLOCK_V
    M rows of queries, N keys of one tile                           FAR beyond every position
    r row of a query in its tensor, c number of a key in its tensor i, j positions of a query and of a key

Softmax runs in base 2. `unit` takes the scores to that base: scale * log2(e), or log2(e) behind a score rule, which
works on scaled scores. Masked pairs are -inf before, 0 after exp2; a row that sees nothing is caught by its top or lse.
"""

import triton
import triton.language as tl

INNER, EDGE, FIRST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FAR = tl.constexpr(1 << 28)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
EMULATED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter's bf16 needs help in `_dot` and `_narrow`

# ---- pieces of the kernels


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """To `dtype`, to nearest even. (The interpreter would cut bf16 off.)"""
    if EMULATED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, acc):
    if EMULATED:  # it would multiply the bits of bf16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _tile(base, row, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to ROWS rows from `row` on."""
    r, d = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return base + tl.cast(row, tl.int64) * stride + (r * stride + d)


@triton.jit
def _exists(row, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of such a tile are in a tensor of `rows` rows of WIDTH."""
    found = row + tl.arange(0, ROWS)[:, None] < rows
    return found & (tl.arange(0, COLUMNS)[None, :] < WIDTH) if WIDTH < COLUMNS else found


@triton.jit
def _load(base, row, stride, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr):
    """A tile of rows. CHECK: they may go beyond the last, and read as 0 there."""
    pointers = _tile(base, row, stride, ROWS, COLUMNS)
    if CHECK:
        return tl.load(pointers, mask=_exists(row, rows, WIDTH, ROWS, COLUMNS), other=0.0)
    elif WIDTH < COLUMNS:
        return tl.load(pointers, mask=tl.arange(0, COLUMNS)[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _save(x, base, row, stride, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    pointers = _tile(base, row, stride, ROWS, COLUMNS)
    tl.store(pointers, _narrow(x, base.dtype.element_ty), mask=_exists(row, rows, WIDTH, ROWS, COLUMNS))


@triton.jit
def _cut(low, high, all_low, all_high, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """[low, high) in tiles: how many of STEP go before [all_low, all_high), how many of BLOCK fit in, how many of STEP
    go after."""
    start = low + tl.cdiv(tl.maximum(all_low - low, 0), STEP) * STEP
    inner = tl.maximum(tl.minimum(all_high, high) - start, 0) // BLOCK
    left = tl.where(inner > 0, (start - low) // STEP, 0)
    return left, inner, tl.cdiv(tl.maximum(high - low - left * STEP - inner * BLOCK, 0), STEP)


@triton.jit
def _keys_to_visit(i_low, i_last, h, k_len, place, KEYS: tl.constexpr, NEAR: tl.constexpr, CAUSAL: tl.constexpr,
                   PREFIX: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """For queries at positions i_low .. i_last: (first key, tiles) of the FIRST tiles, then of the rest as `_cut`."""
    slots, base, first, heads, a, b, c = place
    low, all_high = KEYS(tl.maximum(i_low, 0), h, heads, a, b, c)
    all_low, high = KEYS(i_last, h, heads, a, b, c)
    if CAUSAL:
        high, all_high = tl.minimum(high, i_last + 1), tl.minimum(all_high, i_low + 1)
    low, all_low = tl.maximum(low, 0), tl.maximum(all_low, 0)
    high = tl.where(i_last < 0, 0, high)
    all_high = tl.where(i_low < 0, 0, all_high)
    if NEAR is not None:  # holes everywhere
        all_high = 0

    zero = slots - base  # the number that a contiguous key at position 0 has, or would have
    low, high = tl.maximum(low + zero, slots), tl.minimum(high + zero, k_len)
    prefix_low, prefix_tiles = 0, 0
    if PREFIX:
        prefix_low = tl.where(slots > 0, 0, tl.maximum(zero, 0))
        sinks = tl.minimum(tl.minimum(first, i_last + 1) if CAUSAL else first, k_len - zero) + zero
        prefix_high = tl.where(sinks > tl.maximum(slots, zero), sinks, slots)
        prefix_tiles = tl.where(i_last < 0, 0, tl.cdiv(tl.maximum(prefix_high - prefix_low, 0), STEP))
        low = tl.maximum(low, prefix_low + prefix_tiles * STEP)
    left, inner, right = _cut(low, high, all_low + zero, all_high + zero, BLOCK, STEP)
    return prefix_low, prefix_tiles, low, left, inner, right


@triton.jit
def _seen_from(j_low, j_last, h, place, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, PREFIX: tl.constexpr):
    """Positions [low, high) of the queries that may see some key at j_low .. j_last, and of those that see them all."""
    slots, base, first, heads, a, b, c = place
    low, all_high = QUERIES(tl.maximum(j_low, 0), h, heads, a, b, c)
    all_low, high = QUERIES(j_last, h, heads, a, b, c)
    if PREFIX:  # the keys that everyone sees
        low, high = tl.where(j_low < first, 0, low), tl.where(j_low < first, FAR, high)
    if CAUSAL:
        low, all_low = tl.maximum(low, j_low), tl.maximum(all_low, j_last)
    empty = j_last < tl.maximum(j_low, 0)
    return tl.where(empty, FAR, tl.maximum(low, 0)), tl.where(empty, 0, high), tl.maximum(all_low, 0), all_high


@triton.jit
def _queries_to_visit(n, h, q_len, k_len, i_zero, place, QUERIES: tl.constexpr, NEAR: tl.constexpr,
                      CAUSAL: tl.constexpr, PREFIX: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr,
                      BLOCK_N: tl.constexpr):  # fmt: skip
    """For keys n .. n + BLOCK_N - 1: the first row of queries and the tiles of them, as `_cut`."""
    slots, base, first, heads, a, b, c = place
    end = tl.minimum(n + BLOCK_N, k_len)
    low, high, all_low, all_high = _seen_from(
        tl.maximum(n, slots) - slots + base, end - 1 - slots + base, h, place, QUERIES, CAUSAL, PREFIX
    )
    if NEAR is not None:
        all_high = 0
    if PREFIX:  # slots and contiguous keys may share a tile
        slot_low, slot_high, _, _ = _seen_from(n, tl.minimum(end, slots) - 1, h, place, QUERIES, CAUSAL, PREFIX)
        low, high = tl.minimum(low, slot_low), tl.maximum(high, slot_high)
        all_high = tl.where(n < slots, 0, all_high)
    low, high = tl.maximum(low - i_zero, 0), tl.minimum(high - i_zero, q_len)
    left, inner, right = _cut(low, high, all_low - i_zero, all_high - i_zero, BLOCK_M, STEP)
    return low, left, inner, right


@triton.jit
def _positions(n, mask, k_len, slots, base, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The positions of keys n .. n + BLOCK - 1; negative for those that are not there, but in INNER tiles."""
    c = n + tl.arange(0, BLOCK)
    j = c - slots + base
    if KIND == FIRST:
        j = tl.where(c < slots, c, j)
    if KIND != INNER:
        j = tl.where(c < k_len if mask is None else tl.load(mask + c, mask=c < k_len, other=0) != 0, j, -1)
    return j


@triton.jit
def _bounds_of_queries(i, h, place, KEYS: tl.constexpr, CAUSAL: tl.constexpr):
    """[low, high) of the keys that each query sees by the pattern, and the end of all that it may see at all."""
    slots, base, first, heads, a, b, c = place
    low, high = KEYS(i, h, heads, a, b, c)
    end = tl.where(i < 0, 0, i + 1 if CAUSAL else FAR)
    return tl.maximum(low, 0), tl.minimum(high, end), end


@triton.jit
def _bounds_of_keys(j, h, end, place, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, PREFIX: tl.constexpr):
    """[low, high) of the queries, of those before `end`, that see each key."""
    slots, base, first, heads, a, b, c = place
    low, high = QUERIES(j, h, heads, a, b, c)
    if PREFIX:
        low, high = tl.where(j < first, 0, low), tl.where(j < first, FAR, high)
    low = tl.maximum(low, j) if CAUSAL else tl.maximum(low, 0)
    return tl.maximum(low, 0), tl.where(j < 0, 0, tl.minimum(high, end))


@triton.jit
def _visible(i, j, h, i_low, i_high, i_end, place, NEAR: tl.constexpr, SINKS: tl.constexpr):
    slots, base, first, heads, a, b, c = place
    near = (j >= i_low) & (j < i_high)
    if NEAR is not None:
        near = near & NEAR(i, j, h, heads, a, b, c)
    if SINKS:
        near = near | (j >= 0) & (j < tl.minimum(first, i_end))
    return near


@triton.jit
def _start_of(start, b):
    return 0 if start is None else tl.load(start + b).to(tl.int32)


@triton.jit
def _head(base, b, h, stride_b, stride_h):
    return base + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h


# ---- forward


@triton.jit
def _attend(acc, top, total, q, other, i, bounds, h, key, stride_k, value, stride_v, mask, k_len, low, left, hole,
            tiles, place, scale, unit, cap, D: tl.constexpr, V: tl.constexpr, NEAR: tl.constexpr, RULE: tl.constexpr,
            KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """`tiles` tiles of keys from number `low` on; after `left` of them, `hole` keys are left out."""
    slots, base, first, heads, a, b, c = place
    i_low, i_high, i_end = bounds
    for t in range(0, tiles):
        n = low + t * BLOCK_N
        if KIND == EDGE:
            n += tl.where(t < left, 0, hole)
        k = _load(key, n, stride_k, k_len, D, BLOCK_N, BLOCK_D, KIND != INNER)
        j = _positions(n, mask, k_len, slots, base, KIND, BLOCK_N)[None, :]
        if KIND == INNER and mask is not None:
            real = (tl.load(mask + n + tl.arange(0, BLOCK_N)) != 0)[None, :]
        s = _dot(q, tl.trans(k), None)
        if KIND == FIRST and other is not None:
            s = tl.where(j < first, _dot(other, tl.trans(k), None), s)
        if RULE is not None:
            s = RULE(s * scale, i, j, h, cap)
        if KIND != INNER:
            s = tl.where(_visible(i, j, h, i_low, i_high, i_end, place, NEAR, KIND == FIRST), s, float("-inf"))
        elif mask is not None:
            s = tl.where(real, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * unit)
        safe = higher if KIND == INNER and mask is None else tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s * unit - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(p, 1)
        v = _load(value, n, stride_v, k_len, V, BLOCK_N, BLOCK_V, KIND != INNER)
        acc = _dot(_narrow(p, v.dtype), v, acc * fade[:, None])
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["q_len", "k_len", "slots", "tail", "first", "a", "b", "c"])
def forward(q, k, v, q_first, mask, start, out, lse,
            q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, f_b, f_h, f_t, o_b, o_h, o_t, mask_b,
            scale, cap, heads, group, q_len, k_len, slots, tail, first, a, b, c,
            D: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, NEAR: tl.constexpr, RULE: tl.constexpr,
            CAUSAL: tl.constexpr, PREFIX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """out (B, H, Tq, V) and lse (B, H, Tq) fp32; one program per tile of queries, the longest rows first."""
    tiles = tl.cdiv(q_len, BLOCK_M)
    program = tl.program_id(0)
    r = (tiles - 1 - program % tiles) * BLOCK_M
    h, row = program // tiles % heads, program // tiles // heads
    base = tail - _start_of(start, row)
    i_low = base + k_len - slots - q_len + r  # position of the first query
    i = (i_low + tl.arange(0, BLOCK_M))[:, None]
    place = (slots, base, first, heads, a, b, c)
    bounds = _bounds_of_queries(i, h, place, KEYS, CAUSAL)
    prefix_low, prefix_tiles, low, left, inner, right = _keys_to_visit(
        i_low, i_low + tl.minimum(BLOCK_M, q_len - r) - 1, h, k_len, place, KEYS, NEAR, CAUSAL, PREFIX, BLOCK_N, STEP
    )
    q_tile = _load(_head(q, row, h, q_b, q_h), r, q_t, q_len, D, BLOCK_M, BLOCK_D, True)
    key, value = _head(k, row, h // group, k_b, k_h), _head(v, row, h // group, v_b, v_h)
    if mask is not None:
        mask += tl.cast(row, tl.int64) * mask_b
    unit = LOG2E if RULE is not None else scale * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if PREFIX:
        other = None
        if q_first is not None:
            other = _load(_head(q_first, row, h, f_b, f_h), r, f_t, q_len, D, BLOCK_M, BLOCK_D, True)
        acc, top, total = _attend(
            acc, top, total, q_tile, other, i, bounds, h, key, k_t, value, v_t, mask, k_len, prefix_low, 0, 0, prefix_tiles,
            place, scale, unit, cap, D, V, NEAR, RULE, FIRST, STEP, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q_tile, None, i, bounds, h, key, k_t, value, v_t, mask, k_len, low, left, inner * BLOCK_N,
        left + right, place, scale, unit, cap, D, V, NEAR, RULE, EDGE, STEP, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q_tile, None, i, bounds, h, key, k_t, value, v_t, mask, k_len, low + left * STEP, 0, 0, inner,
        place, scale, unit, cap, D, V, NEAR, RULE, INNER, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    blind = total == 0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    _save(acc, _head(out, row, h, o_b, o_h), r, o_t, q_len, V, BLOCK_M, BLOCK_V)
    rows = r + tl.arange(0, BLOCK_M)
    sums = tl.where(blind, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse + tl.cast(row * heads + h, tl.int64) * q_len + rows, sums, mask=rows < q_len)


# ---- backward


@triton.jit(do_not_specialize=["q_len"])
def backward_rows(out, grad, lse, grad_lse, delta, lse2, o_b, o_h, o_t, g_b, g_h, g_t, heads, q_len,
                  V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """Per query, (B, H, Tq) fp32: delta, the part of d score / weight that all its keys share, and lse in base 2.

    A query that saw nothing gets lse2 = +inf, so that exp2(s - lse2) is 0 for whatever is scored.
    """
    tiles = tl.cdiv(q_len, BLOCK_M)
    program = tl.program_id(0)
    r, h, row = program % tiles * BLOCK_M, program // tiles % heads, program // tiles // heads
    rows = r + tl.arange(0, BLOCK_M)
    at = tl.cast(row * heads + h, tl.int64) * q_len + rows
    exists = rows < q_len
    sums = tl.load(lse + at, mask=exists, other=0.0)
    x = _load(_head(out, row, h, o_b, o_h), r, o_t, q_len, V, BLOCK_M, BLOCK_V, True).to(tl.float32)
    dx = _load(_head(grad, row, h, g_b, g_h), r, g_t, q_len, V, BLOCK_M, BLOCK_V, True).to(tl.float32)
    shared = tl.sum(x * dx, 1)
    if grad_lse is not None:
        shared -= tl.load(grad_lse + at, mask=exists, other=0.0)
    blind = sums == float("-inf")
    tl.store(delta + at, tl.where(blind, 0.0, shared), mask=exists)
    tl.store(lse2 + at, tl.where(blind, float("inf"), sums * LOG2E), mask=exists)


@triton.jit
def _query_gradient(dq, dother, q, other, grad, lse2, delta, i, bounds, h, key, stride_k, value, stride_v, mask, k_len,
                    low, left, hole, tiles, place, scale, unit, cap, D: tl.constexpr, V: tl.constexpr,
                    NEAR: tl.constexpr, RULE: tl.constexpr, SLOPE: tl.constexpr, KIND: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """As `_attend`; dq and dother (the gradient of `other`) are not yet multiplied by scale."""
    slots, base, first, heads, a, b, c = place
    i_low, i_high, i_end = bounds
    for t in range(0, tiles):
        n = low + t * BLOCK_N
        if KIND == EDGE:
            n += tl.where(t < left, 0, hole)
        k = _load(key, n, stride_k, k_len, D, BLOCK_N, BLOCK_D, KIND != INNER)
        v = _load(value, n, stride_v, k_len, V, BLOCK_N, BLOCK_V, KIND != INNER)
        j = _positions(n, mask, k_len, slots, base, KIND, BLOCK_N)[None, :]
        if KIND == INNER and mask is not None:
            real = (tl.load(mask + n + tl.arange(0, BLOCK_N)) != 0)[None, :]
        s = _dot(q, tl.trans(k), None)
        if KIND == FIRST and other is not None:
            s = tl.where(j < first, _dot(other, tl.trans(k), None), s)
        if RULE is not None:
            s = RULE(s * scale, i, j, h, cap)
        p = tl.exp2(s * unit - lse2)
        if KIND != INNER:
            p = tl.where(_visible(i, j, h, i_low, i_high, i_end, place, NEAR, KIND == FIRST), p, 0.0)
        elif mask is not None:
            p = tl.where(real, p, 0.0)
        ds = p * (_dot(grad, tl.trans(v), None) - delta)
        if RULE is not None:
            ds = ds * SLOPE(s, i, j, h, cap)
        if KIND == FIRST and other is not None:
            dother = _dot(_narrow(tl.where(j < first, ds, 0.0), k.dtype), k, dother)
            ds = tl.where(j < first, 0.0, ds)
        dq = _dot(_narrow(ds, k.dtype), k, dq)
    return dq, dother


@triton.jit(do_not_specialize=["q_len", "k_len", "slots", "tail", "first", "a", "b", "c"])
def backward_queries(q, k, v, q_first, mask, start, grad, lse2, delta, dq, dq_first,
                     q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, f_b, f_h, f_t, g_b, g_h, g_t, dq_b, dq_h, dq_t,
                     mask_b, scale, cap, heads, group, q_len, k_len, slots, tail, first, a, b, c,
                     D: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, NEAR: tl.constexpr, RULE: tl.constexpr,
                     SLOPE: tl.constexpr, CAUSAL: tl.constexpr, PREFIX: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """dq, and dq_first with the same strides; one program per tile of queries, which visits the keys as `forward`."""
    tiles = tl.cdiv(q_len, BLOCK_M)
    program = tl.program_id(0)
    r = (tiles - 1 - program % tiles) * BLOCK_M
    h, row = program // tiles % heads, program // tiles // heads
    base = tail - _start_of(start, row)
    i_low = base + k_len - slots - q_len + r
    i = (i_low + tl.arange(0, BLOCK_M))[:, None]
    place = (slots, base, first, heads, a, b, c)
    bounds = _bounds_of_queries(i, h, place, KEYS, CAUSAL)
    prefix_low, prefix_tiles, low, left, inner, right = _keys_to_visit(
        i_low, i_low + tl.minimum(BLOCK_M, q_len - r) - 1, h, k_len, place, KEYS, NEAR, CAUSAL, PREFIX, BLOCK_N, STEP
    )
    q_tile = _load(_head(q, row, h, q_b, q_h), r, q_t, q_len, D, BLOCK_M, BLOCK_D, True)
    g_tile = _load(_head(grad, row, h, g_b, g_h), r, g_t, q_len, V, BLOCK_M, BLOCK_V, True)
    rows = r + tl.arange(0, BLOCK_M)
    at = tl.cast(row * heads + h, tl.int64) * q_len + rows
    l_tile = tl.load(lse2 + at, mask=rows < q_len, other=float("inf"))[:, None]
    d_tile = tl.load(delta + at, mask=rows < q_len, other=0.0)[:, None]
    key, value = _head(k, row, h // group, k_b, k_h), _head(v, row, h // group, v_b, v_h)
    if mask is not None:
        mask += tl.cast(row, tl.int64) * mask_b
    unit = LOG2E if RULE is not None else scale * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc, _ = _query_gradient(
        acc, None, q_tile, None, g_tile, l_tile, d_tile, i, bounds, h, key, k_t, value, v_t, mask, k_len, low, left,
        inner * BLOCK_N, left + right, place, scale, unit, cap, D, V, NEAR, RULE, SLOPE, EDGE, STEP,
        BLOCK_D, BLOCK_V,
    )  # fmt: skip
    acc, _ = _query_gradient(
        acc, None, q_tile, None, g_tile, l_tile, d_tile, i, bounds, h, key, k_t, value, v_t, mask, k_len, low + left * STEP,
        0, 0, inner, place, scale, unit, cap, D, V, NEAR, RULE, SLOPE, INNER, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    if PREFIX:
        other, dother = None, None
        if q_first is not None:
            other = _load(_head(q_first, row, h, f_b, f_h), r, f_t, q_len, D, BLOCK_M, BLOCK_D, True)
            dother = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        acc, dother = _query_gradient(
            acc, dother, q_tile, other, g_tile, l_tile, d_tile, i, bounds, h, key, k_t, value, v_t, mask, k_len, prefix_low, 0,
            0, prefix_tiles, place, scale, unit, cap, D, V, NEAR, RULE, SLOPE, FIRST, STEP, BLOCK_D,
            BLOCK_V,
        )  # fmt: skip
        if q_first is not None:
            _save(dother * scale, _head(dq_first, row, h, dq_b, dq_h), r, dq_t, q_len, D, BLOCK_M, BLOCK_D)
    _save(acc * scale, _head(dq, row, h, dq_b, dq_h), r, dq_t, q_len, D, BLOCK_M, BLOCK_D)


@triton.jit
def _key_gradients(dk, dv, k, v, j, bounds, query, stride_q, first_query, stride_f, grad, stride_g, lse2, delta,
                   i_zero, h, q_len, low, left, hole, tiles, place, scale, unit, cap, D: tl.constexpr,
                   V: tl.constexpr, NEAR: tl.constexpr, RULE: tl.constexpr, SLOPE: tl.constexpr, KIND: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """`tiles` tiles of queries from row `low` on, against the keys at positions j (N, 1); scores are (N, M) here."""
    slots, base, first, heads, a, b, c = place
    j_low, j_high = bounds
    for t in range(0, tiles):
        r = low + t * BLOCK_M
        if KIND == EDGE:
            r += tl.where(t < left, 0, hole)
        rows = r + tl.arange(0, BLOCK_M)
        i = (i_zero + rows)[None, :]
        q = _load(query, r, stride_q, q_len, D, BLOCK_M, BLOCK_D, KIND != INNER)
        do = _load(grad, r, stride_g, q_len, V, BLOCK_M, BLOCK_V, KIND != INNER)
        # 0 for rows that are not there, which the bounds exclude: cp.async fills in zeros for nothing
        l = (tl.load(lse2 + rows) if KIND == INNER else tl.load(lse2 + rows, mask=rows < q_len, other=0.0))[None, :]
        d = (tl.load(delta + rows) if KIND == INNER else tl.load(delta + rows, mask=rows < q_len, other=0.0))[None, :]
        s = _dot(k, tl.trans(q), None)
        if KIND == FIRST:
            other = _load(first_query, r, stride_f, q_len, D, BLOCK_M, BLOCK_D, True)
            s = tl.where(j < first, _dot(k, tl.trans(other), None), s)
        if RULE is not None:
            s = RULE(s * scale, i, j, h, cap)
        p = tl.exp2(s * unit - l)
        if KIND != INNER:
            near = (i >= j_low) & (i < j_high)
            if NEAR is not None:
                near = near & (NEAR(i, j, h, heads, a, b, c) | (j < first))
            p = tl.where(near, p, 0.0)
        dv = _dot(_narrow(p, do.dtype), do, dv)
        ds = p * (_dot(v, tl.trans(do), None) - d)
        if RULE is not None:
            ds = ds * SLOPE(s, i, j, h, cap)
        if KIND == FIRST:
            dk = _dot(_narrow(tl.where(j < first, ds, 0.0), q.dtype), other, dk)
            ds = tl.where(j < first, 0.0, ds)
        dk = _dot(_narrow(ds, q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["q_len", "k_len", "slots", "tail", "first", "a", "b", "c"])
def backward_keys(q, k, v, q_first, mask, start, grad, lse2, delta, dk, dv,
                  q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, f_b, f_h, f_t, g_b, g_h, g_t,
                  dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, mask_b,
                  scale, cap, heads, group, q_len, k_len, slots, tail, first, a, b, c,
                  D: tl.constexpr, V: tl.constexpr, QUERIES: tl.constexpr, NEAR: tl.constexpr,
                  RULE: tl.constexpr, SLOPE: tl.constexpr, CAUSAL: tl.constexpr, PREFIX: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_V: tl.constexpr):  # fmt: skip
    """dk and dv; one program per tile of keys, which adds up the heads of its group: no atomics, the same every time.

    A key that is not real (padding, or beyond the last) may gather anything in its own row, which is dropped at the
    end: the loops need no mask for it.
    """
    tiles = tl.cdiv(k_len, BLOCK_N)
    program = tl.program_id(0)
    n, kv_head = program % tiles * BLOCK_N, program // tiles % (heads // group)
    row = program // tiles // (heads // group)
    base = tail - _start_of(start, row)
    i_zero = base + k_len - slots - q_len
    place = (slots, base, first, heads, a, b, c)
    if mask is not None:
        mask += tl.cast(row, tl.int64) * mask_b
    k_tile = _load(_head(k, row, kv_head, k_b, k_h), n, k_t, k_len, D, BLOCK_N, BLOCK_D, True)
    v_tile = _load(_head(v, row, kv_head, v_b, v_h), n, v_t, k_len, V, BLOCK_N, BLOCK_V, True)
    j = _positions(n, mask, k_len, slots, base, FIRST if PREFIX else EDGE, BLOCK_N)[:, None]
    unit = LOG2E if RULE is not None else scale * LOG2E
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for g in range(0, group):
        h = kv_head * group + g
        low, left, inner, right = _queries_to_visit(
            n, h, q_len, k_len, i_zero, place, QUERIES, NEAR, CAUSAL, PREFIX, BLOCK_M, STEP, BLOCK_N
        )
        bounds = _bounds_of_keys(j, h, i_zero + q_len, place, QUERIES, CAUSAL, PREFIX)
        query, do = _head(q, row, h, q_b, q_h), _head(grad, row, h, g_b, g_h)
        at = tl.cast(row * heads + h, tl.int64) * q_len
        if q_first is not None:  # a tile with such keys is all FIRST
            steps = left + inner * (BLOCK_M // STEP) + right
            all_first = tl.where((n < slots) | (n - slots + base < first), steps, 0)
            dk_acc, dv_acc = _key_gradients(
                dk_acc, dv_acc, k_tile, v_tile, j, bounds, query, q_t, _head(q_first, row, h, f_b, f_h), f_t, do, g_t,
                lse2 + at, delta + at, i_zero, h, q_len, low, 0, 0, all_first, place, scale, unit, cap, D, V, NEAR, RULE, SLOPE, FIRST, STEP, BLOCK_D, BLOCK_V,
            )  # fmt: skip
            if all_first > 0:
                left, inner, right = 0, 0, 0
        dk_acc, dv_acc = _key_gradients(
            dk_acc, dv_acc, k_tile, v_tile, j, bounds, query, q_t, None, 0, do, g_t, lse2 + at, delta + at, i_zero, h, q_len,
            low, left, inner * BLOCK_M, left + right, place, scale, unit, cap, D, V, NEAR, RULE, SLOPE, EDGE, STEP, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        dk_acc, dv_acc = _key_gradients(
            dk_acc, dv_acc, k_tile, v_tile, j, bounds, query, q_t, None, 0, do, g_t, lse2 + at, delta + at, i_zero, h, q_len,
            low + left * STEP, 0, 0, inner, place, scale, unit, cap, D, V, NEAR, RULE, SLOPE, INNER, BLOCK_M, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    real = j >= 0
    dk_acc, dv_acc = tl.where(real, dk_acc * scale, 0.0), tl.where(real, dv_acc, 0.0)
    _save(dk_acc, _head(dk, row, kv_head, dk_b, dk_h), n, dk_t, k_len, D, BLOCK_N, BLOCK_D)
    _save(dv_acc, _head(dv, row, kv_head, dv_b, dv_h), n, dv_t, k_len, V, BLOCK_N, BLOCK_V)
