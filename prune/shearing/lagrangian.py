"""Lagrangian constraints that bring the expected shape of a masked model to its target.

Equation 2 of Sheared LLaMA (arXiv:2310.06694): for every axis, lambda1 (s - t) + lambda2 (s - t)^2,
where s is the expected share that is removed and t the target's, ramped up linearly; the lambdas
climb while everything else descends."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effattn.prune.shearing.masks import Masks

# lambda2 at the start: in few steps, multipliers that grow from 0 act too late, and then too much
SQUARE = 100.0


class Lagrangian(nn.Module):
    """Two multipliers for every row of every axis of `masks`: each layer meets its own number of
    heads and FFN dimensions, since a plain config holds one number for all. warmup: steps until the
    target is the whole one."""

    def __init__(self, masks: Masks, warmup: int):
        super().__init__()
        self.warmup = warmup
        self.final = {
            axis: 1 - masks.target[axis] / log_alpha.shape[-1]
            for axis, log_alpha in masks.log_alpha.items()
        }
        rows = {axis: share.detach() for axis, share in masks.removed().items()}
        self.linear = nn.ParameterDict(
            {axis: nn.Parameter(torch.zeros_like(row)) for axis, row in rows.items()}
        )
        self.square = nn.ParameterDict(
            {axis: nn.Parameter(torch.full_like(row, SQUARE)) for axis, row in rows.items()}
        )

    def targets(self, step: int) -> dict[str, float]:
        """Axis -> the share to be removed at `step`."""
        ramp = min(1.0, step / self.warmup) if self.warmup else 1.0
        return {axis: ramp * share for axis, share in self.final.items()}

    def forward(self, removed: dict[str, Tensor], step: int) -> Tensor:
        """The penalty, a 0-d tensor, of `Masks.removed` at a step."""
        total = 0.0
        # squares as well: a linear term alone pushes past its target before its multiplier turns
        for axis, target in self.targets(step).items():
            gap = removed[axis] - target
            total = (
                total
                + (_climb(self.linear[axis]) * gap + _climb(self.square[axis]) * gap.square()).sum()
            )
        return total


def _climb(multiplier: Tensor) -> Tensor:
    """The same value with the opposite gradient, so that any optimizer that descends makes it
    ascend.
    """
    return 2 * multiplier.detach() - multiplier
