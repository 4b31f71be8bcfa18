"""Packing group by group and number by number: slow and obvious, and the definition of every bit.

With b bits, h = 2^(b - 1) and all in fp32, rounded to nearest even unless said otherwise:

    half  = (max - min) / 2,  mid = (max + min) / 2,  m = max |x|                over the group
    scale = up(max((half + m 2^-10) 2^(1 - b), m 2^-15, 2^-111)), or 0 if m = 0  asymmetric
            up(max(m 2^(1 - b), 2^-111)), or 0 if m = 0                          symmetric
            up(max(m / 448, 2^-111)), or 0 if m = 0                              fp8
    zero  = fp16(mid / scale)
    code  = round(x / scale - zero + (h - 1/2)) - h, within -h .. h - 1
            e4m3(x / scale)                                                      fp8

`up` rounds to bf16, away from zero. The cells of the levels then cover [min, max], as zero's
rounding error, at most 2^-11 |zero| <= 2^-11 m / scale steps, is paid for by the m 2^-10 in
`scale`: no code is cut off by `within`, and
|x - unpack| <= scale / 2 but for fp32's own rounding, at most 2^-22 m + 2^-15 scale. m 2^-15 keeps
|zero| <= 2^15 within fp16, and matters only where the range of the group is below m / 128, at 8
bits. 2^-111 keeps the products normal numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import LARGEST, Codes, Coding


def pack(x: Tensor, coding: Coding) -> Codes:
    """(B, H, N, D) -> Codes, on the CPU."""
    batch, heads, tokens, dim = x.shape
    codes = Codes.empty(coding, *x.shape)
    x = x.detach().float().cpu()
    for b in range(batch):
        for h in range(heads):
            whole = torch.zeros(tokens, dim, dtype=torch.uint8)
            for row in range(codes.scale.shape[2]):
                for column in range(codes.scale.shape[3]):
                    if coding.axis == "channel":
                        at = (slice(row * coding.group, (row + 1) * coding.group), column)
                    else:
                        at = (row, slice(column * coding.group, (column + 1) * coding.group))
                    scale, zero, whole[at] = _group(x[b, h][at], coding)
                    codes.scale[b, h, row, column] = scale
                    if coding.has_zero:
                        codes.zero[b, h, row, column] = zero
            for c in range(dim):
                plane, byte = divmod(c, dim // coding.planes)
                codes.codes[b, h, :, byte] |= whole[:, c] << (plane * coding.bits)
    return codes


def _group(x: Tensor, coding: Coding) -> tuple[Tensor, Tensor, Tensor]:
    low, high, most = x.min(), x.max(), x.abs().max()
    step = 2.0 ** (1 - coding.bits)
    if coding.kind == "fp8":
        scale = most / LARGEST
    elif coding.symmetric:
        scale = most * step
    else:
        scale = torch.maximum((high / 2 - low / 2 + most * 2**-10) * step, most * 2**-15)
    scale = _up(scale.clamp(min=2.0**-111)) if most > 0 else torch.tensor(0.0)
    y = x / scale if scale > 0 else torch.zeros_like(x)
    if coding.kind == "fp8":
        return scale, scale, _nearest_e4m3(y)
    zero = torch.tensor(0.0)
    if coding.has_zero and scale > 0:
        zero = ((high / 2 + low / 2) / scale).half().float()
    code = (y - zero + (coding.half - 0.5)).round() - coding.half
    code = code.clamp(-coding.half, coding.half - 1).to(torch.int8).view(torch.uint8)
    return scale, zero, code & (2**coding.bits - 1)


def _up(x: Tensor) -> Tensor:
    """To bf16 away from zero, as fp32."""
    near = x.bfloat16()
    if near.float() < x:
        near = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return near.float()


def _nearest_e4m3(y: Tensor) -> Tensor:
    """The code of the nearest of e4m3's numbers, and of two the even one."""
    codes = torch.arange(127)  # 127 is NaN
    exponent, digits = codes // 8, codes % 8
    values = torch.where(
        exponent == 0, digits * 2.0**-9, (8 + digits) * 2.0 ** (exponent - 10.0)
    ).double()
    away = (y.abs().double()[:, None] - values).abs()
    nearest = torch.where(away == away.min(dim=1, keepdim=True).values, codes % 2, 2).argmin(dim=1)
    return (nearest + 128 * torch.signbit(y)).to(torch.uint8)


def unpack(codes: Codes, dtype: torch.dtype) -> Tensor:
    """(B, H, N, D) in `dtype`."""
    coding = codes.coding
    n, c = torch.arange(codes.tokens)[:, None], torch.arange(codes.dim)[None, :]
    plane, byte = c // codes.codes.shape[3], c % codes.codes.shape[3]
    code = (codes.codes[:, :, n, byte].int() >> plane * coding.bits) & (2**coding.bits - 1)
    row, column = (n // coding.group, c) if coding.axis == "channel" else (n, c // coding.group)
    scale = codes.scale[:, :, row, column].float()
    if coding.kind == "fp8":
        return (code.to(torch.uint8).view(torch.float8_e4m3fn).float() * scale).to(dtype)
    code = torch.where(code < coding.half, code, code - 2 * coding.half)
    zero = 0.0 if codes.zero is None else codes.zero[:, :, row, column].float()
    return ((code + 0.5 + zero) * scale).to(dtype)
