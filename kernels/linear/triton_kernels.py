"""Chunked linear attention in Triton: sums of each chunk, a scan over chunks, and what queries make
of them.

    H key/value heads, `group` query heads to each; n chunk of C tokens
    D head size, V value size, F features
    S (F, V) and z (F,): the sums before a chunk (for gradients: after it)
    states (B H, n, F, V), norms (B H, n, F): S and z of all chunks
    mu_j log weight of a key, high_t the highest so far; None: no weights
    ends (B, H, n + 1): the highest at the chunks' ends
    rate (H,) log2 of the decay; None: no decay
    x_b, x_h, x_t strides of x by row of the batch, head, token
    share 1 / normaliser of a query (None: not normalised)
    slope = -(grad . out), its part of the gradient

Features are made in the kernels, from x and directions (F, D), and never written. Products are in
the inputs' type; those with states, and with anything divided by a normaliser, in bf16 for both
16-bit types: their range has no bound."""

import triton
import triton.language as tl

from ..flash.triton_pieces import dot, head_of, load_rows, narrow, save_rows
from .triton_pieces import (
    after_weights,
    columns,
    exponents,
    factor_of,
    features,
    into_weights,
    load_real,
    norms_of,
    pair_weights,
    ratio,
    real_keys,
    row_of,
    share_of,
    whole,
    wide,
)

# ---- sums


