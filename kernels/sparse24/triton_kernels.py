"""A 2:4 sparse product of few rows in Triton: the packed weight is read once, as it lies.

Letters as in `effattn.kernels.sparse24`. Column c of every group of four is a matrix (N, G) of its
own, so the product is four dense ones with x[:, c::4]: a column's weight is the first plane's where
the first position is c, the second's where the second is, and 0 elsewhere. Positions are in order:
column 0 is never a second one, column 3 never a first. One row of x needs no matrix product: each
weight chooses its number of x among those of its group."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode.triton_kernels import dot, narrow


@triton.jit
def planes(x, ROWS: tl.constexpr, BLOCK_G: tl.constexpr):
    """x (ROWS, 4 BLOCK_G) as it lies -> its columns 0, 1, 2 and 3 of every group, (ROWS, BLOCK_G)
    each. So it is read 16 bytes at once, where a column by itself would be two at once."""
    even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK_G, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def by_rows(acc, x, first, second, a, b, ROWS: tl.constexpr, BLOCK_G: tl.constexpr):
    """acc (M, N) plus the products of one tile of groups, in the matrix unit."""
    x0, x1, x2, x3 = planes(x, ROWS, BLOCK_G)
    zero = tl.zeros_like(a)
    w = tl.where(first == 0, a, zero)
    acc = dot(x0, tl.trans(w), acc)
    w = tl.where(first == 1, a, tl.where(second == 1, b, zero))
    acc = dot(x1, tl.trans(w), acc)
    w = tl.where(first == 2, a, tl.where(second == 2, b, zero))
    acc = dot(x2, tl.trans(w), acc)
    w = tl.where(second == 3, b, zero)
    return dot(x3, tl.trans(w), acc)


@triton.jit
def by_group(acc, x, first, second, a, b, BLOCK_G: tl.constexpr):
    """acc (N, G) plus the products of one tile of groups with one row of x: a weight chooses its
    number of x, so that two products are made of a group, and not four."""
    x0, x1, x2, x3 = planes(x.to(tl.float32), 1, BLOCK_G)
    acc += a.to(tl.float32) * tl.where(first == 0, x0, tl.where(first == 1, x1, x2))
    return acc + b.to(tl.float32) * tl.where(second == 3, x3, tl.where(second == 2, x2, x1))


@triton.jit
def add(acc, x, first, second, a, b, ROWS: tl.constexpr, BLOCK_G: tl.constexpr):
    """One of the two, by how many rows x has."""
    if ROWS == 1:
        return by_group(acc, x, first, second, a, b, BLOCK_G)
    else:
        return by_rows(acc, x, first, second, a, b, ROWS, BLOCK_G)


@triton.jit
def product(
    x_ptr,
    values_ptr,
    indices_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    half,
    tiles_a_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """out ([splits,] M, N): one block of outputs over one split of the groups. Grid (blocks of N,
    splits).

    x (M, K) contiguous, values (N, 2, 2 half), indices (N, half). A tile is BLOCK_G bytes of
    indices, so as many groups from each half of the row. The bias is added here where there is one
    split (a pointer of None otherwise)."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    groups = 2 * half
    n_wide = n.to(tl.int64)[:, None]
    if BLOCK_M == 1:
        acc = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(split * tiles_a_split, (split + 1) * tiles_a_split):
        g = tile * BLOCK_G + tl.arange(0, BLOCK_G)
        there = (n < outputs)[:, None] & (g < half)[None, :]
        at = 4 * tile * BLOCK_G + tl.arange(0, 4 * BLOCK_G)
        x_mask = (m < rows)[:, None] & (at < 4 * half)[None, :]
        x = x_ptr + m[:, None] * (4 * groups) + at[None, :]
        low, high = (
            tl.load(x, mask=x_mask, other=0.0),
            tl.load(x + 4 * half, mask=x_mask, other=0.0),
        )
        byte = tl.load(indices_ptr + n_wide * half + g[None, :], mask=there, other=0)
        value = values_ptr + n_wide * (2 * groups) + g[None, :]
        a = tl.load(value, mask=there, other=0.0)
        b = tl.load(value + groups, mask=there, other=0.0)
        acc = add(acc, low, byte & 3, (byte >> 2) & 3, a, b, BLOCK_M, BLOCK_G)
        a = tl.load(value + half, mask=there, other=0.0)
        b = tl.load(value + groups + half, mask=there, other=0.0)
        acc = add(acc, high, (byte >> 4) & 3, byte >> 6, a, b, BLOCK_M, BLOCK_G)
    if BLOCK_M == 1:
        acc = tl.sum(acc, 1)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (split * rows + m)[:, None].to(tl.int64) * outputs + n[None, :]
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(out, narrow(acc, out_ptr.dtype.element_ty), mask=mask)
