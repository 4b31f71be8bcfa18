"""What the flash kernels share: products and memory, which tiles to visit, and which pairs of a
tile count.

A pattern (the table in `triton_impl`) is two jitted functions of positions, KEYS and QUERIES: the
interval that a token sees, and the one that it is seen from; and NEAR, a predicate, if there are
holes in them. Asked with the ends of a tile they say which tiles to visit, asked with vectors which
pairs count. Tiles come in three kinds:

    INNER   all pairs count: no predicate
    EDGE    the borders of the pattern, the diagonal, the ends of the tensors
    FIRST   slots and the keys that all queries see, which may be scored with other queries

INNER tiles are BLOCK wide. The others go in smaller STEPs: that wastes less of them, and their
predicates need the registers. Legend, for the kernels too:

    r, c     row of a query in its tensor, number of a key in its tensor
    i, j     position of a query and of a key
    place    (slots, base, first, window): key slots + n is at position base + n, those below first
             are seen by all
    PART     of the pattern's pairs: ALL, those NEARER than window (i - j < window), or the FARTHER
             ones
    numbers  (heads, a, b, c), a to c the pattern's integers
    FAR      beyond every position
    drop     (numbers of queries, numbers of keys, least), the ones a tile's and the others behind a
             pointer: which weights are 0 (`dropout`). Of one element: none is
"""

import triton
import triton.language as tl

from . import dropout

INNER, EDGE, FIRST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ALL, NEARER, FARTHER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FAR = tl.constexpr(1 << 28)  # sums of a few of these fit in int32
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# numbers of a launch that are not worth machine code of their own
VARYING = ["q_len", "k_len", "slots", "tail", "first", "window", "a", "b", "c", "step", "n_params"]
VARYING += ["least", "drop_b"]
STEPS = tl.constexpr(dropout.STEPS)
# the interpreter's bf16 needs help in `narrow` and `dot`
EMULATED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """To `dtype`, to nearest even. (The interpreter would cut bf16 off.)"""
    if EMULATED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a b in fp32; fp32 inputs without TF32."""
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
def load_rows(
    base,
    row,
    stride,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECK: tl.constexpr,
):
    """A tile of rows. CHECK: they may go beyond the last, and read as 0 there."""
    pointers = _tile(base, row, stride, ROWS, COLUMNS)
    if CHECK:
        return tl.load(pointers, mask=_exists(row, rows, WIDTH, ROWS, COLUMNS), other=0.0)
    elif WIDTH < COLUMNS:
        return tl.load(pointers, mask=tl.arange(0, COLUMNS)[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def save_rows(
    x, base, row, stride, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes x (ROWS, COLUMNS) from row `row` on, what exists of it."""
    pointers = _tile(base, row, stride, ROWS, COLUMNS)
    tl.store(
        pointers, narrow(x, base.dtype.element_ty), mask=_exists(row, rows, WIDTH, ROWS, COLUMNS)
    )


@triton.jit
def head_of(base, b, h, stride_b, stride_h):
    """Where the memory of row b and head h begins."""
    return base + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h


@triton.jit
def start_of(start, b):
    """Row number of the first real token of row b."""
    return 0 if start is None else tl.load(start + b).to(tl.int32)


# ---- which tiles. A run of them is (first element, how many tiles until the hole, elements of the
# hole, tiles in all).


