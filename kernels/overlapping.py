"""Tiles of a sequence as the batch of one call of torch's fused attention on CPUs: views that
overlap, and what they give added up. H: heads; T: tokens; D: of a head."""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import dense_rows


def every(x: Tensor, at: int, size: int, count: int, stride: int) -> Tensor:
    """(H, T, D) -> (count, H, size, D): `size` tokens from `at`, from at + stride, ..."""
    head, token, one = x.stride()
    return x.as_strided(
        (count, x.shape[0], size, x.shape[2]),
        (stride * token, head, token, one),
        x.storage_offset() + at * token,
    )


def add_overlapping(
    total: Tensor, parts: Tensor, at: int, size: int, count: int, stride: int
) -> None:
    """Adds parts (count, H, size, D) where `every` of `total` took them from: pieces that do not
    overlap in turn.
    """
    piece = stride or size
    for begin in range(0, size, piece):
        end = min(begin + piece, size)
        every(total, at + begin, end - begin, count, stride).add_(parts[:, :, begin:end])


def computable(tensors) -> list[Tensor | None]:
    """As the kernel reads them, which asks nothing: with dense rows. In fp32 where the CPU has no
    units for half precision: emulated, the kernel is twice as slow in it."""
    dtype = tensors[0].dtype
    units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    emulated = dtype == torch.float16 or (dtype == torch.bfloat16 and not units)
    return [dense_rows(x.float() if emulated and x is not None else x) for x in tensors]
