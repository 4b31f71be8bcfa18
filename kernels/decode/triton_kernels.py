"""Flash-decoding in Triton: `attend` takes one split of the keys, `combine` merges the splits by log-sum-exp.

Shapes: q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), out ([splits,] B, Hq, Tq, Dv), lse without Dv.
M: rows of a tile, the Tq queries of the G = Hq / Hkv heads that share a K/V head, so that K and V are read once.
N: keys of a tile. i and h: position and head of each row (M, 1); j: position of each key (1, N), negative: not there.

Lengths, which change at every step, are never specialised on: a kernel that compiled at one length runs at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EMULATED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter's bf16 needs help in `dot` and `narrow`

CHANGING = (
    "mask_b", "c_b", "c_h", "c_t", "queries", "tail", "total", "slots", "first", "near_a", "near_b", "near_c",
    "head", "low", "high", "tiles", "tiles_a_split",
)  # fmt: skip


@triton.jit
def in_window(i, j, h, heads, back, ahead, _):
    """The jitted twin of `Window.near`."""
    return (j > i - back) & (j < i + ahead)


@triton.jit
def in_blocks(i, j, h, heads, size, look_back, half):
    """The jitted twin of `Blocks.near`; the division is by rows only, so it leaves the loop over keys."""
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
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """No tanh of Triton's runs everywhere. Small x by its series: 1 - 2 / (exp(2x) + 1) would lose their digits."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.0625, series, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))


