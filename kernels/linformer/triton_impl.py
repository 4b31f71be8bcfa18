"""Projection along time on Triton: tiles, launches, the backward pass; and `Earlier` as the flash
kernels know it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..flash import tiles
from ..flash.triton_impl import DTYPES
from ..flash.triton_patterns import PATTERNS, Jitted
from ..flash.triton_pieces import FAR
from ..once import once_differentiable
from ..precision import as_given
from ..rounding import cdiv, power_of_two
from ..rows import dense_rows
from . import triton_kernels
from .pattern import Earlier

WAVES = 2  # programs for each multiprocessor that a projection is split into
LEAST = 4  # tiles of positions that a split has at least


PATTERNS[Earlier] = Jitted(
    triton_kernels.earlier_keys,
    triton_kernels.earlier_queries,
    lambda p: (min(p.size, FAR.value), p.slots, p.offset),
)


@lru_cache
def tile(dim: int, slots: int, dtype: torch.dtype, arch: str) -> dict[str, int]:
    """Tile sizes and launch options of all three kernels; ValueError for heads wider than flash
    attention takes.
    """
    block_d = tiles.padded(dim)
    if block_d > tiles.WIDEST:
        raise ValueError(f"head size: got {dim}, valid are 1 to {tiles.WIDEST}")
    if arch == "interpreted":
        return dict(BLOCK_K=16, BLOCK_T=32, BLOCK_D=block_d, num_warps=1, num_stages=1)
    most = 32 if dtype == torch.float32 or block_d > 128 else 64
    block_k = min(max(16, power_of_two(slots)), most)
    # 64 spill on sm_80, with a mask
    block_t = most if block_d <= 64 or arch in ("sm_90", "sm_100") else 32
    stages = 1 if arch == "gfx942" or dtype == torch.float32 else 2
    return dict(BLOCK_K=block_k, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4, num_stages=stages)


def project(x: Tensor, weight: Tensor, start: Tensor | None, mask: Tensor | None) -> Tensor:
    """As `effattn.kernels.linformer.project`. fp16, bf16 or fp32, heads up to 256 wide; the weight
    is fp32.
    """
    if x.dtype not in DTYPES:
        raise ValueError(
            f"dtype: got {x.dtype}, valid for impl='triton' are {', '.join(map(str, DTYPES))}"
        )
    return _Project.apply(
        dense_rows(x), weight.float().contiguous(), dense_rows(start), dense_rows(mask)
    )


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, start, mask):
        (batch, heads, tokens, dim), slots = x.shape, weight.shape[1]
        sizes = tile(dim, slots, x.dtype, tiles.architecture(x.device))
        programs = batch * heads * cdiv(slots, sizes["BLOCK_K"])
        along = cdiv(tokens, sizes["BLOCK_T"])
        splits = max(1, min(WAVES * _processors(x.device) // programs, along // LEAST))
        each = cdiv(along, splits)
        splits = cdiv(along, each)
        parts = torch.empty(
            (splits, batch, heads, slots, dim), dtype=torch.float32, device=x.device
        )
        with torch.cuda.device_of(x):
            triton_kernels.project[programs, splits](
                x, weight, start, mask, parts, *x.stride()[:3], *_steps(weight), _row(mask), heads,
                slots, tokens, each,
                D=dim, **sizes,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, start, mask)
        return (parts[0] if splits == 1 else parts.sum(0)).to(x.dtype)

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, grad):
        x, weight, start, mask = ctx.saved_tensors
        (batch, heads, tokens, dim), slots = x.shape, weight.shape[1]
        sizes = tile(dim, slots, x.dtype, tiles.architecture(x.device))
        along = cdiv(tokens, sizes["BLOCK_T"])
        grad, dx, dw = grad.contiguous(), None, None
        with torch.cuda.device_of(x):
            if ctx.needs_input_grad[0]:
                dx = torch.empty((batch, heads, tokens, dim), dtype=x.dtype, device=x.device)
                triton_kernels.token_gradient[(batch * heads * along,)](
                    grad, weight, start, mask, dx, *_steps(weight), _row(mask), heads, slots,
                    tokens,
                    D=dim, **sizes,
                )  # fmt: skip
            if ctx.needs_input_grad[1]:
                dw = torch.zeros_like(weight)  # later columns take no part
                triton_kernels.weight_gradient[(len(weight) * cdiv(slots, sizes["BLOCK_K"]) *
                along,)](
                    grad, x, start, mask, dw, *x.stride()[:3], _row(mask), heads, heads //
                    len(weight), slots,
                    weight.shape[2], tokens, batch, D=dim, **sizes,
                )  # fmt: skip
        return dx, dw, None, None


def _steps(weight: Tensor) -> tuple[int, int]:
    """Strides by head (0 where all share one) and by slot."""
    return weight.stride(0) if len(weight) > 1 else 0, weight.stride(1)


def _row(mask: Tensor | None) -> int:
    return 0 if mask is None else mask.stride(0)


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 8 in the interpreter."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 8
    )
