"""Gated linear attention and the gated delta rule on Triton: one program goes through all chunks of
a head, with some of its values' columns, and has the sums in its registers.

Legend: b row; h key/value head; C tokens of a chunk; F features, V columns of the values (BLOCK_:
with padding, or of one program); near: log decay since the chunk's start, (C, 1), or (C, F) with a
decay for every feature. `torch_impl` has the equations."""

import triton
import triton.language as tl

from ..flash.triton_pieces import dot, head_of, narrow
from ..linear.triton_pieces import wide


@triton.jit
def _typed(x, dtype: tl.constexpr):
    """x in the type of a product with the inputs' `dtype`; decays take fp16 out of its range."""
    return wide(x.to(tl.float32), dtype)


@triton.jit
def _row(x, at, C: tl.constexpr):
    """Row `at` of x (C, n), as (1, n)."""
    return tl.sum(tl.where(tl.arange(0, C)[:, None] == at, x, 0.0), 0)[None, :]


@triton.jit
def _inverse(lower, C: tl.constexpr):
    """(1 + L)^-1 of a strictly lower triangular L (C, C), row by row."""
    i = tl.arange(0, C)
    found = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for at in range(1, C):
        factors = tl.sum(tl.where(i[:, None] == at, lower, 0.0), 0)
        below = tl.sum(factors[:, None] * found, 0)
        found = tl.where(i[:, None] == at, found - below[None, :], found)
    return found


@triton.jit(do_not_specialize=["tokens", "queries"])
def forward(
    q,
    k,
    v,
    gate,
    beta,
    mask,
    first,
    first_norms,
    out,
    last,
    last_norms,
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
    scale,
    heads,
    group,
    tokens,
    queries,
    F: tl.constexpr,
    V: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BY_FEATURE: tl.constexpr,
    HALF: tl.constexpr,
    C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out (B, heads group, Tq, V) and, where wanted, the sums `last` (B, heads, F, V) and
    `last_norms` (B, heads, F) after all tokens; from `first`, or None. gate (B, heads, T, 1 or F)
    fp32 and beta (B, heads, T) fp32, contiguous as all of these are, or None."""
    v_blocks = tl.cdiv(V, BLOCK_V)
    head, block = tl.program_id(0) // v_blocks, tl.program_id(0) % v_blocks
    b, h = head // heads, head % heads
    dtype: tl.constexpr = k.dtype.element_ty
    i, f = tl.arange(0, C), tl.arange(0, BLOCK_F)
    d_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    in_f, in_v = f < F, d_v < V
    k, v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    line = tl.cast(head, tl.int64)
    held = line * F * V + f[:, None] * V + d_v[None, :]
    inside = in_f[:, None] & in_v[None, :]
    sums = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    norms = tl.zeros([BLOCK_F], tl.float32)
    if first is not None:
        sums = tl.load(first + held, mask=inside, other=0.0)
        if NORMALIZE:
            norms = tl.load(first_norms + line * F + f, mask=in_f, other=0.0)
    if mask is not None:
        mask += tl.cast(b, tl.int64) * mask_b
    for start in range(0, tokens, C):
        t = start + i
        real = t < tokens
        if mask is not None:
            real = real & tl.load(mask + t, mask=real, other=False).to(tl.int1)
        at = tl.cast(t, tl.int64)[:, None]
        key = tl.load(k + at * k_t + f[None, :], mask=real[:, None] & in_f[None, :], other=0.0)
        value = tl.load(v + at * v_t + d_v[None, :], mask=real[:, None] & in_v[None, :], other=0.0)
        key = key.to(tl.float32)
        near = tl.zeros([C, 1], tl.float32)
        if gate is not None:
            if BY_FEATURE:
                place = gate + (line * tokens + at) * F + f[None, :]
                near = tl.load(place, mask=real[:, None] & in_f[None, :], other=0.0)
            else:
                near = tl.load(gate + line * tokens + at, mask=real[:, None], other=0.0)
            near = tl.cumsum(near, 0)
        end = _row(near, C - 1, C)
        right = tl.trans(_typed(key * (tl.exp(-near) / HALF), dtype))
        if beta is not None:
            share = tl.load(beta + line * tokens + t, mask=real, other=0.0)[:, None]
            left = _typed(key * (tl.exp(near) * HALF), dtype)
            zero = tl.zeros([C, C], tl.float32)
            lower = tl.where(i[:, None] > i[None, :], dot(left, right, zero) * share, 0.0)
            known = dot(left, _typed(sums, dtype), tl.zeros([C, BLOCK_V], tl.float32)) / HALF
            rest = share * (value.to(tl.float32) - known)
            written = tl.zeros([C, BLOCK_V], tl.float32)
            written = dot(_typed(_inverse(lower, C), dtype), _typed(rest, dtype), written)
        else:
            written = value.to(tl.float32)
        written = _typed(written, dtype)
        place = t - (tokens - queries)
        asked = (place >= 0) & (t < tokens)
        for member in range(group):
            rows = (
                head_of(q, b, h * group + member, q_b, q_h)
                + tl.cast(place, tl.int64)[:, None] * q_t
            )
            query = tl.load(rows + f[None, :], mask=asked[:, None] & in_f[None, :], other=0.0)
            query = query.to(tl.float32)
            raised = query * (tl.exp(near) * HALF)
            typed = _typed(raised, dtype)
            score = dot(typed, right, tl.zeros([C, C], tl.float32))
            score = tl.where(i[:, None] >= i[None, :], score, 0.0)
            got = dot(typed, _typed(sums, dtype), tl.zeros([C, BLOCK_V], tl.float32)) / HALF
            got = dot(_typed(score, dtype), written, got)
            if NORMALIZE:
                total = tl.sum(score, 1) + tl.sum(raised * norms[None, :], 1) / HALF
                nothing = tl.abs(total) < 1e-30
                got = tl.where(nothing[:, None], 0.0, got / tl.where(nothing, 1.0, total)[:, None])
            else:
                got = got * scale
            line_q = (line * group + member) * queries + tl.cast(place, tl.int64)
            tl.store(
                out + line_q[:, None] * V + d_v[None, :],
                narrow(got, out.dtype.element_ty),
                mask=asked[:, None] & in_v[None, :],
            )
        # what is left of each key at the chunk's end: e^-G_j, times e^G of all
        decay = tl.trans(tl.exp(end))
        added = dot(right, written, tl.zeros([BLOCK_F, BLOCK_V], tl.float32))
        sums = sums * decay + added * (decay * HALF)
        if NORMALIZE:
            kept = tl.sum(right.to(tl.float32) * (decay * HALF), 1)
            norms = norms * tl.sum(decay, 1) + kept
    if last is not None:
        tl.store(last + held, sums, mask=inside)
        if NORMALIZE and block == 0:
            tl.store(last_norms + line * F + f, norms, mask=in_f)
