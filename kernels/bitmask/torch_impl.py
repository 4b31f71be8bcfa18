"""In plain torch: blocks of outputs are unpacked, multiplied and forgotten, so that the dense
weight never exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..once import once_differentiable
from ..precision import as_given
from .packed import Packed, bits

BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights unpacked at a time

# rows of W, and those rows (n, K)
Blocks = Iterable[tuple[slice, Tensor]]


def linear(x: Tensor, packed, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N)."""
    y = _Product.apply(x, *packed)
    return y if bias is None else y + bias


def steps(packed: Packed) -> Iterator[slice]:
    """The rows of one block after the other."""
    outputs, inputs = packed.shape
    step = max(1, BLOCK.get(packed.values.device.type, BLOCK["cuda"]) // inputs)
    for start in range(0, outputs, step):
        yield slice(start, min(start + step, outputs))


def blocks(packed: Packed) -> Blocks:
    """Blocks of W, one after the other."""
    for rows in steps(packed):
        yield rows, block(packed, rows)


def block(packed: Packed, rows: slice) -> Tensor:
    """Rows of W, (n, K)."""
    values, masks, starts = packed
    kept = bits(masks[rows])
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        first = int(starts[rows.start, 0])
        return values.new_zeros(kept.shape).masked_scatter_(kept, values[first:])
    # twice the work, but for no number does a host wait for its GPU
    at = starts[rows, :1] + kept.cumsum(dim=1, dtype=torch.int32) - 1
    return torch.where(kept, values[at.clamp_(min=0)], torch.zeros((), dtype=values.dtype))


def product(x: Tensor, w: Blocks, outputs: int) -> Tensor:
    """x (M, K) times each block of W -> (M, N)."""
    y = x.new_empty(len(x), outputs)
    for rows, weight in w:
        y[:, rows] = x @ weight.mT
    return y


def gradient(dy: Tensor, w: Blocks, inputs: int) -> Tensor:
    """dx (M, K) of dy (M, N), summed over blocks in fp32 at least."""
    work = torch.promote_types(dy.dtype, torch.float32)
    dx = dy.new_zeros(len(dy), inputs, dtype=work)
    for rows, weight in w:
        dx += (dy[:, rows] @ weight).to(work)
    return dx.to(dy.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, masks, starts):
        ctx.packed = Packed(values, masks, starts)
        return product(x, blocks(ctx.packed), len(masks))

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, dy):
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        dx = gradient(dy, blocks(ctx.packed), ctx.packed.shape[1])
        return dx, None, None, None
