"""The one demand that kernels make on the strides of their tensors, and how it is met."""

from __future__ import annotations

from typing import overload

from torch import Tensor


@overload
def dense_rows(x: Tensor) -> Tensor: ...
@overload
def dense_rows(x: None) -> None: ...
@overload
def dense_rows(x: Tensor | None) -> Tensor | None: ...
def dense_rows(x: Tensor | None) -> Tensor | None:
    """x (..., T, D), or (..., T), as kernels read it: a row's numbers beside each other, and rows
    that do not overlap.

    What transformers hands over (storage B, T, H, D seen as B, H, T, D) is so, and so are slices of
    tokens, expanded heads and batches: they are returned as they are. Everything else is copied: a
    transposed last dimension, every third number, an expanded one; and tokens that share storage,
    which matrix products in half precision refuse."""
    if x is None or x.is_contiguous():
        return x
    strides = x.stride()
    if strides[-1] == 1 and len(strides) > 2 and strides[-2] >= x.shape[-1]:
        return x  # a part of a cache: every step asks
    beside = x.shape[-1] == 1 or strides[-1] == 1
    apart = x.ndim < 3 or x.shape[-2] == 1 or strides[-2] >= x.shape[-1]
    return x if beside and apart else x.contiguous()
