"""Ragged attention on Triton: the launch. See `triton_kernels`.

Packed keys are unpacked first, for one call of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..decode.triton_impl import (
    DTYPES,
    WIDEST,
    in_base_two,
    merge,
    processors,
    results,
    shared_memory,
    split,
    strides,
    tile,
)
from ..rounding import cdiv
from .kept import Ragged
from .triton_kernels import attend


def attention(
    q: Tensor, kept: Ragged, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """As `effattn.kernels.ragged.attention`; float16, bfloat16 and float32, heads up to 256 wide.
    ValueError for others."""
    batch, heads, queries, dim = q.shape
    value_dim, kv_heads = kept.dims[1], kept.heads
    if q.dtype not in DTYPES or max(dim, value_dim) > WIDEST:
        raise ValueError(
            f"ragged: got {q.dtype} with head dimensions {dim} and {value_dim}; the Triton kernel "
            f"takes float16, bfloat16 and float32 with at most {WIDEST}, impl='torch' takes all"
        )
    kept, group = kept.unpacked(), heads // kv_heads
    sizes = tile(dim, value_dim, q.element_size(), group * queries, shared_memory(q.device), False)
    tiles = cdiv(kept.most, sizes["BLOCK_N"])
    row_tiles = cdiv(group * queries, sizes["BLOCK_M"])
    splits = split(tiles, batch * kv_heads * row_tiles, processors(q.device))
    out, lse, parts, sums = results(q, value_dim, splits, True)
    numbers = (queries, cdiv(tiles, splits))
    with torch.cuda.device_of(q):
        attend[splits * row_tiles, kv_heads, batch](
            q, kept.k, kept.v, parts, sums, kept.begin, kept.of,
            *strides(q), group, row_tiles, *in_base_two(scale, softcap), *numbers,
            D=dim, DV=value_dim, SOFTCAP=softcap is not None, **sizes,
        )  # fmt: skip
        if splits > 1:
            merge(parts, sums, out, lse)
    return out, lse
