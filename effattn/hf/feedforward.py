"""One layer's feed-forward part by its inner dimensions, also where the gate and the up projection
are one module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from effattn.hf.weights import sizes


@dataclass(frozen=True)
class FeedForward:
    """F inner dimensions between the hidden size D: `inputs` have weights (F, D), or together (2F,
    D) where they are fused (Phi-3: the gate's rows, then the up projection's); `output` has (D,
    F)."""

    inputs: tuple[nn.Linear, ...]
    output: nn.Linear

    @property
    def size(self) -> int:
        """F."""
        return sizes(self.output)[1]

    def rows(self, dimensions: torch.Tensor) -> torch.Tensor:
        """Which rows of an input's weight belong to these inner dimensions (n,): int64 (n,), or
        fused (2n,).
        """
        stacked = torch.arange(sizes(self.inputs[0])[0]).view(-1, self.size)
        return stacked[:, dimensions].flatten()
