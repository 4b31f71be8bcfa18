"""A few queries over a state of linear attention, in one kernel. Legend: `triton_kernels`."""

import triton
import triton.language as tl

from ..flash.triton_pieces import dot, head_of, narrow
from .triton_pieces import (
    FAVOR,
    columns,
    exponents,
    factor_of,
    features,
    into_weights,
    norms_of,
    pair_weights,
    real_keys,
    share_of,
    whole,
    wide,
)

# ---- sums


@triton.jit(do_not_specialize=["q_len", "k_len"])
def decode(
    q,
    k,
    v,
    w_q,
    w_k,
    mask,
    top,
    rate,
    state,
    norms,
    out,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    mask_b,
    half,
    gain,
    heads,
    group,
    q_len,
    k_len,
    MAP: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    NORMALIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A few queries over the state and up to N keys after it, in one launch: out (B, heads, Tq, V),
    contiguous.

    Rows are the group's query heads times q_len. `heads` key/value heads; one program per head, M
    rows and values."""
    v_blocks, tiles = tl.cdiv(V, BLOCK_V), tl.cdiv(group * q_len, M)
    program = tl.program_id(0)
    d_v, tile, head = (
        program % v_blocks * BLOCK_V,
        program // v_blocks % tiles,
        program // v_blocks // tiles,
    )
    h, b = head % heads, head // heads
    place = tl.cast(head, tl.int64)
    r = tile * M + tl.arange(0, M)
    exists = r < group * q_len
    member, at_q = r // q_len, r % q_len
    dtype: tl.constexpr = q.dtype.element_ty
    rows = (
        head_of(q, b, h * group, q_b, q_h) + (tl.cast(member, tl.int64) * q_h + at_q * q_t)[:, None]
    )
    query = None
    if MAP >= FAVOR:
        d = tl.arange(0, BLOCK_D)[None, :]
        query = tl.load(rows + d, mask=exists[:, None] & (d < D), other=0.0)
    at_q += k_len - q_len
    at_k = tl.arange(0, N)
    if mask is not None:
        mask += tl.cast(b, tl.int64) * mask_b
    real = real_keys(mask, at_k, k_len)
    k = head_of(k, b, h, k_b, k_h)
    key = whole(k, 0, k_t, real, MAP, D, N, BLOCK_D)
    query_top, key_top, key_mu, high, before, head_rate = None, None, None, None, None, None
    if MAP == FAVOR:
        query_top, key_top = (
            tl.full([M], float("-inf"), tl.float32),
            tl.full([N], float("-inf"), tl.float32),
        )
        for f in range(0, F, BLOCK_F):
            u = exponents(query, w_q, f, F, D, BLOCK_F, BLOCK_D)
            s = exponents(key, w_k, f, F, D, BLOCK_F, BLOCK_D)
            if F % BLOCK_F != 0:
                inside = f + tl.arange(0, BLOCK_F)[None, :] < F
                u, s = tl.where(inside, u, float("-inf")), tl.where(inside, s, float("-inf"))
            query_top, key_top = (
                tl.maximum(query_top, tl.max(u, 1)),
                tl.maximum(key_top, tl.max(s, 1)),
            )
        exact = key.to(tl.float32)
        key_mu = tl.where(real, key_top - half * tl.sum(exact * exact, 1), float("-inf"))
        before = tl.full([1], float("-inf"), tl.float32)
        if top is not None:
            before = tl.load(top + head + tl.zeros([1], tl.int32))
        past = tl.where(at_k[None, :] <= at_q[:, None], key_mu[None, :], float("-inf"))
        high = tl.maximum(tl.max(past, 1), before)
    if rate is not None:
        head_rate = tl.load(rate + h)
    pairs = tl.zeros([M, N], tl.float32)
    acc = tl.zeros([M, BLOCK_V], tl.float32)
    total = tl.zeros([M], tl.float32)
    dv = d_v + tl.arange(0, BLOCK_V)
    for f in range(0, F, BLOCK_F):
        at_f = f + tl.arange(0, BLOCK_F)
        if MAP >= FAVOR:
            x = query
        else:
            x = tl.load(rows + at_f[None, :], mask=exists[:, None] & (at_f[None, :] < F), other=0.0)
        phi = features(x, w_q, query_top, f, MAP, F, D, BLOCK_F, BLOCK_D)
        y = columns(key, k, 0, k_t, real, f, MAP, F, N, BLOCK_F)
        phi_k = features(y, w_k, key_top, f, MAP, F, D, BLOCK_F, BLOCK_D)
        pairs = dot(factor_of(phi, dtype, MAP), tl.trans(factor_of(phi_k, dtype, MAP)), pairs)
        if state is not None:
            sums = tl.load(
                state + place * F * V + at_f[:, None] * V + dv[None, :],
                mask=(at_f[:, None] < F) & (dv[None, :] < V),
                other=0.0,
            )
            acc = dot(wide(phi, dtype), wide(sums, dtype), acc)
            if NORMALIZE:
                total += tl.sum(phi * norms_of(norms, place, f, F, BLOCK_F)[None, :], 1)
    into = into_weights(at_q, high, before, head_rate)
    pairs *= pair_weights(at_q, at_k, real, key_mu, high, head_rate)
    if NORMALIZE:
        total = total * into + tl.sum(pairs, 1)
        factor = share_of(total)[:, None]
    else:
        factor = gain
    values = head_of(v, b, h, v_b, v_h) + at_k[:, None] * v_t + dv[None, :]
    value = tl.load(values, mask=real[:, None] & (dv[None, :] < V), other=0.0)
    acc = dot(narrow(pairs * factor, value.dtype), value, acc * into[:, None] * factor)
    at = (tl.cast(head * group, tl.int64) * q_len + r)[:, None] * V + dv[None, :]
    tl.store(out + at, narrow(acc, out.dtype.element_ty), mask=exists[:, None] & (dv[None, :] < V))
