"""What attention over a packed cache is put together from: codes and scales piece by piece, scores,
and sums. The letters and the formulas are those of `packed_kernels`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..pack.triton_kernels import FP8, numbers
from .triton_pieces import dot, narrow
from .triton_turn import angles, cos_sin


@triton.jit
def pieces_of(pointers, there, W: tl.constexpr, BLOCK_W: tl.constexpr, PIECES: tl.constexpr):
    """Rows at `pointers` (X, 1), those `there`: PIECES tensors (X, BLOCK_W) of W channels."""
    d = tl.arange(0, BLOCK_W)[None, :]
    mask = there if W == BLOCK_W else there & (d < W)
    out = ()
    for p in tl.static_range(PIECES):
        out += (tl.load(pointers + p * W + d, mask=mask, other=0.0),)
    return out


@triton.jit
def codes_of(pointer, n0, n_step, there, dtype: tl.constexpr, CODE: tl.constexpr):
    """The numbers of the keys from n0 on, those `there` (N,), in pieces (N, BLOCK_W), without
    scales and zeros.
    """
    BITS: tl.constexpr = CODE[0]
    IS_FP8: tl.constexpr = CODE[1]
    W: tl.constexpr = CODE[5]
    BLOCK_W: tl.constexpr = CODE[6]
    PIECES: tl.constexpr = CODE[7]
    CHUNKS: tl.constexpr = PIECES * BITS // 8  # pieces of a plane
    n = (n0 + tl.arange(0, there.shape[0])).to(tl.int64)
    rows = pieces_of(pointer + n[:, None] * n_step, there[:, None], W, BLOCK_W, CHUNKS)
    out = ()
    for p in tl.static_range(PIECES):
        out += (numbers(rows[p % CHUNKS], p // CHUNKS, BITS, IS_FP8, dtype),)
    return out


@triton.jit
def scales_of(pointers, n0, n_step, there, p, CODE: tl.constexpr):
    """The scales or zeros of piece p, in fp32: (1, BLOCK_W) of the group that the keys from n0 on
    are in, or (N,).
    """
    CHANNEL: tl.constexpr = CODE[3]
    GROUP: tl.constexpr = CODE[4]
    W: tl.constexpr = CODE[5]
    BLOCK_W: tl.constexpr = CODE[6]
    if CHANNEL:
        w = tl.arange(0, BLOCK_W)
        group = (n0 // GROUP).to(tl.int64)
        return tl.load(pointers + group * n_step + p * W + w, mask=w < W, other=0.0).to(tl.float32)[
            None, :
        ]
    else:
        n = n0 + tl.arange(0, there.shape[0])
        at = n.to(tl.int64) * n_step + p * W // GROUP
        return tl.load(pointers + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def packed_scores(q, k, n0, there, dtype: tl.constexpr, CODE: tl.constexpr):
    """q . k (M, N) of the packed keys from n0 on; k: pointers to codes, scales and zeros, and their
    steps.
    """
    codes_ptr, scale_ptr, zero_ptr, codes_n, scale_n = k
    IS_FP8: tl.constexpr = CODE[1]
    ZERO: tl.constexpr = CODE[2]
    CHANNEL: tl.constexpr = CODE[3]
    PIECES: tl.constexpr = CODE[7]
    codes = codes_of(codes_ptr, n0, codes_n, there, dtype, CODE)
    s = tl.zeros([q[0].shape[0], there.shape[0]], tl.float32)
    for p in tl.static_range(PIECES):
        scale = scales_of(scale_ptr, n0, scale_n, there, p, CODE)
        scale = scale * FP8 if IS_FP8 else scale
        wide = q[p].to(tl.float32)
        if CHANNEL:
            wide *= scale
            s = dot(narrow(wide, dtype), tl.trans(codes[p]), s)
            if ZERO:
                s += tl.sum(wide * scales_of(zero_ptr, n0, scale_n, there, p, CODE), axis=1)[
                    :, None
                ]
        else:
            piece = dot(q[p], tl.trans(codes[p]), None)
            if ZERO:
                piece += (
                    tl.sum(wide, axis=1)[:, None]
                    * scales_of(zero_ptr, n0, scale_n, there, p, CODE)[None, :]
                )
            s += piece * scale[None, :]
    return s


@triton.jit
def packed_keys(k, n0, there, dtype: tl.constexpr, CODE: tl.constexpr):
    """The keys from n0 on in fp32, in pieces (N, BLOCK_W), with their scales and zeros."""
    codes_ptr, scale_ptr, zero_ptr, codes_n, scale_n = k
    IS_FP8: tl.constexpr = CODE[1]
    ZERO: tl.constexpr = CODE[2]
    CHANNEL: tl.constexpr = CODE[3]
    PIECES: tl.constexpr = CODE[7]
    codes = codes_of(codes_ptr, n0, codes_n, there, tl.float32, CODE)
    out = ()
    for p in tl.static_range(PIECES):
        scale = scales_of(scale_ptr, n0, scale_n, there, p, CODE)
        scale = scale * FP8 if IS_FP8 else scale
        x = codes[p]
        if ZERO:
            zero = scales_of(zero_ptr, n0, scale_n, there, p, CODE)
            x += zero if CHANNEL else zero[:, None]
        out += (x * (scale if CHANNEL else scale[:, None]),)
    return out


@triton.jit
def add_packed(acc, p, fade, v, n0, there, dtype: tl.constexpr, CODE: tl.constexpr):
    """acc fade + p v, piece by piece, of the packed values from n0 on."""
    codes_ptr, scale_ptr, zero_ptr, codes_n, scale_n = v
    IS_FP8: tl.constexpr = CODE[1]
    ZERO: tl.constexpr = CODE[2]
    CHANNEL: tl.constexpr = CODE[3]
    PIECES: tl.constexpr = CODE[7]
    codes = codes_of(codes_ptr, n0, codes_n, there, dtype, CODE)
    out = ()
    for part in tl.static_range(PIECES):
        scale = scales_of(scale_ptr, n0, scale_n, there, part, CODE)
        scale = scale * FP8 if IS_FP8 else scale
        faded = acc[part] * fade[:, None]
        if CHANNEL:
            product = dot(narrow(p, dtype), codes[part], None)
            if ZERO:
                product += tl.sum(p, axis=1)[:, None] * scales_of(
                    zero_ptr, n0, scale_n, there, part, CODE
                )
            faded += product * scale
        else:
            weighed = p * scale[None, :]
            faded = dot(narrow(weighed, dtype), codes[part], faded)
            if ZERO:
                zero = scales_of(zero_ptr, n0, scale_n, there, part, CODE)
                faded += tl.sum(weighed * zero[None, :], axis=1)[:, None]
        out += (faded,)
    return out


@triton.jit
def add_full(acc, p, fade, v, PIECES: tl.constexpr):
    """acc fade + p v, piece by piece."""
    out = ()
    for part in tl.static_range(PIECES):
        out += (dot(narrow(p, v[part].dtype), v[part], acc[part] * fade[:, None]),)
    return out


@triton.jit
def full_scores(q, k, PIECES: tl.constexpr):
    """q k' (M, N) of keys in full precision, piece by piece."""
    s = dot(q[0], tl.trans(k[0]), None)
    for p in tl.static_range(1, PIECES):
        s = dot(q[p], tl.trans(k[p]), s)
    return s


