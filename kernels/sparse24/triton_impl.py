"""The 2:4 product in Triton: tiles, and how the groups are split so that every processor reads."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..decode.triton_impl import processors
from ..launching import launch
from ..once import once_differentiable
from ..precision import as_given
from ..rounding import cdiv
from ..rows import dense_rows
from . import torch_impl
from .packed import Packed
from .triton_kernels import product

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WAVES = 4  # programs for each processor, at least, where there are groups enough


def linear(x: Tensor, packed, bias: Tensor | None) -> Tensor:
    """x (M, K), M <= 16 -> (M, N)."""
    return _Product.apply(x.contiguous(), *(y.contiguous() for y in packed), dense_rows(bias))


def forward(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) W' + bias -> (M, N), in x's dtype; products summed in fp32."""
    if x.dtype not in DTYPES:
        raise ValueError(
            f"x: got {x.dtype}; valid for impl='triton' are float16, bfloat16 and float32"
        )
    rows, (outputs, half) = len(x), indices.shape
    sizes = dict(tile(rows, x.element_size(), outputs, half, processors(x.device)))
    splits = sizes.pop("splits")
    out = x.new_empty(rows, outputs)
    parts = out if splits == 1 else x.new_empty(splits, rows, outputs, dtype=torch.float32)
    tiles = cdiv(half, sizes["BLOCK_G"])
    with torch.cuda.device_of(x):
        given = x, values, indices, bias if splits == 1 else None, parts
        numbers = rows, outputs, half, cdiv(tiles, splits)
        grid = cdiv(outputs, sizes["BLOCK_N"]), splits, 1
        launch(product, grid, (*given, *numbers), sizes)
    if splits == 1:
        return out
    total = parts.sum(dim=0)
    return (total if bias is None else total + bias).to(x.dtype)


@lru_cache
def tile(rows: int, itemsize: int, outputs: int, half: int, processors: int) -> dict[str, int]:
    """Keyword arguments of `product`, and into how many `splits` the groups of a row go.

    In 16 bits a tile of 32 outputs and 64 bytes of indices is 18 KiB of packed weights. One row of
    x needs no matrix unit, whose tiles of 16 rows would be mostly empty, and more registers a
    weight.
    """
    small = triton.knobs.runtime.interpret  # small tests have several tiles
    block_n = 16 if small or rows == 1 else 32
    block_g = 16 if small else 64 if itemsize == 2 else 32
    tiles = cdiv(half, block_g)
    splits = max(1, min(tiles, WAVES * processors // cdiv(outputs, block_n)))
    splits = cdiv(tiles, cdiv(tiles, splits))  # none is empty
    return dict(
        splits=splits,
        BLOCK_M=1 if rows == 1 else 16,
        BLOCK_N=block_n,
        BLOCK_G=block_g,
        num_warps=4,
        num_stages=3,
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, indices, bias):
        ctx.packed = values, indices
        return forward(x, values, indices, bias)

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, dy):
        dx = torch_impl.gradient(dy, Packed(*ctx.packed)) if ctx.needs_input_grad[0] else None
        return dx, None, None, dy.sum(dim=0) if ctx.needs_input_grad[3] else None
