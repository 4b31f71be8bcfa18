"""No positions at all (NoPE, arXiv:2305.19466): a causal model can tell order from what each token
may see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effattn.errors import Unsupported
from effattn.positions.base import Rotation, register


@register("nope")
@dataclass(frozen=True)
class NoPositions(Rotation):
    """NoPE (arXiv:2305.19466): queries and keys are not turned. Unsupported for layers that have no
    rotary positions to leave out."""

    turns = False
    by_distance = False

    def check(self, trained):
        if not trained.dims:
            raise Unsupported(
                "positions: 'nope' leaves out rotary positions, and these layers have none to "
                "leave out: learned positions are added to the hidden states, before any layer"
            )

    def frequencies(self, trained, length=None):
        return torch.zeros(trained.dims // 2), 1.0