@triton.jit
def turned(
    k,
    j,
    inv_freq,
    slow,
    scaling,
    dtype: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PIECES: tl.constexpr,
    R2: tl.constexpr,
):
    """Keys in pieces, rotated to j / slow: channel d < R2 with d + R2, so pieces with pieces; the
    others are as they were."""
    HALF: tl.constexpr = R2 // W
    low, high = (), ()
    for p in tl.static_range(HALF):
        cos, sin = cos_sin(angles(j, inv_freq + p * W, slow, W, BLOCK_W))
        a, b = k[p].to(tl.float32), k[p + HALF].to(tl.float32)
        low += (narrow((a * cos - b * sin) * scaling, dtype),)
        high += (narrow((b * cos + a * sin) * scaling, dtype),)
    rest = ()
    for p in tl.static_range(2 * HALF, PIECES):
        rest += (narrow(k[p].to(tl.float32), dtype),)
    return low + high + rest


@triton.jit
def turned_scores(
    q, q_far, k, i, j, turn, dtype: tl.constexpr, CODE: tl.constexpr, TURN: tl.constexpr
):
    """Scores of keys in pieces that are rotated now; far ones of q_far."""
    W: tl.constexpr = CODE[5]
    BLOCK_W: tl.constexpr = CODE[6]
    PIECES: tl.constexpr = CODE[7]
    R2: tl.constexpr = TURN[0]
    SLOWED: tl.constexpr = TURN[1]
    inv_freq, scaling, window, slow = turn
    at = tl.reshape(j, [j.shape[1]])
    s = full_scores(q, turned(k, at, inv_freq, 1.0, scaling, dtype, W, BLOCK_W, PIECES, R2), PIECES)
    if q_far is not None:
        at = at if SLOWED else at * 0
        far = full_scores(
            q_far, turned(k, at, inv_freq, slow, scaling, dtype, W, BLOCK_W, PIECES, R2), PIECES
        )
        s = tl.where(i - j >= window, far, s)
    return s


@triton.jit
def peak(s, highest):
    """Scores in bits, -inf for what is hidden: weights p, the factor for all that came before, and
    the new maximum.
    """
    higher = tl.maximum(highest, tl.max(s, axis=1))
    # rows that have seen nothing yet: no inf - inf
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return tl.exp2(s - base[:, None]), tl.exp2(highest - base), higher
