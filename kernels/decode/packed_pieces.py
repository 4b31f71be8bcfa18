"""What attention over a packed cache is put together from: codes and scales piece by piece, scores,
and sums. The letters and the formulas are those of `packed_kernels`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..pack.triton_kernels import FP8, numbers
from .triton_pieces import EMULATED, dot, narrow
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
def strided_pieces(pointers, there, CODE: tl.constexpr):
    """The rows of `pieces_of`, one tensor for each piece of codes: channels STEP apart."""
    STEP: tl.constexpr = CODE[8]
    W: tl.constexpr = CODE[5] // STEP
    BLOCK_W: tl.constexpr = CODE[6] // STEP
    d = tl.arange(0, BLOCK_W)[None, :]
    out = ()
    for p in tl.static_range(CODE[7] * STEP):
        at = p // STEP * (W * STEP) + p % STEP + d * STEP
        out += (tl.load(pointers + at, mask=there & (d < W), other=0.0),)
    return out


@triton.jit
def codes_of(pointer, n0, n_step, there, dtype: tl.constexpr, CODE: tl.constexpr):
    """The numbers of the keys from n0 on, those `there` (N,), in pieces (N, BLOCK_W / STEP),
    without scales and zeros.

    STEP bytes are one element: with 2, neighbours along the keys that a matrix unit wants in one
    register are together without moving bytes, and one shift serves both."""
    BITS: tl.constexpr = CODE[0]
    IS_FP8: tl.constexpr = CODE[1]
    STEP: tl.constexpr = CODE[8]
    W: tl.constexpr = CODE[5] // STEP
    BLOCK_W: tl.constexpr = CODE[6] // STEP
    CHUNKS: tl.constexpr = CODE[7] * BITS // 8  # blocks of channels in a plane
    n = (n0 + tl.arange(0, there.shape[0])).to(tl.int64)
    at = pointer + n[:, None] * n_step
    if STEP == 2:
        at = at.to(tl.pointer_type(tl.uint16))
    rows = pieces_of(at, there[:, None], W, BLOCK_W, CHUNKS)
    out = ()
    for p in tl.static_range(CODE[7] * STEP):
        # (only written so are they constants)
        out += (
            numbers(
                rows[p // STEP % CHUNKS],
                p // STEP // CHUNKS * BITS + p % STEP * 8,
                BITS,
                IS_FP8,
                dtype,
                CODE[9],
            ),
        )
    return out


@triton.jit
def scales_of(pointers, n0, n_step, there, CODE: tl.constexpr):
    """The scales or zeros of all pieces, as they are read: (BLOCK_W / STEP,) of the group that the
    keys from n0 on are in, for each block of channels; or (N,) for each group of channels. Two lie
    in one uint32 where STEP is 2, or groups are even in number; or those of two tokens, (N / 2,),
    where there is one group."""
    STEP: tl.constexpr = CODE[8]
    W: tl.constexpr = CODE[5]
    GROUPS: tl.constexpr = W * CODE[7] // CODE[4]
    out = ()
    if CODE[3]:
        w = tl.arange(0, CODE[6] // STEP)
        at = pointers + (n0 // CODE[4]).to(tl.int64) * n_step
        if STEP == 2:
            at = at.to(tl.pointer_type(tl.uint32))
        for block in tl.static_range(CODE[7]):
            out += (tl.load(at + block * (W // STEP) + w, mask=w < W // STEP, other=0),)
    elif CODE[10]:
        at = (pointers + n0.to(tl.int64)).to(tl.pointer_type(tl.uint32))
        out += (tl.load(at + tl.arange(0, there.shape[0] // 2)),)
    else:
        at = pointers + (n0 + tl.arange(0, there.shape[0])).to(tl.int64) * n_step
        if GROUPS % 2 == 0:
            at = at.to(tl.pointer_type(tl.uint32))
        for g in tl.static_range(GROUPS // 2 if GROUPS % 2 == 0 else GROUPS):
            out += (tl.load(at + g, mask=there, other=0),)
    return out


@triton.jit
def of_piece(read, p: tl.constexpr, kind: tl.constexpr, CODE: tl.constexpr):
    """Of what `scales_of` read, numbers of `kind`, those of piece p in fp32, broadcastable to (N,
    BLOCK_W / STEP)."""
    STEP: tl.constexpr = CODE[8]
    W: tl.constexpr = CODE[5]
    if CODE[3]:
        return half_of(read[p // STEP], p % STEP, kind)[None, :]
    elif CODE[10]:
        return tl.interleave(half_of(read[0], 0, kind), half_of(read[0], 1, kind))[:, None]
    else:
        g: tl.constexpr = p // STEP * W // CODE[4]
        if W * CODE[7] // CODE[4] % 2 == 0:
            return half_of(read[g // 2], g % 2, kind)[:, None]
        else:
            return half_of(read[g], 0, kind)[:, None]


@triton.jit
def half_of(words, half: tl.constexpr, kind: tl.constexpr):
    """The 16-bit numbers in one half of 32-bit words, or all of what is no word, in fp32."""
    if words.dtype != tl.uint32:
        return words.to(tl.float32)
    elif kind == tl.bfloat16:
        bits = words & 0xFFFF0000 if half else words << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return (words >> (16 * half)).to(tl.uint16).to(kind, bitcast=True).to(tl.float32)


@triton.jit
def times(x, scale, zero, FP8_CODES: tl.constexpr, dtype: tl.constexpr):
    """(x + zero) scale in `dtype`, of numbers that are exact in it."""
    scale = scale * FP8 if FP8_CODES else scale
    if EMULATED:
        x = x.to(tl.float32)
        return narrow(x * scale if zero is None else x * scale + zero * scale, dtype)
    y = x * scale.to(dtype)
    return y if zero is None else y + (zero * scale).to(dtype)


@triton.jit
def within(q, dtype: tl.constexpr, PIECES: tl.constexpr):
    """q in `dtype`, and what it was divided by to be in its range (M, 1)."""
    most = tl.max(tl.abs(q[0].to(tl.float32)), axis=1)
    for p in tl.static_range(1, PIECES):
        most = tl.maximum(most, tl.max(tl.abs(q[p].to(tl.float32)), axis=1))
    most = tl.where(most == 0, 1.0, most)[:, None]
    out = ()
    for p in tl.static_range(PIECES):
        out += ((q[p].to(tl.float32) / most).to(dtype),)
    return out, most


@triton.jit
def packed_scores(q, k, n0, there, dtype: tl.constexpr, CODE: tl.constexpr):
    """q . k (M, N) of the packed keys from n0 on, q as `strided_pieces`, in `dtype`; k: pointers to
    codes, scales and zeros, and their steps.

    In 8 bits the scales of a tile are made 1 at most, so that fp16 can hold any."""
    codes_ptr, scale_ptr, zero_ptr, codes_n, scale_n = k
    ZERO: tl.constexpr = CODE[2]
    CHANNEL: tl.constexpr = CODE[3]
    PIECES: tl.constexpr = CODE[7] * CODE[8]
    WITHIN: tl.constexpr = CODE[0] == 8 and CHANNEL and dtype == tl.float16
    codes = codes_of(codes_ptr, n0, codes_n, there, dtype, CODE)
    scales = scales_of(scale_ptr, n0, scale_n, there, CODE)
    zeros = scales_of(zero_ptr, n0, scale_n, there, CODE) if ZERO else None
    s = tl.zeros([q[0].shape[0], there.shape[0]], tl.float32)
    if WITHIN:
        most = largest(scales, CODE)
        less = 1.0 / most
    for p in tl.static_range(PIECES):
        scale = of_piece(scales, p, tl.bfloat16, CODE)
        zero = of_piece(zeros, p, tl.float16, CODE) if ZERO else None
        if CHANNEL:
            scale = scale * less if WITHIN else scale
            key = times(codes[p], scale, zero, CODE[1], dtype)
            s = dot(q[p], tl.trans(key), s)
        else:
            piece = dot(q[p], tl.trans(codes[p]), None)
            if ZERO:
                piece += tl.sum(q[p].to(tl.float32), axis=1)[:, None] * tl.trans(zero)
            s += piece * tl.trans(scale * FP8 if CODE[1] else scale)
    return s * most if WITHIN else s


@triton.jit
def largest(scales, CODE: tl.constexpr):
    """The largest of all that `scales_of` read, which are not negative; 1 where all are 0."""
    most = half_of(scales[0], 0, tl.bfloat16)
    for n in tl.static_range(len(scales)):
        if n > 0:
            most = tl.maximum(most, half_of(scales[n], 0, tl.bfloat16))
        if scales[n].dtype == tl.uint32:
            most = tl.maximum(most, half_of(scales[n], 1, tl.bfloat16))
    most = tl.max(most, axis=0)
    return tl.where(most == 0, 1.0, most)


@triton.jit
def packed_keys(k, n0, there, CODE: tl.constexpr):
    """The keys from n0 on in fp32, in pieces (N, BLOCK_W), with their scales and zeros; STEP is
    1."""
    codes_ptr, scale_ptr, zero_ptr, codes_n, scale_n = k
    ZERO: tl.constexpr = CODE[2]
    codes = codes_of(codes_ptr, n0, codes_n, there, tl.float32, CODE)
    scales = scales_of(scale_ptr, n0, scale_n, there, CODE)
    zeros = scales_of(zero_ptr, n0, scale_n, there, CODE) if ZERO else None
    out = ()
    for p in tl.static_range(CODE[7]):
        zero = of_piece(zeros, p, tl.float16, CODE) if ZERO else None
        scale = of_piece(scales, p, tl.bfloat16, CODE)
        out += (times(codes[p], scale, zero, CODE[1], tl.float32),)
    return out


@triton.jit
def add_packed(acc, p, fade, v, n0, there, dtype: tl.constexpr, CODE: tl.constexpr):
    """acc fade + p v, piece by piece, of the packed values from n0 on; products are in `dtype`.

    Below 8 bits values are made whole, so that p is brought to the matrix unit once. In 8 bits a
    token's scale goes into its weight, made 1 at most, so that fp16 can hold any."""
    codes_ptr, scale_ptr, zero_ptr, codes_n, scale_n = v
    IS_FP8: tl.constexpr = CODE[1]
    ZERO: tl.constexpr = CODE[2]
    CHANNEL: tl.constexpr = CODE[3]
    codes = codes_of(codes_ptr, n0, codes_n, there, dtype, CODE)
    scales = scales_of(scale_ptr, n0, scale_n, there, CODE)
    zeros = scales_of(zero_ptr, n0, scale_n, there, CODE) if ZERO else None
    WHOLE: tl.constexpr = CODE[0] < 8
    if not WHOLE and not CHANNEL:
        most = largest(scales, CODE)
        less = 1.0 / most
    weights = narrow(p, dtype)
    out = ()
    for part in tl.static_range(CODE[7] * CODE[8]):
        scale = of_piece(scales, part, tl.bfloat16, CODE)
        zero = of_piece(zeros, part, tl.float16, CODE) if ZERO else None
        faded = acc[part] * fade[:, None]
        if WHOLE:
            faded = dot(weights, times(codes[part], scale, zero, False, dtype), faded)
        elif CHANNEL:
            product = dot(weights, codes[part], None)
            if ZERO:
                product += tl.sum(p, axis=1)[:, None] * zero
            faded += product * (scale * FP8 if IS_FP8 else scale)
        else:
            weighed = p * tl.trans(scale * less)
            product = dot(narrow(weighed, dtype), codes[part], None)
            if ZERO:
                product += tl.sum(weighed * tl.trans(zero), axis=1)[:, None]
            faded += product * (most * FP8 if IS_FP8 else most)
        out += (faded,)
    return out


@triton.jit
def side_by_side(acc, CODE: tl.constexpr):
    """Sums by piece (M, BLOCK_W / STEP) -> by block of channels (M, BLOCK_W)."""
    out = ()
    for block in tl.static_range(CODE[7]):
        if CODE[8] == 1:
            out += (acc[block],)
        else:
            pair = tl.join(acc[2 * block], acc[2 * block + 1])
            out += (tl.reshape(pair, [pair.shape[0], CODE[6]]),)
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
