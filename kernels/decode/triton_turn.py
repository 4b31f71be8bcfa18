"""Rotating keys inside of a Triton kernel: cos and sin from inv_freq and the position, in fp32.

    a, b                      the two halves of each pair, (N, BLOCK_R) each, fp32
    cos, sin = cos_sin(angles(j, inv_freq_ptr, slow, R2, BLOCK_R))
    a, b = a * cos - b * sin, b * cos + a * sin

Angles are rounded to fp32 as transformers and `Turn.keys` round them; what follows is exact to 1e-7
up to a million tokens. The sine of a large angle in libdevice needs a stack, which is what a spill
is."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_pieces import dot

EMULATED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter's fma rounds twice
TWO_OVER_PI = tl.constexpr(0.6366197723675814)
# pi / 2 in three parts of 24 bits: fp32 numbers, of which a multiple is taken away exactly by fma
HALF_PI_0, HALF_PI_1, HALF_PI_2 = (
    tl.constexpr(1.5707963705062866),
    tl.constexpr(-4.371138828673793e-08),
    tl.constexpr(-1.7151245100058819e-15),
)


@triton.jit
def angles(j, inv_freq, slow, R2: tl.constexpr, BLOCK_R: tl.constexpr):
    """Positions j (N,) int32 over `slow`, times the R2 frequencies: (N, BLOCK_R) fp32."""
    r = tl.arange(0, BLOCK_R)
    frequency = tl.load(inv_freq + r, mask=r < R2, other=0.0)
    return tl.div_rn(j.to(tl.float32), slow)[:, None] * frequency[None, :]


@triton.jit
def cos_sin(angle):
    """Both of an angle of either sign. Taken to [-pi/4, pi/4] by the nearest quarter turn; then
    series, to 1e-8.
    """
    turns = tl.floor(angle * TWO_OVER_PI + 0.5)
    if EMULATED:
        x = (angle.to(tl.float64) - turns.to(tl.float64) * 1.5707963267948966).to(tl.float32)
    else:
        x = tl.fma(-turns, HALF_PI_0, angle)
        x = tl.fma(-turns, HALF_PI_1, x)
        x = tl.fma(-turns, HALF_PI_2, x)
    square = x * x
    cos = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    sin = x + x * square * (
        -1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))
    )
    quarter = turns.to(tl.int32) & 3
    swapped = (quarter & 1) == 1
    c, s = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -c, c), tl.where(quarter >= 2, -s, s)


@triton.jit
def load_pairs(
    pointers,
    found,
    R2: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Rows at `pointers` (X, 1), those `found`: both halves of the pairs (X, BLOCK_R), and if there
    is a rest, that (X, BLOCK_P)."""
    d, p = tl.arange(0, BLOCK_R)[None, :], tl.arange(0, BLOCK_P)[None, :]
    step, apart = (2, 1) if INTERLEAVED else (1, R2)
    there = found if R2 == BLOCK_R else found & (d < R2)
    a = tl.load(pointers + d * step, mask=there, other=0.0)
    b = tl.load(pointers + d * step + apart, mask=there, other=0.0)
    if REST > 0:
        return a, b, tl.load(pointers + 2 * R2 + p, mask=found & (p < REST), other=0.0)
    else:
        return a, b


@triton.jit
def pairs_product(q, k, scaling, REST: tl.constexpr):
    """(M, N) in fp32, of queries and keys as `load_pairs` gives them."""
    s = dot(q[1], tl.trans(k[1]), dot(q[0], tl.trans(k[0]), None)) * scaling
    return dot(q[2], tl.trans(k[2]), s) if REST > 0 else s