@triton.jit(do_not_specialize=CHANGING)
def attend(
    q_ptr, q_first_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    start_ptr, mask_ptr, slots_at_ptr, ring_ptr, counts_ptr,
    q_b, q_h, q_t, f_b, f_h, f_t, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, c_b, c_h, c_t, c_n,
    group, row_tiles, inner, outer,
    queries, tail, total, slots, first, near_a, near_b, near_c, head, low, high, tiles, tiles_a_split,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NEAR: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """One split of the keys for one row tile of one K/V head: its normalised output and its log-sum-exp.

    Grid (splits * row_tiles, Hkv, B). Pointers that are None are absent. Scores in bits are q k * inner, or with
    SOFTCAP tanh(q k * inner) * outer. The keys read are `head` ones from the front (HEAD: slots and first keys)
    and then those at [low, high), in `tiles` tiles of BLOCK_N.
    """
    split = tl.program_id(0) // row_tiles
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * group

    r = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = r < group * queries
    h = kv_head * group + r // queries
    t = r % queries
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    origin = 0 if start_ptr is None else tl.load(start_ptr + b).to(tl.int32)
    i = (total - queries + t - origin)[:, None]

    h_wide = h.to(tl.int64)[:, None]
    q_mask = is_row[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + b * q_b + h_wide * q_h + t[:, None] * q_t + d[None, :], mask=q_mask, other=0.0)
    if q_first_ptr is not None:
        q_first = tl.load(q_first_ptr + b * f_b + h_wide * f_h + t[:, None] * f_t + d[None, :], mask=q_mask, other=0.0)
    if counts_ptr is not None:
        counts_ptr += b * c_b + h_wide * c_h + t[:, None].to(tl.int64) * c_t
    k_ptr += b * k_b + kv_head.to(tl.int64) * k_h
    v_ptr += b * v_b + kv_head.to(tl.int64) * v_h

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for tile in range(split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, tiles)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # c: the key's index in k, is_key: whether it is one, and this tile's to count.
        if HEAD:
            front = (head + BLOCK_N - 1) // BLOCK_N * BLOCK_N
            skipped = tl.maximum(origin - tail, 0)  # padding between the slots and the first real key
            c = tl.where(n < front, tl.where(n < slots, n, n + skipped), n - front + low)
            is_key = tl.where(n < front, (n < head) & (c < low), c < high)
        else:
            c = n + low
            is_key = c < high
        c_wide = c.to(tl.int64)[:, None]

        k_mask = is_key[:, None] if D == BLOCK_D else is_key[:, None] & (d < D)[None, :]
        v_mask = is_key[:, None] if DV == BLOCK_DV else is_key[:, None] & (dv < DV)[None, :]
        k = tl.load(k_ptr + c_wide * k_n + d[None, :], mask=k_mask, other=0.0)
        v = tl.load(v_ptr + c_wide * v_n + dv[None, :], mask=v_mask, other=0.0)

        if ring_ptr is None:
            number = c - slots + tail
        else:
            number = tl.load(ring_ptr + (c - slots), mask=is_key & (c >= slots), other=-1).to(tl.int32)
        slot = c if slots_at_ptr is None else tl.load(slots_at_ptr + c, mask=c < slots, other=0).to(tl.int32)
        j = tl.where(c < slots, slot, number - origin)
        if mask_ptr is not None:
            j = tl.where(tl.load(mask_ptr + b * mask_b + c, mask=is_key, other=0) != 0, j, -1)
        j = j[None, :]

        s = dot(q, tl.trans(k), None)
        if q_first_ptr is not None:
            s = tl.where((j >= 0) & (j < first), dot(q_first, tl.trans(k), None), s)
        s = tanh(s * inner) * outer if SOFTCAP else s * inner
        if counts_ptr is not None:
            count = tl.load(counts_ptr + c.to(tl.int64)[None, :] * c_n, mask=is_row[:, None] & is_key[None, :], other=0)
            count = count.to(tl.float32)
            visible = count > 0
        else:
            visible = is_key[None, :] & (j >= 0) & (i >= 0)
            if CAUSAL:
                visible &= j <= i
            if NEAR is not None:
                visible &= NEAR(i, j, h[:, None], heads, near_a, near_b, near_c) | (j < first)
        s = tl.where(visible, s, float("-inf"))

        higher = tl.maximum(highest, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # rows that have seen nothing yet: no inf - inf
        p = tl.exp2(s - base[:, None])
        if counts_ptr is not None:
            p *= count
        fade = tl.exp2(highest - base)
        weight = weight * fade + tl.sum(p, axis=1)
        acc = dot(narrow(p, v.dtype), v, acc * fade[:, None])
        highest = higher

    weight = tl.where(weight > 0, weight, 1.0)  # a row that saw nothing: 0, and -inf from `highest`
    acc = narrow(acc / weight[:, None], out_ptr.dtype.element_ty)
    row = ((split * tl.num_programs(2) + b) * heads + h) * queries + t  # int64, as b is
    tl.store(out_ptr + row[:, None] * DV + dv[None, :], acc, mask=is_row[:, None] & (dv < DV)[None, :])
    if lse_ptr is not None:
        tl.store(lse_ptr + row, (highest + tl.log2(weight)) * LN2, mask=is_row)


@triton.jit(do_not_specialize=["splits", "rows"])
def combine(
    parts_ptr, sums_ptr, out_ptr, lse_ptr, splits, rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One output row: parts (splits, rows, Dv) weighed by the softmax of their log-sum-exps sums (splits, rows)."""
    row = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    highest = float("-inf")
    weight = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for done in range(0, splits, CHUNK):
        s = done + tl.arange(0, CHUNK)
        at = s.to(tl.int64) * rows + row
        sums = tl.load(sums_ptr + at, mask=s < splits, other=float("-inf")) * LOG2E
        there = (s < splits)[:, None] & (dv < DV)[None, :]
        parts = tl.load(parts_ptr + at[:, None] * DV + dv[None, :], mask=there, other=0.0)
        higher = tl.maximum(highest, tl.max(sums, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(sums - base)
        fade = tl.exp2(highest - base)
        weight = weight * fade + tl.sum(p, axis=0)
        acc = acc * fade + tl.sum(p[:, None] * parts, axis=0)
        highest = higher
    weight = tl.where(weight > 0, weight, 1.0)
    tl.store(out_ptr + row * DV + dv, narrow(acc / weight, out_ptr.dtype.element_ty), mask=dv < DV)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, (highest + tl.log2(weight)) * LN2)
