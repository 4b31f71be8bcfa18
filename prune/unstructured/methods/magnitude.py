"""Magnitude pruning: the smallest weights of a matrix go. The baseline (Han et al.,
arXiv:1506.02626).
"""

from __future__ import annotations

from torch import Tensor

from effattn.prune.unstructured.methods.base import Masking, Needs, register
from effattn.prune.unstructured.nm import Sparsity, lowest, lowest_of_groups


@register
class Magnitude(Masking):
    """Needs no data: what it compares is the weights alone."""

    name, needs, source = "magnitude", Needs.NOTHING, "arXiv:1506.02626"

    def mask(self, weight: Tensor, statistics: None, sparsity: Sparsity) -> Tensor:
        return magnitude_mask(weight, sparsity)


def magnitude_mask(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """What to prune of weight (outputs, inputs): bool, exactly `sparsity.count` of the matrix, or n
    of every m.
    """
    scores = weight.abs()
    if sparsity.n is not None and sparsity.m is not None:
        return lowest_of_groups(scores, sparsity.n, sparsity.m)
    return lowest(scores.view(1, -1), sparsity.count(weight.numel())).view(weight.shape)
