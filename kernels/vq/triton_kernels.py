"""Codebook attention in Triton: the nearest word, sums per block and code, and the softmax over
counted codes.

    B              batch
    H, Hkv         query heads, `group` of them to a K/V head; K/V heads
    S, N           words, blocks of `size` tokens
    M, W           queries or keys, and words in a tile
    D, V           head sizes, padded to BLOCK_D, BLOCK_V
    x_b, x_h, x_t  strides of x by row of the batch, head and token
    sums (B, Hkv, N, S, V) and counts (B, Hkv, N, S) are dense

Softmax runs in base 2: `unit` is scale * log2(e). Products are in q's dtype, sums in float32.
"""

import triton
import triton.language as tl

from ..flash.triton_pieces import LN2, dot, head_of, load_rows, narrow, save_rows


@triton.jit(do_not_specialize=["tokens"])
def nearest(
    k,
    words,
    offsets,
    codes,
    k_b,
    k_h,
    k_t,
    heads,
    tokens,
    count,
    parts,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """codes (B, Hkv, T) int64: the first word with the most of k c - |c|^2 / 2; one program per
    tile of keys.

    words (parts, Hkv, S, D) in k's dtype, which add up to the float32 words: so their products,
    each on tensor cores, add up to what float32 would give. offsets (Hkv, S) fp32."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    program = tl.program_id(0)
    t, h, b = program % tiles * BLOCK_M, program // tiles % heads, program // tiles // heads
    tile = load_rows(head_of(k, b, h, k_b, k_h), t, k_t, tokens, D, BLOCK_M, BLOCK_D, True)
    # a running argmax over tiles of words: the (keys, words) scores never exist as a whole
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    found = tl.zeros([BLOCK_M], tl.int32)
    for w in range(0, count, BLOCK_W):
        score = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
        for part in range(0, parts):
            own = words + (tl.cast(part, tl.int64) * heads + h) * count * D
            score = dot(
                tile, tl.trans(load_rows(own, w, D, count, D, BLOCK_W, BLOCK_D, True)), score
            )
        at = w + tl.arange(0, BLOCK_W)
        score -= tl.load(
            offsets + tl.cast(h, tl.int64) * count + at, mask=at < count, other=float("inf")
        )[None, :]
        top, which = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        # > and not >=: among equal words the first wins, whatever the tile
        found = tl.where(top > best, w + which, found)
        best = tl.maximum(best, top)
    rows = t + tl.arange(0, BLOCK_M)
    place = tl.cast(b * heads + h, tl.int64) * tokens + rows
    tl.store(codes + place, found.to(tl.int64), mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens", "first", "size", "blocks"])
def summarise(
    v,
    codes,
    real,
    sums,
    counts,
    v_b,
    v_h,
    v_t,
    real_b,
    heads,
    tokens,
    first,
    size,
    blocks,
    count,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """sums and counts of one block for one tile of codes: the product of codes as one-hot rows with
    the values.
    """
    tiles = tl.cdiv(count, BLOCK_W)
    program = tl.program_id(0)
    w, n = program % tiles * BLOCK_W, program // tiles % blocks
    h, b = program // tiles // blocks % heads, program // tiles // blocks // heads
    # blocks are counted from the sequence's start, not from this call's first token
    border = (first // size + n) * size - first
    low, high = tl.maximum(border, 0), tl.minimum(border + size, tokens)
    v = head_of(v, b, h, v_b, v_h)
    codes += tl.cast(b * heads + h, tl.int64) * tokens
    acc = tl.zeros([BLOCK_W, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_W], tl.int32)
    word = w + tl.arange(0, BLOCK_W)
    for t in range(low, high, BLOCK_M):
        rows = t + tl.arange(0, BLOCK_M)
        there = rows < high
        if real is not None:
            there = there & (
                tl.load(real + tl.cast(b, tl.int64) * real_b + rows, mask=there, other=0) != 0
            )
        # -1 is nobody's code: tokens outside, and padding, fall into no row of `hot`
        code = tl.load(codes + rows, mask=there, other=-1).to(tl.int32)
        # a scatter by code would need atomics; as a product with 0 and 1 it runs on tensor cores,
        # and adds in a fixed order
        hot = word[:, None] == code[None, :]
        d = tl.arange(0, BLOCK_V)[None, :]
        values = tl.load(
            v + tl.cast(rows, tl.int64)[:, None] * v_t + d, mask=there[:, None] & (d < V), other=0.0
        )
        acc = dot(narrow(hot.to(tl.float32), values.dtype), values, acc)
        total += tl.sum(hot.to(tl.int32), 1)
    place = (tl.cast(b * heads + h, tl.int64) * blocks + n) * count
    save_rows(acc, sums + place * V, w, V, count, V, BLOCK_W, BLOCK_V)
    tl.store(counts + place + word, total, mask=word < count)


@triton.jit
def _means(
    sums,
    counts,
    w,
    count,
    V: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A tile's mean values (W, V) in `dtype`, and log2 of its counts (W,): -inf for codes that no
    token has.
    """
    at = w + tl.arange(0, BLOCK_W)
    number = tl.load(counts + at, mask=at < count, other=0).to(tl.float32)
    share = 1 / tl.maximum(number, 1.0)
    values = load_rows(sums, w, V, count, V, BLOCK_W, BLOCK_V, True) * share[:, None]
    return (
        narrow(values, dtype),
        tl.where(number > 0, tl.log2(tl.maximum(number, 1.0)), float("-inf")),
        share,
    )


@triton.jit
def _place(tiles, heads, blocks, first, size, tokens, BLOCK_M: tl.constexpr):
    """(row of the batch, head, block, first query of the tile, end of the queries that are the
    tile's to do).
    """
    program = tl.program_id(0)
    n, h = program // tiles % blocks, program // tiles // blocks % heads
    border = (first // size + n) * size - first
    r = tl.maximum(border, 0) + program % tiles * BLOCK_M
    return program // tiles // blocks // heads, h, n, r, tl.minimum(border + size, tokens)


@triton.jit(do_not_specialize=["tokens", "first", "size", "blocks", "tiles"])
def forward(
    q,
    words,
    sums,
    counts,
    out,
    lse,
    q_b,
    q_h,
    q_t,
    unit,
    heads,
    group,
    tokens,
    first,
    size,
    blocks,
    tiles,
    count,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out (B, H, T, V) and lse (B, H, T) fp32, dense; one program per tile of queries in one
    block.
    """
    b, h, n, r, end = _place(tiles, heads, blocks, first, size, tokens, BLOCK_M)
    kv_head, kv_heads = h // group, heads // group
    own = (tl.cast(b * kv_heads + kv_head, tl.int64) * blocks + n) * count
    words += tl.cast(kv_head, tl.int64) * count * D
    query = load_rows(head_of(q, b, h, q_b, q_h), r, q_t, end, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for w in range(0, count, BLOCK_W):
        word = load_rows(words, w, D, count, D, BLOCK_W, BLOCK_D, True)
        s = dot(query, tl.trans(word), None) * unit
        means, number, _ = _means(
            sums + own * V, counts + own, w, count, V, query.dtype, BLOCK_W, BLOCK_V
        )
        # a code that n tokens share weighs n exp(s) = exp2(s + log2 n)
        s += number[None, :]
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(p, 1)
        acc = dot(narrow(p, query.dtype), means, acc * fade[:, None])
        top = higher
    # such queries see no finished block: out 0 and lse -inf, which a merge leaves out
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    row = tl.cast(b * heads + h, tl.int64) * tokens
    save_rows(acc / total[:, None], out + row * V, r, V, end, V, BLOCK_M, BLOCK_V)
    rows = r + tl.arange(0, BLOCK_M)
    found = tl.where(blind, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse + row + rows, found, mask=rows < end)


@triton.jit(do_not_specialize=["tokens", "first", "size", "blocks", "tiles"])
def query_gradient(
    q,
    words,
    sums,
    counts,
    grad,
    lse2,
    delta,
    dq,
    q_b,
    q_h,
    q_t,
    g_b,
    g_h,
    g_t,
    scale,
    unit,
    heads,
    group,
    tokens,
    first,
    size,
    blocks,
    tiles,
    count,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dq (B, H, T, D), dense; lse2 (base 2, +inf for queries that see nothing) and delta are
    `backward_rows`'s.
    """
    b, h, n, r, end = _place(tiles, heads, blocks, first, size, tokens, BLOCK_M)
    kv_head, kv_heads = h // group, heads // group
    own = (tl.cast(b * kv_heads + kv_head, tl.int64) * blocks + n) * count
    words += tl.cast(kv_head, tl.int64) * count * D
    query = load_rows(head_of(q, b, h, q_b, q_h), r, q_t, end, D, BLOCK_M, BLOCK_D, True)
    do = load_rows(head_of(grad, b, h, g_b, g_h), r, g_t, end, V, BLOCK_M, BLOCK_V, True)
    rows = r + tl.arange(0, BLOCK_M)
    row = tl.cast(b * heads + h, tl.int64) * tokens
    sums_of = tl.load(lse2 + row + rows, mask=rows < end, other=float("inf"))[:, None]
    shared = tl.load(delta + row + rows, mask=rows < end, other=0.0)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for w in range(0, count, BLOCK_W):
        word = load_rows(words, w, D, count, D, BLOCK_W, BLOCK_D, True)
        means, number, _ = _means(
            sums + own * V, counts + own, w, count, V, query.dtype, BLOCK_W, BLOCK_V
        )
        p = tl.exp2(dot(query, tl.trans(word), None) * unit + number[None, :] - sums_of)
        # by the softmax's Jacobian; `delta` is what all of a row's codes share
        slope = p * (dot(do, tl.trans(means), None) - shared)
        acc = dot(narrow(slope, query.dtype), word, acc)
    save_rows(acc * scale, dq + row * D, r, D, end, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "first", "size", "blocks"])
def sum_gradient(
    q,
    words,
    sums,
    counts,
    grad,
    lse2,
    dsums,
    q_b,
    q_h,
    q_t,
    g_b,
    g_h,
    g_t,
    unit,
    heads,
    group,
    tokens,
    first,
    size,
    blocks,
    count,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dsums, dense fp32; one program per block and tile of codes, which adds up the heads of its
    group.
    """
    tiles = tl.cdiv(count, BLOCK_W)
    program = tl.program_id(0)
    w, n = program % tiles * BLOCK_W, program // tiles % blocks
    kv_heads = heads // group
    kv_head, b = program // tiles // blocks % kv_heads, program // tiles // blocks // kv_heads
    own = (tl.cast(b * kv_heads + kv_head, tl.int64) * blocks + n) * count
    word = load_rows(
        words + tl.cast(kv_head, tl.int64) * count * D, w, D, count, D, BLOCK_W, BLOCK_D, True
    )
    at = w + tl.arange(0, BLOCK_W)
    number = tl.load(counts + own + at, mask=at < count, other=0).to(tl.float32)
    share = 1 / tl.maximum(number, 1.0)
    number = tl.where(number > 0, tl.log2(tl.maximum(number, 1.0)), float("-inf"))
    border = (first // size + n) * size - first
    low, high = tl.maximum(border, 0), tl.minimum(border + size, tokens)
    acc = tl.zeros([BLOCK_W, BLOCK_V], tl.float32)
    # the query heads of a group read the same sums: one writer, no atomics
    for g in range(0, group):
        h = kv_head * group + g
        query, do_head = head_of(q, b, h, q_b, q_h), head_of(grad, b, h, g_b, g_h)
        row = tl.cast(b * heads + h, tl.int64) * tokens
        for r in range(low, high, BLOCK_M):
            tile = load_rows(query, r, q_t, high, D, BLOCK_M, BLOCK_D, True)
            do = load_rows(do_head, r, g_t, high, V, BLOCK_M, BLOCK_V, True)
            rows = r + tl.arange(0, BLOCK_M)
            sums_of = tl.load(lse2 + row + rows, mask=rows < high, other=float("inf"))[None, :]
            p = tl.exp2(dot(word, tl.trans(tile), None) * unit + number[:, None] - sums_of)
            acc = dot(narrow(p, do.dtype), do, acc)
    save_rows(acc * share[:, None], dsums + own * V, w, V, count, V, BLOCK_W, BLOCK_V)
