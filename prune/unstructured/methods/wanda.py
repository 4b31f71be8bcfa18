"""Wanda: weights times the norms of their inputs, compared within an output (Sun et al.,
arXiv:2306.11695).
"""

from __future__ import annotations

from torch import Tensor

from effattn.prune.unstructured.methods.base import Masking, Needs, register
from effattn.prune.unstructured.nm import Sparsity, lowest_per_row


@register
class Wanda(Masking):
    """Needs the inputs' norms, and chooses within each output."""

    name, needs, source = "wanda", Needs.NORMS, "arXiv:2306.11695"

    def mask(self, weight: Tensor, statistics: Tensor, sparsity: Sparsity) -> Tensor:
        return wanda_mask(weight, statistics, sparsity)


def wanda_mask(weight: Tensor, second_moment: Tensor, sparsity: Sparsity) -> Tensor:
    """What to prune of weight (outputs, inputs): the lowest |W_ij| * ||X_j||_2 of each output, or
    of each group of m.

    second_moment (inputs,): a multiple of the mean of x_j^2 over the calibration tokens. Bool
    (outputs, inputs)."""
    return lowest_per_row(weight.abs() * second_moment.sqrt(), sparsity)
