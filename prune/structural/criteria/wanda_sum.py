"""Wanda's score of weights, |W_ij| |x_j|_2 (arXiv:2306.11695), summed over all weights that go with
a structure.

W is o_proj or the FFN's output module, whose columns belong to heads and FFN dimensions.
"""

from __future__ import annotations

from torch import Tensor

from effattn.hf.anatomy import Anatomy, Layer
from effattn.prune.structural.criteria.base import (
    Importance,
    Sums,
    by_group,
    criterion,
    forward,
    in_fp64,
    watching,
    watching_blocks,
)
from effattn.prune.structural.criteria.flap import output_weight


@criterion("wanda_sum", ("heads", "ffn"), place=60)
def score(parts: Anatomy, batches: list[Tensor], targets: list[str], seed: int) -> Importance:
    """Wanda's scores, summed over each structure."""
    sums = Sums(parts)

    def see(target: str, layer: Layer, x: Tensor) -> None:
        for some in in_fp64(x) if target in targets else ():
            sums.add(target, layer.index, some.square().sum(0))

    with watching(parts, see), watching_blocks(parts):
        for _ in forward(parts, batches):
            pass
    for (target, index), squares in list(sums.total.items()):
        sums.total[target, index] = squares.sqrt() * output_weight(
            parts.layers[index], target
        ).abs().sum(0)
    return sums.importance(
        lambda layer, values: by_group(layer, values.unflatten(0, (layer.heads, -1)).sum(-1))
    )
