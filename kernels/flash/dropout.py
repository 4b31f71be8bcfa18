"""Attention dropout: weights that are set to 0 while training, told by a counter instead of drawn.

Whether a pair is kept depends on a seed, its row of the batch, its head and its two positions, and
on nothing else: so every implementation, in whatever tiles, forward, backward and when a checkpoint
is computed again, drops the same weights, and none is ever stored. Each query and each key has a
random number of 32 bits of its own; a pair's is a hash of both. The hash is `lowbias32`
(https://nullprogram.com/blog/2018/07/31/), in int32 that wraps round; its jitted twin is in
`triton_pieces`.

B: rows; H: query heads; Tq, Tk: queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 1 << 24  # rates are multiples of 1 / STEPS
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B9 - (1 << 32)  # odd, so that no two numbers of 32 bits become one


def mixed(x: Tensor) -> Tensor:
    """int32 -> int32, one to one, every bit of it on every bit of x."""
    x = x ^ ((x >> 16) & 0xFFFF)  # a logical shift
    x = x * _FIRST
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)


@dataclass(frozen=True, eq=False)
class Dropout:
    """Each pair's weight is 0 with probability `rate`, and divided by 1 - rate otherwise; the
    denominator is that of all pairs (Vaswani et al., arXiv:1706.03762, as torch does it).

    q (B, H, Tq), k (1 or B, Tk): the numbers of queries and keys, int32."""

    rate: float
    q: Tensor
    k: Tensor

    @classmethod
    def drawn(cls, rate: float, at_q: Tensor, at_k: Tensor, rows: int, heads: int) -> Dropout:
        """For queries and keys at positions at_q (1 or B, Tq) and at_k (1 or B, Tk), by a seed from
        torch's generator of their device: `torch.manual_seed` decides what is dropped."""
        seed = torch.randint(2**31 - 1, (), device=at_q.device).int()
        lines = torch.arange(rows * heads, dtype=torch.int32, device=at_q.device)
        lines = mixed(mixed(lines * _GOLDEN) ^ seed).view(rows, heads, 1)
        queries = mixed(lines ^ mixed(at_q.int() * _GOLDEN)[:, None])
        return cls(rate, queries, mixed(at_k.int() * _GOLDEN + 1))

    @property
    def least(self) -> int:
        """A pair whose number, of 24 bits, is below it is dropped."""
        return round(self.rate * STEPS)

    @property
    def factor(self) -> float:
        """What weights that are kept are multiplied by."""
        return STEPS / (STEPS - self.least)

    def kept(self, q: Tensor, k: Tensor) -> Tensor:
        """bool, broadcast: the pairs of queries and keys with these numbers that are kept."""
        return ((mixed(q ^ k) >> 8) & 0xFFFFFF) >= self.least

    def factors(self, dtype: torch.dtype) -> Tensor:
        """What each pair's weight is multiplied by, (B, H, Tq, Tk)."""
        return self.kept(self.q[..., None], self.k[:, None, None]).to(dtype) * self.factor


def check_rate(rate) -> None:
    """ValueError unless `rate` is a number from 0 on, below 1."""
    number = isinstance(rate, (int, float)) and not isinstance(rate, bool) and math.isfinite(rate)
    if not number or not 0 <= rate < 1 or round(rate * STEPS) == STEPS:
        raise ValueError(f"dropout: got {rate!r}, valid is a number from 0 on, below 1")
