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

from ..pack.codes import Codes
from ..pack.torch_impl import plane, unpack, worth
from ..scratch import scratch

# numbers a thread, 2 MiB in fp32: smaller ones are more calls, larger ones leave the cache
TILE = 2**19


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
        shape, rows = rows.shape[:3], rows.flatten(0, 1)
        coding = self.k.coding
        # each group has rows of its own: a quarter of its tokens at most, or they are the larger
        few = coding.axis == "channel" and 4 * shape[2] <= coding.group
        score = _scores_by_channel if few else _scores_by_numbers
        s = [score(rows, part) for part in self.k.parts]
        return (s[0] if len(s) == 1 else torch.cat(s, dim=-1)).view(*shape, -1)

    def weigh(self, weights):
        shape, coding, dim = weights.shape[:3], self.v.coding, self.v.dim
        weights, parts = weights.flatten(0, 1), self.v.parts
        each = [weights] if len(parts) == 1 else weights.split([x.tokens for x in parts], dim=2)
        few = coding.axis == "token" and shape[2] * (dim // coding.group) <= dim
        weigh, out = _weigh_by_token if few else _weigh_numbers, None
        for some, part in zip(each, parts, strict=True):
            out = weigh(out, some, part)
        return out.view(*shape, -1)

    def unpacked(self):
        parts = [unpack(part, torch.float32) for part in self.k.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


# rows (Z, R, D) and weights (Z, R, n) with one tensor of codes
# -------------------------------------------------------------------------------------------------


def _scores_by_channel(rows: Tensor, codes: Codes) -> Tensor:
    """rows k^T, (Z, R, n). A group's scales go into the rows, of which there are fewer than tokens:
    each group has rows of its own, and the codes are multiplied as they are."""
    scale, shift = _scales(codes, rows.dtype)
    own = (rows[:, None] * scale[:, :, None]).flatten(0, 1)  # (Z groups, R, D)
    if isinstance(shift, float):
        added = own.sum(dim=-1, keepdim=True).mul_(shift)
    else:
        added = own @ shift.flatten(0, 1)[..., None]
    many, parts, at = codes.coding.group, [], 0
    for _, _, held in _tiles(codes, rows.dtype):
        turned = held.view(-1, many, codes.dim).mT
        count = turned.shape[0]
        mine = slice(at, at + count)
        some = (added, own) if count == own.shape[0] else (added[mine], own[mine])
        parts.append(torch.baddbmm(*some, turned))
        at += count
    s = parts[0] if len(parts) == 1 else torch.cat(parts)
    return s.view(len(rows), -1, rows.shape[1], many).transpose(1, 2).flatten(2)


def _scores_by_numbers(rows: Tensor, codes: Codes) -> Tensor:
    """rows k^T, (Z, R, n)."""
    s = rows.new_empty(*rows.shape[:2], codes.tokens)
    for z, n, numbers in _numbers(codes, rows.dtype):
        s[z, :, n] = torch.bmm(rows[z], numbers.mT)
    return s


def _weigh_numbers(out: Tensor | None, weights: Tensor, codes: Codes) -> Tensor:
    """out + weights v, (Z, R, Dv); out may be changed."""
    if out is None:
        out = weights.new_zeros(*weights.shape[:2], codes.dim)
    for z, n, numbers in _numbers(codes, weights.dtype):
        out[z].baddbmm_(weights[z, :, n], numbers)
    return out


def _weigh_by_token(out: Tensor | None, weights: Tensor, codes: Codes) -> Tensor:
    """The same, with a token's scales in its weights, which are fewer than its numbers."""
    scale, shift = _scales(codes, weights.dtype)
    turned, group = scale.mT, codes.coding.group
    # (weights times offsets, this way round: the other takes four times as long)
    added = torch.bmm((scale * shift).mT, weights.mT)  # (Z, groups, R)
    new = added[..., None].expand(*added.shape, group).contiguous()
    for z, n, held in _tiles(codes, weights.dtype):
        whole = held.shape[:2] == scale.shape[:2]
        some, by = (weights, turned) if whole else (weights[z, :, n], turned[z, :, n])
        for g in range(new.shape[1]):
            part = held if new.shape[1] == 1 else held.narrow(2, g * group, group)
            new[z, g].baddbmm_(some * by[:, g, None], part)
    new = new.transpose(1, 2).flatten(2)
    return new if out is None else out + new


# Codes as numbers
# -------------------------------------------------------------------------------------------------


def _tiles(codes: Codes, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """(part of Z, part of the tokens, what `plane` makes of their codes (z, n, D)), to be changed
    in place: the next tile takes the same memory. All tokens, or some of one z."""
    coding, dim = codes.coding, codes.dim
    size = TILE * (2 if torch.compiler.is_compiling() else torch.get_num_threads())
    whole = codes.codes.flatten(0, 1)
    rows, tokens, width = whole.shape
    some = max(coding.unit, min(tokens, size // dim) // coding.unit * coding.unit)
    many = min(rows, max(1, size // (some * dim))) if some >= tokens else 1
    memory = scratch(many * min(some, tokens) * dim, dtype, whole.device)
    sizes, held, places = None, memory, [memory]
    for z in range(0, rows, many):
        mine = whole if many == rows else whole[z : z + many]
        for n in range(0, tokens, some):
            tile = mine if some >= tokens else mine[:, n : n + some]
            if tile.shape[:2] != sizes:
                sizes = tile.shape[:2]
                held = memory[: sizes.numel() * dim].view(*sizes, dim)
                places = [held] if coding.planes == 1 else held.split(width, dim=2)
            for p, place in enumerate(places):
                place.copy_(plane(tile, coding, p))
            yield slice(z, z + sizes[0]), slice(n, n + sizes[1]), held


def _numbers(codes: Codes, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of the numbers that the codes stand for."""
    coding = codes.coding
    scale, shift = _scales(codes, dtype)
    offset = scale * shift
    for z, n, held in _tiles(codes, dtype):
        where = z, slice(n.start // coding.unit, n.stop // coding.unit)
        if coding.axis == "token":
            grouped = held.unflatten(2, (-1, coding.group))
            grouped.mul_(scale[where][..., None]).add_(offset[where][..., None])
        else:  # one pass; where a scale is a token's, torch is faster in two
            grouped, each = held.unflatten(1, (-1, coding.group)), (*where, None)
            torch.addcmul(offset[each], grouped, scale[each], out=grouped)
        yield z, n, held


def _scales(codes: Codes, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """scale (Z, ...) and shift, of the same shape or one number: `plane`'s numbers stand for
    scale (number + shift).
    """
    coding, scale = codes.coding, codes.scale.flatten(0, 1).to(dtype)
    unit = worth(coding)
    shift = 0.0 if coding.kind == "fp8" else 0.5 / unit
    if codes.zero is not None:
        shift = codes.zero.flatten(0, 1).to(dtype).add_(0.5).div_(unit)
    return scale if unit == 1 else scale * unit, shift
