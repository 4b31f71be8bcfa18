"""Stretches of a cache for `packed_torch`: n keys, packed or in full precision, that give scores
and take weights.

Packed numbers become fp32 a tile at a time, small enough to stay in a processor's cache: a few
passes over it cost less than products of many small groups, each with its own scales.

Shapes: rows (B, Hkv, R, D), scores and weights (B, Hkv, R, n), products (B, Hkv, R, Dv); inside, B
and Hkv are one dimension, Z."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..pack.codes import Codes, Coding, Pages
from ..pack.torch_impl import plane, unpack, worth
from ..scratch import scratch

# numbers a thread, 2 MiB in fp32: smaller ones are more calls, larger ones leave the cache
TILE = 2**19
FEWEST = 4096  # tokens of a tile, if there are as many


class Stretch:
    """index: of its first key in the cache (first tokens, packed, newest); number: of that key's
    token if the tokens are in order, else None."""

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
        shape, rows, coding = rows.shape[:3], rows.flatten(0, 1), self.k.coding
        scale, offset = _scales(self.k, rows.dtype)
        s = None
        for z, n, codes in _tiles(self.k, rows.dtype):
            numbers = _numbers(codes, coding, scale, offset, z, n)
            if codes.shape[:2] == (len(rows), self.keys):
                s = torch.bmm(rows, numbers.mT)
            else:
                s = rows.new_empty(*rows.shape[:2], self.keys) if s is None else s
                s[z, :, n] = torch.bmm(rows[z], numbers.mT)
        return rows.new_empty(*shape, 0) if s is None else s.view(*shape, -1)

    def weigh(self, weights):
        shape, weights, coding = weights.shape[:3], weights.flatten(0, 1), self.v.coding
        scale, offset = _scales(self.v, weights.dtype)
        out = weights.new_zeros(*weights.shape[:2], self.v.dim)
        groups = out.unflatten(2, (-1, coding.group)) if coding.axis == "token" else None
        if groups is None or groups.shape[1] * groups.shape[2] > self.v.dim:
            for z, n, codes in _tiles(self.v, weights.dtype):
                out[z].add_(
                    torch.bmm(weights[z, :, n], _numbers(codes, coding, scale, offset, z, n))
                )
            return out.view(*shape, -1)
        # A token's scales go into its weights instead, which are fewer than its numbers.
        # (weights times offsets, this way round: the other takes four times as long)
        if offset is not None:
            groups.copy_(torch.bmm(offset.mT, weights.mT).mT[..., None])
        for z, n, codes in _tiles(self.v, weights.dtype):
            for group, own in enumerate(codes.split(coding.group, dim=2)):
                groups[z, :, group].add_(
                    torch.bmm(weights[z, :, n] * scale[z, n, group][:, None], own)
                )
        return out.view(*shape, -1)

    def unpacked(self):
        parts = [unpack(part, torch.float32) for part in self.k.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _tiles(codes: Codes | Pages, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """(part of Z, part of the tokens, what `plane` makes of their codes (z, n, D)), to be changed
    in place: the next tile takes the same memory. All of Z where there is room for `FEWEST` tokens
    of each: its products run at once."""
    coding, dim, at = codes.coding, codes.dim, 0
    size = TILE * (2 if torch.compiler.is_compiling() else torch.get_num_threads())
    for part in codes.parts:
        whole = part.codes.flatten(0, 1)
        rows, tokens, width = whole.shape
        some = min(max(FEWEST, size // (rows * dim)), max(tokens, 1))
        some = max(coding.unit, some // coding.unit * coding.unit)
        many = max(1, size // (some * dim))
        memory = scratch(min(many, rows) * min(some, tokens) * dim, dtype, whole.device)
        for z in range(0, rows, many):
            for n in range(0, tokens, some):
                tile = whole[z : z + many, n : n + some]
                held = memory[: tile.numel() * coding.planes].view(*tile.shape[:2], dim)
                for p in range(coding.planes):
                    held.narrow(2, p * width, width).copy_(plane(tile, coding, p))
                yield slice(z, z + len(tile)), slice(at + n, at + n + tile.shape[1]), held
        at += tokens


def _numbers(
    held: Tensor, coding: Coding, scale: Tensor, offset: Tensor | None, z: slice, n: slice
) -> Tensor:
    """A tile of `_tiles`, changed in place to the numbers that its codes stand for."""
    where = z, slice(n.start // coding.unit, n.stop // coding.unit)
    if coding.axis == "token":
        grouped = held.unflatten(2, (-1, coding.group)).mul_(scale[where][..., None])
        if offset is not None:
            grouped.add_(offset[where][..., None])
    else:
        grouped, each = held.unflatten(1, (-1, coding.group)), (*where, None)
        if offset is None:
            grouped.mul_(scale[each])
        else:  # one pass; where a scale is a token's, torch is faster in two
            torch.addcmul(offset[each], grouped, scale[each], out=grouped)
    return held


def _scales(codes: Codes | Pages, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(Z, ...): what `plane`'s numbers are multiplied by, and what is then added, (zero + 1/2)
    scale; None for fp8.
    """
    scale, zero, offset, coding = (
        codes.scale.flatten(0, 1).to(dtype),
        codes.zero,
        None,
        codes.coding,
    )
    if coding.kind != "fp8":
        offset = scale * 0.5 if zero is None else zero.flatten(0, 1).to(dtype).add_(0.5).mul_(scale)
    return scale * worth(coding) if worth(coding) != 1 else scale, offset
