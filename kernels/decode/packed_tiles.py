"""Stretches of a cache for `packed_torch`: n keys, packed or in full precision, that give scores and take weights.

Packed numbers are turned to fp32 a tile at a time, small enough to stay in a processor's cache, and without their
scales: these go into the rows (scales of channels) or into the weights (scales of tokens), and zero points into one
more number a row and group. So a tile costs a cast and a product.

Shapes: rows (B, Hkv, R, D), scores and weights (B, Hkv, R, n), products (B, Hkv, R, Dv); inside, B and Hkv are one
dimension, Z. P planes of W = D / P channels (`pack.codes`), g tokens or channels a group.
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
        run = _scores_of_channels if self.k.coding.axis == "channel" else _scores_of_tokens
        return run(rows.flatten(0, 1), self.k).unflatten(0, rows.shape[:2])

    def weigh(self, weights):
        run = _weigh_channels if self.v.coding.axis == "channel" else _weigh_tokens
        return run(weights.flatten(0, 1), self.v).unflatten(0, weights.shape[:2])

    def unpacked(self):
        parts = [unpack(part, torch.float32) for part in self.k.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _scales(codes: Codes | Pages, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(Z, ...): what `plane`'s numbers are multiplied by, and what is then added, (zero + 1/2) scale; None for fp8."""
    scale, zero, offset, coding = codes.scale.flatten(0, 1).to(dtype), codes.zero, None, codes.coding
    if coding.kind != "fp8":
        offset = scale * 0.5 if zero is None else zero.flatten(0, 1).to(dtype).add_(0.5).mul_(scale)
    return scale * worth(coding) if worth(coding) != 1 else scale, offset


def _tiles(codes: Codes | Pages, dtype: torch.dtype) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """(part of Z, part of the tokens, first channel, their numbers in one plane (z, n, W) without scales). The next
    tile takes the same memory. All of Z where there is room for `FEWEST` tokens of each: its products run at once."""
    coding, at = codes.coding, 0
    for part in codes.parts:
        whole = part.codes.flatten(0, 1)
        rows, tokens, width = whole.shape
        size = TILE * (2 if torch.compiler.is_compiling() else torch.get_num_threads())
        some = min(max(FEWEST, size // (rows * width)), max(tokens, 1))
        some = max(coding.unit, some // coding.unit * coding.unit)
        many = max(1, size // (some * width))
        memory = scratch(min(many, rows) * min(some, tokens) * width, dtype, whole.device)
        for z in range(0, rows, many):
            for n in range(0, tokens, some):
                z_part, stop = slice(z, min(z + many, rows)), min(n + some, tokens)
                tile = whole[z_part, n:stop]
                held = memory[: tile.numel()].view(tile.shape)
                for p in range(coding.planes):
                    yield z_part, slice(at + n, at + stop), p * width, held.copy_(plane(tile, coding, p))
        at += tokens


def _scores_of_channels(rows: Tensor, codes: Codes | Pages) -> Tensor:
    """Scales go into the rows, one copy of them a group: (Z, n / g, R, D)."""
    group = codes.coding.group
    scale, offset = _scales(codes, rows.dtype)
    scaled = rows[:, None] * scale[:, :, None]
    s = rows.new_empty(*scaled.shape[:3], group)
    for z, n, channel, numbers in _tiles(codes, rows.dtype):
        groups, width = slice(n.start // group, n.stop // group), numbers.shape[2]
        some, held = scaled[z, groups, :, channel : channel + width], s[z, groups]
        products = torch.bmm(some.flatten(0, 1), numbers.view(-1, group, width).mT).view(held.shape)
        held.add_(products) if channel else held.copy_(products)
    if offset is not None:
        s += (offset @ rows.mT)[..., None]
    return s.transpose(1, 2).flatten(2)


def _weigh_tokens(weights: Tensor, codes: Codes | Pages) -> Tensor:
    """Scales go into the weights, one copy of them a group of channels: g of (Z, R, n)."""
    group = codes.coding.group
    scale, offset = _scales(codes, weights.dtype)
    scaled = [weights * scale[:, None, :, g] for g in range(scale.shape[2])]
    out = weights.new_zeros(*weights.shape[:2], codes.dim)
    for z, n, channel, numbers in _tiles(codes, weights.dtype):
        for start in range(0, numbers.shape[2], group):
            columns = slice(channel + start, channel + min(start + group, numbers.shape[2]))
            some = scaled[columns.start // group][z, :, n]
            out[z, :, columns].baddbmm_(some, numbers[..., start : start + group])
    if offset is not None:
        for g in range(offset.shape[2]):  # a sum in pairs: thousands of terms of a product lose digits to each other
            out[..., g * group : (g + 1) * group].add_((weights * offset[:, None, :, g]).sum(dim=-1, keepdim=True))
    return out


def _scores_of_tokens(rows: Tensor, codes: Codes | Pages) -> Tensor:
    """Scales go into the scores of each group of channels."""
    group = codes.coding.group
    scale, offset = _scales(codes, rows.dtype)
    s = rows.new_zeros(*rows.shape[:2], codes.tokens)
    for z, n, channel, numbers in _tiles(codes, rows.dtype):
        for start in range(0, numbers.shape[2], group):
            columns = slice(channel + start, channel + min(start + group, numbers.shape[2]))
            products = torch.bmm(rows[z, :, columns], numbers[..., start : start + group].mT)
            s[z, :, n].addcmul_(products, scale[z, None, n, columns.start // group])
    if offset is not None:
        s += rows.unflatten(2, (-1, group)).sum(dim=-1) @ offset.mT
    return s


def _weigh_channels(weights: Tensor, codes: Codes | Pages) -> Tensor:
    """Scales go into the products of each group of tokens."""
    group = codes.coding.group
    scale, offset = _scales(codes, weights.dtype)
    grouped = weights.unflatten(2, (-1, group)).transpose(1, 2)  # (Z, n / g, R, g)
    out = weights.new_zeros(*weights.shape[:2], codes.dim)
    for z, n, channel, numbers in _tiles(codes, weights.dtype):
        groups, columns = slice(n.start // group, n.stop // group), slice(channel, channel + numbers.shape[2])
        products = grouped[z, groups] @ numbers.unflatten(1, (-1, group))
        out[z, :, columns].add_((products * scale[z, groups, None, columns]).sum(dim=1))
    return out if offset is None else out + grouped.sum(dim=-1).mT @ offset
