"""What the decode kernels share: products, which keys a tile has and where they stand, who sees
them, the softmax.

M: rows of a tile, the Tq queries of the G = Hq / Hkv heads that share a K/V head, so that K and V
are read once. N: keys of a tile. i and h: position and head of each row (M, 1); j: position of each
key (1, N), negative: not there. c: the number of each key in its tensor (N,)."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# the interpreter's bf16 needs help in `dot` and `narrow`
EMULATED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def in_window(i, j, h, heads, back, ahead, _):
    """The jitted twin of `Window.near`."""
    return (j > i - back) & (j < i + ahead)


@triton.jit
def in_blocks(i, j, h, heads, size, look_back, half):
    """The jitted twin of `Blocks.near`; the division is by rows only, so it leaves the loop over
    keys.
    """
    shift = tl.where(h >= heads // 2, half, 0)
    border = (i + shift) // size * size
    return (j + shift >= border - look_back * size) & (j + shift < border + size)


@triton.jit
def dot(a, b, acc):
    """a b + acc in fp32. The interpreter would multiply the bits of bf16 numbers."""
    if EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even. The interpreter would cut bf16 off."""
    if EMULATED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """No tanh of Triton's runs everywhere. Small x by its series: 1 - 2 / (exp(2x) + 1) would lose
    their digits.
    """
    square = x * x
    series = x * (
        1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    )
    return tl.where(square < 0.0625, series, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))


@triton.jit
def tile_keys(
    tile, origin, slots, tail, head, low, high, HEAD: tl.constexpr, BLOCK_N: tl.constexpr
):
    """c, and which of them are keys, and this tile's to count: of `head` ones from the front (HEAD:
    slots and first keys) and then those at [low, high)."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if HEAD:
        front = (head + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        skipped = tl.maximum(origin - tail, 0)  # padding between the slots and the first real key
        c = tl.where(n < front, tl.where(n < slots, n, n + skipped), n - front + low)
        return c, tl.where(n < front, (n < head) & (c < low), c < high)
    else:
        return n + low, n + low < high


@triton.jit
def key_positions(c, is_key, origin, slots, tail, slots_at_ptr, ring_ptr, mask_ptr):
    """j; `mask_ptr`, if there is one, at this row of the batch."""
    if ring_ptr is None:
        number = c - slots + tail
    else:
        number = tl.load(ring_ptr + (c - slots), mask=is_key & (c >= slots), other=-1).to(tl.int32)
    slot = (
        c
        if slots_at_ptr is None
        else tl.load(slots_at_ptr + c, mask=c < slots, other=0).to(tl.int32)
    )
    j = tl.where(c < slots, slot, number - origin)
    if mask_ptr is not None:
        j = tl.where(tl.load(mask_ptr + c, mask=is_key, other=0) != 0, j, -1)
    return j[None, :]


@triton.jit
def sees(
    i, j, h, heads, is_key, first, near_a, near_b, near_c, NEAR: tl.constexpr, CAUSAL: tl.constexpr
):
    """Which pairs of a tile count, (M, N) bool."""
    visible = is_key[None, :] & (j >= 0) & (i >= 0)
    if CAUSAL:
        visible &= j <= i
    if NEAR is not None:
        visible &= NEAR(i, j, h, heads, near_a, near_b, near_c) | (j < first)
    return visible


@triton.jit
def soften(sums, s, v, count):
    """Goes on with sums = (acc (M, Dv), highest (M,), weight (M,)): scores s (M, N) in bits, -inf
    for what is hidden, `count` times each (None: once)."""
    acc, highest, weight = sums
    higher = tl.maximum(highest, tl.max(s, axis=1))
    # rows that have seen nothing yet: no inf - inf
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - base[:, None])
    if count is not None:
        p *= count
    fade = tl.exp2(highest - base)
    weight = weight * fade + tl.sum(p, axis=1)
    acc = dot(narrow(p, v.dtype), v, acc * fade[:, None])
    return acc, higher, weight


@triton.jit
def finish(
    sums,
    out_ptr,
    lse_ptr,
    split,
    b,
    h,
    t,
    is_row,
    heads,
    queries,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Stores the normalised output of a split and its log-sum-exp."""
    acc, highest, weight = sums
    dv = tl.arange(0, BLOCK_DV)
    weight = tl.where(weight > 0, weight, 1.0)  # a row that saw nothing: 0, and -inf from `highest`
    acc = narrow(acc / weight[:, None], out_ptr.dtype.element_ty)
    row = ((split * tl.num_programs(2) + b) * heads + h) * queries + t  # int64, as b is
    tl.store(
        out_ptr + row[:, None] * DV + dv[None, :], acc, mask=is_row[:, None] & (dv < DV)[None, :]
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + row, (highest + tl.log2(weight)) * LN2, mask=is_row)
