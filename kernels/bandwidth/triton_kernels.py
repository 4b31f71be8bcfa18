"""Copy, read, write and nothing, as Triton kernels. N elements of 4 bytes; positions are int64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy(source_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = source, n numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(source_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def write(out_ptr, value, n, BLOCK: tl.constexpr):
    """out = value, n numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.full([BLOCK], value, tl.float32), mask=at < n)


@triton.jit
def read(source_ptr, sums_ptr, n, steps, BLOCK: tl.constexpr):
    """Program p reads blocks p, p + programs, ...: all programs together walk through memory side
    by side.
    """
    program = tl.program_id(0)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for _ in range(steps):
        sums += tl.load(source_ptr + at, mask=at < n, other=0.0)
        at += stride
    tl.store(sums_ptr + program, tl.sum(sums))


@triton.jit
def nothing(out_ptr):
    """What starting a kernel costs."""
    pass
