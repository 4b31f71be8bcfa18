"""Magnitude pruning: the smallest weights of a matrix go. The baseline (Han et al.,
arXiv:1506.02626).
"""

from __future__ import annotations

from torch import Tensor

from effattn.prune.unstructured.nm import Sparsity, lowest, lowest_of_groups


def magnitude_mask(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """What to prune of weight (outputs, inputs): bool, exactly `sparsity.count` of the matrix, or n
    of every m.
    """
    scores = weight.abs()
    if sparsity.m is not None:
        return lowest_of_groups(scores, sparsity.n, sparsity.m)
    return lowest(scores.view(1, -1), sparsity.count(weight.numel())).view(weight.shape)
