"""How a 2:4 sparse matrix is kept: values and 2-bit positions.

    N outputs  K inputs, a multiple of 8      G = K / 4 groups of a row      H = G / 2
    values  (N, 2, G)     the two kept weights of each group, in the order of their positions: two
                          planes a row
    indices (N, H) uint8  the low four bits belong to group j, the high four to group j + H:
                          position of the first kept weight (0 to 2), plus four times that of the
                          second (1 to 3)

Groups with fewer than two non-zeros keep zeros beside them, at the lowest free positions. Packing
and unpacking are exact, but for -0.0, which comes back as 0.0 where it is not kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """A 2:4 matrix: values (N, 2, G) of a float dtype, indices (N, G / 2) uint8."""

    values: Tensor
    indices: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix."""
        return self.values.shape[0], 4 * self.values.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of values and positions."""
        return self.values.nbytes + self.indices.nbytes


def pack(weight: Tensor) -> Packed:
    """weight (N, K), 2:4 sparse along K. ValueError for a K that is no multiple of 8, and for a
    group of four with more than two non-zeros (it says how many there are and where the first
    is)."""
    if weight.ndim != 2 or weight.shape[1] % 8 or not weight.is_floating_point():
        raise ValueError(
            f"weight: got {tuple(weight.shape)} {weight.dtype}, valid is a float matrix (outputs, "
            "inputs) with a multiple of 8 inputs"
        )
    groups = weight.unflatten(1, (-1, 4))
    kept = groups != 0
    over = kept.sum(dim=2) > 2
    if over.any():
        row, group = over.nonzero()[0].tolist()
        raise ValueError(
            f"weight: it is not 2:4 sparse: {int(over.sum())} of {over.numel()} groups of four "
            f"have more than two non-zeros, the first in row {row} at columns {4 * group} to "
            f"{4 * group + 3}"
        )
    # non-zeros first, then free places
    at = (~kept).byte().argsort(dim=2, stable=True)[..., :2].sort(dim=2).values
    values = groups.gather(2, at).movedim(2, 1).contiguous()
    nibbles = (at[..., 0] | at[..., 1] << 2).to(torch.uint8)
    low, high = nibbles.chunk(2, dim=1)
    return Packed(values, low | high << 4)


def unpack(packed: Packed) -> Tensor:
    """The matrix (N, K)."""
    return torch.stack(columns(packed), dim=2).flatten(1)


def columns(packed: Packed) -> list[Tensor]:
    """Its columns c, c + 4, c + 8, ... for c from 0 to 3: (N, G) each."""
    nibbles = torch.cat([packed.indices & 15, packed.indices >> 4], dim=1)
    first, second = nibbles & 3, nibbles >> 2
    a, b = packed.values.unbind(1)
    zero = torch.zeros((), dtype=a.dtype, device=a.device)
    inner = [torch.where(first == c, a, torch.where(second == c, b, zero)) for c in (1, 2)]
    return [torch.where(first == 0, a, zero), *inner, torch.where(second == 3, b, zero)]
