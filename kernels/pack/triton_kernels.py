"""Packing and unpacking on the device, bit for bit as `reference.py` says, and `numbers`, which the
decode kernel shares.

No step can be contracted to a fused multiply-add that rounds otherwise: divisions are correctly
rounded, and sums come before products. Rounding to nearest even is the addition of 1.5 * 2^23,
which runs everywhere."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode.triton_pieces import EMULATED, narrow

FP8 = tl.constexpr(2.0**8)  # e4m3 over the number that the same bits are in fp16
ROUND = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def moved(words, by: tl.constexpr, PAIRS: tl.constexpr):
    """Bits moved down by `by`, up where it is negative; what comes in from outside is not to be
    looked at. PAIRS: two 16-bit words lie in a register and are moved at once, which no shift of
    NVIDIA's compiler does."""
    if by == 0:
        return words
    elif PAIRS and words.dtype == tl.uint16:
        down: tl.constexpr = f"shr.b32 $0, $1, {by};"
        up: tl.constexpr = f"shl.b32 $0, $1, {-by};"
        asm: tl.constexpr = down if by > 0 else up
        return tl.inline_asm_elementwise(asm, "=r,r", [words], tl.uint16, is_pure=True, pack=2)
    else:
        return words >> by if by > 0 else words << -by


@triton.jit
def numbers(
    codes,
    SHIFT: tl.constexpr,
    KIND_BITS: tl.constexpr,
    IS_FP8: tl.constexpr,
    dtype: tl.constexpr,
    PAIRS: tl.constexpr = False,
):
    """uint8 or uint16 -> the codes that begin at bit SHIFT plus 1 / 2, of fp8 the numbers over
    `FP8`; exact in any float dtype, but for 8 bits in bf16.

    The bits go into the mantissa of 2^b, which is then subtracted: an integer's conversion is eight
    times slower. Their sign is flipped on the way, for code + 2^(b - 1)."""
    if IS_FP8:
        wide = codes.to(tl.uint16)
        sign = moved(wide, SHIFT - 8, PAIRS) & 0x8000
        x = (sign | (moved(wide, SHIFT - 7, PAIRS) & 0x3F80)).to(tl.float16, bitcast=True)
        return x if dtype == tl.float16 else x.to(tl.float32).to(dtype)
    else:
        less: tl.constexpr = 2.0**KIND_BITS + (2**KIND_BITS - 1) / 2
        ones: tl.constexpr = (1 << KIND_BITS) - 1
        if dtype == tl.float16:
            code = moved(codes.to(tl.uint16), SHIFT - (10 - KIND_BITS), PAIRS)
            x = ((code & (ones << (10 - KIND_BITS))) ^ ((31 + 2 * KIND_BITS) << 9)).to(
                tl.float16, bitcast=True
            )
            return (x - less).to(dtype)
        elif dtype == tl.bfloat16 and KIND_BITS < 8:
            code = moved(codes.to(tl.uint16), SHIFT - (7 - KIND_BITS), PAIRS)
            x = (code & (ones << (7 - KIND_BITS))) ^ ((255 + 2 * KIND_BITS) << 6)
            if EMULATED:  # bf16's arithmetic is not its own there
                return ((x.to(tl.uint32) << 16).to(tl.float32, bitcast=True) - less).to(dtype)
            else:
                return x.to(tl.bfloat16, bitcast=True) - less
        else:
            code = (codes >> SHIFT).to(tl.uint32) & ones
            x = ((code << (23 - KIND_BITS)) ^ ((255 + 2 * KIND_BITS) << 22)).to(
                tl.float32, bitcast=True
            )
            return (x - less).to(dtype)


