"""How a matrix with zeros anywhere is kept: a bit for each weight, and the weights that are not
zero.

    N outputs  K inputs, a multiple of 8      B = K / 8 bytes of mask a row      V non-zeros
    values (V,)          the non-zeros as they lie in the matrix, row by row; one 0 where there are
                         none
    masks  (N, B) uint8  a SEGMENT of 64 bytes stands for 512 columns of a row: bit c of its byte b
                         for column 64 c + b of them. Bit c of all 64 bytes is a plane of columns
                         beside each other, which go with numbers of x and values that lie so, too.
                         The last segment has B % 64 bytes where that is not 0, its planes are as
                         wide
    starts (N, S) int32  where in `values` the first one of each segment is, so that nobody has to
                         read the row before it; S = B / 64, rounded up

In 16 bits half of the weights take 9/16 of the dense bytes, as 2:4 does, and the starts 1/256.
SpInfer (Fan et al. 2025, EuroSys) has bitmaps of 8 x 8 weights for the same end; rows fit any
number of outputs. Packing and unpacking are exact, but for -0.0, which comes back as 0.0."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SEGMENT = 64  # bytes of mask
LARGEST = 2**31 - 1  # values that `starts` can count
COUNTS = (torch.arange(256)[:, None] >> torch.arange(8) & 1).sum(dim=1)  # set bits of each byte


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


def packed_bytes(outputs: int, inputs: int, nonzeros: int, itemsize: int) -> int:
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
    kept = weight != 0
    nonzeros = int(kept.sum())
    _check_pays(weight, nonzeros)
    places = _places(weight.device)
    planes = (part.unflatten(2, (8, -1)) for part in _parts(kept, 8 * SEGMENT))
    masks = torch.cat([(one * places).sum(2, dtype=torch.uint8).flatten(1) for one in planes], 1)
    return Packed(weight[kept] if nonzeros else weight.new_zeros(1), masks, starts_of(masks))


def _check_pays(weight: Tensor, nonzeros: int) -> None:
    """ValueError where `starts` cannot count the non-zeros, or dense is no larger than packed."""
    numbers, size = weight.numel(), weight.element_size()
    if nonzeros > LARGEST:
        raise ValueError(f"weight: got {nonzeros:,} non-zeros, a bitmask holds up to {LARGEST:,}")
    outputs, inputs = weight.shape
    taken = packed_bytes(outputs, inputs, nonzeros, size)
    if taken >= weight.nbytes:
        needed = (packed_bytes(outputs, inputs, 1, size) - size) / max(weight.nbytes, 1)
        raise ValueError(
            f"weight: with a bitmask it takes {taken:,} bytes, dense {weight.nbytes:,}: "
            f"{1 - nonzeros / max(numbers, 1):.1%} of it are zeros, above {needed:.1%} pay"
        )


def unpack(packed: Packed) -> Tensor:
    """The matrix (N, K)."""
    kept = bits(packed.masks)
    return packed.values.new_zeros(kept.shape).masked_scatter_(kept, packed.values)


def bits(masks: Tensor) -> Tensor:
    """masks (N, B) -> which weights are kept, (N, K) bool."""
    places = _places(masks.device)
    parts = _parts(masks, SEGMENT)
    return torch.cat([(one[:, :, None] & places).ne(0).flatten(1) for one in parts], dim=1)


def _places(device: torch.device) -> Tensor:
    """The bits of a byte, (8, 1) uint8; made where they are wanted, since a copy would be waited
    for."""
    return (1 << torch.arange(8, device=device)).byte()[:, None]


def _parts(x: Tensor, size: int) -> list[Tensor]:
    """x (N, X) in whole segments of `size`, (N, X / size, size), and the shorter last one, (N, 1,
    X % size); either may be missing."""
    whole = x.shape[1] // size * size
    parts = x[:, :whole].unflatten(1, (-1, size)), x[:, None, whole:]
    return [one for one in parts if one.numel()]


def starts_of(masks: Tensor) -> Tensor:
    """The starts (N, S) int32 that belong to masks (N, B)."""
    outputs, width = masks.shape
    count = torch.zeros(outputs, segments(8 * width), dtype=torch.int64, device=masks.device)
    segment = torch.arange(width, device=masks.device).div(SEGMENT, rounding_mode="floor")
    count.index_add_(1, segment, COUNTS.to(masks.device)[masks.int()])
    total = count.flatten().cumsum(0)
    return (total.view_as(count) - count).int()


def check(packed: Packed) -> None:
    """ValueError unless the parts fit together, as those of a file may not: kernels read where the
    starts say."""
    expected = starts_of(packed.masks)
    last = packed.masks[-1:, (expected.shape[1] - 1) * SEGMENT :]
    total = int(expected[-1, -1]) + int(COUNTS.to(last.device)[last.int()].sum())
    if not torch.equal(packed.starts, expected):
        raise ValueError("starts: they do not fit the masks")
    if len(packed.values) != max(total, 1):
        raise ValueError(f"values: got {len(packed.values):,}, the masks have {total:,} bits")
