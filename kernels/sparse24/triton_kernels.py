"""A 2:4 sparse product of few rows in Triton: the packed weight is read once, as it lies.

Letters as in `effattn.kernels.sparse24`. Column c of every group of four is a matrix (N, G) of its
own, so the product is four dense ones with x[:, c::4]: a column's weight is the first plane's where
the first position is c, the second's where the second is, and 0 elsewhere. Positions are in order:
column 0 is never a second one, column 3 never a first."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode.triton_kernels import dot, narrow


@triton.jit
def columns(acc, x, x_mask, first, second, a, b):
    """acc (M, N) plus the products of one tile of groups; x points at column 0 of its groups (M,
    G).
    """
    zero = tl.zeros_like(a)
    w = tl.where(first == 0, a, zero)
    acc = dot(tl.load(x, mask=x_mask, other=0.0), tl.trans(w), acc)
    w = tl.where(first == 1, a, tl.where(second == 1, b, zero))
    acc = dot(tl.load(x + 1, mask=x_mask, other=0.0), tl.trans(w), acc)
    w = tl.where(first == 2, a, tl.where(second == 2, b, zero))
    acc = dot(tl.load(x + 2, mask=x_mask, other=0.0), tl.trans(w), acc)
    w = tl.where(second == 3, b, zero)
    return dot(tl.load(x + 3, mask=x_mask, other=0.0), tl.trans(w), acc)


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
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(split * tiles_a_split, (split + 1) * tiles_a_split):
        g = tile * BLOCK_G + tl.arange(0, BLOCK_G)
        there = (n < outputs)[:, None] & (g < half)[None, :]
        x_mask = (m < rows)[:, None] & (g < half)[None, :]
        byte = tl.load(indices_ptr + n_wide * half + g[None, :], mask=there, other=0)
        x = x_ptr + m[:, None] * (4 * groups) + 4 * g[None, :]
        value = values_ptr + n_wide * (2 * groups) + g[None, :]
        a = tl.load(value, mask=there, other=0.0)
        b = tl.load(value + groups, mask=there, other=0.0)
        acc = columns(acc, x, x_mask, byte & 3, (byte >> 2) & 3, a, b)
        a = tl.load(value + half, mask=there, other=0.0)
        b = tl.load(value + groups + half, mask=there, other=0.0)
        acc = columns(acc, x + 4 * half, x_mask, (byte >> 4) & 3, byte >> 6, a, b)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (split * rows + m)[:, None].to(tl.int64) * outputs + n[None, :]
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(out, narrow(acc, out_ptr.dtype.element_ty), mask=mask)
