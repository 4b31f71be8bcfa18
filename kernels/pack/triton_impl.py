"""Packing and unpacking in Triton: one launch each (two for scales of tokens below 8 bits)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rounding import cdiv, power_of_two
from ..rows import dense_rows
from .codes import SCALE, ZERO, Codes, Coding
from .torch_impl import side_by_side
from .triton_kernels import pack_channels, pack_tokens, unpack_tokens

ELEMENTS = 2048  # of a tile
WARPS = 4


def pack(x: Tensor, coding: Coding) -> Codes:
    """(B, H, N, D) -> Codes."""
    x = x.float() if x.dtype == torch.float64 else x
    x = dense_rows(x)
    batch, heads, tokens, dim = x.shape
    scales = coding.scales(tokens, dim)
    scale = x.new_empty(batch, heads, *scales, dtype=SCALE)
    zero = x.new_empty(batch, heads, *scales, dtype=ZERO) if coding.has_zero else None
    width, group = dim // coding.planes, coding.group
    fixed = dict(
        BITS=coding.bits, IS_FP8=coding.kind == "fp8", HAS_ZERO=coding.has_zero, num_warps=WARPS
    )
    per_channel = coding.axis == "channel"
    codes = x.new_empty(batch, heads, tokens, width if per_channel else dim, dtype=torch.uint8)
    strides = x.stride()[:3]
    if tokens:
        block_g = max(16, power_of_two(group))
        with torch.cuda.device_of(x):
            if per_channel:
                block_w = max(16, min(power_of_two(width), ELEMENTS // block_g))
                pack_channels[tokens // group, cdiv(width, block_w), batch * heads](
                    x, codes, scale, zero, *strides, heads, tokens // group, group, width,
                    PLANES=coding.planes,
                    BLOCK_G=block_g, BLOCK_W=block_w, **fixed,
                )  # fmt: skip
            else:
                block_n = max(16, ELEMENTS // block_g)
                pack_tokens[cdiv(tokens, block_n), dim // group, batch * heads](
                    x, codes, scale, zero,
                    *strides,
                    heads, tokens, group, dim,
                    BLOCK_N=block_n, BLOCK_G=block_g, **fixed,
                )  # fmt: skip
    return Codes(codes if per_channel else side_by_side(codes, coding), scale, zero, coding)


def unpack(codes: Codes, dtype: torch.dtype) -> Tensor:
    """(B, H, N, D) in `dtype`."""
    coding, packed, scale, zero = codes.coding, codes.codes, codes.scale, codes.zero
    if (
        packed.stride(-1) != 1
        or scale.stride(-1) != 1
        or (zero is not None and zero.stride() != scale.stride())
    ):
        packed, scale, zero = (None if x is None else x.contiguous() for x in (packed, scale, zero))
    batch, heads, tokens, width = packed.shape
    out = packed.new_empty(codes.shape, dtype=torch.float32 if dtype == torch.float64 else dtype)
    block_w = max(16, min(power_of_two(width), 128))
    block_n = ELEMENTS // block_w
    if tokens:
        with torch.cuda.device_of(packed):
            unpack_tokens[cdiv(tokens, block_n), cdiv(width, block_w), batch * heads](
                packed, scale, zero, out,
                *packed.stride()[:3], *scale.stride()[:3],
                heads, tokens, coding.group, width,
                BITS=coding.bits, PLANES=coding.planes, IS_FP8=coding.kind == "fp8",
                HAS_ZERO=zero is not None, CHANNEL=coding.axis == "channel", BLOCK_N=block_n,
                BLOCK_W=block_w, num_warps=WARPS,
            )  # fmt: skip
    return out.to(dtype)
