"""Packing in plain torch, on any device, bit for bit as `reference.py` defines it. It traces under
torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import LARGEST, SCALE, ZERO, Codes, Coding

FP8 = 2**8  # e4m3 over the number that the same bits are in fp16


def pack(x: Tensor, coding: Coding) -> Codes:
    """(B, H, N, D) -> Codes."""
    grouped = _groups(x.float(), coding)
    along = -2 if coding.axis == "channel" else -1
    low, high = torch.aminmax(grouped, dim=along, keepdim=True)
    most = torch.maximum(-low, high)
    step = 2.0 ** (1 - coding.bits)
    if coding.kind == "fp8":
        scale = most / LARGEST
    elif coding.symmetric:
        scale = most * step
    else:
        scale = torch.maximum((high * 0.5 - low * 0.5 + most * 2**-10) * step, most * 2**-15)
    scale = torch.where(most == 0, 0.0, round_up(scale.clamp(min=2.0**-111)))
    y = torch.where(scale == 0, 0.0, grouped / scale)
    zero = None
    if coding.kind == "fp8":
        codes = y.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        if coding.has_zero:
            zero = torch.where(scale == 0, 0.0, (high * 0.5 + low * 0.5) / scale).to(ZERO)
            y = y - zero.float()
        codes = (y + (coding.half - 0.5)).round_().clamp_(0, 2 * coding.half - 1).to(
            torch.uint8
        ) ^ coding.half
    scale, zero = (None if s is None else s.squeeze(along) for s in (scale.to(SCALE), zero))
    return Codes(side_by_side(codes.reshape(x.shape), coding), scale, zero, coding)


def round_up(x: Tensor) -> Tensor:
    """Positive fp32 numbers to bf16's, away from zero; infinities and NaN stay."""
    rounded = ((x.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def unpack(codes: Codes, dtype: torch.dtype) -> Tensor:
    """(B, H, N, D) in `dtype`."""
    coding = codes.coding
    x = _groups(
        torch.cat([plane(codes.codes, coding, p).float() for p in range(coding.planes)], dim=-1),
        coding,
    )
    along = -2 if coding.axis == "channel" else -1
    scale = codes.scale.float()
    if coding.kind == "fp8":
        scale = scale * worth(coding)
    else:
        x = x * worth(coding) + 0.5
        if codes.zero is not None:
            x += codes.zero.float().unsqueeze(along)
    x *= scale.unsqueeze(along)
    return x.reshape(codes.shape).to(dtype)


def plane(codes: Tensor, coding: Coding, index: int) -> Tensor:
    """uint8 (..., D / P) -> the codes of channels [index D / P, (index + 1) D / P), int8; of fp8
    the numbers that they stand for, fp16. Both over `worth`."""
    if coding.kind == "fp8":
        # Its bits are fp16's, up to the bias; float8's own cast goes one by one on a CPU, 20 times
        # slower.
        return (codes.view(torch.int8).short() << 7 & 0xBFFF - 2**16).view(torch.float16)
    above = 8 - (index + 1) * coding.bits
    if above:
        codes = codes << above
    if index:
        codes = codes & (256 - 2 ** (8 - coding.bits))
    return codes.view(torch.int8)


def worth(coding: Coding) -> float:
    """What `plane`'s numbers are to be multiplied by: codes lie in a byte's top bits."""
    return FP8 if coding.kind == "fp8" else 2.0 ** (coding.bits - 8)


def _groups(x: Tensor, coding: Coding) -> Tensor:
    """(B, H, N, D) -> (B, H, N / group, group, D) or (B, H, N, D / group, group)."""
    batch, heads, tokens, dim = x.shape
    if coding.axis == "channel":
        return x.reshape(batch, heads, tokens // coding.group, coding.group, dim)
    return x.reshape(batch, heads, tokens, dim // coding.group, coding.group)


def side_by_side(codes: Tensor, coding: Coding) -> Tensor:
    """(..., D) codes -> (..., D / P) bytes."""
    first, *others = codes.chunk(coding.planes, dim=-1)
    for index, other in enumerate(others, 1):
        first = first | other << index * coding.bits
    return first
