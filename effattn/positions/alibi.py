"""ALiBi (arXiv:2108.12409): a penalty that grows with the distance, at a slope of each head's
own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effattn.kernels.flash.rules import Bias
from effattn.positions.base import Added, register


@register("alibi")
@dataclass(frozen=True)
class Alibi(Added):
    """ALiBi (arXiv:2108.12409): -m_h |i - j| is added to scores, with m_h = 2^(-8h/H), h = 1 .. H
    query heads. Without parameters."""

    def bias(self, trained, tokens, learned):
        return Bias("alibi", slopes(trained.heads)[:, None])


def slopes(heads: int) -> torch.Tensor:
    """m_h, (heads,) float32. For a number that is no power of two: those of the next lower power of
    two H', then every other one of 2H', as in the paper's code."""
    # 2^(-8h/H') for the H' heads, and for the rest the 1st, 3rd, ... of 2^(-8h/2H')
    lower = 1 << (heads.bit_length() - 1)
    own = 2.0 ** (-8 * torch.arange(1, lower + 1, dtype=torch.float64) / lower)
    between = 2.0 ** (-4 * torch.arange(1, 2 * lower + 1, 2, dtype=torch.float64) / lower)
    return torch.cat([own, between[: heads - lower]]).float()
