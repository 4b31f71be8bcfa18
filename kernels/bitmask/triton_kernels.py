"""Products with a bitmask's matrix in Triton: masks and values are read once, as they lie.

Letters as in `effattn.kernels.bitmask.packed`. A tile is BLOCK_N rows of one segment, 64 bytes
each. Bit c of its bytes is a plane (BLOCK_N, 64) of weights, which goes with 64 numbers of x. Where
a kept weight is in the values: behind the segment's start, the planes before, and the set bits of
its plane to the left."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode.triton_kernels import dot, narrow

SIZES = ("rows", "outputs", "width", "segments", "segments_a_split")


@triton.jit
def spread(x):
    """The low four bits of x, each in a byte of its own: no two partial products meet in a bit."""
    return (x * 0x00204081) & 0x01010101


@triton.jit
def segment_of(
    masks_ptr,
    starts_ptr,
    n,
    s,
    outputs,
    width,
    segments,
    SEGMENT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Segment s of rows n: its bytes (N, 64), its starts (N), and how many columns a plane has.
    Rows and bytes that are not there have no bits. ALIGN: 4 where it divides the width, else 1.

    A thread is to have four bytes beside each other, no more: what it loads of a plane then lies
    beside what its neighbours load. So many Triton gives it where it knows of that alignment
    alone; of 16 bytes (a width that it specialises on) a warp's weights would be on as many lines
    as it has threads."""
    b = tl.arange(0, SEGMENT)
    wide = tl.multiple_of(tl.minimum(width - s * SEGMENT, SEGMENT), ALIGN)
    there = (n < outputs)[:, None] & (b < wide)[None, :]
    row = n.to(tl.int64)
    first = tl.multiple_of(row[:, None] * width + s * SEGMENT, [ALIGN, ALIGN])
    byte = tl.load(masks_ptr + first + b[None, :], mask=there, other=0)
    start = tl.load(starts_ptr + row * segments + s, mask=n < outputs, other=0)
    return byte.to(tl.int32), start, wide


@triton.jit
def plane(values_ptr, byte, before, start, c: tl.constexpr):
    """Plane c of a segment (N, 64), 0 where nothing is kept. before: how many are kept to the left
    in planes 0 to 3, or 4 to 7, a byte for each plane; start (N): of the plane's values."""
    at = values_ptr + start[:, None] + ((before >> (8 * (c % 4))) & 0xFF)
    return tl.load(at, mask=(byte & (1 << c)) != 0, other=0.0)


@triton.jit(do_not_specialize=SIZES)
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
    ALIGN: tl.constexpr,
):
    """out ([splits,] M, N): one block of outputs over one split of the segments, for the M <=
    BLOCK_M rows of x. Grid (blocks of N, splits).

    x (M, K) contiguous. The bias is added here where there is one split (a pointer of None
    otherwise). One row is multiplied as it comes, more on the matrix unit."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    x_row = x_ptr + tl.multiple_of(m.to(tl.int64)[:, None] * (8 * width), [ALIGN, ALIGN])
    if BLOCK_M == 1:
        acc = tl.zeros([BLOCK_N, SEGMENT], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b = tl.arange(0, SEGMENT)
    last = tl.minimum((split + 1) * segments_a_split, segments)
    for s in range(split * segments_a_split, last):
        byte, start, wide = segment_of(
            masks_ptr, starts_ptr, n, s, outputs, width, segments, SEGMENT, ALIGN
        )
        first = 8 * SEGMENT * s
        x_mask = (m < rows)[:, None] & (b < wide)[None, :]
        for c in tl.static_range(8):
            if c % 4 == 0:  # four planes are counted at once, none has more than 64
                bits = spread((byte >> c) & 15)
                before = tl.cumsum(bits, axis=1) - bits
                count = tl.sum(bits, axis=1)
            w = plane(values_ptr, byte, before, start, c)
            start += (count >> (8 * (c % 4))) & 0xFF
            x = tl.load(x_row + (first + c * wide + b)[None, :], mask=x_mask, other=0.0)
            if BLOCK_M == 1:
                acc += w.to(tl.float32) * x.to(tl.float32)
            else:
                acc = dot(x, tl.trans(w), acc)
    y = tl.sum(acc, axis=1)[None, :] if BLOCK_M == 1 else acc
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (split * rows + m)[:, None].to(tl.int64) * outputs + n[None, :]
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(out, narrow(y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
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
    ALIGN: tl.constexpr,
):
    """out (outputs, K): that many rows of W, zeros among them. masks and starts are those rows',
    values all. Grid (blocks of rows, segments)."""
    s = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.arange(0, SEGMENT)
    byte, start, wide = segment_of(
        masks_ptr, starts_ptr, n, s, outputs, width, segments, SEGMENT, ALIGN
    )
    there = (n < outputs)[:, None] & (b < wide)[None, :]
    out = out_ptr + n.to(tl.int64)[:, None] * (8 * width) + (8 * SEGMENT * s + b)[None, :]
    for c in tl.static_range(8):
        if c % 4 == 0:
            bits = spread((byte >> c) & 15)
            before = tl.cumsum(bits, axis=1) - bits
            count = tl.sum(bits, axis=1)
        tl.store(out + c * wide, plane(values_ptr, byte, before, start, c), mask=there)
        start += (count >> (8 * (c % 4))) & 0xFF