@triton.jit
def next_tile(t, run, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The first element of tile t of a run. Only EDGE runs have a hole: the INNER one."""
    return run[0] + t * BLOCK + (tl.where(t < run[1], 0, run[2]) if KIND == EDGE else 0)


@triton.jit
def _cut(low, high, all_low, all_high, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """[low, high) as an EDGE run of STEPs around an INNER run of BLOCKs, which lies inside of
    [all_low, all_high).
    """
    start = low + tl.cdiv(tl.maximum(all_low - low, 0), STEP) * STEP
    inner = tl.maximum(tl.minimum(all_high, high) - start, 0) // BLOCK
    left = tl.where(inner > 0, (start - low) // STEP, 0)
    right = tl.cdiv(tl.maximum(high - low - left * STEP - inner * BLOCK, 0), STEP)
    return (low, left, inner * BLOCK, left + right), (low + left * STEP, 0, 0, inner)


@triton.jit
def keys_to_visit(
    i_low,
    i_last,
    h,
    k_len,
    place,
    numbers,
    KEYS: tl.constexpr,
    NEAR: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """For queries at positions i_low .. i_last, the runs of keys: FIRST, EDGE and INNER."""
    slots, base, first, window = place
    low, all_high = KEYS(tl.maximum(i_low, 0), h, *numbers)
    all_low, high = KEYS(i_last, h, *numbers)
    if CAUSAL:
        high, all_high = tl.minimum(high, i_last + 1), tl.minimum(all_high, i_low + 1)
    if PART == NEARER:
        low, all_low = tl.maximum(low, i_low - window + 1), tl.maximum(all_low, i_last - window + 1)
    elif PART == FARTHER:
        high, all_high = (
            tl.minimum(high, i_last - window + 1),
            tl.minimum(all_high, i_low - window + 1),
        )
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
        prefix_tiles = tl.where(
            i_last < 0, 0, tl.cdiv(tl.maximum(prefix_high - prefix_low, 0), STEP)
        )
        if PART == NEARER:  # none, where all of them are farther
            prefix_tiles = tl.where(i_low - window + 1 >= tl.maximum(first, slots), 0, prefix_tiles)
        low = tl.maximum(low, prefix_low + prefix_tiles * STEP)
    edge, inner = _cut(low, high, all_low + zero, all_high + zero, BLOCK, STEP)
    return (prefix_low, 0, 0, prefix_tiles), edge, inner


@triton.jit
def _seen_from(
    j_low,
    j_last,
    h,
    place,
    numbers,
    QUERIES: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    PART: tl.constexpr,
):
    """Positions [low, high) of the queries that may see some key at j_low .. j_last, and of those
    that see them all.
    """
    _, _, first, window = place
    low, all_high = QUERIES(tl.maximum(j_low, 0), h, *numbers)
    all_low, high = QUERIES(j_last, h, *numbers)
    if PREFIX:  # the keys that everyone sees
        low, high = tl.where(j_low < first, 0, low), tl.where(j_low < first, FAR, high)
    if CAUSAL:
        low, all_low = tl.maximum(low, j_low), tl.maximum(all_low, j_last)
    if PART == NEARER:
        high, all_high = tl.minimum(high, j_last + window), tl.minimum(all_high, j_low + window)
    elif PART == FARTHER:
        low, all_low = tl.maximum(low, j_low + window), tl.maximum(all_low, j_last + window)
    empty = j_last < tl.maximum(j_low, 0)
    return (
        tl.where(empty, FAR, tl.maximum(low, 0)),
        tl.where(empty, 0, high),
        tl.maximum(all_low, 0),
        all_high,
    )


@triton.jit
def queries_to_visit(
    n,
    h,
    q_len,
    k_len,
    i_zero,
    place,
    numbers,
    QUERIES: tl.constexpr,
    NEAR: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    OTHER: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For keys n .. n + BLOCK_N - 1, the runs of queries: FIRST, EDGE and INNER. OTHER: if some of
    the keys are scored with other queries, all is FIRST."""
    slots, base, first, _ = place
    end = tl.minimum(n + BLOCK_N, k_len)
    j_low = tl.maximum(n, slots) - slots + base
    low, high, all_low, all_high = _seen_from(
        j_low, end - 1 - slots + base, h, place, numbers, QUERIES, CAUSAL, PREFIX, PART
    )
    if NEAR is not None:
        all_high = 0
    if PREFIX:  # slots and contiguous keys may share a tile
        slot_low, slot_high, _, _ = _seen_from(
            n, tl.minimum(end, slots) - 1, h, place, numbers, QUERIES, CAUSAL, PREFIX, PART
        )
        low, high = tl.minimum(low, slot_low), tl.maximum(high, slot_high)
        all_high = tl.where(n < slots, 0, all_high)
    low, high = tl.maximum(low - i_zero, 0), tl.minimum(high - i_zero, q_len)
    to_other = 0
    if OTHER:
        has_first = (n < slots) | (j_low < first)
        to_other = tl.where(has_first, tl.cdiv(tl.maximum(high - low, 0), STEP), 0)
        high = tl.where(has_first, 0, high)
    edge, inner = _cut(low, high, all_low - i_zero, all_high - i_zero, BLOCK_M, STEP)
    return (low, 0, 0, to_other), edge, inner


# ---- which pairs


@triton.jit
def positions(n, mask, k_len, place, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The positions of keys n .. n + BLOCK - 1; negative for those that are not there, but in INNER
    tiles.
    """
    slots, base, _, _ = place
    c = n + tl.arange(0, BLOCK)
    j = c - slots + base
    if KIND == FIRST:
        j = tl.where(c < slots, c, j)
    if KIND != INNER:
        j = tl.where(
            c < k_len if mask is None else tl.load(mask + c, mask=c < k_len, other=0) != 0, j, -1
        )
    return j


@triton.jit
def bounds_of_queries(
    i, h, window, numbers, KEYS: tl.constexpr, CAUSAL: tl.constexpr, PART: tl.constexpr
):
    """[low, high) of the keys that each query sees by the pattern, and [begin, end) of all that it
    may see at all.
    """
    low, high = KEYS(i, h, *numbers)
    begin, end = 0, i + 1 if CAUSAL else FAR
    if PART == NEARER:
        begin = tl.maximum(i - window + 1, 0)
    elif PART == FARTHER:
        end = i - window + 1
    end = tl.where(i < 0, 0, end)
    return tl.maximum(low, begin), tl.minimum(high, end), begin, end


@triton.jit
def visible(i, j, h, bounds, place, numbers, NEAR: tl.constexpr, SINKS: tl.constexpr):
    """Which pairs count. All that can be is asked of the queries alone, by `bounds`: two
    comparisons a pair.
    """
    low, high, begin, end = bounds
    near = (j >= low) & (j < high)
    if NEAR is not None:
        near = near & NEAR(i, j, h, *numbers)
    if SINKS:
        near = near | (j >= begin) & (j < tl.minimum(place[2], end))
    return near


@triton.jit
def bounds_of_keys(
    j,
    h,
    end,
    place,
    numbers,
    QUERIES: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    PART: tl.constexpr,
):
    """[low, high) of the queries, of those before `end`, that see each key."""
    _, _, first, window = place
    low, high = QUERIES(j, h, *numbers)
    if PREFIX:
        low, high = tl.where(j < first, 0, low), tl.where(j < first, FAR, high)
    if CAUSAL:
        low = tl.maximum(low, j)
    if PART == NEARER:
        high = tl.minimum(high, j + window)
    elif PART == FARTHER:
        low = tl.maximum(low, j + window)
    return tl.maximum(low, 0), tl.where(j < 0, 0, tl.minimum(high, end))


# ---- dropout


@triton.jit
def _kept(q, k, least):
    """Which pairs of queries and keys with these numbers are kept: `dropout.Dropout.kept`."""
    x = (q ^ k).to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * tl.full([1, 1], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([1, 1], 0x846CA68B, tl.uint32)
    return ((x ^ (x >> 16)) >> 8).to(tl.int32) >= least


@triton.jit
def drop_factor(least):
    """What weights that are kept are multiplied by."""
    return 1 / (1 - tl.cast(least, tl.float32) / STEPS)


@triton.jit
def dropped_by_keys(p, drop, n, k_len, BLOCK: tl.constexpr):
    """p (M, BLOCK) of a tile of queries and the keys from n on, 0 where it is dropped."""
    keys = n + tl.arange(0, BLOCK)
    numbers = tl.load(drop[1] + keys, mask=keys < k_len, other=0)[None, :]
    return tl.where(_kept(drop[0], numbers, drop[2]), p, 0.0)


@triton.jit
def dropped_by_queries(p, drop, rows, q_len):
    """p (N, M) of a tile of keys and these rows of queries, 0 where it is dropped."""
    numbers = tl.load(drop[0] + rows, mask=rows < q_len, other=0)[None, :]
    return tl.where(_kept(numbers, drop[1], drop[2]), p, 0.0)
