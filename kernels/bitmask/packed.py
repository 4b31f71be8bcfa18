"""How a matrix with zeros anywhere is kept: a bit for each weight, and the weights that are not
zero.

    N outputs  K inputs, a multiple of 8      B = K / 8 bytes of mask a row      V non-zeros
    masks  (N, B) uint8  bit c of byte b stands for column c B + b: each plane of columns with the
                         same c is contiguous, so a kernel takes bit after bit of a tile of bytes
                         with x's planes, and moves nothing
    values (V,)          what the set bits stand for: row by row, byte by byte, from the lowest bit
                         on; one 0 where the whole matrix is zero
    starts (N, S) int32  where in `values` the first weight of each SEGMENT of 64 bytes (512 weights
                         of a row) is: nobody has to read the row before it; S = B / 64, rounded up

In 16 bits half of the weights take 9/16 of the dense bytes, as 2:4 does, and the starts 1/256.
The order is that of SpInfer's bitmaps (Fan et al. 2025, EuroSys), a row instead of 8 x 8 weights at
a time. Packing and unpacking are exact, but for -0.0, which comes back as 0.0."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SEGMENT = 64  # bytes of mask
LARGEST = 2**31 - 1  # values that `starts` can count
BITS = (torch.arange(256, dtype=torch.uint8)[:, None] >> torch.arange(8).byte() & 1).bool()


class Packed(NamedTuple):
    """A matrix with zeros: values (V,) of a float dtype, masks (N, B) uint8, starts (N, S)
    int32."""

    values: Tensor
    masks: Tensor
    starts: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix."""
        return self.masks.shape[0], 8 * self.masks.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of values, masks and starts."""
        return sum(one.nbytes for one in self)


def segments(inputs: int) -> int:
    """S, how many starts a row of so many inputs has."""
    return -(-inputs // (8 * SEGMENT))


def nbytes(outputs: int, inputs: int, nonzeros: int, itemsize: int) -> int:
    """Bytes of a packed matrix with so many non-zeros."""
    return max(nonzeros, 1) * itemsize + outputs * (inputs // 8 + 4 * segments(inputs))


def pack(weight: Tensor) -> Packed:
    """weight (N, K) with zeros anywhere. ValueError for a K that is no multiple of 8, and for a
    matrix that would not be smaller (it says how many zeros would do)."""
    if weight.ndim != 2 or weight.shape[1] % 8 or not weight.is_floating_point():
        raise ValueError(
            f"weight: got {tuple(weight.shape)} {weight.dtype}, valid is a float matrix (outputs, "
            "inputs) with a multiple of 8 inputs"
        )
    stored = in_order(weight)
    kept = stored != 0
    nonzeros = int(kept.sum())
    _check_pays(weight, nonzeros)
    places = torch.arange(8, dtype=torch.uint8, device=weight.device)
    masks = (kept.byte() << places).sum(dim=2, dtype=torch.uint8)
    values = stored[kept] if nonzeros else weight.new_zeros(1)
    return Packed(values, masks, starts_of(masks))


def _check_pays(weight: Tensor, nonzeros: int) -> None:
    """ValueError where `starts` cannot count the non-zeros, or dense is no larger than packed."""
    numbers, size = weight.numel(), weight.element_size()
    if nonzeros > LARGEST:
        raise ValueError(f"weight: got {nonzeros:,} non-zeros, a bitmask holds up to {LARGEST:,}")
    taken = nbytes(*weight.shape, nonzeros, size)
    if taken >= weight.nbytes:
        needed = (nbytes(*weight.shape, 1, size) - size) / max(weight.nbytes, 1)
        raise ValueError(
            f"weight: with a bitmask it takes {taken:,} bytes, dense {weight.nbytes:,}: "
            f"{1 - nonzeros / max(numbers, 1):.1%} of it are zeros, above {needed:.1%} pay"
        )


def unpack(packed: Packed) -> Tensor:
    """The matrix (N, K)."""
    outputs, inputs = packed.shape
    kept = bits(packed.masks).flatten(1)
    dense = packed.values.new_zeros(outputs, inputs).masked_scatter_(kept, packed.values)
    return from_order(dense)


def in_order(x: Tensor) -> Tensor:
    """x (R, K) as rows of weights lie: a view (R, B, 8) of bytes and their bits."""
    return x.unflatten(1, (8, -1)).mT


def from_order(x: Tensor) -> Tensor:
    """x (R, K) in the order of the bits -> (R, K) in that of the columns."""
    return x.unflatten(1, (-1, 8)).mT.flatten(1)


def bits(masks: Tensor) -> Tensor:
    """masks (N, B) -> (N, B, 8) bool, bit 0 first."""
    return BITS.to(masks.device)[masks.int()]


def starts_of(masks: Tensor) -> Tensor:
    """The starts (N, S) int32 that belong to masks (N, B)."""
    outputs, width = masks.shape
    count = torch.zeros(outputs, segments(8 * width), dtype=torch.int64, device=masks.device)
    segment = torch.arange(width, device=masks.device).div(SEGMENT, rounding_mode="floor")
    table = BITS.sum(dim=1).to(masks.device)
    count.index_add_(1, segment, table[masks.int()])
    total = count.flatten().cumsum(0)
    return (total.view_as(count) - count).int()


def check(packed: Packed) -> None:
    """ValueError unless the parts fit together, as those of a file may not: kernels read where the
    starts say."""
    expected = starts_of(packed.masks)
    last = packed.masks[-1:, (expected.shape[1] - 1) * SEGMENT :]
    total = int(expected[-1, -1]) + int(bits(last).sum())
    if not torch.equal(packed.starts, expected):
        raise ValueError("starts: they do not fit the masks")
    if len(packed.values) != max(total, 1):
        raise ValueError(f"values: got {len(packed.values):,}, the masks have {total:,} bits")
