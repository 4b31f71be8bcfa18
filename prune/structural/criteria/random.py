"""Random scores: what every criterion has to be better than."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.hf.anatomy import Anatomy
from effattn.prune.structural.criteria.base import (
    Importance,
    criterion,
)


@criterion("random", ("heads", "ffn", "layers"), place=90, reads=False)
def score(parts: Anatomy, batches: list[Tensor], targets: list[str], seed: int) -> Importance:
    """Drawn from `seed`: the baseline."""
    generator = torch.Generator().manual_seed(seed)
    layers, first = len(parts.layers), parts.layers[0]
    shapes = {
        "heads": lambda: (layers, parts.kv_heads),
        "layers": lambda: (layers,),
        "ffn": lambda: (layers, first.feed_forward.size),
    }
    return Importance(
        **{
            target: torch.rand(shapes[target](), generator=generator, dtype=torch.float64)
            for target in targets
        }
    )
