"""What the LSH kernels share: rows read and written through an order, and which pairs count.

The letters are those of `triton_kernels`."""

import triton
import triton.language as tl

from ..flash.triton_pieces import narrow

SELF = tl.constexpr(-1.4426950408889634e5)  # a token's own key with shared_qk: below every other


@triton.jit
def gather(base, rows, stride, there, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a tensor (rows int32 of any order), 0 where there is none."""
    d = tl.arange(0, COLUMNS)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * stride + d
    return tl.load(pointers, mask=there[:, None] & (d < WIDTH), other=0.0)


@triton.jit
def scatter(x, base, rows, stride, there, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes x to rows of a tensor, those that are there."""
    d = tl.arange(0, COLUMNS)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * stride + d
    tl.store(pointers, narrow(x, base.dtype.element_ty), mask=there[:, None] & (d < WIDTH))


@triton.jit
def gather_queries(
    base, m, stride_h, stride_t, group, there, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows m of the queries of a key/value head, whose first query head is at `base`."""
    d = tl.arange(0, COLUMNS)[None, :]
    at = (m % group).to(tl.int64) * stride_h + (m // group).to(tl.int64) * stride_t
    return tl.load(base + at[:, None] + d, mask=there[:, None] & (d < WIDTH), other=0.0)


@triton.jit
def scatter_queries(
    x, base, m, stride_h, stride_t, group, there, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes x to rows m of the queries of a key/value head."""
    d = tl.arange(0, COLUMNS)[None, :]
    at = (m % group).to(tl.int64) * stride_h + (m // group).to(tl.int64) * stride_t
    tl.store(
        base + at[:, None] + d, narrow(x, base.dtype.element_ty), mask=there[:, None] & (d < WIDTH)
    )


@triton.jit
def head_at(base, p, heads, stride_b, stride_h):
    """Where head p of all rows of the batch begins; stride_h: from one to the next."""
    return base + (p // heads).to(tl.int64) * stride_b + (p % heads).to(tl.int64) * stride_h


@triton.jit
def counted(x, m, n, there_m, there_n, low, high, r, codes, numbers, CAUSAL: tl.constexpr):
    """Which pairs count in round r. x, n and there_n are of the keys, m, low, high and there_m of
    the queries, one kind in columns and the other in rows."""
    query_code, code = codes
    rows, store, group, own, step = numbers
    seen = (x >= low) & (x < high)
    if not CAUSAL:
        seen = seen & (n != own + m // group)
    for earlier in range(0, r):
        apart = tl.load(query_code + earlier * rows + m, mask=there_m, other=0)
        apart = apart - tl.load(code + earlier * store + n, mask=there_n, other=0)
        seen = seen & (apart != 0) & (apart != step)
        if not CAUSAL:
            seen = seen & (apart != -step)
    return seen


@triton.jit
def own_scores(query, key, unit, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """Scores of queries with their own tokens' keys, in base 2."""
    if SHARED:
        return tl.full([BLOCK], SELF, tl.float32)
    return tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * unit
