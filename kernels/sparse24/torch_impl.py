"""In plain torch: blocks of outputs are unpacked, multiplied and forgotten, so that the dense
weight never exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..once import once_differentiable
from ..precision import as_given
from .packed import Packed, columns

BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights unpacked at a time


def linear(x: Tensor, packed, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N)."""
    y = _Product.apply(x, *packed)
    return y if bias is None else y + bias


def blocks(packed):
    """(rows, their four `columns` (n, G)) of W, one block after the other."""
    outputs, inputs = packed.shape
    step = max(1, BLOCK.get(packed.values.device.type, BLOCK["cuda"]) // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        yield rows, columns(Packed(packed.values[rows], packed.indices[rows]))


def gradient(dy: Tensor, packed) -> Tensor:
    """dx (M, K) of dy (M, N)."""
    work = torch.promote_types(dy.dtype, torch.float32)
    dx = dy.new_zeros(len(dy), packed.shape[1], dtype=work)
    for rows, weights in blocks(packed):
        for c, weight in enumerate(weights):
            dx[:, c::4] += (dy[:, rows] @ weight).to(work)
    return dx.to(dy.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, indices):
        ctx.packed = Packed(values, indices)
        work = torch.promote_types(x.dtype, torch.float32)
        inputs = [x[:, c::4].contiguous() for c in range(4)]
        y = x.new_empty(len(x), values.shape[0])
        for rows, weights in blocks(ctx.packed):
            y[:, rows] = sum(
                (some @ weight.mT).to(work) for some, weight in zip(inputs, weights, strict=True)
            ).to(x.dtype)
        return y

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, dy):
        return gradient(dy, ctx.packed) if ctx.needs_input_grad[0] else None, None, None
