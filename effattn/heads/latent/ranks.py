"""How many numbers each layer remembers of a token: asked for, or chosen under one total.

D: hidden size; K: key/value heads; d: size of a head; itemsize: bytes of a number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.hf.anatomy import Anatomy, Layer

# Ranks that are chosen are multiples of this, so that rows lie on borders of 16 bytes.
STEP = 8
SIZES = ("rank", "bytes", "ratio", "energy")


@dataclass(frozen=True)
class Size:
    """How large latents are to be; exactly one is given.

    rank: numbers a token, in every layer. bytes: a token, in all layers together. ratio: the same
    as a share of what the model's cache takes now. energy: the share of the weighed energy of keys
    and values that every layer keeps."""

    rank: int | None = None
    bytes: int | None = None
    ratio: float | None = None
    energy: float | None = None

    def check_given(self) -> tuple[str, float]:
        """The name and the value of what is given. ValueError unless it is one number of its
        kind."""
        given = {name: getattr(self, name) for name in SIZES}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"latent: got {', '.join(given) or 'no size'}, valid is one of rank (numbers a "
                "token and layer), bytes (a token), ratio (of today's bytes) and energy (kept)"
            )
        ((name, value),) = given.items()
        whole = name in ("rank", "bytes")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"latent: {name}: got {value!r}, valid is {kind}")
        return name, value

    def check(self, parts: Anatomy) -> None:
        """ValueError for what means nothing in this model, naming what is valid."""
        name, value = self.check_given()
        low, high = self._bounds(name, parts)
        if not low <= value <= high:
            raise ValueError(f"latent: {name}: got {value}, valid is {low:g} to {high:g}")

    def _bounds(self, name: str, parts: Anatomy) -> tuple[float, float]:
        most, least = total_bytes(parts), least_bytes(parts)
        return {
            "rank": (1, min(map(full_rank, parts))),
            "bytes": (least, most),
            # rounded up, so that what is said to be valid is
            "ratio": (math.ceil(1e4 * least / most) / 1e4, 1),
            "energy": (1e-6, 1),
        }[name]

    def choose(self, parts: Anatomy, shares: list[Tensor] | None) -> list[int]:
        """The rank of every layer. shares: each layer's spectrum, for all but `rank`."""
        if self.rank is not None:
            return [self.rank for _ in parts]
        assert shares is not None
        full = list(map(full_rank, parts))
        if self.energy is not None:
            return [keeping(one, self.energy, most) for one, most in zip(shares, full, strict=True)]
        total = self.bytes if self.bytes is not None else int(self.ratio * total_bytes(parts))
        return allocate(shares, full, total // parts.layers[0].dtype.itemsize)


def full_rank(layer: Layer) -> int:
    """The rank with which nothing is lost: D, or the size of all keys and values if that is
    less."""
    return min(layer.k.module.in_features, 2 * layer.kv_heads * layer.head_dim)


def total_bytes(parts: Anatomy) -> int:
    """Bytes of one token in the caches of all layers, as they are."""
    return sum(layer.kv_bytes_per_token for layer in parts)


def least_bytes(parts: Anatomy) -> int:
    """Of the smallest latents that are chosen."""
    return sum(min(STEP, full_rank(layer)) * layer.dtype.itemsize for layer in parts)


def keeping(shares: Tensor, energy: float, most: int) -> int:
    """The smallest multiple of `STEP` (or `most`) whose energy is at least `energy` of all."""
    kept = shares.cumsum(0)
    rank = int((kept < energy - 1e-12).sum()) + 1
    return min(-(-rank // STEP) * STEP, most)


def allocate(shares: list[Tensor], full: list[int], total: int) -> list[int]:
    """Ranks, `STEP` numbers at a time, whose sum is at most `total` and whose kept shares sum up to
    the most: exact, since spectra fall, so that the best step of a layer is always its next."""
    ranks = [min(STEP, most) for most in full]
    steps = [
        (float(one[at : at + STEP].sum()), layer, min(STEP, most - at))
        for layer, (one, most) in enumerate(zip(shares, full, strict=True))
        for at in range(STEP, most, STEP)
    ]
    left = total - sum(ranks)
    # a last step of fewer numbers comes after its layer's others all the same: it gains less
    for _, layer, size in sorted(steps, key=lambda step: -step[0]):
        if size > left:
            break
        ranks[layer] += size
        left -= size
    return ranks


def lost(shares: list[Tensor], ranks: list[int]) -> list[float]:
    """The share of each layer's energy that its latent leaves out."""
    return [
        float(torch.clamp(one[rank:].sum(), min=0)) for one, rank in zip(shares, ranks, strict=True)
    ]
