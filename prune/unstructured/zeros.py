"""Training that keeps the zeros of pruned weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from effattn.hf import anatomy as hf


@contextmanager
def keep_zeros(model: nn.Module) -> Iterator[None]:
    """While open, weights of the decoder layers' linear modules that are zero now have zero
    gradients.

    With a zero gradient, Adam's moments and weight decay leave a zero exactly where it is, so that
    no optimizer, Trainer or number of processes has to know of it. RuntimeError at the end if one
    moved all the same."""
    weights = [
        module.weight
        for layer in hf.of(model)
        for module in layer.block.modules()
        if isinstance(module, nn.Linear)
    ]
    masks = {weight: weight == 0 for weight in weights}
    handles = [
        weight.register_hook(lambda gradient, mask=mask: gradient.masked_fill(mask, 0))
        if weight.requires_grad
        else None
        for weight, mask in masks.items()
    ]
    try:
        yield
    finally:
        for handle in filter(None, handles):
            handle.remove()
    with torch.no_grad():
        moved = sum(int((weight[mask] != 0).sum()) for weight, mask in masks.items())
        if moved:
            raise RuntimeError(f"training moved {moved:,} pruned weights away from zero")
        for weight, mask in masks.items():
            weight.masked_fill_(mask, 0)  # a decayed zero may be -0.0