@triton.jit
def round_up(x):
    """Positive fp32 to bf16's numbers, away from zero."""
    return ((x.to(tl.uint32, bitcast=True) + 0xFFFF) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(y):
    """fp32 within +-448 to the nearest e4m3, uint8; of two the even one."""
    bits = y.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # below 2^-6: multiples of 2^-9; 8 of them are the first normal number
    small = (tl.abs(y) * 512.0 + ROUND) - ROUND
    code = tl.where(size < (121 << 23), small.to(tl.uint32), normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def grouped(
    x, BITS: tl.constexpr, IS_FP8: tl.constexpr, HAS_ZERO: tl.constexpr, AXIS: tl.constexpr
):
    """One group along AXIS of x: its codes (not yet side by side in bytes), scale and zero, fp32, 1
    along AXIS.
    """
    low, high = tl.min(x, axis=AXIS, keep_dims=True), tl.max(x, axis=AXIS, keep_dims=True)
    most = tl.maximum(-low, high)
    step: tl.constexpr = 2.0 ** (1 - BITS)
    if IS_FP8:
        scale = tl.div_rn(most, most * 0 + 448.0)
    elif HAS_ZERO:
        scale = tl.maximum((high * 0.5 - low * 0.5 + most * 2.0**-10) * step, most * 2.0**-15)
    else:
        scale = most * step
    scale = tl.where(most == 0, 0.0, round_up(tl.maximum(scale, 2.0**-111)))
    scale += tl.sum(x * 0, axis=AXIS, keep_dims=True)  # NaN where something is not finite
    by = tl.where(scale == 0, 1.0, scale)
    y = tl.div_rn(x, by + tl.zeros_like(x))
    zero = tl.zeros_like(scale)
    if IS_FP8:
        code = to_e4m3(tl.minimum(tl.maximum(y, -448.0), 448.0))
    else:
        if HAS_ZERO:
            zero = tl.div_rn(high * 0.5 + low * 0.5, by).to(tl.float16).to(tl.float32)
        y = ((y - zero + (2**BITS - 1) / 2) + ROUND) - ROUND
        code = tl.minimum(tl.maximum(y, 0.0), 2.0**BITS - 1).to(tl.uint8) ^ (1 << (BITS - 1))
    return code, scale, zero


@triton.jit
def pack_channels(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    x_b,
    x_h,
    x_n,
    heads,
    groups,
    group,
    width,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One group of tokens and BLOCK_W bytes of each: grid (groups, ceil(width / BLOCK_W), B * H).
    Outputs are dense.
    """
    row = tl.program_id(2).to(tl.int64)
    g = tl.program_id(0).to(tl.int64)
    n, c = (
        tl.arange(0, BLOCK_G)[:, None],
        tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :],
    )
    there = (n < group) & (c < width)
    x_ptr += row // heads * x_b + row % heads * x_h + (g * group + n) * x_n
    together = tl.zeros([BLOCK_G, BLOCK_W], tl.uint8)
    for plane in tl.static_range(PLANES):
        x = tl.load(x_ptr + plane * width + c, mask=there, other=0.0).to(tl.float32)
        first = tl.load(x_ptr - n * x_n + plane * width + c, mask=c < width, other=0.0).to(
            tl.float32
        )
        # what fills the tile up changes neither minimum nor maximum
        x = tl.where(n < group, x, first)
        code, scale, zero = grouped(x, BITS, IS_FP8, HAS_ZERO, 0)
        together |= code << (plane * BITS)
        at = (row * groups + g) * (width * PLANES) + plane * width + c
        tl.store(scale_ptr + at, scale.to(tl.bfloat16), mask=c < width)
        if HAS_ZERO:
            tl.store(zero_ptr + at, zero.to(tl.float16), mask=c < width)
    tl.store(codes_ptr + (row * groups * group + g * group + n) * width + c, together, mask=there)


@triton.jit
def pack_tokens(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    x_b,
    x_h,
    x_n,
    heads,
    tokens,
    group,
    dim,
    BITS: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """BLOCK_N tokens of one group of channels: grid (ceil(N / BLOCK_N), D / group, B * H). Codes go
    out one a byte, (B
    * H, N, D); `together` puts them side by side."""
    row = tl.program_id(2).to(tl.int64)
    g = tl.program_id(1)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_G)[None, :]
    start = x_ptr + row // heads * x_b + row % heads * x_h + n * x_n + g * group
    x = tl.load(start + tl.where(c < group, c, 0), mask=n < tokens, other=0.0).to(tl.float32)
    code, scale, zero = grouped(x, BITS, IS_FP8, HAS_ZERO, 1)
    at = (row * tokens + n) * (dim // group) + g
    tl.store(scale_ptr + at, scale.to(tl.bfloat16), mask=n < tokens)
    if HAS_ZERO:
        tl.store(zero_ptr + at, zero.to(tl.float16), mask=n < tokens)
    tl.store(
        codes_ptr + (row * tokens + n) * dim + g * group + c, code, mask=(n < tokens) & (c < group)
    )


@triton.jit
def unpack_tokens(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    c_b,
    c_h,
    c_n,
    s_b,
    s_h,
    s_n,
    heads,
    tokens,
    group,
    width,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    CHANNEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """BLOCK_N tokens: grid (ceil(N / BLOCK_N), ceil(width / BLOCK_W), B * H)."""
    row = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    c = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    there = (n < tokens) & (c < width)
    b, h = row // heads, row % heads
    codes = tl.load(codes_ptr + b * c_b + h * c_h + n * c_n + c, mask=there, other=0)
    for plane in tl.static_range(PLANES):
        channel = plane * width + c
        at = (
            b * s_b
            + h * s_h
            + (n // group * s_n + channel if CHANNEL else n * s_n + channel // group)
        )
        scale = tl.load(scale_ptr + at, mask=there, other=0.0).to(tl.float32)
        x = numbers(codes, plane * BITS, BITS, IS_FP8, tl.float32)
        if HAS_ZERO:
            x += tl.load(zero_ptr + at, mask=there, other=0.0).to(tl.float32)
        x = x * (scale * FP8 if IS_FP8 else scale)
        tl.store(
            out_ptr + (row * tokens + n) * (width * PLANES) + channel,
            narrow(x, out_ptr.dtype.element_ty),
            mask=there,
        )
