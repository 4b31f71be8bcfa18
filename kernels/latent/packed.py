"""Packed latents: each token by itself, so that any store of tokens holds them as rows of bytes.

    rows = pack_rows(c, coding)                        # c (B, 1, T, r) -> (B, 1, T, width) uint8
    c = PackedLatents(rows[:, 0], rank, coding, dtype)     # in place of c (B, T, r)

A row: the scales of a token's groups, their zeros if there are any, the codes, and a byte more
where these are odd (`kernels.pack.codes` says what each is)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..pack import Codes, Coding, pack, unpack
from ..pack.codes import SCALE, ZERO


def width(coding: Coding, rank: int) -> int:
    """Bytes of a row."""
    return sum(_parts(coding, rank))


def _parts(coding: Coding, rank: int) -> tuple[int, int, int]:
    """Bytes of the scales, the zeros, and the codes with what fills them up."""
    scales, codes = 2 * (rank // coding.group), rank // coding.planes
    return scales, scales if coding.has_zero else 0, codes + codes % 2


def pack_rows(c: Tensor, coding: Coding) -> Tensor:
    """c (B, 1, T, r) -> (B, 1, T, width) uint8. coding: per token. ValueError where its groups do
    not fit r."""
    if not c.shape[2]:  # torch views no empty scales as bytes
        return c.new_empty(*c.shape[:3], width(coding, c.shape[3]), dtype=torch.uint8)
    packed = pack(c, coding)
    parts = [x.contiguous().view(torch.uint8) for x in (packed.scale, packed.zero) if x is not None]
    codes = packed.codes
    if codes.shape[3] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return torch.cat([*parts, codes], dim=3)


@dataclass(frozen=True, eq=False)
class PackedLatents:
    """Latents (B, T, r) as `rows` (B, T, width) uint8, which are unpacked as they are read."""

    rows: Tensor
    rank: int
    coding: Coding
    dtype: torch.dtype

    requires_grad = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, r)."""
        return self.rows.shape[0], self.rows.shape[1], self.rank

    @property
    def ndim(self) -> int:
        """3."""
        return 3

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    def __getitem__(self, at: tuple[slice, slice]) -> PackedLatents:
        """Of some tokens."""
        return replace(self, rows=self.rows[at])

    def unpacked(self) -> Tensor:
        """(B, T, r) in `dtype`."""
        scales, zeros, _ = _parts(self.coding, self.rank)
        rows, codes = self.rows[:, None], self.rank // self.coding.planes
        zero = rows[..., scales : scales + zeros].view(ZERO) if zeros else None
        begin = scales + zeros
        packed = Codes(
            rows[..., begin : begin + codes],
            rows[..., :scales].view(SCALE),
            zero,
            self.coding,
        )
        return unpack(packed, self.dtype)[:, 0]


def dense(c: Tensor | PackedLatents) -> Tensor:
    """All of them, (B, T, r), in memory."""
    return c.unpacked() if isinstance(c, PackedLatents) else c
