"""Stretches of a cache for `packed_torch`: n keys, packed or in full precision, that give scores and take weights.

Packed numbers become fp32 a tile at a time, small enough to stay in a processor's cache: a few passes over it cost less
than products of many small groups, each with its own scales.

Shapes: rows (B, Hkv, R, D), scores and weights (B, Hkv, R, n), products (B, Hkv, R, Dv); inside, B and Hkv are one
dimension, Z.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..pack.codes import Codes, Pages
from ..pack.torch_impl import plane, unpack, worth
from ..scratch import scratch

TILE = 2**19  # numbers a thread, 2 MiB in fp32: smaller ones are more calls, larger ones leave the cache
FEWEST = 4096  # tokens of a tile, if there are as many


class Stretch:
    """index: of its first key in the cache (first tokens, packed, newest); number: of that key's token if the tokens
    are in order, else None."""

    def __init__(self, k, v, index: int, number: int | None):
        self.k, self.v, self.index, self.number = k, v, index, number
        self.keys = k.shape[2]

    def scores(self, rows: Tensor) -> Tensor:
        """rows k^T"""
        raise NotImplementedError

    def weigh(self, weights: Tensor) -> Tensor:
        """weights v"""
        raise NotImplementedError

    def unpacked(self) -> Tensor:
        """k (B, Hkv, n, D)"""
        raise NotImplementedError


class Full(Stretch):
    """k, v: tensors."""

    def scores(self, rows):
        return rows @ self.k.to(rows.dtype).mT

    def weigh(self, weights):
        return weights @ self.v.to(weights.dtype)

    def unpacked(self):
        return self.k


class Packed(Stretch):
    """k, v: Codes or Pages."""

    def scores(self, rows):
        shape, rows = rows.shape[:3], rows.flatten(0, 1)
        s = rows.new_empty(*rows.shape[:2], self.keys)
        for z, n, numbers in _tiles(self.k, rows.dtype):
            s[z, :, n] = torch.bmm(rows[z], numbers.mT)
        return s.view(*shape, -1)

    def weigh(self, weights):
        shape, weights = weights.shape[:3], weights.flatten(0, 1)
        out = weights.new_zeros(*weights.shape[:2], self.v.dim)
        for z, n, numbers in _tiles(self.v, weights.dtype):
            out[z].add_(torch.bmm(weights[z, :, n], numbers))
        return out.view(*shape, -1)

    def unpacked(self):
        parts = [unpack(part, torch.float32) for part in self.k.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _tiles(codes: Codes | Pages, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """(part of Z, part of the tokens, their numbers (z, n, D)). The next tile takes the same memory. All of Z where
    there is room for `FEWEST` tokens of each: its products run at once."""
    coding, dim, at = codes.coding, codes.dim, 0
    group, unit, by_channel = coding.group, coding.unit, coding.axis == "channel"
    scale, offset = _scales(codes, dtype)
    for part in codes.parts:
        whole = part.codes.flatten(0, 1)
        rows, tokens, width = whole.shape
        size = TILE * (2 if torch.compiler.is_compiling() else torch.get_num_threads())
        some = min(max(FEWEST, size // (rows * dim)), max(tokens, 1))
        some = max(unit, some // unit * unit)
        many = max(1, size // (some * dim))
        memory = scratch(min(many, rows) * min(some, tokens) * dim, dtype, whole.device)
        for z in range(0, rows, many):
            for n in range(0, tokens, some):
                z_part, n_part = slice(z, min(z + many, rows)), slice(at + n, at + min(n + some, tokens))
                tile = whole[z_part, n : n + some]
                held = memory[: tile.numel() * coding.planes].view(*tile.shape[:2], dim)
                for p in range(coding.planes):
                    held[..., p * width : (p + 1) * width] = plane(tile, coding, p)
                where = z_part, slice(n_part.start // unit, n_part.stop // unit)
                if by_channel:
                    grouped, each = held.unflatten(1, (-1, group)), (*where, None)
                else:
                    grouped, each = held.unflatten(2, (-1, group)), (*where, ..., None)
                if offset is None:
                    grouped.mul_(scale[each])
                elif by_channel:  # one pass; where a scale is a row's, torch is faster in two
                    torch.addcmul(offset[each], grouped, scale[each], out=grouped)
                else:
                    grouped.mul_(scale[each]).add_(offset[each])
                yield z_part, n_part, held
        at += tokens


def _scales(codes: Codes | Pages, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(Z, ...): what `plane`'s numbers are multiplied by, and what is then added, (zero + 1/2) scale; None for fp8."""
    scale, zero, offset, coding = codes.scale.flatten(0, 1).to(dtype), codes.zero, None, codes.coding
    if coding.kind != "fp8":
        offset = scale * 0.5 if zero is None else zero.flatten(0, 1).to(dtype).add_(0.5).mul_(scale)
    return scale * worth(coding) if worth(coding) != 1 else scale, offset
