"""The backward kernels of chunked linear attention in Triton. Legend and the kernels of sums:
`triton_kernels`.
"""

import triton
import triton.language as tl

from ..flash.triton_pieces import dot, head_of, load_rows, save_rows
from .triton_pieces import (
    FAVOR,
    add_gradient,
    after_weights,
    columns,
    factor_of,
    features,
    gradient_of_columns,
    into_weights,
    load_real,
    norms_of,
    pair_weights,
    real_keys,
    row_of,
    save_columns,
    whole,
    wide,
)


@triton.jit(do_not_specialize=["tokens"])
def slopes(
    out,
    grad,
    slope,
    o_b,
    o_h,
    o_t,
    g_b,
    g_h,
    g_t,
    heads,
    tokens,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """slope (B, heads, T) = -(grad . out): the gradient of a query's normaliser, times that."""
    tiles = tl.cdiv(tokens, C)
    program = tl.program_id(0)
    t, h, b = program % tiles * C, program // tiles % heads, program // tiles // heads
    at = t + tl.arange(0, C)
    x = load_rows(head_of(out, b, h, o_b, o_h), t, o_t, tokens, V, C, BLOCK_V, True).to(tl.float32)
    dx = load_rows(head_of(grad, b, h, g_b, g_h), t, g_t, tokens, V, C, BLOCK_V, True).to(
        tl.float32
    )
    tl.store(
        slope + tl.cast(b * heads + h, tl.int64) * tokens + at, -tl.sum(x * dx, 1), mask=at < tokens
    )


@triton.jit(do_not_specialize=["tokens", "chunks"])
def gradient_sums(
    q,
    grad,
    directions,
    high,
    top_q,
    ends,
    rate,
    share,
    slope,
    states,
    norms,
    q_b,
    q_h,
    q_t,
    g_b,
    g_h,
    g_t,
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
    """Each chunk's part of the gradient of the state before it, summed over the group's queries.
    `heads` are k's.
    """
    blocks = tl.cdiv(F, BLOCK_F)
    program = tl.program_id(0)
    f, n, row = program % blocks * BLOCK_F, program // blocks % chunks, program // blocks // chunks
    h, b = row % heads, row // heads
    i = tl.arange(0, C)
    at = n * C + i
    exists = at < tokens
    query_high, before, head_rate = None, None, None
    if high is not None and CAUSAL:
        query_high = row_of(high, row, tokens, at)
        before = tl.load(ends + tl.cast(row, tl.int64) * (chunks + 1) + n)
    if rate is not None:
        head_rate = tl.load(rate + h)
    dtype: tl.constexpr = q.dtype.element_ty
    own = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_F], tl.float32)
    for member in range(0, group):
        head = b * heads * group + h * group + member
        base = head_of(q, b, h * group + member, q_b, q_h)
        query = whole(base, n * C, q_t, exists, MAP, D, C, BLOCK_D)
        x = columns(query, base, n * C, q_t, exists, f, MAP, F, C, BLOCK_F)
        dout = load_real(
            head_of(grad, b, h * group + member, g_b, g_h), n * C, g_t, exists, V, C, BLOCK_V
        )
        query_top = None if high is None else row_of(top_q, head, tokens, at)
        phi = features(x, directions, query_top, f, MAP, F, D, BLOCK_F, BLOCK_D)
        if CAUSAL:
            phi *= into_weights(i, query_high, before, head_rate)[:, None]
        if share is not None:
            weight = row_of(share, head, tokens, at)
            total += tl.sum(phi * (weight * row_of(slope, head, tokens, at))[:, None], 0)
            phi *= weight[:, None]
        else:
            phi *= gain
        own = dot(tl.trans(wide(phi, dtype)), wide(dout, dtype), own)
    place = tl.cast(row, tl.int64) * chunks + n
    save_rows(own, states + place * F * V, f, V, F, V, BLOCK_F, BLOCK_V)
    if norms is not None:
        at_f = f + tl.arange(0, BLOCK_F)
        tl.store(norms + place * F + at_f, total, mask=at_f < F)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def backward_queries(
    q,
    k,
    v,
    grad,
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
    share,
    slope,
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
    dq_b,
    dq_h,
    dq_t,
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
    """dq (B, heads, T, D); one program per chunk and query head, with the states before the
    chunks.
    """
    tiles = tl.cdiv(tokens, C)
    program = tl.program_id(0)
    n, h, b = program % tiles, program // tiles % heads, program // tiles // heads
    row = b * (heads // group) + h // group
    i = tl.arange(0, C)
    at = n * C + i
    exists = at < tokens
    dtype: tl.constexpr = q.dtype.element_ty
    q, dq = head_of(q, b, h, q_b, q_h), head_of(dq, b, h, dq_b, dq_h)
    query = whole(q, n * C, q_t, exists, MAP, D, C, BLOCK_D)
    dout = load_real(head_of(grad, b, h, g_b, g_h), n * C, g_t, exists, V, C, BLOCK_V)
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
    extra = i.to(tl.float32) * 0
    scaled = extra + gain
    if share is not None:
        extra, scaled = (
            row_of(slope, b * heads + h, tokens, at),
            row_of(share, b * heads + h, tokens, at),
        )
    into = extra * 0 + 1
    if CAUSAL:
        into = into_weights(i, query_high, before, head_rate)
        if mask is not None:
            mask += tl.cast(b, tl.int64) * mask_b
        real = real_keys(mask, at, tokens)
        k = head_of(k, b, h // group, k_b, k_h)
        key = whole(k, n * C, k_t, real, MAP, D, C, BLOCK_D)
        value = load_real(head_of(v, b, h // group, v_b, v_h), n * C, v_t, real, V, C, BLOCK_V)
        weights = pair_weights(at, at, real, key_mu, query_high, head_rate)
        d_pairs = wide((dot(dout, tl.trans(value), None) + extra[:, None]) * weights, dtype)
    acc = tl.zeros([C, BLOCK_D], tl.float32)
    inner = tl.zeros([C], tl.float32)
    for f in range(0, F, BLOCK_F):
        state = load_rows(states + place * F * V, f, V, F, V, BLOCK_F, BLOCK_V, F % BLOCK_F != 0)
        d_phi = dot(wide(dout, dtype), tl.trans(state), None)
        if norms is not None:
            d_phi += extra[:, None] * norms_of(norms, place, f, F, BLOCK_F)[None, :]
        d_phi *= into[:, None]
        if CAUSAL:
            y = columns(key, k, n * C, k_t, real, f, MAP, F, C, BLOCK_F)
            phi_k = features(y, w_k, key_top, f, MAP, F, D, BLOCK_F, BLOCK_D)
            d_phi = dot(d_pairs, wide(phi_k, dtype), d_phi)
        d_phi *= scaled[:, None]
        x = columns(query, q, n * C, q_t, exists, f, MAP, F, C, BLOCK_F)
        phi = features(x, w_q, query_top, f, MAP, F, D, BLOCK_F, BLOCK_D)
        if MAP >= FAVOR:
            acc, inner = add_gradient(acc, inner, phi, d_phi, w_q, f, MAP, F, D, BLOCK_F, BLOCK_D)
        else:
            save_columns(
                gradient_of_columns(x, phi, d_phi, MAP), dq, n * C, dq_t, tokens, f, F, C, BLOCK_F
            )
    if MAP >= FAVOR:
        save_rows(acc, dq, n * C, dq_t, tokens, D, C, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def backward_keys(
    q,
    k,
    v,
    grad,
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
    share,
    slope,
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
    dk_b,
    dk_h,
    dk_t,
    dv_b,
    dv_h,
    dv_t,
    mask_b,
    square,
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
    INSIDE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The part of dk and dv that each query head has, (B, heads, T, D) and (.., V); one program per
    chunk and query head, with the states' gradients after the chunks, which the first head of a
    group takes. INSIDE: there are queries in the chunks."""
    tiles = tl.cdiv(tokens, C)
    program = tl.program_id(0)
    n, h, b = program % tiles, program // tiles % heads, program // tiles // heads
    h_k = h // group
    row, head = b * (heads // group) + h_k, b * heads + h
    i = tl.arange(0, C)
    at = n * C + i
    exists = at < tokens
    dtype: tl.constexpr = k.dtype.element_ty
    if mask is not None:
        mask += tl.cast(b, tl.int64) * mask_b
    real = real_keys(mask, at, tokens)
    k, dk = head_of(k, b, h_k, k_b, k_h), head_of(dk, b, h, dk_b, dk_h)
    key = whole(k, n * C, k_t, real, MAP, D, C, BLOCK_D)
    value = load_real(head_of(v, b, h_k, v_b, v_h), n * C, v_t, real, V, C, BLOCK_V)
    place = tl.cast(row, tl.int64) * chunks + (n if CAUSAL else 0)
    key_top, key_mu, query_high, query_top, head_rate, end = None, None, None, None, None, None
    if mu is not None:
        key_top, key_mu = row_of(top_k, row, tokens, at), row_of(mu, row, tokens, at)
        end = tl.load(ends + tl.cast(row, tl.int64) * (chunks + 1) + (n + 1 if CAUSAL else chunks))
        if INSIDE:
            query_high, query_top = row_of(high, row, tokens, at), row_of(top_q, head, tokens, at)
    if rate is not None:
        head_rate = tl.load(rate + h_k)
    left = after_weights(i, tl.minimum(tokens - n * C, C), real, key_mu, end, head_rate)
    left = tl.where(h % group == 0, left, 0.0)[:, None]
    acc_v = tl.zeros([C, BLOCK_V], tl.float32)
    if INSIDE:
        q = head_of(q, b, h, q_b, q_h)
        query = whole(q, n * C, q_t, exists, MAP, D, C, BLOCK_D)
        pairs = tl.zeros([C, C], tl.float32)
        for f in range(0, F, BLOCK_F):
            x = columns(query, q, n * C, q_t, exists, f, MAP, F, C, BLOCK_F)
            y = columns(key, k, n * C, k_t, real, f, MAP, F, C, BLOCK_F)
            phi = factor_of(features(x, w_q, query_top, f, MAP, F, D, BLOCK_F, BLOCK_D), dtype, MAP)
            phi_k = factor_of(features(y, w_k, key_top, f, MAP, F, D, BLOCK_F, BLOCK_D), dtype, MAP)
            pairs = dot(phi, tl.trans(phi_k), pairs)
        dout = load_real(head_of(grad, b, h, g_b, g_h), n * C, g_t, exists, V, C, BLOCK_V)
        weights = pair_weights(at, at, real, key_mu, query_high, head_rate)
        if share is not None:
            weights *= row_of(share, head, tokens, at)[:, None]
        else:
            weights *= gain
        acc_v = dot(tl.trans(wide(pairs * weights, dtype)), wide(dout, dtype), acc_v)
        d_pairs = dot(dout, tl.trans(value), None)
        if share is not None:
            d_pairs += row_of(slope, head, tokens, at)[:, None]
        d_pairs = tl.trans(wide(d_pairs * weights, dtype))
    acc = tl.zeros([C, BLOCK_D], tl.float32)
    inner = tl.zeros([C], tl.float32)
    for f in range(0, F, BLOCK_F):
        state = load_rows(states + place * F * V, f, V, F, V, BLOCK_F, BLOCK_V, F % BLOCK_F != 0)
        y = columns(key, k, n * C, k_t, real, f, MAP, F, C, BLOCK_F)
        phi_k = features(y, w_k, key_top, f, MAP, F, D, BLOCK_F, BLOCK_D)
        acc_v = dot(wide(phi_k * left, dtype), state, acc_v)
        d_phi = dot(wide(value, dtype), tl.trans(state), None)
        if norms is not None:
            d_phi += norms_of(norms, place, f, F, BLOCK_F)[None, :]
        d_phi *= left
        if INSIDE:
            x = columns(query, q, n * C, q_t, exists, f, MAP, F, C, BLOCK_F)
            d_phi = dot(
                d_pairs,
                wide(features(x, w_q, query_top, f, MAP, F, D, BLOCK_F, BLOCK_D), dtype),
                d_phi,
            )
        if MAP >= FAVOR:
            acc, inner = add_gradient(acc, inner, phi_k, d_phi, w_k, f, MAP, F, D, BLOCK_F, BLOCK_D)
        else:
            save_columns(
                gradient_of_columns(y, phi_k, d_phi, MAP), dk, n * C, dk_t, tokens, f, F, C, BLOCK_F
            )
    if MAP == FAVOR:  # of -|x|^2 / 2 in mu
        acc -= key.to(tl.float32) * (square * inner)[:, None]
    if MAP >= FAVOR:
        save_rows(acc, dk, n * C, dk_t, tokens, D, C, BLOCK_D)
    save_rows(acc_v, head_of(dv, b, h, dv_b, dv_h), n * C, dv_t, tokens, V, C, BLOCK_V)
