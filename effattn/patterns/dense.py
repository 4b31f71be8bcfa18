"""Dense softmax attention: every query sees every key, or every key up to its own when causal."""

from __future__ import annotations

import torch

from effattn.interface import Traits
from effattn.kernels.flash.pattern import Pattern
from effattn.patterns.exact import ExactBackend
from effattn.registry import register


@register("dense")
class Dense(ExactBackend):
    """softmax(scale q k^T) v, exactly."""

    traits = Traits(exact=True, causal=True, bidirectional=True, learned=False, state="full")
    plain = True

    def sees(self, i, j, h, heads, causal):
        return (j <= i) if causal else (j == j) & (i == i)

    def pattern(self, causal):
        return Pattern()

    def pairs(self, i, shape):
        return shape.heads * (i + 1 if shape.causal else torch.full_like(i, shape.keys))

    def still_seen(self, j, shape):
        return torch.ones_like(j, dtype=torch.bool)