@triton.jit(do_not_specialize=["tokens"])
def tops(
    x,
    directions,
    mask,
    out,
    mu,
    x_b,
    x_h,
    x_t,
    mask_b,
    heads,
    tokens,
    half,
    F: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out (B, H, T): the highest exponent of each row, max_f w_f.x. mu: `half` |x|^2 less, a key's
    log weight, -inf where the mask says padding; None for queries. One program per tile of C
    tokens."""
    tiles = tl.cdiv(tokens, C)
    program = tl.program_id(0)
    t, h, b = program % tiles * C, program // tiles % heads, program // tiles // heads
    at = t + tl.arange(0, C)
    if mask is not None:
        mask += tl.cast(b, tl.int64) * mask_b
    real = real_keys(mask, at, tokens)
    rows = load_real(head_of(x, b, h, x_b, x_h), t, x_t, real, D, C, BLOCK_D)
    top = tl.full([C], float("-inf"), tl.float32)
    for f in range(0, F, BLOCK_F):
        u = exponents(rows, directions, f, F, D, BLOCK_F, BLOCK_D)
        if F % BLOCK_F != 0:
            u = tl.where(f + tl.arange(0, BLOCK_F)[None, :] < F, u, float("-inf"))
        top = tl.maximum(top, tl.max(u, 1))
    place = tl.cast(b * heads + h, tl.int64) * tokens + at
    tl.store(out + place, top, mask=at < tokens)
    if mu is not None:
        y = rows.to(tl.float32)
        tl.store(
            mu + place,
            tl.where(real, top - half * tl.sum(y * y, 1), float("-inf")),
            mask=at < tokens,
        )


@triton.jit(do_not_specialize=["tokens", "chunks"])
def chunk_sums(
    k,
    v,
    directions,
    mask,
    mu,
    top,
    ends,
    rate,
    states,
    norms,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    mask_b,
    heads,
    tokens,
    chunks,
    MAP: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Each chunk's own sums, as of its end; one program per chunk and block of features.

    top (B H, T): the highest exponent of each key, where mu has less than that.
    """
    blocks = tl.cdiv(F, BLOCK_F)
    program = tl.program_id(0)
    f, n, row = program % blocks * BLOCK_F, program // blocks % chunks, program // blocks // chunks
    h, b = row % heads, row // heads
    i = tl.arange(0, C)
    at = n * C + i
    if mask is not None:
        mask += tl.cast(b, tl.int64) * mask_b
    real = real_keys(mask, at, tokens)
    dtype: tl.constexpr = k.dtype.element_ty
    k = head_of(k, b, h, k_b, k_h)
    key = columns(
        whole(k, n * C, k_t, real, MAP, D, C, BLOCK_D), k, n * C, k_t, real, f, MAP, F, C, BLOCK_F
    )
    value = load_real(head_of(v, b, h, v_b, v_h), n * C, v_t, real, V, C, BLOCK_V)
    key_top, key_mu, end, head_rate = None, None, None, None
    if mu is not None:
        key_top, key_mu = row_of(top, row, tokens, at), row_of(mu, row, tokens, at)
        end = tl.load(ends + tl.cast(row, tl.int64) * (chunks + 1) + n + 1)
    if rate is not None:
        head_rate = tl.load(rate + h)
    left = after_weights(i, tl.minimum(tokens - n * C, C), real, key_mu, end, head_rate)
    phi = features(key, directions, key_top, f, MAP, F, D, BLOCK_F, BLOCK_D) * left[:, None]
    own = dot(tl.trans(wide(phi, dtype)), wide(value, dtype), None)
    place = tl.cast(row, tl.int64) * chunks + n
    save_rows(own, states + place * F * V, f, V, F, V, BLOCK_F, BLOCK_V)
    if norms is not None:
        at_f = f + tl.arange(0, BLOCK_F)
        tl.store(norms + place * F + at_f, tl.sum(phi, 0), mask=at_f < F)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def scan(
    states,
    first,
    last,
    ends,
    rate,
    heads,
    tokens,
    chunks,
    size,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place, over the chunks: their own sums (B H, n, size) become the sums before them, from
    `first` (B H, size) (None: 0) on; `last` gets those after all. REVERSE: from the last chunk to
    the first."""
    blocks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    row = program // blocks
    h = row % heads
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    if first is not None:
        total += tl.load(first + tl.cast(row, tl.int64) * size + at, mask=inside, other=0.0)
    for step in range(0, chunks):
        n = chunks - 1 - step if REVERSE else step
        pointer = states + (tl.cast(row, tl.int64) * chunks + n) * size + at
        own = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
        tl.store(pointer, narrow(total, states.dtype.element_ty), mask=inside)
        if ends is not None:
            end = ends + tl.cast(row, tl.int64) * (chunks + 1) + n
            total *= ratio(tl.load(end), tl.load(end + 1))
        if rate is not None:
            total *= tl.exp2(tl.minimum(tokens - n * C, C).to(tl.float32) * tl.load(rate + h))
        total += own
    if last is not None:
        tl.store(last + tl.cast(row, tl.int64) * size + at, total, mask=inside)


# ---- forward


@triton.jit(do_not_specialize=["tokens", "chunks"])
def forward(
    q,
    k,
    v,
    w_q,
    w_k,
    mask,
    mu,
    high,
    top_k,
    top_q,
    ends,
    rate,
    states,
    norms,
    out,
    share,
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
    mask_b,
    gain,
    heads,
    group,
    tokens,
    chunks,
    MAP: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    CAUSAL: tl.constexpr,
    C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out (B, heads, T, V) and share (B, heads, T); one program per chunk and query head.

    Causal: the state before the chunk and the pairs inside of it. Otherwise one state (chunks = 1)
    is all there is."""
    tiles = tl.cdiv(tokens, C)
    program = tl.program_id(0)
    n, h, b = program % tiles, program // tiles % heads, program // tiles // heads
    row = b * (heads // group) + h // group
    i = tl.arange(0, C)
    at = n * C + i
    exists = at < tokens
    dtype: tl.constexpr = q.dtype.element_ty
    q = head_of(q, b, h, q_b, q_h)
    query = whole(q, n * C, q_t, exists, MAP, D, C, BLOCK_D)
    place = tl.cast(row, tl.int64) * chunks + (n if CAUSAL else 0)
    query_top, key_top, key_mu, query_high, head_rate, before = None, None, None, None, None, None
    if mu is not None:
        query_top = row_of(top_q, b * heads + h, tokens, at)
        if CAUSAL:
            key_top, key_mu = row_of(top_k, row, tokens, at), row_of(mu, row, tokens, at)
            query_high = row_of(high, row, tokens, at)
            before = tl.load(ends + tl.cast(row, tl.int64) * (chunks + 1) + n)
    if rate is not None:
        head_rate = tl.load(rate + h // group)
    if CAUSAL:
        if mask is not None:
            mask += tl.cast(b, tl.int64) * mask_b
        real = real_keys(mask, at, tokens)
        k = head_of(k, b, h // group, k_b, k_h)
        key = whole(k, n * C, k_t, real, MAP, D, C, BLOCK_D)
        pairs = tl.zeros([C, C], tl.float32)
    acc = tl.zeros([C, BLOCK_V], tl.float32)
    total = tl.zeros([C], tl.float32)
    for f in range(0, F, BLOCK_F):
        x = columns(query, q, n * C, q_t, exists, f, MAP, F, C, BLOCK_F)
        phi = features(x, w_q, query_top, f, MAP, F, D, BLOCK_F, BLOCK_D)
        state = load_rows(states + place * F * V, f, V, F, V, BLOCK_F, BLOCK_V, F % BLOCK_F != 0)
        acc = dot(wide(phi, dtype), state, acc)
        if norms is not None:
            total += tl.sum(phi * norms_of(norms, place, f, F, BLOCK_F)[None, :], 1)
        if CAUSAL:
            y = columns(key, k, n * C, k_t, real, f, MAP, F, C, BLOCK_F)
            phi_k = features(y, w_k, key_top, f, MAP, F, D, BLOCK_F, BLOCK_D)
            pairs = dot(factor_of(phi, dtype, MAP), tl.trans(factor_of(phi_k, dtype, MAP)), pairs)
    if CAUSAL:
        into = into_weights(i, query_high, before, head_rate)
        acc *= into[:, None]
        pairs *= pair_weights(at, at, real, key_mu, query_high, head_rate)
        total = total * into + tl.sum(pairs, 1)
    if norms is not None:
        inverse = share_of(total)
        tl.store(share + tl.cast(b * heads + h, tl.int64) * tokens + at, inverse, mask=exists)
        factor = inverse[:, None]
    else:
        factor = gain
    acc *= factor
    if CAUSAL:
        value = load_real(head_of(v, b, h // group, v_b, v_h), n * C, v_t, real, V, C, BLOCK_V)
        acc = dot(narrow(pairs * factor, value.dtype), value, acc)
    save_rows(acc, head_of(out, b, h, o_b, o_h), n * C, o_t, tokens, V, C, BLOCK_V)
