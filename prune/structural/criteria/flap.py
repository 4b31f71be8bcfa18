"""Fluctuation: Var(x_j) |W_:j|^2, what losing input j costs once a bias stands in for its mean.

FLAP (arXiv:2312.11983), equation 5. W is o_proj or the FFN's output module, x what it takes; a
head's score is the sum over its dimensions. The bias itself is
`effattn.prune.structural.compensation`'s (`bias=True`)."""

from __future__ import annotations

import torch
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


@criterion("flap", ("heads", "ffn"), place=50)
def score(parts: Anatomy, batches: list[Tensor], targets: list[str], seed: int) -> Importance:
    """Each input's variance times its column's square, in one pass."""
    sums = Sums(parts)

    def see(target: str, layer: Layer, x: Tensor) -> None:
        for some in in_fp64(x) if target in targets else ():
            # counts, sums and sums of squares in one tensor, since `Sums` adds up one by one
            rows = some.new_full((some.shape[-1],), len(some))
            sums.add(target, layer.index, torch.stack([rows, some.sum(0), some.square().sum(0)]))

    with watching(parts, see), watching_blocks(parts):
        for _ in forward(parts, batches):
            pass
    for (target, index), (rows, total, squares) in list(sums.total.items()):
        variance = squares / rows - (total / rows).square()
        sums.total[target, index] = variance.clamp_min(0) * output_weight(
            parts.layers[index], target
        ).square().sum(0)
    return sums.importance(
        lambda layer, values: by_group(layer, values.unflatten(0, (layer.heads, -1)).sum(-1))
    )


def output_weight(layer: Layer, target: str) -> Tensor:
    """The weight (D, n) of the module in which a layer's heads or FFN dimensions end; fp64 on the
    CPU.
    """
    weight = layer.o.weight if target == "heads" else layer.feed_forward.output.weight
    return weight.detach().double().cpu()
