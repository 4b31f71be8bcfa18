"""T5's relative positions (arXiv:1910.10683): a learned number per head and bucket of distances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from effattn.kernels.flash.rules import Bias
from effattn.positions.base import Added, check_count, register


@register("t5")
@dataclass(frozen=True)
class T5(Added):
    """T5's bias (arXiv:1910.10683), learned: the first half of the buckets are distances 0, 1, ...,
    the others grow logarithmically up to max_distance, from which on all share the last. The causal
    form; bidirectional models share buckets between both directions. All numbers are 0 at first."""

    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self):
        check_count("t5", "buckets", self.buckets, least=2)
        check_count("t5", "max_distance", self.max_distance, least=self.buckets // 2 + 1)

    def new_parameters(self, trained):
        return torch.zeros(trained.heads, self.buckets)

    def bias(self, trained, tokens, learned):
        # by distance up to `max_distance`; the kernels take the table's last entry for what is
        # further
        return Bias(
            "table", learned[:, self.bucket(torch.arange(self.max_distance + 1)).to(learned.device)]
        )

    def bucket(self, distance: torch.Tensor) -> torch.Tensor:
        """int64 distances >= 0 -> int64 buckets, T5's `_relative_position_bucket` of a decoder."""
        # T5 computes this in float32, and its rounding decides at the borders
        exact = self.buckets // 2
        ratio = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (ratio * (self.buckets - exact)).long()).clamp(max=self.buckets - 1)
        return torch.where(distance < exact, distance, far)
