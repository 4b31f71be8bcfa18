"""Block influence of a layer, 1 - E cos(its input, its output) over tokens (ShortGPT,
arXiv:2403.03853, eq. 2).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from effattn.hf.anatomy import Anatomy, Layer
from effattn.prune.structural.criteria.base import (
    Importance,
    Sums,
    criterion,
    forward,
    watching_blocks,
)


@criterion("block_influence", ("layers",), place=70)
def score(parts: Anatomy, batches: list[Tensor], targets: list[str], seed: int) -> Importance:
    """One minus the cosine of what goes into a layer and what comes out of it."""
    sums, tokens = Sums(parts), sum(batch.numel() for batch in batches)

    def see(layer: Layer, before: Tensor, after: Tensor) -> None:
        away = 1 - cosine_similarity(before.double(), after.double(), dim=-1)
        sums.add("layers", layer.index, away.sum() / tokens)

    with watching_blocks(parts, see):
        for _ in forward(parts, batches):
            pass
    return sums.importance()
