"""Products with a bitmask's matrix in Triton: tiles, and how the segments are split so that every
processor reads.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..decode.triton_impl import processors
from ..launching import launch
from ..once import once_differentiable
from ..precision import as_given
from ..rounding import cdiv, power_of_two
from ..rows import dense_rows
from . import torch_impl
from .packed import SEGMENT, Packed
from .triton_kernels import expand, product

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEW_ROWS = 64  # of x: more are dense products, for which a block of W is unpacked
WAVES = 4  # programs for each processor, at least, where there are segments enough


def linear(x: Tensor, packed, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N)."""
    return _Product.apply(x.contiguous(), *(y.contiguous() for y in packed), dense_rows(bias))


def forward(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x (M, K) W' + bias -> (M, N), in x's dtype; products summed in fp32."""
    if x.dtype not in DTYPES:
        raise ValueError(
            f"x: got {x.dtype}; valid for impl='triton' are float16, bfloat16 and float32"
        )
    if len(x) > FEW_ROWS:
        y = torch_impl.product(x, blocks(packed), packed.shape[0])
        return y if bias is None else y + bias
    outputs, segments = packed.starts.shape
    width = packed.masks.shape[1]
    sizes = dict(tile(len(x), outputs, width, processors(x.device)))
    splits = sizes.pop("splits")
    out = x.new_empty(len(x), outputs)
    parts = out if splits == 1 else x.new_empty(splits, *out.shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        given = x, *packed, bias if splits == 1 else None, parts
        numbers = len(x), outputs, width, segments, cdiv(segments, splits)
        grid = cdiv(outputs, sizes["BLOCK_N"]), splits, 1
        launch(product, grid, (*given, *numbers), sizes)
    if splits == 1:
        return out
    total = parts.sum(dim=0)
    return (total if bias is None else total + bias).to(x.dtype)


@lru_cache
def tile(rows: int, outputs: int, width: int, processors: int) -> dict[str, int]:
    """Keyword arguments of `product`, and into how many `splits` the segments of a row go.

    In a tile of 32 outputs each thread asks for 16 weights of every plane together. Several rows of
    x go to the matrix unit; 64 of them twice would be more than shared memory holds.
    """
    block_n = 16 if triton.knobs.runtime.interpret else 32  # small tests have several tiles
    segments = cdiv(width, SEGMENT)
    splits = max(1, min(segments, WAVES * processors // cdiv(outputs, block_n)))
    splits = cdiv(segments, cdiv(segments, splits))  # none is empty
    return dict(
        splits=splits,
        BLOCK_M=1 if rows == 1 else max(16, power_of_two(rows)),
        BLOCK_N=block_n,
        SEGMENT=SEGMENT,
        ALIGN=align(width),
        num_warps=4 if rows <= 16 else 8,
        num_stages=2 if rows <= 16 else 1,
    )


def align(width: int) -> int:
    """How many bytes of a mask a thread may have beside each other."""
    return 4 if width % 4 == 0 else 1


EXPAND = dict(BLOCK_N=16, SEGMENT=SEGMENT, num_warps=4, num_stages=1)


def blocks(packed: Packed) -> torch_impl.Blocks:
    """Blocks of W in the order of its columns; one is unpacked over the one before."""
    values, masks, starts = packed
    dense = None
    for rows in torch_impl.steps(packed):
        count = rows.stop - rows.start
        if dense is None:
            dense = values.new_empty(count, packed.shape[1])
        grid = cdiv(count, EXPAND["BLOCK_N"]), starts.shape[1]
        with torch.cuda.device_of(values):
            expand[grid](
                values,
                masks[rows],
                starts[rows],
                dense,
                count,
                masks.shape[1],
                starts.shape[1],
                ALIGN=align(masks.shape[1]),
                **EXPAND,
            )
        yield rows, dense[:count]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, masks, starts, bias):
        ctx.packed = Packed(values, masks, starts)
        return forward(x, ctx.packed, bias)

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, dy):
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch_impl.gradient(dy, blocks(ctx.packed), ctx.packed.shape[1])
        return dx, None, None, None, dy.sum(dim=0) if ctx.needs_input_grad[4] else None
