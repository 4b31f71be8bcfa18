"""Monarch products by batched matrix products, on any device: never a dense W. Letters as in
`effattn.kernels.monarch`.

Autograd does the backward pass. It keeps x and the intermediate numbers, as it would for two linear
layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def linear(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """x (N, n) -> (N, out_features)."""
    blocks, inner, p = right.shape
    rows, rank = len(x), inner // blocks
    if missing := blocks * p - x.shape[1]:
        x = pad(x, (0, missing))
    z = torch.bmm(x.view(rows, blocks, p).transpose(0, 1), right.transpose(1, 2))  # (i, N, j·a)
    # P': (j, N, i·a)
    z = z.view(blocks, rows, blocks, rank).permute(2, 1, 0, 3).reshape(blocks, rows, inner)
    y = torch.bmm(z, left.transpose(1, 2)).permute(1, 2, 0)  # P: (N, t, j)
    y = y.reshape(rows, left.shape[1] * blocks)[:, :out_features]
    return y.contiguous() if bias is None else y + bias
