"""Activations: L2 over windows of the mean over a window's tokens of a structure's output
(Minitron, arXiv:2407.14679).

Section 2.2, aggregation (batch=L2, sequence=mean): of a head the L2 norm of its output, of an FFN
dimension the magnitude. A K/V head counts as the sum of its query heads: they are ranked within
their group only where some of them stay (Llama-3.1-Minitron), here groups go as a whole."""

from __future__ import annotations

from torch import Tensor

from effattn.hf.anatomy import Anatomy, Layer
from effattn.prune.structural.criteria.base import (
    Importance,
    Sums,
    by_group,
    by_sample,
    criterion,
    forward,
    watching,
    watching_blocks,
)


@criterion("activation", ("heads", "ffn"), place=40)
def score(parts: Anatomy, batches: list[Tensor], targets: list[str], seed: int) -> Importance:
    """L2 over windows of the mean output, or magnitude, in a window; one pass."""
    sums, seen = Sums(parts), []

    def see(target: str, layer: Layer, x: Tensor) -> None:
        if target in targets:
            seen.append((target, layer, x))

    with watching(parts, see), watching_blocks(parts):
        for samples in forward(parts, batches):
            for target, layer, x in seen:
                x = by_sample(x.float(), samples)
                x = (
                    x.unflatten(-1, (layer.heads, -1)).norm(dim=-1)
                    if target == "heads"
                    else x.abs()
                )
                # mean over the window's tokens, then squares over windows: the root is taken at the
                # end
                sums.add(target, layer.index, x.mean(1).square().sum(0))
            seen.clear()
    sums.total = {key: squares.sqrt() for key, squares in sums.total.items()}
    return sums.importance(by_group)
