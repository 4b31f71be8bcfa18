"""Products with a bitmask's matrix in Triton: masks and values are read once, as they lie.

Letters as in `effattn.kernels.bitmask.packed`. A tile is BLOCK_N rows of one segment, 64 bytes
each. Where a byte's weights begin is the segment's start and the bits of the bytes before; from
there each byte counts its own: bit c of all bytes is a matrix (BLOCK_N, 64) that goes with plane c
of x."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode.triton_kernels import dot, narrow


@triton.jit
def bytes_of(masks_ptr, starts_ptr, n, b, s, outputs, width, segments):
    """Of rows n and the bytes b of segment s: the bytes (N, 64), and where in the values each one's
    first weight is. Rows and bytes that are not there have no bits."""
    there = (n < outputs)[:, None] & (b < width)[None, :]
    n_wide = n.to(tl.int64)
    byte = tl.load(masks_ptr + n_wide[:, None] * width + b[None, :], mask=there, other=0)
    byte = byte.to(tl.int32)
    start = tl.load(starts_ptr + n_wide * segments + s, mask=n < outputs, other=0)
    # the bits of a byte, by adding neighbours: of 1, of 2, of 4 bits
    count = byte - ((byte >> 1) & 0x55)
    count = (count & 0x33) + ((count >> 2) & 0x33)
    count = (count + (count >> 4)) & 0x0F
    return byte, start[:, None] + tl.cumsum(count, axis=1) - count


@triton.jit
def product(
    x_ptr,
    values_ptr,
    masks_ptr,
    starts_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    width,
    segments,
    segments_a_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """out ([splits,] M, N): one block of outputs over one split of the segments, for the M <=
    BLOCK_M rows of x. Grid (blocks of N, splits).

    x (M, K) contiguous. The bias is added here where there is one split (a pointer of None
    otherwise). One row is multiplied as it comes, more on the matrix unit."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    x_row = x_ptr + m.to(tl.int64)[:, None] * (8 * width)
    if BLOCK_M == 1:
        acc = tl.zeros([BLOCK_N, SEGMENT], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = min((split + 1) * segments_a_split, segments)
    for s in range(split * segments_a_split, last):
        b = s * SEGMENT + tl.arange(0, SEGMENT)
        byte, place = bytes_of(masks_ptr, starts_ptr, n, b, s, outputs, width, segments)
        for c in tl.static_range(8):
            kept = (byte >> c) & 1
            w = tl.load(values_ptr + place, mask=kept != 0, other=0.0)
            place += kept
            x_mask = (m < rows)[:, None] & (b < width)[None, :]
            x = tl.load(x_row + (c * width + b)[None, :], mask=x_mask, other=0.0)
            if BLOCK_M == 1:
                acc += w.to(tl.float32) * x.to(tl.float32)
            else:
                acc = dot(x, tl.trans(w), acc)
    if BLOCK_M == 1:
        y = tl.sum(acc, axis=1)[None, :]
    else:
        y = acc
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (split * rows + m)[:, None].to(tl.int64) * outputs + n[None, :]
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(out, narrow(y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expand(
    values_ptr,
    masks_ptr,
    starts_ptr,
    out_ptr,
    outputs,
    width,
    segments,
    BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """out (outputs, K): that many rows of W, zeros among them. masks and starts are those rows',
    values all. Grid (blocks of rows, segments)."""
    s = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = s * SEGMENT + tl.arange(0, SEGMENT)
    byte, place = bytes_of(masks_ptr, starts_ptr, n, b, s, outputs, width, segments)
    there = (n < outputs)[:, None] & (b < width)[None, :]
    out = out_ptr + n.to(tl.int64)[:, None] * (8 * width) + b[None, :]
    for c in tl.static_range(8):
        kept = (byte >> c) & 1
        w = tl.load(values_ptr + place, mask=kept != 0, other=0.0)
        place += kept
        tl.store(out + c * width, w, mask=there)
