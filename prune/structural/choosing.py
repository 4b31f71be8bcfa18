"""Which heads, FFN dimensions and layers stay, from their importance: as many in every layer, or
the most important of all layers together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effattn.prune.structural.criteria.base import Importance
from effattn.prune.structural.keep import Keep

FFN_STEP = 32  # FFN dimensions that stay or go together: what q8_0 and tensor cores take at a time


def choose(layers: int, importance: Importance, keep: Mapping[str, int], uniform: bool) -> Keep:
    """The most important ones: layers first, then heads and FFN dimensions of the layers that
    stay. layers: how many the model has. keep: how many of each target stay. uniform: in each
    layer, else on average."""
    # what goes with a layer need not be chosen
    staying = torch.arange(layers)
    if "layers" in keep:
        staying = best(importance.layers, keep["layers"])
    inside = {}
    for target in ("heads", "ffn"):
        if target in keep:
            scores = getattr(importance, target)[staying]
            inside[target] = (
                alike(scores, keep[target])
                if uniform
                else freely(scores, keep[target], first=target == "heads")
            )
    return Keep(**inside, layers=staying if "layers" in keep else None)


def best(scores: Tensor, count: int) -> Tensor:
    """The indices (count,) of the highest scores (n,), in the model's order."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def alike(scores: Tensor, count: int) -> list[Tensor]:
    """Each layer's own best, from scores (L, n)."""
    return [best(row, count) for row in scores]


def freely(scores: Tensor, count: int, first: bool) -> list[Tensor]:
    """The best of all layers together, `count` a layer on average, from scores (L, n). A layer may
    keep none; the first one keeps some where `first`.

    Of many dimensions FFN_STEP go together: in each layer those that follow each other in the order
    of their scores, so that a layer still keeps its best."""
    layers, size = scores.shape
    step = FFN_STEP if size % FFN_STEP == 0 and size > FFN_STEP else 1
    ordered = scores.sort(dim=1, descending=True, stable=True)
    blocks = ordered.values.view(layers, size // step, step).sum(2)
    if first:
        blocks[0, 0] = torch.inf
    chosen = blocks.flatten().sort(descending=True, stable=True).indices
    chosen = chosen[: max(1, round(layers * count / step))]
    kept = torch.bincount(chosen // blocks.shape[1], minlength=layers) * step
    return [
        row[:stay].sort().values for row, stay in zip(ordered.indices, kept.tolist(), strict=True)
    ]
