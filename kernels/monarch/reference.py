"""Monarch matrices as the paper writes them: four matrices, multiplied (arXiv:2204.00595, section
3.1). fp64, slow.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense(right: Tensor, left: Tensor) -> Tensor:
    """P L P' R of right (b, b·r, p) and left (b, s, b·r): (b·s, b·p), fp64."""
    blocks, inner, _ = right.shape
    size, rank = left.shape[1], inner // blocks
    r, l = (torch.block_diag(*factor.double()) for factor in (right, left))
    middle = permutation((blocks, blocks, rank), (1, 0, 2)).to(r)  # (i, j, a) -> (j, i, a)
    last = permutation((blocks, size), (1, 0)).to(r)  # (j, t) -> (t, j)
    return last @ l @ middle @ r


def permutation(shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """The matrix that brings vectors, read as tensors of `shape`, into the order of their permuted
    dimensions.
    """
    count = torch.Size(shape).numel()
    return torch.eye(count, dtype=torch.float64)[
        torch.arange(count).view(shape).permute(order).flatten()
    ]


def linear(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """x (N, n) -> (N, out_features) in x's dtype, computed in fp64."""
    y = x.double() @ dense(right, left)[:out_features, : x.shape[1]].T
    return (y if bias is None else y + bias.double()).to(x.dtype)
