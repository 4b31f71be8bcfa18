"""Projection along time in Triton: slots = E x, and the gradients of both.

    B, H, T, K, D     batch, heads, tokens, slots, head size (padded to BLOCK_D)
    BLOCK_K, BLOCK_T  slots, and positions or tokens in a tile
    p                 a position, counted from a row's token number start[b]
    x_b, x_h, x_t     strides of x by row of the batch, head and token
    w_h, w_k          strides of the weight (w_h 0: shared)

The weight is float32; products are in x's dtype, on tensor cores where there are some, and sums in
float32."""

import triton
import triton.language as tl

from ..flash.triton_pieces import FAR, dot, head_of, load_rows, narrow, save_rows, start_of


@triton.jit
def _tokens(
    x, p, at, mask, x_t, t_len, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The tokens at positions p .. p + BLOCK_T - 1 (number `at` more); those that are not real read
    as 0.
    """
    t = p + at + tl.arange(0, BLOCK_T)
    real = t < t_len
    if mask is not None:
        real = real & (tl.load(mask + t, mask=real, other=0) != 0)
    d = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(
        x + tl.cast(t, tl.int64)[:, None] * x_t + d, mask=real[:, None] & (d < D), other=0.0
    )


@triton.jit
def _weights(w, i, p, w_k, slots, end, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr):
    """weight[i .. i + BLOCK_K - 1, p .. p + BLOCK_T - 1], 0 from position `end` on."""
    row, column = i + tl.arange(0, BLOCK_K)[:, None], p + tl.arange(0, BLOCK_T)[None, :]
    return tl.load(
        w + tl.cast(row, tl.int64) * w_k + column, mask=(row < slots) & (column < end), other=0.0
    )


@triton.jit(do_not_specialize=["t_len", "tiles_a_split"])
def project(
    x,
    w,
    start,
    mask,
    out,
    x_b,
    x_h,
    x_t,
    w_h,
    w_k,
    mask_b,
    heads,
    slots,
    t_len,
    tiles_a_split,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out (splits, B, H, K, D) fp32: one split of the positions for one tile of slots. Grid (B * H
    * tiles, splits).
    """
    tiles = tl.cdiv(slots, BLOCK_K)
    program, split = tl.program_id(0), tl.program_id(1)
    i, h, b = program % tiles * BLOCK_K, program // tiles % heads, program // tiles // heads
    at = start_of(start, b)
    if mask is not None:
        mask += tl.cast(b, tl.int64) * mask_b
    x = head_of(x, b, h, x_b, x_h)
    w += tl.cast(h, tl.int64) * w_h
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    low = split * tiles_a_split * BLOCK_T
    high = tl.minimum(low + tiles_a_split * BLOCK_T, t_len - at)
    for p in range(low, high, BLOCK_T):
        tile = _tokens(x, p, at, mask, x_t, t_len, D, BLOCK_T, BLOCK_D)
        weight = _weights(w, i, p, w_k, slots, t_len - at, BLOCK_K, BLOCK_T)
        acc = dot(narrow(weight, tile.dtype), tile, acc)
    rows = tl.num_programs(0) // tiles  # of (B, H)
    head = (tl.cast(split, tl.int64) * rows + b * heads + h) * slots
    save_rows(acc, out + head * D, i, D, slots, D, BLOCK_K, BLOCK_D)


@triton.jit(do_not_specialize=["t_len"])
def token_gradient(
    grad,
    w,
    start,
    mask,
    dx,
    w_h,
    w_k,
    mask_b,
    heads,
    slots,
    t_len,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx (B, H, T, D), dense: the weight's columns times grad (B, H, K, D); one program per tile of
    tokens.
    """
    tiles = tl.cdiv(t_len, BLOCK_T)
    program = tl.program_id(0)
    t, h, b = program % tiles * BLOCK_T, program // tiles % heads, program // tiles // heads
    p = t - start_of(start, b)
    number = t + tl.arange(0, BLOCK_T)
    real = (number < t_len) & (p + tl.arange(0, BLOCK_T) >= 0)
    if mask is not None:
        real = real & (
            tl.load(mask + tl.cast(b, tl.int64) * mask_b + number, mask=real, other=0) != 0
        )
    w += tl.cast(h, tl.int64) * w_h
    grad += tl.cast(b * heads + h, tl.int64) * slots * D
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    column = (p + tl.arange(0, BLOCK_T))[None, :]
    for i in range(0, slots, BLOCK_K):
        row = i + tl.arange(0, BLOCK_K)[:, None]
        seen = (row < slots) & real[None, :]
        weight = tl.load(w + tl.cast(row, tl.int64) * w_k + column, mask=seen, other=0.0)
        tile = load_rows(grad, i, D, slots, D, BLOCK_K, BLOCK_D, True)
        acc = dot(tl.trans(narrow(weight, tile.dtype)), tile, acc)
    save_rows(
        acc, dx + tl.cast(b * heads + h, tl.int64) * t_len * D, t, D, t_len, D, BLOCK_T, BLOCK_D
    )


@triton.jit(do_not_specialize=["t_len", "batch"])
def weight_gradient(
    grad,
    x,
    start,
    mask,
    dw,
    x_b,
    x_h,
    x_t,
    mask_b,
    heads,
    shared,
    slots,
    n_len,
    t_len,
    batch,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dw (H / shared, K, N) fp32, of the first T columns: the sum over the batch, and over the
    `shared` heads that have one weight, of grad x^T. One program per tile of dw: no atomics, the
    same every time."""
    across, down = tl.cdiv(t_len, BLOCK_T), tl.cdiv(slots, BLOCK_K)
    program = tl.program_id(0)
    p, i = program % across * BLOCK_T, program // across % down * BLOCK_K
    owner = program // across // down
    acc = tl.zeros([BLOCK_K, BLOCK_T], tl.float32)
    for n in range(0, batch * shared):
        b, h = n // shared, owner * shared + n % shared
        row_mask = mask
        if mask is not None:
            row_mask = mask + tl.cast(b, tl.int64) * mask_b
        tile = _tokens(
            head_of(x, b, h, x_b, x_h),
            p,
            start_of(start, b),
            row_mask,
            x_t,
            t_len,
            D,
            BLOCK_T,
            BLOCK_D,
        )
        own = load_rows(
            grad + tl.cast(b * heads + h, tl.int64) * slots * D,
            i,
            D,
            slots,
            D,
            BLOCK_K,
            BLOCK_D,
            True,
        )
        acc = dot(own, tl.trans(tile), acc)
    row, column = i + tl.arange(0, BLOCK_K)[:, None], p + tl.arange(0, BLOCK_T)[None, :]
    place = (tl.cast(owner, tl.int64) * slots + row) * n_len + column
    tl.store(dw + place, acc, mask=(row < slots) & (column < t_len))


# ---- `Earlier` for the flash kernels: [low, high) of the slots that a query at x sees, of the
# queries that see a slot


@triton.jit
def earlier_keys(x, h, heads, size, slots, offset):
    """Slots that the query at x sees: those of earlier blocks."""
    return x * 0 + offset, offset + x // size * slots


@triton.jit
def earlier_queries(x, h, heads, size, slots, offset):
    """Queries that see slot x: those of later blocks."""
    return ((x - offset) // slots + 1) * size, x * 0 + FAR
