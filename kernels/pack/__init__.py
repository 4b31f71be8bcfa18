"""Packed K/V caches: numbers to int8, int4, int2 or fp8 codes with scales, and back.

    # k (B, H, N, D), N a multiple of 64
    codes = pack(k, Coding("int4", axis="channel", group=64))
    # |k_again - k| <= scale / 2 before the rounding to bfloat16
    k_again = unpack(codes, torch.bfloat16)

`codes.py` documents the layout, byte by byte, `reference.py` the arithmetic. All implementations
give the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from .codes import AXES, KINDS, Codes, Coding, Pages, concatenate

__all__ = [
    "AXES",
    "IMPLEMENTATIONS",
    "KINDS",
    "Codes",
    "Coding",
    "Pages",
    "choose",
    "concatenate",
    "pack",
    "unpack",
]


def pack(x: Tensor, coding: Coding, impl: str = "auto") -> Codes:
    """x (B, H, N, D), any float dtype (fp64 is rounded to fp32 first) -> `Codes`; forward only.

    ValueError where the groups do not fit N or D. Each group is quantized by itself, from its own
    numbers only, so packing in parts gives the same as packing at once."""
    coding.check(*x.shape[2:])
    return _implementation(impl, x.device).pack(x.detach(), coding)


def unpack(codes: Codes, dtype: torch.dtype = torch.float32, impl: str = "auto") -> Tensor:
    """(B, H, N, D) in `dtype`: the fp32 numbers that the codes mean, rounded once."""
    return _implementation(impl, codes.device).unpack(codes, dtype)


def _implementation(impl: str, device: torch.device):
    name = choose(impl, device)
    if name == "triton":
        from . import triton_impl

        return triton_impl
    if name == "reference":
        from . import reference

        return reference
    from . import torch_impl

    return torch_impl
